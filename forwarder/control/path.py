"""Where the control socket is: its default place, and making it there.

Speaks no protocol.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from forwarder.errors import ExitCode, StartupError
from forwarder.net.unixfile import is_served, listen_at

log = logging.getLogger(__name__)

NAME: Final = "control.sock"
_SYSTEM_DIRECTORY: Final = Path("/run/forwarder")
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
    """Where a client finds the control socket when nobody says where.

    Where nobody answers at the default places, a second instance that could not have the name, if
    there is one only.
    """
    candidates = [*default_paths(), _SYSTEM_DIRECTORY / NAME]
    for path in candidates:
        if path.exists() and is_served(path):
            return path
    others = {it for path in candidates for it in path.parent.glob("control-*.sock")}
    served = [it for it in others if is_served(it)]
    if len(served) == 1:
        return served[0]
    return next((path for path in candidates if path.exists()), candidates[0])


def take_default(now_at: str) -> ControlListener | None:
    """Listen at the default place if that has become free, for an instance that is beside it."""
    for path in default_paths():
        if Path(now_at) != path.with_name(f"control-{os.getpid()}.sock"):
            return None
        if path.exists() and is_served(path):
            return None
        with suppress(OSError):  # another one was quicker
            return ControlListener(path)
    return None


class ControlListener:
    """A listening control socket. Owns the socket, and the file as long as it is ours."""

    def __init__(self, path: Path, *, replaces_live: bool = False) -> None:
        """Listen at ``path``, whose directory exists. A file that nobody serves is replaced.

        ``replaces_live``: take the place of an instance that listens there, too.
        Raises OSError; EADDRINUSE when another instance listens there.
        """
        self.path = str(path)
        self.sock, self._file = listen_at(
            path, mode=0o600, backlog=_BACKLOG, replaces_live=replaces_live
        )

    def remove_file(self) -> None:
        """Remove the file, unless somebody has put another one in its place."""
        self._file.remove()


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
