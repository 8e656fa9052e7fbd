"""Unix sockets that listen at a path: the file is made, found again, and removed only if ours.

A file that no process serves, left by a crash, is replaced; one that a process listens at is not,
unless the caller asks for that. Accepts nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from forwarder.net.owning import ClosedOnFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK_TIMEOUT_S: Final = 2.0
_O_PATH: Final = getattr(os, "O_PATH", 0)  # Linux only, like sockets that can be chmod-ed

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_ALL_STATES: Final = 0xFFFFFFFF
_UDIAG_SHOW_VFS: Final = 2
_UNIX_DIAG_VFS: Final = 1
_NO_COOKIE: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SocketFile:
    """The file of a socket that listens: where it is, and which one it is."""

    path: str
    device: int
    inode: int

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to this file and not to another one."""
        try:
            status = Path(self.path).lstat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.device, self.inode)

    def set_mode(self, mode: int) -> None:
        """Give the file these permissions, and no other file that has taken its place.

        By the time of a chmod(2) its path could lead to another file, or to a link to one.
        """
        with suppress(OSError):  # it went away
            fd = os.open(self.path, _O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) == (self.device, self.inode):
                    Path(f"/proc/self/fd/{fd}").chmod(mode)
            finally:
                os.close(fd)

    def remove(self) -> None:
        """Remove the file, unless another one is in its place."""
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

    ``mode``: permissions of the file. ``replaces_live``: take the place of a process that listens
    there. The caller owns the socket and the file. Raises OSError; EADDRINUSE when a process
    listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with ClosedOnFailure(sock):
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
            if not stat.S_ISSOCK(status.st_mode):
                raise OSError(errno.EEXIST, "another process puts files there")
    return sock, SocketFile(str(path), status.st_dev, status.st_ino)


def file_of(sock: socket.socket) -> SocketFile | None:
    """The file of a listening socket that another process has bound; None if it is not there.

    Where the kernel does not report it (sock_diag(7)), the file at its path is taken for it.
    """
    path = sock.getsockname()
    try:
        status = Path(path).lstat()
    except OSError:
        return None
    found = SocketFile(path, status.st_dev, status.st_ino)
    known = _bound_file(sock)
    # The kernel reports 32 bits of the inode.
    is_same = known is None or known == (status.st_dev, status.st_ino & 0xFFFFFFFF)
    return found if is_same and stat.S_ISSOCK(status.st_mode) else None


def _bound_file(sock: socket.socket) -> tuple[int, int] | None:
    """Device and inode of the file that a unix socket was bound to; None if it is unknown.

    A netlink message to the kernel and its answer: linux/netlink.h, sock_diag.h, unix_diag.h.
    """
    inode = os.fstat(sock.fileno()).st_ino
    request = struct.pack(
        "=IHHIIBBHIIIII",
        *(40, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0),
        *(socket.AF_UNIX, 0, 0, _ALL_STATES, inode, _UDIAG_SHOW_VFS, _NO_COOKIE, _NO_COOKIE),
    )
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1.0)
            netlink.send(request)
            answer = netlink.recv(4096)
        _, kind = struct.unpack_from("=IH", answer)
        at = 32  # behind the headers
        while kind == _SOCK_DIAG_BY_FAMILY and at + 12 <= len(answer):
            length, attribute = struct.unpack_from("=HH", answer, at)
            if attribute == _UNIX_DIAG_VFS:
                number, device = struct.unpack_from("=II", answer, at + 4)
                return os.makedev(device >> 20, device & 0xFFFFF), number
            at += max(length + 3 & ~3, 4)
    except (AttributeError, OSError, struct.error):
        return None  # another system, or a kernel without the module
    return None


def _clear(path: Path, *, replaces_live: bool) -> None:
    """Remove a socket that no process serves. Raises OSError for anything else."""
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
    """Whether a process listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full queue is a sign of life, too
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


@contextmanager
def _locked(directory: Path, timeout_s: float) -> Iterator[None]:
    """Let one instance at a time look and bind: a socket that is not listening yet looks stale.

    Any process may lock a directory, so this waits only a while.
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
