"""Sessions of a dead worker go on here, if the kernel's counts show that no byte is missing.

What is known of them is in the kernel, and in what their worker has said of them while it lived
(``moving.deposits``). Both ways begin again: an end of file is read once more and passed on once
more, which changes nothing where it had been done.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from forwarder.ipc.deposit import KEPT
from forwarder.net.sockets import client_text, waiting_bytes
from forwarder.relay.listing import identify
from forwarder.relay.moving import proof
from forwarder.relay.moving.parcel import read
from forwarder.relay.moving.streams import Streams
from forwarder.stats.reasons import CloseReason, Phase, Who
from forwarder.system.printable import field

if TYPE_CHECKING:
    from forwarder.net.sockets import IpSockAddr
    from forwarder.relay.moving.kinds import Load
    from forwarder.relay.moving.parcel import Parcel
    from forwarder.relay.moving.proof import Counts
    from forwarder.relay.relay import Relay
    from forwarder.relay.tcp.stream import Stream
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

# A session may be what its workers die of if it was adopted so often within so many seconds, from
# workers that were not just killed: it is reset. The figures are arbitrary.
_MOST_ADOPTIONS: Final = 3
_ADOPTIONS_WITHIN_S: Final = 10.0
_SO_PEERNAME: Final = 28  # asm-generic/socket.h
# struct sockaddr_in and sockaddr_in6: family and, of the latter, interface are in our byte order.
_IPV4: Final = struct.Struct("!2sH4s8x")
_IPV6: Final = struct.Struct("!2sHI16s4s")


class Kept:
    """Sessions that a dead worker had deposited: see :class:`forwarder.relay.moving.kinds.Kind`.

    They only come: what goes from here is a stream.
    """

    name = KEPT

    def __init__(self) -> None:
        self._streams = Streams()

    def may_move(self, session: Stream) -> bool:
        """It is a stream by then."""
        return self._streams.may_move(session)

    def describe(self, session: Stream) -> Load:
        """As above."""
        return self._streams.describe(session)

    def let_go(self, session: Stream) -> None:
        """As above."""
        self._streams.let_go(session)

    def unpack(self, parcel: Parcel, fds: list[int], pool: Pool, relay: Relay) -> Stream:
        """Make it a stream, which goes on, or is reset after the caller has counted it."""
        client, upstream = socks = [socket.SocketType(fileno=os.dup(fd)) for fd in fds[:2]]
        try:
            finding = _look(client, upstream, parcel, fds[2:], relay.poller.now)
            found = _completed(parcel, finding, client, upstream, relay.poller.now)
        finally:
            for sock in socks:
                sock.close()
        session = self._streams.unpack(found, fds, pool, relay)
        session.held_as = relay.restrictions.wanted(session)
        end = finding.end or _end_of_both(finding)
        if end is None:
            _take_note_of_ends(session, finding)
            session.arm(pool.rule.idle_timeout_s)
            return session
        for direction in (session.c2u, session.u2c):
            direction.stop()
        if finding.end is not None:
            log.warning(
                "session.lost id=%s rule=%s client=%s: %s",
                identify(session),
                field(pool.rule.name),
                client_text(session.client_address),
                end,
            )
        relay.poller.defer(partial(session.abort, end))
        return session


@dataclass(frozen=True, slots=True)
class _Finding:
    """What was found out of a session before it goes on.

    ``errors`` are those of its sockets, ``end`` is why it does not go on.
    """

    client: Counts | None = None
    upstream: Counts | None = None
    errors: tuple[int, int] = (0, 0)
    adoptions: int = 0
    end: CloseReason | None = None


def _look(
    client: socket.SocketType,
    upstream: socket.SocketType,
    parcel: Parcel,
    ends: list[int],
    now: float,
) -> _Finding:
    """Whether a session may go on; ``ends`` are those of its pipes. Raises OSError."""
    pipes = iter(ends[::2])  # the ends to read
    in_c2u, in_u2c = (
        waiting_bytes(next(pipes)) if way.waiting else 0 for way in (parcel.c2u, parcel.u2c)
    )
    ours = proof.counts(client, has_connected=False)
    theirs = proof.counts(upstream, has_connected=True)
    if ours is None or theirs is None:
        return _Finding(end=_lost("its bytes cannot be counted"))
    c2u = proof.missing(ours, theirs, in_c2u)
    u2c = proof.missing(theirs, ours, in_u2c)
    end = None
    adoptions = parcel.adoptions
    if c2u or u2c:
        end = _lost(f"missing bytes: c2u={c2u} u2c={u2c}")
    elif parcel.more.get("is_suspect"):
        within = now - read(parcel.more, "adopted_at", 0.0) < _ADOPTIONS_WITHIN_S
        adoptions = parcel.adoptions + 1 if within else 1
        if adoptions >= _MOST_ADOPTIONS:
            what = f"adopted {adoptions} times within {_ADOPTIONS_WITHIN_S:.0f} s"
            end = CloseReason(Who.US, Phase.ERROR, what)
    errors = (_error(client, ours), _error(upstream, theirs))
    return _Finding(ours, theirs, errors, adoptions, end)


def _error(sock: socket.SocketType, counts: Counts) -> int:
    """Why a socket is closed; 0 if it was by FIN both ways."""
    if not counts.is_closed:
        return 0
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return error if counts.has_ended else error or errno.ECONNRESET


def _completed(
    parcel: Parcel,
    finding: _Finding,
    client: socket.SocketType,
    upstream: socket.SocketType,
    now: float,
) -> Parcel:
    """The parcel with what only the kernel knows. Raises OSError."""
    ways = [
        replace(way, moved=0 if counts is None else counts.read)
        for way, counts in ((parcel.c2u, finding.client), (parcel.u2c, finding.upstream))
    ]
    return replace(
        parcel,
        client=_peer(client),
        family=upstream.family,
        target=_peer(upstream),
        active_at=now,
        adoptions=finding.adoptions,
        more={"adopted_at": now},
        c2u=ways[0],
        u2c=ways[1],
    )


def _lost(why: str) -> CloseReason:
    return CloseReason(Who.US, Phase.LOST, why)


def _end_of_both(finding: _Finding) -> CloseReason | None:
    """Why a session is over of which both sides are gone; None if one is not."""
    if finding.client is None or finding.upstream is None:
        return None
    if not (finding.client.is_closed and finding.upstream.is_closed):
        return None
    who = Who.UPSTREAM if finding.errors[1] and not finding.errors[0] else Who.CLIENT
    return CloseReason(who, Phase.DATA, is_reset=any(finding.errors))


def _take_note_of_ends(session: Stream, finding: _Finding) -> None:
    """One side may be gone already, by FIN both ways or by RST; no event reports which."""
    for direction, counts, error in (
        (session.c2u, finding.client, finding.errors[0]),
        (session.u2c, finding.upstream, finding.errors[1]),
    ):
        if counts is None or not counts.is_closed:
            continue
        if error:
            session.lose(direction.reverse, os.strerror(error))
        else:
            direction.reverse.end()  # it has got our FIN, behind all that there was


def _peer(sock: socket.SocketType) -> IpSockAddr:
    """The other end of a TCP socket, also of one that is closed. Raises OSError."""
    with suppress(OSError):
        address: IpSockAddr = sock.getpeername()
        return address
    # Room for more than there is, is EINVAL: getsockopt of SO_PEERNAME in net/core/sock.c.
    if sock.family == socket.AF_INET:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, _IPV4.size)
        _, port, host = _IPV4.unpack(raw)
        return socket.inet_ntop(socket.AF_INET, host), port
    raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERNAME, _IPV6.size)
    _, port, flow, host, scope = _IPV6.unpack(raw)
    scope = int.from_bytes(scope, sys.byteorder)
    return socket.inet_ntop(socket.AF_INET6, host), port, flow, scope
