"""Whether bytes of a TCP session are missing whose worker has died, by the kernel's own counts.

Ends nothing and moves nothing.

Theory of operation
-------------------
Since Linux 4.1 the kernel counts for each socket what its peer has sent and what its peer has
acknowledged: ``tcpi_bytes_received`` and ``tcpi_bytes_acked``, whose places in ``struct tcp_info``
never change (linux/tcp.h). Less what was not read yet, and with what was not acknowledged yet,
these are the bytes that the dead worker has read and written. What it has read from one side it has
written to the other one, or left in a pipe; everything else was in its memory and is lost.

Three bytes are none: the SYN of the side that has connected is acknowledged like a byte, a FIN that
was sent, too, and one that was received counts as received. Which of these there were, the state of
the socket says, except in TCP_CLOSE, which a connection reaches by FIN and by RST. There nothing
can be sent any more, so what was written no longer matters; and whether a FIN was received is in
what TCP_INQ reports (Linux 4.18): one byte more than can be read.

In SYN_RECV, where a client with Fast Open is until its handshake is over, the kernel reports
nothing as waiting, whatever there is; nothing can be proved then.

Not for MPTCP, whose socket has no such counts, nor for unix sockets.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final

from forwarder.net.sockets import unacknowledged_bytes, waiting_bytes

_TCP_INFO: Final = getattr(socket, "TCP_INFO", 0)
_TCP_INQ: Final = 36  # linux/tcp.h; the type of its control message as well
_COUNTS_AT: Final = 120  # tcpi_bytes_acked, then tcpi_bytes_received
_INFO_BYTES: Final = _COUNTS_AT + 16
# How often a socket is looked at until nothing moves meanwhile. Its peer goes on, but only until
# the one queue is full and the other one empty. Arbitrary.
_TRIES: Final = 1000

# net/tcp_states.h
ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2 = range(1, 6)
CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING = 7, 8, 9, 11
_HAS_SENT_FIN: Final = frozenset({FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING})
_HAS_GOT_FIN: Final = frozenset({CLOSE_WAIT, LAST_ACK, CLOSING})
_CONNECTING: Final = frozenset({SYN_SENT, SYN_RECV})


@dataclass(frozen=True, slots=True)
class Report:
    """What the kernel says of a socket. ``unread`` is without, ``received`` with the FIN.

    ``has_fin`` is of use in TCP_CLOSE only: whether a FIN was received.
    """

    state: int
    acked: int
    received: int
    unread: int
    unacked: int
    has_fin: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """What has passed through a socket: ``read`` from it, and ``written`` to it.

    ``has_ended``: its FIN was received, read or not. ``was_ended``: it has got ours.
    ``is_closed``: nothing can be sent any more; ``written`` and ``was_ended`` are not known then.
    """

    read: int
    written: int
    has_ended: bool
    was_ended: bool
    is_closed: bool


def counts_of(report: Report, *, has_connected: bool) -> Counts | None:
    """The counts of a socket, which ``has_connected`` or was accepted; None while it connects."""
    state = report.state
    if state in _CONNECTING:
        return None
    is_closed = state == CLOSE
    has_ended = report.has_fin if is_closed else state in _HAS_GOT_FIN
    was_ended = state in _HAS_SENT_FIN
    return Counts(
        read=report.received - has_ended - report.unread,
        written=report.acked + report.unacked - has_connected - was_ended,
        has_ended=has_ended,
        was_ended=was_ended,
        is_closed=is_closed,
    )


def missing(src: Counts, dst: Counts, waiting: int) -> int:
    """How many bytes of one way are missing, of which ``waiting`` are in its pipe.

    What has no way to go any more is not missed. Any other number than 0, below it as well, means
    that the session cannot go on.
    """
    return 0 if dst.is_closed else src.read - dst.written - waiting


def counts(sock: socket.SocketType, *, has_connected: bool) -> Counts | None:
    """What has passed through a socket that nobody here uses any more; None if that is unknown.

    Raises OSError.
    """
    report = _report(sock)
    return None if report is None else counts_of(report, has_connected=has_connected)


def _report(sock: socket.SocketType) -> Report | None:
    before = _info(sock)
    for _ in range(_TRIES):
        if before is None:
            return None
        has_fin = before[0] == CLOSE and _has_fin(sock)
        unread, unacked = waiting_bytes(sock.fileno()), unacknowledged_bytes(sock.fileno())
        after = _info(sock)
        if after == before:
            return Report(*before, unread, unacked, has_fin)
        before = after
    return None


def _info(sock: socket.SocketType) -> tuple[int, int, int] | None:
    """State, and the bytes acknowledged and received; None if the kernel does not count them."""
    info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        return None
    acked, received = struct.unpack_from("=QQ", info, _COUNTS_AT)
    return info[0], acked, received


def _has_fin(sock: socket.SocketType) -> bool:
    """Whether a closed socket had received a FIN. Takes away the error that it was closed by.

    Behind a FIN TCP_INQ counts a byte more than there is to read, and one if there is none. A
    kernel before 4.18 has none, and we say no: then a byte is missing, and the session is reset.
    """
    try:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 1)
    except OSError:
        return False
    try:
        _, ancillary, _, _ = sock.recvmsg(0, socket.CMSG_SPACE(4), socket.MSG_PEEK)
    except OSError as err:
        if err.errno in (errno.EBADF, errno.ENOTSOCK):
            raise
        return False  # it has nothing, and there is no FIN in front of the error
    finally:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_INQ, 0)
    unread = waiting_bytes(sock.fileno())
    return any(
        (level, kind) == (socket.IPPROTO_TCP, _TCP_INQ)
        and struct.unpack("i", data)[0] == unread + 1
        for level, kind, data in ancillary
    )
