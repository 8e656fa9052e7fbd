"""From a session to a record of the connection log. Asked for only where there is such a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from forwarder.connlog.record import Event, Record, rinetd_result
from forwarder.relay.listing import identify

if TYPE_CHECKING:
    from forwarder.errors import CloseReason
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.flow import Flow
    from forwarder.relay.session import Session
    from forwarder.upstream.pool import Pool


def opened(session: Session | Flow) -> Record:
    """A session has reached its upstream."""
    return _of_session(session, Event.OPENED, "opened")


def ended(session: Session | Flow, reason: CloseReason, now: float) -> Record:
    """A session has ended; ``now`` is in the loop's time."""
    record = _of_session(session, Event.ENDED, rinetd_result(reason))
    record.bytes_c2u = session.c2u.moved
    record.bytes_u2c = session.u2c.moved
    if session.connected_at:
        record.connect_s = session.connected_at - session.started_at
    record.duration_s = now - session.started_at
    record.end = reason.code
    record.detail = reason.detail
    return record


def refused(
    pool: Pool, client: SockAddr | None, local: Target, result: str, reason: CloseReason
) -> Record:
    """A client was turned away. None: one that was gone before it could be accepted."""
    host, port = _host_and_port(client) if client is not None else ("?", 0)
    return Record(
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
    )


def _of_session(session: Session | Flow, event: Event, result: str) -> Record:
    pool = session.pool
    host, port = _host_and_port(session.client_address)
    reached = session.targets[session.attempt] if session.attempt >= 0 else None
    upstream = pool.upstream_text
    local = session.local()
    if reached is not None and len(pool.rule.upstreams) > 1:
        upstream = _host_and_port(reached.sockaddr)
    return Record(
        event=event,
        at=time.time(),
        session=identify(session),
        rule=pool.rule.name,
        protocol=pool.rule.protocol.value,
        client_host=host,
        client_port=port,
        listen=(pool.listen_host, local.port),
        upstream=upstream,
        local=str(local),
        reached=str(reached) if reached is not None else None,
        result=result,
    )


def _host_and_port(address: SockAddr) -> tuple[str, int]:
    return (address[0], address[1]) if isinstance(address, tuple) else ("unix", 0)
