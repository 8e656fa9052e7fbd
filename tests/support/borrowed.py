"""Sockets of another process, to ask the kernel about: pidfd_getfd(2), Linux 5.6."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from support import procfs
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PIDFD_GETFD: Final = 438  # the same on all architectures since Linux 5.6
_SO_ACCEPTCONN: Final = socket.SO_ACCEPTCONN


def _copy(pid: int, fd: int, libc: ctypes.CDLL) -> socket.socket | None:
    """A duplicate of a socket of ``pid``; None when it has been closed."""
    pidfd = os.pidfd_open(pid)
    try:
        found = libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    return socket.socket(fileno=found) if found >= 0 else None


@contextmanager
def sockets_of(*pids: int) -> Iterator[list[socket.socket]]:
    """Duplicates of all IP sockets of some processes; closed at the end of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        found = []
        for pid in pids:
            for fd, target in procfs.descriptors(pid).items():
                sock = _copy(pid, fd, libc) if target.startswith("socket:") else None
                if sock is not None:
                    stack.enter_context(sock)
                    if sock.family in (socket.AF_INET, socket.AF_INET6):
                        found.append(sock)
        yield found


def is_listening(sock: socket.socket) -> bool:
    """Whether a TCP socket listens."""
    return sock.type == socket.SOCK_STREAM and bool(
        sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN)
    )


def peer_of(sock: socket.socket) -> tuple[str, int] | None:
    """Where a socket is connected to; an IPv4 address as such, also where it is written as IPv6."""
    try:
        name = sock.getpeername()
    except OSError:
        return None
    return name[0].removeprefix("::ffff:"), name[1]


@contextmanager
def connected_to(pids: Sequence[int], peer: tuple[str, int]) -> Iterator[socket.socket]:
    """The socket of some processes that is connected to ``peer``, once there is one."""

    def find(found: list[socket.socket]) -> list[socket.socket]:
        return [sock for sock in found if peer_of(sock) == peer]

    def is_there() -> bool:
        with sockets_of(*pids) as found:
            return bool(find(found))

    eventually(is_there, f"no socket to {peer}")
    with sockets_of(*pids) as found:
        yield find(found)[0]


def listening(
    pids: Sequence[int], address: tuple[str, int], read: Callable[[socket.socket], object]
) -> list[object]:
    """What ``read`` says of each socket that listens at an address: TCP, or unconnected UDP."""
    with sockets_of(*pids) as found:
        return [
            read(sock)
            for sock in found
            if sock.getsockname()[:2] == address[:2]
            and (is_listening(sock) or (sock.type == socket.SOCK_DGRAM and peer_of(sock) is None))
        ]
