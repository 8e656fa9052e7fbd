"""TCP Fast Open towards an upstream: what the client has sent already goes with the SYN (RFC 7413).

Theory of operation
-------------------
The bytes are only looked at (MSG_PEEK) and given to the kernel together with the SYN; they stay in
the queue of the client's socket until the upstream has answered, and are then taken out. So an
attempt that fails costs nothing and the next upstream gets the same bytes, though an upstream that
did not answer may have seen them as well: fast open is for requests that may be repeated.

TCP_FASTOPEN_CONNECT would be simpler, but sends no SYN before there is data: with a protocol in
which the server speaks first both sides would wait forever. A client that has sent nothing yet is
connected as usual.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from forwarder.net.sockets import SockAddr

# No segment of an Ethernet is larger, and only one carries a SYN.
_MOST_BYTES: Final = 1460
_MSG_FASTOPEN: Final = getattr(socket, "MSG_FASTOPEN", 0x20000000)
# sendto(2) cannot do it on this socket, or not now: without the option it may.
_NOT_HERE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTCONN, errno.EPIPE})


def connect(
    client: socket.SocketType, upstream: socket.SocketType, to: SockAddr, view: memoryview
) -> tuple[int, int]:
    """Begin to connect. Returns an errno as ``connect_ex``, and how many bytes are under way.

    ``view`` is scratch space. The first time, the kernel asks the upstream for a cookie and sends
    nothing with it.
    """
    count = 0
    with suppress(OSError):  # nothing yet, or the client is gone, as an event reports
        count = client.recv_into(view, _MOST_BYTES, socket.MSG_PEEK)
    if not count:
        return upstream.connect_ex(to), 0
    try:
        return 0, upstream.sendto(view[:count], _MSG_FASTOPEN, to)
    except OSError as err:
        if err.errno in _NOT_HERE:
            return upstream.connect_ex(to), 0
        return err.errno or 0, 0


def take_out(client: socket.SocketType, count: int, view: memoryview) -> bool:
    """Take bytes that are under way out of the client's queue; False if it was reset meanwhile."""
    while count:
        try:
            taken = client.recv_into(view, min(count, len(view)))
        except OSError:
            return False
        if not taken:
            return False
        count -= taken
    return True
