"""From a session to a record of the connection log. Used only where there is such a log.

What will be gone in a moment is noted at once, the rest is done when records are written, many at a
time: in the middle of a session's work it would cost twice as much, because of the processor's
caches.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Final

from forwarder.connlog.record import Event, Record, rinetd_result
from forwarder.relay.session import id_text

if TYPE_CHECKING:
    from forwarder.balancing.server import Server
    from forwarder.connlog.log import Later
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.session import Home, Session
    from forwarder.stats.reasons import CloseReason
    from forwarder.upstream.pool import Pool

_UNIX: Final = ("unix", 0)
# Looking a member up in the class costs 100 ns in Python 3.11.
_OPENED, _ENDED = Event.OPENED, Event.ENDED


def opened(session: Session) -> Later:
    """A session has reached its upstream."""
    return ended(session, None, 0.0)  # without a reason: not ended


def ended(session: Session, reason: CloseReason | None, now: float) -> Later:
    """A session has ended; ``now`` is in the loop's time. Raises OSError if its socket is gone."""
    pool = session.pool
    group = None
    if pool.balancer is not None or session.server is not None:
        group = session.relay.servers.group_of(session)
    return partial(
        _record,
        pool,
        time.time(),
        session.relay,
        session.id,
        session.client_address,
        session.local(),
        session.target,
        group or "",
        None if group is None else _server_of(session),
        session.c2u.moved,
        session.u2c.moved,
        session.started_at,
        session.connected_at,
        now,
        reason,
    )


def refused(
    slot: int,
    pool: Pool,
    client: SockAddr | None,
    local: Target,
    result: str,
    reason: CloseReason,
) -> Later:
    """A client was turned away. None: one that was gone before it could be accepted."""
    host, port = _host_and_port(client) if client is not None else ("?", 0)
    return partial(
        Record,
        event=Event.REFUSED,
        at=time.time(),
        session="",
        rule=pool.rule.name,
        protocol=pool.rule.protocol.value,
        client_host=host,
        client_port=port,
        listen=(pool.listen_host, local.port),
        upstream=pool.upstream_text,
        local=str(local),
        result=result,
        end=reason.code,
        detail=reason.detail or result,
        worker=slot,
    )


def _record(  # noqa: PLR0913 - what is logged of a session, by position: it is done for every one
    pool: Pool,
    at: float,
    relay: Home,
    number: int,
    client: SockAddr,
    local: Target,
    reached: Target | None,
    group: str,
    server: Server | None,
    bytes_c2u: int,
    bytes_u2c: int,
    started_at: float,
    connected_at: float,
    now: float,
    reason: CloseReason | None,
) -> Record:
    rule = pool.rule
    host, port = _host_and_port(client)
    upstream = pool.upstream_text
    if reached is not None and len(rule.upstreams) > 1:
        upstream = _host_and_port(reached.sockaddr)
    is_end = reason is not None
    return Record(
        _ENDED if is_end else _OPENED,
        at,
        id_text(number),
        rule.name,
        rule.protocol.value,
        host,
        port,
        (pool.listen_host, local.port),
        upstream,
        rinetd_result(reason) if reason is not None else "opened",
        str(local),
        str(reached) if reached is not None else None,
        bytes_c2u if is_end else 0,  # as rinetd does
        bytes_u2c if is_end else 0,
        connected_at - started_at if connected_at else None,
        now - started_at,
        reason.code if reason is not None else "",
        reason.detail if reason is not None else "",
        relay.slot,
        group,
        "" if server is None else server.name,
    )


def _server_of(session: Session) -> Server | None:
    """The server of a session, or the last one that it has tried."""
    if session.server is not None or session.dialer is None:
        return session.server
    return session.dialer.server


def _host_and_port(address: SockAddr) -> tuple[str, int]:
    return (address[0], address[1]) if isinstance(address, tuple) else _UNIX
