"""The books of one worker: what is counted and logged of sessions, and of clients without one.

Decides nothing and ends nothing.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from forwarder.connlog.log import ConnectionLog
from forwarder.connlog.record import rinetd_result
from forwarder.net import sockets
from forwarder.relay import reporting
from forwarder.stats.reasons import NOT_ALLOWED, CloseReason, Phase, Who
from forwarder.stats.rows import (
    BYTES_C2U,
    BYTES_SPLICED,
    BYTES_U2C,
    CONNECTS_FAILED,
    DATAGRAMS_DROPPED,
    ENDS,
    MOVED_IN,
    MOVED_OUT,
    REFUSED,
    SESSIONS,
    SESSIONS_TOTAL,
    connect_bucket,
)
from forwarder.system.printable import field

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from forwarder.limits.admission import Admission
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.access import Decision
    from forwarder.relay.session import Session
    from forwarder.relay.workbench import Workbench
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)


class Books:
    """``total`` counts sessions that began here, ``failed`` those without an upstream, ``refused``
    clients that got none, each since the worker has begun; ``moved_in`` and ``moved_out`` sessions
    that came from another worker and that went to one. The other numbers are of all rules, too.
    """

    __slots__ = (
        "_bench",
        "_logs_sessions",
        "_slot",
        "bytes_c2u",
        "bytes_spliced",
        "bytes_u2c",
        "connlog",
        "datagrams_dropped",
        "failed",
        "moved_in",
        "moved_out",
        "refused",
        "total",
    )

    def __init__(self, bench: Workbench, slot: int) -> None:
        self._bench = bench
        self._slot = slot
        self._logs_sessions = log.isEnabledFor(logging.DEBUG)
        self.connlog = ConnectionLog()
        self.total = self.failed = self.refused = 0
        self.moved_in = self.moved_out = 0
        self.bytes_c2u = self.bytes_u2c = self.bytes_spliced = 0
        self.datagrams_dropped = 0

    # -- sessions

    def on_begin(self, session: Session) -> None:
        """A session was made just now."""
        self.total += 1
        counts = session.pool.counts
        counts[SESSIONS_TOTAL] += 1
        counts[SESSIONS] += 1

    def on_open(self, session: Session) -> None:
        """A session has reached its upstream."""
        session.pool.counts[connect_bucket(session.connected_at - session.started_at)] += 1
        if self.connlog.tells_opened:
            with suppress(OSError):  # as in on_end
                self.connlog.write(reporting.opened(session))

    def on_no_upstream(self, session: Session, why: str) -> None:
        """A session has found no upstream; its end follows. Repeats are logged only rarely."""
        self.failed += 1
        session.pool.counts[CONNECTS_FAILED] += 1
        session.pool.on_failure()
        rule = session.pool.rule.name
        upstream = f" to {session.target}" if session.target else ""
        about = f"connect.failed rule={field(rule)}: cannot connect{upstream}: {why}"
        self._bench.warn_rarely(rule, about)

    def on_no_server(self, session: Session, why: str, phase: Phase) -> None:
        """A session gets no server, though none has failed; its end follows."""
        if phase is Phase.LIMIT:
            self.on_limit(session.pool, why)
        else:
            self.on_no_upstream(session, why)

    def on_end(self, session: Session, reason: CloseReason) -> None:
        """A session has ended: once for each."""
        counts = session.pool.counts
        counts[ENDS + reason.index] += 1
        counts[SESSIONS] -= 1
        self.count_moved(session)
        if self.connlog.is_on:
            try:
                self.connlog.write(reporting.ended(session, reason, self._bench.poller.now))
            except OSError:  # nothing is known of a client whose socket is gone
                log.debug("session.unlogged id=%d", session.id)
        if self._logs_sessions:
            self._log_session(session, reason)

    def on_moved_out(self, session: Session) -> None:
        """A session goes on in another worker, which will log its end."""
        self.count_moved(session)
        self.moved_out += 1
        counts = session.pool.counts
        counts[SESSIONS] -= 1
        counts[MOVED_OUT] += 1

    def on_moved_in(self, session: Session) -> None:
        """A session has come from another worker, which has counted what it moved so far."""
        session.c2u.counted, session.u2c.counted = session.c2u.moved, session.u2c.moved
        self.moved_in += 1
        counts = session.pool.counts
        counts[SESSIONS] += 1
        counts[MOVED_IN] += 1

    def count_moved(self, session: Session) -> None:
        """Count what a session has moved since the last call."""
        c2u, u2c, counts = session.c2u, session.u2c, session.pool.counts
        server = session.server
        if c2u.moved != c2u.counted:
            new = c2u.moved - c2u.counted
            c2u.counted = c2u.moved
            counts[BYTES_C2U] += new
            self.bytes_c2u += new
            if server is not None:
                server.counts[BYTES_C2U] += new
        if u2c.moved != u2c.counted:
            new = u2c.moved - u2c.counted
            u2c.counted = u2c.moved
            counts[BYTES_U2C] += new
            self.bytes_u2c += new
            if server is not None:
                server.counts[BYTES_U2C] += new
        if spliced := c2u.spliced + u2c.spliced:
            c2u.spliced = u2c.spliced = 0
            counts[BYTES_SPLICED] += spliced
            self.bytes_spliced += spliced
            if server is not None:
                server.counts[BYTES_SPLICED] += spliced

    def _log_session(self, session: Session, reason: CloseReason) -> None:
        log.debug(
            "session.closed rule=%s client=%s upstream=%s end=%s c2u=%d u2c=%d total_s=%.3f",
            field(session.pool.rule.name),
            sockets.client_text(session.client_address),
            session.target or "-",
            reason,
            session.c2u.moved,
            session.u2c.moved,
            self._bench.poller.now - session.started_at,
        )

    # -- clients that got no session

    def on_refused(
        self, pool: Pool, client: SockAddr, local: Callable[[], Target], decision: Decision
    ) -> None:
        """A client was turned away by the access rules. ``local`` gives where it came to."""
        self._on_turned_away(pool, client, local, decision.value, NOT_ALLOWED)

    def on_accept_failed(self, pool: Pool, listener: socket.socket, err: OSError) -> None:
        """A client was gone before it could be accepted."""
        reason = CloseReason(Who.US, Phase.ACCEPT, err.strerror or str(err))
        local = partial(sockets.bound_to, listener)
        self._on_turned_away(pool, None, local, rinetd_result(reason), reason)

    def on_limited(
        self, pool: Pool, client: SockAddr, local: Callable[[], Target], admission: Admission
    ) -> None:
        """A client was turned away at a limit. ``local`` gives where it came to."""
        reason = CloseReason(Who.US, Phase.LIMIT, admission.met)
        self._on_turned_away(pool, client, local, "denied", reason)
        self.on_limit(pool, reason.detail)

    def _on_turned_away(
        self,
        pool: Pool,
        client: SockAddr | None,
        local: Callable[[], Target],
        result: str,
        reason: CloseReason,
    ) -> None:
        """Count a client that got no session, and log it if that is wanted."""
        self.refused += 1
        pool.counts[REFUSED] += 1
        pool.counts[ENDS + reason.index] += 1
        if self.connlog.tells_refused:
            with suppress(OSError):  # as in on_end
                slot = self._slot
                self.connlog.write(reporting.refused(slot, pool, client, local(), result, reason))

    # -- other things

    def on_limit(self, pool: Pool, met: str) -> None:
        """A limit of a rule was reached: logged now and then."""
        name = pool.rule.name
        self._bench.warn_rarely(f"limit {name}", f"limit.reached rule={field(name)}: {met}")

    def drop_datagrams(self, pool: Pool, count: int) -> None:
        """Count datagrams that are not passed on: without a flow, bandwidth or room for them."""
        self.datagrams_dropped += count
        pool.counts[DATAGRAMS_DROPPED] += count
