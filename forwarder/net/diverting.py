"""Turning new clients away from a listening socket of TCP that is to be closed, and nobody else.

Theory of operation
-------------------
Closing a listener resets who is queued on it, and whose handshake is under way. So it is closed
when there is nobody any more, for which it must get nothing new first. Where the port is served by
another socket, too, at a wildcard say, no SYN may be lost meanwhile: the other socket has to get
it. The kernel looks at the interface that a listener is bound to when it searches one for a SYN,
and at nothing else later: a handshake that has begun knows its listener, and what interface that
had (request_sock, ``ir_iif``). So a listener that is bound to an interface which does not exist is
passed over from then on, and what came before is finished on it (seen on Linux 6.18, also with
MPTCP; no reset in 200,000 connections while the listener changed 20 times).

Who may do that: everybody (Linux 5.7) if the socket is bound to no interface yet, else who has
CAP_NET_RAW, which is also needed to undo it.

Sockets with the same address form a group in which the kernel shares SYNs out whatever interfaces
its members have. One that shall not be in the group of others must be elsewhere when it begins to
listen: see :func:`listen_apart`. In a group, a SYN that is shared out to a diverted member gets no
answer, for that would leave by the interface; it is sent again after 1 s.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Final

_SO_BINDTOIFINDEX: Final = 62  # asm-generic/socket.h, Linux 5.0; Python has no name for it
# No interface has this number: they are given out one after the other.
_NOWHERE: Final = 0x7FFFFFFF


def interface_of(sock: socket.socket) -> int:
    """The index of the interface that a socket is bound to, by its address, too; 0 for none."""
    with suppress(OSError):  # before Linux 5.0 that is not told
        return sock.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)
    return 0


def why_unreachable(sock: socket.socket, name: str) -> str:
    """Why nothing can come to a socket that is bound to the interface ``name``; "" if it can.

    An interface that is made anew has another index. One that has another name now still serves.
    """
    address = sock.getsockname()
    scope = address[3] if len(address) == 4 else 0
    index = scope or interface_of(sock)
    if not index:
        return ""
    with suppress(OSError):
        now = int(name) if name.isdigit() else socket.if_nametoindex(name)
        if now != index:
            return f"the network interface {name} was made anew"
    try:
        socket.if_indextoname(index)
    except OSError:
        return f"the network interface {name} has gone"
    return ""


def divert(sock: socket.socket) -> bool:
    """Have new clients of a listener go elsewhere, or be refused. Returns whether that is so."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NOWHERE)
        return True
    return False


def is_for_good(sock: socket.socket) -> bool:
    """Whether a diverted listener stays so, as this process has no right to undo it."""
    return not divert(sock)  # who may not change the interface may not set the same one again


def is_diverted(sock: socket.socket) -> bool:
    """Whether a listener gets no new clients."""
    return interface_of(sock) == _NOWHERE


def listen_apart(sock: socket.socket, backlog: int) -> bool:
    """Listen, but not in the group of sockets that have this address already.

    Returns False where this process may not: then the socket is of no use any more.
    Raises OSError.
    """
    interface = interface_of(sock)
    if not divert(sock):
        return False
    sock.listen(backlog)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, interface)
    except PermissionError:
        return False
    return True
