"""Unix sockets that listen at a path: the file is made, found again, and removed only if ours.

A file that nobody serves, left by a crash, is replaced; one that somebody listens at never is,
unless asked for. Accepts nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The file of a socket that listens: where it is, and which one it is."""

    path: str
    device: int
    inode: int

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to this file and not to somebody else's."""
        try:
            status = Path(self.path).lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)

    def remove(self) -> None:
        """Remove the file, unless somebody has put another one in its place."""
        if self.is_there:
            with suppress(OSError):  # a directory that was taken away is no reason to fail
                Path(self.path).unlink()


def listen_at(
    path: Path,
    *,
    mode: int,
    backlog: int,
    replaces_live: bool = False,
    lock_timeout_s: float = _LOCK_TIMEOUT_S,
) -> tuple[socket.socket, SocketFile]:
    """Listen at ``path``, whose directory exists, without blocking. A stale file is replaced.

    ``mode``: permissions of the file. ``replaces_live``: take the place of whoever listens there.
    The caller owns the socket and the file. Raises OSError; EADDRINUSE when somebody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with _locked(path.parent, lock_timeout_s):
            _clear(path, replaces_live=replaces_live)
            mask = os.umask(0o777 & ~mode)  # no moment in which others could connect
            try:
                sock.bind(str(path))
            finally:
                os.umask(mask)
            sock.listen(backlog)
            status = path.lstat()
    except BaseException:
        sock.close()
        raise
    return sock, SocketFile(str(path), status.st_dev, status.st_ino)


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
def _locked(directory: Path, timeout_s: float) -> Iterator[None]:
    """Let one instance at a time look and bind: a socket that is not listening yet looks stale.

    Anybody may lock a directory, so this waits a while only.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + timeout_s
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)
