"""Where the control socket is: its default place, and making it there.

Speaks no protocol.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from forwarder.errors import ExitCode, StartupError
from forwarder.net.unixfile import is_served, listen_at

log = logging.getLogger(__name__)

NAME: Final = "control.sock"
_SYSTEM_DIRECTORY: Final = Path("/run/forwarder")
_SESSIONS: Final = Path("/run/user")  # what XDG_RUNTIME_DIR is under systemd: pam_systemd(8)
_SHARED_DIRECTORY: Final = Path("/tmp")  # noqa: S108 - as it must be the same in every session
_NOT_PRIVATE: Final = "not a directory of this user alone, of mode 0700"
_BACKLOG: Final = 1024  # so that a crowd gets an answer, at least a refusal


def default_path() -> Path:
    """Where an instance makes its control socket if no option says where."""
    if runtime := os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]:  # systemd.exec(5)
        return Path(runtime, NAME)
    if os.geteuid() == 0:
        return _SYSTEM_DIRECTORY / NAME
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session and _is_ours(Path(session)):  # su(1) may leave that of another user
        return Path(session, "forwarder", NAME)
    return _private_directory() / NAME


def _private_directory() -> Path:
    """For users without a runtime directory: cron jobs, or a login without pam_systemd(8)."""
    return _SHARED_DIRECTORY / f"forwarder-{os.geteuid()}"


def find() -> Path:
    """Where a client finds the control socket if no option says where.

    It may have been made in another session of the same user, with other variables. If no instance
    answers at the default places, it is that of a second instance, which found the name taken, if
    there is only one. Raises StartupError if there is none and another user may listen in the place
    of ours.
    """
    own = _private_directory()
    candidates = [default_path()]
    if os.geteuid():
        candidates += [_SESSIONS / str(os.geteuid()) / "forwarder" / NAME, own / NAME]
    candidates.append(_SYSTEM_DIRECTORY / NAME)
    if not _is_private(own):
        candidates = [path for path in candidates if path.parent != own]
    for path in candidates:
        if _may_exist(path) and is_served(path):
            return path
    others = {it for path in candidates for it in path.parent.glob("control-*.sock")}
    served = [it for it in others if is_served(it)]
    if len(served) == 1:
        return served[0]
    if _may_exist(own) and default_path() not in candidates:
        raise StartupError(f"{own}: {_NOT_PRIVATE}; hint: --control PATH names the control socket")
    return next((path for path in candidates if _may_exist(path)), default_path())


def _may_exist(path: Path) -> bool:
    """Whether something is there, as far as we may look."""
    try:
        path.lstat()
    except OSError as err:
        return isinstance(err, PermissionError)
    return True


def _is_ours(directory: Path) -> bool:
    """Whether it exists and belongs to this user."""
    try:
        return directory.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _is_private(directory: Path) -> bool:
    """Whether it is a directory, no link to one, that only this user may use."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    is_closed = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and is_closed


def take_default(now_at: str) -> ControlListener | None:
    """Listen at the default place if that has become free, for an instance that is beside it."""
    path = default_path()
    is_beside = Path(now_at) == path.with_name(f"control-{os.getpid()}.sock")
    if not is_beside or (path.exists() and is_served(path)):
        return None
    with suppress(OSError):  # another instance was quicker
        return ControlListener(path)
    return None


class ControlListener:
    """A listening control socket. Owns the socket, and the file as long as it is ours."""

    def __init__(self, path: Path, *, replaces_live: bool = False) -> None:
        """Listen at ``path``, whose directory exists. A file that no process serves is replaced.

        ``replaces_live``: take the place of an instance that listens there, too.
        Raises OSError; EADDRINUSE when another instance listens there.
        """
        self.path = str(path)
        self.sock, self._file = listen_at(
            path, mode=0o600, backlog=_BACKLOG, replaces_live=replaces_live
        )

    @property
    def is_there(self) -> bool:
        """Whether our path leads to us."""
        return self._file.is_there

    def renewed(self) -> ControlListener | None:
        """A new listener at our path, which no longer leads to us; None if the path is taken."""
        with suppress(OSError):
            return ControlListener(Path(self.path))
        return None

    def remove_file(self) -> None:
        """Remove the file, unless another one is in its place."""
        self._file.remove()


def listen(explicit: str | None, *, replaces: str | None = None) -> ControlListener | None:
    """Make the control socket at ``explicit``, else at the default place, else nowhere.

    At ``replaces``, the path of our predecessor, it takes the place of an instance that listens.
    Raises StartupError, for an explicit path only.
    """
    if explicit is not None:
        path = Path(explicit)
        try:
            return ControlListener(path, replaces_live=str(path) == replaces)
        except OSError as err:
            raise _startup_error(explicit, err) from err
    path = default_path()
    try:
        return _listen_at_default(path, replaces_live=str(path) == replaces)
    except OSError as err:
        why = _reason(err)
        log.info("control: no control socket at %s: %s; hint: --control PATH makes one", path, why)
        return None


def _listen_at_default(path: Path, *, replaces_live: bool) -> ControlListener:
    if path.parent == _private_directory():
        _make_private(path.parent)
    else:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    try:
        return ControlListener(path, replaces_live=replaces_live)
    except OSError as err:
        if err.errno != errno.EADDRINUSE:
            raise
    other = path.with_name(f"control-{os.getpid()}.sock")
    listener = ControlListener(other)
    log.info("control: another instance has %s; this one's is %s", path, other)
    return listener


def _make_private(directory: Path) -> None:
    """Make a directory where any user may; an existing one must be ours alone. Raises OSError.

    No other user can replace it afterwards: the directory above it is sticky.
    """
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if not _is_private(directory):
        raise OSError(errno.EPERM, _NOT_PRIVATE)


def _reason(err: OSError) -> str:
    return err.strerror or str(err)


def _startup_error(path: str, err: OSError) -> StartupError:
    if err.errno == errno.EADDRINUSE:
        hint = "stop that one, or use another path"
    elif err.errno == errno.EEXIST:
        hint = "use another path"
    else:
        hint = "its directory must exist and be writable, and a path has at most 107 bytes"
    denied = isinstance(err, PermissionError)
    return StartupError(
        f"control socket {path}: {_reason(err)}; hint: {hint}",
        ExitCode.NO_PERMISSION if denied else ExitCode.UNAVAILABLE,
    )
