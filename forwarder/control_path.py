"""Where the control socket is: its default place, making it, and whether somebody has it.

Speaks no protocol.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.errors import ExitCode, StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

NAME: Final = "control.sock"
_SYSTEM_DIRECTORY: Final = Path("/run/forwarder")
_LOCK_TIMEOUT_S: Final = 2.0
_BACKLOG: Final = 1024  # so that a crowd is told that it is one


def default_paths() -> list[Path]:
    """Where the control socket may be when nobody says where, best first."""
    found = []
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]  # systemd.exec(5)
    if runtime:
        found.append(Path(runtime, NAME))
    elif os.geteuid() == 0:
        found.append(_SYSTEM_DIRECTORY / NAME)
    elif session := os.environ.get("XDG_RUNTIME_DIR", ""):
        found.append(Path(session, "forwarder", NAME))
    return found


def find() -> Path:
    """Where a client finds the control socket when nobody says where."""
    candidates = [*default_paths(), _SYSTEM_DIRECTORY / NAME]
    return next((path for path in candidates if path.exists()), candidates[0])


class ControlListener:
    """A listening control socket. Owns the socket, and the file as long as it is ours."""

    def __init__(self, path: Path, *, replaces_live: bool = False) -> None:
        """Listen at ``path``, whose directory exists. A file that nobody serves is replaced.

        ``replaces_live``: take the place of an instance that listens there, too.
        Raises OSError; EADDRINUSE when another instance listens there.
        """
        self.path = str(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.setblocking(False)
            with _locked(path.parent):
                _clear(path, replaces_live=replaces_live)
                mask = os.umask(0o177)  # no moment in which others could connect
                try:
                    self.sock.bind(self.path)
                finally:
                    os.umask(mask)
                self.sock.listen(_BACKLOG)
                status = path.lstat()
        except BaseException:
            self.sock.close()
            raise
        self._identity = (status.st_dev, status.st_ino)

    def remove_file(self) -> None:
        """Remove the file, unless somebody has put another one in its place."""
        path = Path(self.path)
        with suppress(OSError):  # a directory that was taken away is no reason to fail
            status = path.lstat()
            if (status.st_dev, status.st_ino) == self._identity:
                path.unlink()


def listen(explicit: str | None, *, replaces: str | None = None) -> ControlListener | None:
    """Make the control socket at ``explicit``, else at the default place, else nowhere.

    At ``replaces``, the path of our predecessor, the place of an instance that listens is taken.
    Raises StartupError, for an explicit path only.
    """
    if explicit is not None:
        path = Path(explicit)
        try:
            return ControlListener(path, replaces_live=str(path) == replaces)
        except OSError as err:
            raise _startup_error(explicit, err) from err
    for path in default_paths():
        try:
            return _listen_at_default(path, replaces_live=str(path) == replaces)
        except OSError as err:
            log.info("control: no control socket at %s: %s", path, _reason(err))
            return None
    log.info("control: no control socket: no runtime directory; --control PATH makes one")
    return None


def _listen_at_default(path: Path, *, replaces_live: bool) -> ControlListener:
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


def _clear(path: Path, *, replaces_live: bool) -> None:
    """Remove a socket that nobody serves. Raises OSError when there is anything else."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise OSError(errno.EEXIST, "exists and is not a socket")
    if replaces_live or not is_served(path):
        with suppress(FileNotFoundError):
            path.unlink()
        return
    raise OSError(errno.EADDRINUSE, "another instance listens there")


def is_served(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full queue is a sign of life, too
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one instance at a time look and bind: a socket that is not listening yet looks stale.

    Anybody may lock a directory, so this waits a while only.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _LOCK_TIMEOUT_S
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


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
