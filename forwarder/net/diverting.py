"""Turning new clients, and only those, away from a TCP listener that is to be closed.

Theory of operation
-------------------
Closing a listener resets the clients queued on it and those whose handshake is under way. So it is
closed once it has none left, and must get no new ones first. Where another socket serves the port,
too, at a wildcard say, no SYN may be lost meanwhile: the other socket has to get it. The kernel
checks the interface that a listener is bound to only when it looks for a listener for a SYN: a
handshake that has begun knows its listener, and which interface that had (request_sock,
``ir_iif``). So a listener that is bound to an interface which does not exist gets no more SYNs, and
earlier handshakes are finished on it (seen on Linux 6.18, also with MPTCP; no reset in 200,000
connections while the listener changed 20 times).

Any process may do that (Linux 5.7) if the socket is bound to no interface yet; otherwise, and to
undo it, it needs CAP_NET_RAW.

Sockets with the same address form a group, in which the kernel shares out SYNs whatever the
interfaces of its members. A socket that must not join such a group has to be diverted when it
begins to listen: see :func:`listen_apart`. A SYN that a group gives to a diverted member gets no
answer, which would leave by the interface; the client sends it again after 1 s.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Final

_SO_BINDTOIFINDEX: Final = 62  # asm-generic/socket.h, Linux 5.0; Python has no name for it
# No interface has this number: they are given out one after the other.
_NOWHERE: Final = 0x7FFFFFFF
_APART: Final = 0x7FFFFFFE  # nor this one; who begins to listen shall not meet who was diverted


def interface_of(sock: socket.socket) -> int:
    """The index of the interface that a socket is bound to, by its address, too; 0 for none."""
    with suppress(OSError):  # before Linux 5.0 it is not known
        return sock.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)
    return 0


def why_unreachable(sock: socket.socket, name: str) -> str:
    """Why nothing can reach a socket that is bound to the interface ``name``; "" if it can.

    A recreated interface has another index. A renamed one still serves.
    """
    address = sock.getsockname()
    scope = address[3] if len(address) == 4 else 0
    index = scope or interface_of(sock)
    if not index:
        return ""
    with suppress(OSError):
        now = int(name) if name.isdigit() else socket.if_nametoindex(name)
        if now != index:
            return f"the network interface {name} was recreated"
    try:
        socket.if_indextoname(index)
    except OSError:
        return f"the network interface {name} has gone"
    return ""


def divert(sock: socket.socket) -> bool:
    """Send new clients of a listener elsewhere, or refuse them. Returns whether that worked."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NOWHERE)
        return True
    return False


def is_for_good(sock: socket.socket) -> bool:
    """Whether a diverted listener stays so because this process has no right to undo it."""
    return not divert(sock)  # without that right not even the same one can be set


def is_diverted(sock: socket.socket) -> bool:
    """Whether a listener gets no new clients."""
    return interface_of(sock) == _NOWHERE


def listen_apart(sock: socket.socket, backlog: int) -> int | None:
    """Listen, but not in the group of sockets that have this address already; see :func:`arrive`.

    Returns the interface to arrive at, or None where this process may not: then the socket is of no
    use any more. Those that are apart at the same time are one group. Raises OSError.
    """
    interface = interface_of(sock)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _APART)
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _APART)  # what arriving needs, too
    except OSError:
        return None
    sock.listen(backlog)
    return interface


def arrive(sock: socket.socket, interface: int) -> None:
    """Get clients from now on, after :func:`listen_apart`. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, interface)
