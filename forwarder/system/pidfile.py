"""A pid file that is a lock: one instance per file, and no stale number to trip over.

The lock is flock(2) on the open file, so the kernel drops it however the process ends. The number
in it is for people and scripts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from forwarder.errors import ExitCode, StartupError

FD_VARIABLE = "FORWARDER_PID_FD"
_MOST_BYTES = 32  # anything longer is no pid
_MODE = 0o644


class UnwritableError(StartupError):
    """The file cannot be made or written; no other instance holds it."""


class PidFile:
    """The pid file of this instance. Owns the descriptor that holds the lock."""

    def __init__(self, path: str) -> None:
        """Lock ``path`` and write our pid into it. Raises StartupError, naming the other pid.

        In an upgrade the lock is ours already, through the descriptor in ``FD_VARIABLE``, and the
        file keeps the pid of the predecessor until :meth:`claim`.
        """
        self._path = Path(path)
        try:
            self._fd = _inherited(self._path)
            if self._fd >= 0:
                self._lock()
                return
            while not self._open():  # its owner removed it just now
                os.close(self._fd)
        except OSError as err:
            raise self._error(err) from err
        try:
            os.ftruncate(self._fd, 0)
            self.claim()
        except BaseException:
            self._unlink()  # an empty one says nothing
            os.close(self._fd)
            raise

    def _open(self) -> bool:
        """Open or make the file, and lock it. Whether it is still at its path.

        Other users may be able to write to its directory. So the file is checked before it is
        overwritten: a link, or another name of another file, could lead anywhere.
        Raises OSError, StartupError.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        self._fd = os.open(self._path, flags, _MODE)
        try:
            self._lock()
            self._check()
            return self._is_there()
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self) -> None:
        """Check that a pid may be written into the open file. As root, take it from its owner."""
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):  # /dev/null, say, which must never be removed
            raise self._unfit("is not a regular file")
        if status.st_nlink > 1:
            raise self._unfit("has other names, too")
        content = os.pread(self._fd, _MOST_BYTES + 1, 0)
        if len(content) > _MOST_BYTES or (content.strip() and not content.strip().isdigit()):
            raise self._unfit("has something else in it than a process id")
        if os.geteuid() == 0 and status.st_uid:
            os.fchown(self._fd, 0, 0)
            os.fchmod(self._fd, _MODE)

    def _lock(self) -> None:
        """Lock the open file. Raises StartupError, naming the other pid."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            other = self._named()
            raise StartupError(
                f"pid file {self._path} is locked by another forwarder, "
                f"pid {'unknown' if other < 0 else other}; "
                "hint: stop that one, or use another pid file"
            ) from err

    def _is_there(self) -> bool:
        """Whether the path leads to the open file."""
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.lstat())
        except FileNotFoundError:
            return False

    def _unlink(self) -> None:
        """Remove the file, but no other one that is at its path now."""
        with suppress(OSError):  # a directory that was taken away meanwhile is no reason to fail
            if self._is_there():
                self._path.unlink()

    def _unfit(self, why: str) -> StartupError:
        return StartupError(f"pid file {self._path} {why}; hint: use another path, or leave it out")

    def claim(self) -> None:
        """Write our pid over the one in the file; a reader finds either the old or the new.

        Raises StartupError if that fails: a full disk.
        """
        try:
            size = os.fstat(self._fd).st_size
            os.pwrite(self._fd, str(os.getpid()).ljust(size - 1).encode() + b"\n", 0)
        except OSError as err:
            raise self._error(err) from err

    def fileno(self) -> int:
        """The descriptor that holds the lock; a process that inherits it shares the lock."""
        return self._fd

    def leave_to(self, heir: int) -> None:
        """Leave the file to the process ``heir`` if it has claimed it, else remove it."""
        if self._named() == heir:
            os.close(self._fd)
        else:
            self.remove()

    def remove(self) -> None:
        """Give up the lock; remove the file, unless it names another process that shares it."""
        with suppress(OSError):
            if self._named() == os.getpid():
                self._unlink()
        os.close(self._fd)

    def _error(self, err: OSError) -> StartupError:
        if err.errno == errno.ELOOP:
            return self._unfit("is a symbolic link")
        denied = isinstance(err, PermissionError)
        return UnwritableError(
            f"pid file {self._path}: {err.strerror}; hint: its directory must exist and be "
            "writable, with a little space left",
            ExitCode.NO_PERMISSION if denied else ExitCode.UNAVAILABLE,
        )

    def _named(self) -> int:
        text = os.pread(self._fd, _MOST_BYTES, 0).strip()
        return int(text) if text.isdigit() else -1


def _inherited(path: Path) -> int:
    """The descriptor left by an upgrade, if it is of the file ``path``; else -1."""
    text = os.environ.pop(FD_VARIABLE, "")
    if not text.isdigit():
        return -1
    fd = int(text)
    with suppress(OSError):
        if os.path.samestat(os.fstat(fd), path.stat()):
            os.set_inheritable(fd, False)
            return fd
    with suppress(OSError):
        os.close(fd)
    return -1
