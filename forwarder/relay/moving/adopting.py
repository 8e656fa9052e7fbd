"""Sessions of a dead worker go on here, if the kernel's counts show that no byte is missing.

What is known of them is in the kernel, and in what their worker has said of them while it lived
(``moving.deposits``). Both ways begin again: an end of file is read once more and passed on once
more, which changes nothing where it had been done.
"""

from __future__ import annotations

import logging
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.net.pipes import Pipe
from forwarder.net.sockets import Target, client_text
from forwarder.relay.listing import identify
from forwarder.relay.moving import proof
from forwarder.relay.moving.parcel import read
from forwarder.relay.poller import READABLE
from forwarder.relay.session import SessionState
from forwarder.relay.tcp.splice import SpliceDirection
from forwarder.relay.tcp.stream import Stream
from forwarder.stats.reasons import CloseReason, Phase, Who
from forwarder.system.printable import field

if TYPE_CHECKING:
    from forwarder.net.sockets import IpSockAddr
    from forwarder.relay.moving.parcel import Parcel
    from forwarder.relay.moving.proof import Counts
    from forwarder.relay.relay import Relay
    from forwarder.relay.tcp.direction import Direction
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

# A session that was adopted so often within so many seconds may be what its workers die of: it is
# reset. The figures are arbitrary.
_MOST_ADOPTIONS: Final = 3
_ADOPTIONS_WITHIN_S: Final = 10.0
_SO_PEERNAME: Final = 28  # asm-generic/socket.h
# struct sockaddr_in and sockaddr_in6: family and, of the latter, interface are in our byte order.
_IPV4: Final = struct.Struct("!2sH4s")
_IPV6: Final = struct.Struct("!2sHI16s4s")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out of a session before it goes on. ``end``: it does not, and why."""

    client: Counts | None = None
    upstream: Counts | None = None
    adoptions: int = 0
    end: CloseReason | None = None


class Kept:
    """Sessions that a dead worker had deposited, see ``mover.Kind``."""

    def __init__(self) -> None:
        self._found: dict[Stream, Finding] = {}

    def unpack(self, parcel: Parcel, fds: list[int], relay: Relay, pool: Pool) -> Stream:
        """Make it a session of this relay, which handles no event before :meth:`begin`.

        Takes over the descriptors. Raises OSError or ValueError; they then stay the caller's.
        """
        client, upstream = (socket.SocketType(fileno=fd) for fd in fds[:2])
        try:
            session = Stream(relay, pool, client, _peer(client))
        except BaseException:
            client.detach()
            upstream.detach()
            raise
        session.upstream = session.c2u.dst = session.u2c.src = upstream
        session.id = parcel.id
        session.state = SessionState.RELAYING
        session.is_shared = True
        session.started_at, session.connected_at = parcel.started_at, parcel.connected_at
        with suppress(OSError):
            session.target = Target(upstream.family, _peer(upstream))
        ends = fds[2:]
        fds.clear()
        in_pipes = [
            self._put_back(direction, ends) if way.waiting else 0
            for direction, way in ((session.c2u, parcel.c2u), (session.u2c, parcel.u2c))
        ]
        self._found[session] = _look(session, parcel, in_pipes, relay.poller.now)
        return session

    def _put_back(self, direction: Direction, ends: list[int]) -> int:
        """Let a direction begin with what is in the pipe of which ``ends`` has both ends first."""
        pipe = Pipe.of(ends.pop(0), ends.pop(0))
        pool = direction.bench.pipes
        pool.adopt(pipe)
        if not isinstance(direction, SpliceDirection):  # a system without splice has no pipes
            pool.discard(pipe)
            return 0
        pool.notes[pipe.number] = pipe.mark | direction.src.fileno()
        direction.pipe = pipe
        return pipe.filled

    def begin(self, session: Stream) -> None:
        """It is ours: relay, or reset both sides."""
        finding = self._found.pop(session)
        poller, upstream = session.relay.poller, session.upstream
        assert upstream is not None  # noqa: S101 - unpack has set it
        session.active_at = poller.now
        poller.register(session.client.fileno(), session.c2u)
        poller.register(upstream.fileno(), session.u2c)
        if finding.end is not None:
            log.warning(
                "session.lost id=%s rule=%s client=%s: %s",
                identify(session),
                field(session.pool.rule.name),
                client_text(session.client_address),
                finding.end,
            )
            session.abort(finding.end)
            return
        for direction in (session.c2u, session.u2c):
            direction.counted = direction.moved
            direction.is_blocked = direction.holds_data
            direction.missed = READABLE if direction.is_blocked else 0
        _take_note_of_ends(session, finding)
        if session.state is SessionState.RELAYING:
            session.arm(session.pool.rule.idle_timeout_s)
            session.relay.deposits.offer(session, finding.adoptions, poller.now)


def _look(session: Stream, parcel: Parcel, in_pipes: list[int], now: float) -> Finding:
    """Whether a session may go on; sets what its directions have moved."""
    upstream = session.upstream
    assert upstream is not None  # noqa: S101 - unpack has set it
    client = proof.counts(session.client, has_connected=False)
    server = proof.counts(upstream, has_connected=True)
    if client is None or server is None:
        return Finding(end=_lost("its bytes cannot be counted"))
    session.c2u.moved, session.u2c.moved = client.read, server.read
    c2u = proof.missing(client, server, in_pipes[0])
    u2c = proof.missing(server, client, in_pipes[1])
    if c2u or u2c:
        return Finding(end=_lost(f"bytes that are missing: c2u={c2u} u2c={u2c}"))
    adopted_at = read(parcel.more, "adopted_at", 0.0)
    adoptions = parcel.adoptions + 1 if now - adopted_at < _ADOPTIONS_WITHIN_S else 1
    if adoptions >= _MOST_ADOPTIONS:
        what = f"adopted {adoptions} times within {_ADOPTIONS_WITHIN_S:.0f} s"
        return Finding(end=CloseReason(Who.US, Phase.ERROR, what))
    return Finding(client=client, upstream=server, adoptions=adoptions)


def _lost(why: str) -> CloseReason:
    return CloseReason(Who.US, Phase.LOST, why)


def _take_note_of_ends(session: Stream, finding: Finding) -> None:
    """Which side is gone already, by FIN both ways or by RST. No further event may say so."""
    closed = [
        (direction, not counts.has_ended or bool(_error(direction.src)))
        for direction, counts in (
            (session.c2u, finding.client),
            (session.u2c, finding.upstream),
        )
        if counts is not None and counts.is_closed
    ]
    if closed[1:]:  # both
        who = Who.CLIENT if closed[0][1] or not closed[1][1] else Who.UPSTREAM
        is_reset = closed[0][1] or closed[1][1]
        session.abort(CloseReason(who, Phase.DATA, is_reset=is_reset))
        return
    for direction, is_reset in closed:
        if is_reset:
            session.lose(direction.reverse, "reset")
        else:
            direction.reverse.end()  # it has got our FIN, behind all that there was


def _error(sock: socket.SocketType) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def _peer(sock: socket.SocketType) -> IpSockAddr:
    """The other end of a TCP socket, also of one that is closed. Raises OSError."""
    with suppress(OSError):
        address: IpSockAddr = sock.getpeername()
        return address
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, _IPV6.size)
    if sock.family == socket.AF_INET:
        _, port, host = _IPV4.unpack_from(raw)
        return socket.inet_ntop(socket.AF_INET, host), port
    _, port, flow, host, scope = _IPV6.unpack(raw)
    scope = int.from_bytes(scope, sys.byteorder)
    return socket.inet_ntop(socket.AF_INET6, host), port, flow, scope
