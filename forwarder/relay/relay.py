"""What all sessions of one worker share: poller, buffers, pipes, timers, the spare descriptor.

Opens no listener and speaks to no master; the worker does.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from forwarder.config.model import Protocol, RelayMode
from forwarder.connlog.log import ConnectionLog
from forwarder.connlog.record import rinetd_result
from forwarder.limits.admission import client_host
from forwarder.limits.gate import Busy
from forwarder.net import datagrams, sockets, udp
from forwarder.net.datagrams import Batch
from forwarder.net.pipes import HAS_SPLICE, PipePool
from forwarder.net.plain_datagrams import PlainBatch
from forwarder.relay import reporting
from forwarder.relay.conversation import State
from forwarder.relay.pauses import Pauses
from forwarder.relay.poller import Poller
from forwarder.relay.restrictions import Restrictions
from forwarder.relay.tcp.direction import BULK_BYTES, SMALL_BYTES, Direction
from forwarder.relay.tcp.session import Session
from forwarder.relay.tcp.splice import SpliceDirection
from forwarder.relay.tcp.unix import UnixDirection, UnixSpliceDirection
from forwarder.relay.udp.bridge import Bridge
from forwarder.relay.udp.directions import Way
from forwarder.relay.udp.flow import Flow
from forwarder.relay.udp.flow_table import share
from forwarder.relay.udp.flow_tables import FlowTables
from forwarder.relay.udp.trial import Trial
from forwarder.relay.wheel import TICK_S, Wheel
from forwarder.stats.reasons import NOT_ALLOWED, CloseReason, Phase, Who
from forwarder.stats.rows import (
    ATTEMPTS_FAILED,
    BYTES_C2U,
    BYTES_SPLICED,
    BYTES_U2C,
    CONNECTS_FAILED,
    DATAGRAMS_DROPPED,
    ENDS,
    REFUSED,
    SESSIONS,
    SESSIONS_CUT,
    SESSIONS_TOTAL,
    connect_bucket,
)
from forwarder.system.rarely import Rarely

if TYPE_CHECKING:
    import socket
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterable

    from forwarder.limits.admission import Admission
    from forwarder.limits.gate import Holder
    from forwarder.limits.meter import Meter
    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.net.zones import Zoned
    from forwarder.relay.access import Decision
    from forwarder.relay.conversation import Conversation
    from forwarder.stats.rows import Row
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

# Flows with sockets of their own per UDP listening address, in all workers together, where each
# costs the datagrams of others something: see ``udp_flow``. Before Linux 6.13 every datagram pays.
MAX_SETTLED: Final = 1024 if udp.FINDS_FLOWS_BY_HASH else 256
# When to look whether the spare descriptor can be had again, if no client asks before. Arbitrary.
RESERVE_AFTER_S: Final = 0.5
_TCP: Final = Protocol.TCP


class Relay:
    """The relay of one worker. ``total`` counts sessions, ``failed`` those without an upstream,
    ``refused`` clients that got none.

    ``sessions`` are those with TCP on both sides and flows, which have UDP on one or both.
    ``flows.workers`` is how many relays there are, which share what is limited per rule.

    ``small_view``, ``bulk_view`` and ``batch`` are scratch space, used within one call and never
    across.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        mode: RelayMode,
        pipe_budget_pages: int = 0,
        slot: int = 0,
        holder: Holder | None = None,
    ) -> None:
        """Join ``loop``. ``mode`` must not be SPLICE on a system without it.

        ``holder`` is needed as soon as a rule has limits.
        """
        self.slot = slot
        self.pid = os.getpid()
        self.poller = Poller(loop)
        self.wheel = Wheel(loop.time())
        # In order of age. Not a set, which takes 16 to 64 bytes more for each.
        self.sessions: dict[Conversation, None] = {}
        self.pipes = PipePool(pipe_budget_pages)
        self.make_direction: Callable[[Relay, Session], Direction] = Direction
        self.make_unix_direction: Callable[[Relay, Session], Direction] = UnixDirection
        if HAS_SPLICE and mode is not RelayMode.COPY:
            self.make_direction = SpliceDirection
            self.make_unix_direction = UnixSpliceDirection
        bulk = bytearray(BULK_BYTES)
        self.bulk_view = memoryview(bulk)
        self.small_view = self.bulk_view[:SMALL_BYTES]
        self.batch: Batch | PlainBatch = (
            Batch() if mode is not RelayMode.COPY and datagrams.is_supported() else PlainBatch()
        )
        self.batch.on_report = self._on_report
        self.total = self.failed = self.refused = 0
        self.pauses = Pauses(loop, lambda: len(self.sessions))
        self.datagrams_dropped = 0
        # How many UDP listeners are on the IPv6 wildcard, by port.
        self.wildcard_ports: Counter[int] = Counter()
        self.flows = FlowTables()
        self.failing: dict[Pool, None] = {}  # rules some of whose addresses fail, or did
        self.connlog = ConnectionLog()
        self._bytes_c2u = self._bytes_u2c = self._bytes_spliced = 0
        self.restrictions = Restrictions(loop, holder)
        # Looked at for every client, hence not one step further away.
        self.admissions = self.restrictions.admissions
        self.meters = self.restrictions.meters
        self.let_go = self.restrictions.let_go
        self._loop = loop
        self._is_ticking = False
        self._is_closed = False
        self._spare_fd = _reserve_fd()
        self.shortage = errno.EMFILE
        limit = os.sysconf("SC_OPEN_MAX")
        self._fd_limit = limit if limit > 0 else 1 << 20  # -1: unlimited
        self.logs_sessions = log.isEnabledFor(logging.DEBUG)
        self._rarely = Rarely()

    # -- sessions

    def open_session(self, pool: Pool, client: socket.SocketType, address: SockAddr) -> None:
        """Forward an accepted client, or reset it at a limit; ``client`` is ours from here on."""
        if self.admissions and pool.row in self.admissions:
            self._admit(pool, client, address, self.admissions[pool.row])
        else:
            self._open(pool, client, address)

    def _admit(
        self, pool: Pool, client: socket.SocketType, address: SockAddr, admission: Admission
    ) -> None:
        """Forward a client if its rule's limits let it, or reset it; if need be a moment later."""
        admit = admission.admit_reserved if admission.queues else admission.admit
        try:
            held_as = admit(client_host(address))
        except Busy:
            self.restrictions.decide_later(lambda: self._admit(pool, client, address, admission))
            return
        if held_as is None:
            self.on_limited(pool, address, partial(sockets.bound_to, client), admission)
            sockets.set_abort_on_close(client)
            client.close()
        else:
            self._open(pool, client, address, held_as)

    def _open(
        self, pool: Pool, client: socket.SocketType, address: SockAddr, held_as: int | None = None
    ) -> None:
        make = Session if pool.rule.protocol is _TCP else Bridge
        session = make(self, pool, client, address)
        session.held_as = held_as
        self.begin(session)

    def meter(self, row: int, *, is_u2c: bool) -> Meter | None:
        """What meters one way of a rule; None where the rule has no bandwidth."""
        meters = self.meters.get(row) if self.meters else None
        return None if meters is None else meters[is_u2c]

    def begin(self, session: Conversation) -> None:
        """Count a session that was made just now, and start it."""
        self.total += 1
        counts = session.pool.counts
        counts[SESSIONS_TOTAL] += 1
        counts[SESSIONS] += 1
        try:
            session.start()
        except Exception:  # as in Poller: a bug must cost one session, not the worker
            log.exception("relay.bug while connecting rule=%s", session.pool.rule.name)
            session.on_bug()

    def count(self, row: Row) -> None:
        """Count what open sessions have moved so far, and write the counters of ``row``, our own.

        Walks over all sessions: for a beat, not for an event.
        """
        for session in self.sessions:
            self._count_moved(session)
        pipes = self.pipes.statistics()
        counters = (
            len(self.sessions),
            self.total,
            self.refused,
            self.failed,
            self._bytes_c2u,
            self._bytes_u2c,
            self._bytes_spliced,
            pipes.refused,
            self.datagrams_dropped + self.batch.dropped,
            self.batch.errors,
            self.flows.evicted,
            self.pauses.total,
            pipes.made,
            pipes.idle,
            pipes.pages,
            self.connlog.dropped,
        )
        for index, value in enumerate(counters):
            row[index] = value

    def _count_moved(self, session: Conversation) -> None:
        """Count what a session has moved since this was done last."""
        c2u, u2c, counts = session.c2u, session.u2c, session.pool.counts
        if c2u.moved != c2u.counted:
            new = c2u.moved - c2u.counted
            c2u.counted = c2u.moved
            counts[BYTES_C2U] += new
            self._bytes_c2u += new
        if u2c.moved != u2c.counted:
            new = u2c.moved - u2c.counted
            u2c.counted = u2c.moved
            counts[BYTES_U2C] += new
            self._bytes_u2c += new
        if spliced := c2u.spliced + u2c.spliced:
            c2u.spliced = u2c.spliced = 0
            counts[BYTES_SPLICED] += spliced
            self._bytes_spliced += spliced

    def on_open(self, session: Conversation) -> None:
        """A session has reached its upstream."""
        session.pool.counts[connect_bucket(session.connected_at - session.started_at)] += 1
        if self.connlog.tells_opened:
            with suppress(OSError):  # as in on_end
                self.connlog.write(reporting.opened(session))

    def on_refused(
        self, pool: Pool, client: SockAddr, local: Callable[[], Target], decision: Decision
    ) -> None:
        """A client was turned away by the access rules. ``local`` tells where it came to."""
        self._on_turned_away(pool, client, local, decision.value, NOT_ALLOWED)

    def on_accept_failed(self, pool: Pool, listener: socket.socket, err: OSError) -> None:
        """There was a client, and it was gone before it could be accepted."""
        reason = CloseReason(Who.US, Phase.ACCEPT, err.strerror or str(err))
        local = partial(sockets.bound_to, listener)
        self._on_turned_away(pool, None, local, rinetd_result(reason), reason)

    def on_limited(
        self, pool: Pool, client: SockAddr, local: Callable[[], Target], admission: Admission
    ) -> None:
        """A client was turned away at a limit. ``local`` tells where it came to."""
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
        if self.connlog.is_on:
            with suppress(OSError):  # as in on_end
                self.connlog.write(reporting.refused(self, pool, client, local(), result, reason))

    def drop_datagrams(self, pool: Pool, count: int) -> None:
        """Count datagrams that are not passed on: for want of a flow, of bandwidth, or of room."""
        self.datagrams_dropped += count
        pool.counts[DATAGRAMS_DROPPED] += count

    def on_limit(self, pool: Pool, met: str) -> None:
        """Log, now and then, that a limit of a rule was reached."""
        name = pool.rule.name
        self.warn_rarely(f"limit {name}", f"limit.reached rule={name}: {met}")

    def on_end(self, session: Conversation, reason: CloseReason) -> None:
        """Count the end of a session, once, and log it if that is wanted."""
        counts = session.pool.counts
        counts[ENDS + reason.index] += 1
        counts[SESSIONS] -= 1
        self._count_moved(session)
        if self.connlog.is_on:
            try:
                self.connlog.write(reporting.ended(session, reason, self.poller.now))
            except OSError:  # a client whose socket is gone has nothing to be said of
                log.debug("session.unlogged id=%d", session.id)
        if self.logs_sessions:
            self._log_session(session, reason)

    def abort_sessions(
        self, phase: Phase, why: str, sessions: Iterable[Conversation] | None = None
    ) -> None:
        """End sessions by RST, all or some; one that has ended is passed over."""
        is_cut = phase in (Phase.DRAIN, Phase.SHUTDOWN)
        for session in tuple(self.sessions if sessions is None else sessions):
            if is_cut and session.state is not State.CLOSED:
                session.pool.counts[SESSIONS_CUT] += 1
            session.abort(CloseReason(Who.US, phase, why))

    def end_silent_flows(self, limit_s: float) -> None:
        """End flows in which nothing has moved for ``limit_s``, if that is how they end."""
        self.poller.now = self._loop.time()
        for session in tuple(self.sessions):
            if isinstance(session, Flow):
                session.end_if_silent_for(limit_s)

    def follow_names(self) -> None:
        """Names have other addresses: flows follow. Walks over all sessions; it is rare."""
        self.poller.read_clock()
        for session in tuple(self.sessions):
            if isinstance(session, Flow):
                session.follow()

    def _log_session(self, session: Conversation, reason: CloseReason) -> None:
        log.debug(
            "session.closed rule=%s client=%s upstream=%s end=%s c2u=%d u2c=%d total_s=%.3f",
            session.pool.rule.name,
            sockets.client_text(session.client_address),
            session.target or "-",
            reason,
            session.c2u.moved,
            session.u2c.moved,
            self.poller.now - session.started_at,
        )

    def note_connect_failed(self, session: Conversation, why: str) -> None:
        """Count a session that found no upstream; log it, repeats only rarely."""
        self.failed += 1
        session.pool.counts[CONNECTS_FAILED] += 1
        session.pool.on_failure()
        rule = session.pool.rule.name
        upstream = f" to {session.target}" if session.target else ""
        self.warn_rarely(rule, f"connect.failed rule={rule}: cannot connect{upstream}: {why}")

    def on_attempt_failed(self, pool: Pool, target: Target, why: str, *, has_others: bool) -> None:
        """An address of an upstream has refused, or has not answered in time.

        ``has_others``: where there are none, the failure of the session says it all.
        """
        pool.counts[ATTEMPTS_FAILED] += 1
        self.on_unanswered(pool, target, why, has_others=has_others)

    def on_unanswered(
        self,
        pool: Pool,
        target: Target | Zoned | str,
        why: str = "does not answer",
        *,
        has_others: bool = True,
    ) -> None:
        """Others are tried before an address of an upstream, for a while."""
        is_news = pool.failures.note(target, why, self.poller.now)
        self.failing[pool.origin] = None
        if is_news and has_others:
            rule = pool.rule.name
            # A client that asks all ports of a range shall not fill the log.
            about = f"upstream {rule} {target if pool.origin is pool else 'of a range'}"
            self.warn_rarely(about, f"upstream.failed rule={rule} upstream={target}: {why}")

    def on_attempt_worked(self, pool: Pool, target: Target | Zoned | str) -> None:
        """An address of an upstream has answered; called while some fail, or it was on trial."""
        if pool.failures.forget(target):
            log.info("upstream.recovered rule=%s upstream=%s", pool.rule.name, target)

    def _on_report(self, fd: int, number: int) -> None:
        """The kernel says that nobody is where datagrams of a socket go to, or why they cannot."""
        handler = self.poller.handler(fd)
        if isinstance(handler, Way | Trial):
            handler.on_report(number)

    def warn_rarely(self, about: str, message: str) -> None:
        """Log a warning; further ones about the same only now and then, with a count."""
        more = self._rarely.note(about, self.poller.now)
        if more is not None:
            log.warning("%s%s", message, more)

    # -- flows

    def settled_limit(self, *, is_flat: bool) -> int:
        """How many flows of a listener may have sockets of their own in this worker.

        ``is_flat``: they cost others nothing but descriptors, of which a part is left for flows
        that do without.
        """
        return self._fd_limit // 4 if is_flat else share(MAX_SETTLED, self.flows.workers)

    # -- timers

    def tick_soon(self) -> None:
        """Make sure that the wheel turns while something is on it."""
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self.poller.now = self._loop.time()
        try:
            self.wheel.advance(self.poller.now)
        except Exception:  # as in Poller
            log.exception("relay.bug in a timer")
        self._is_ticking = False
        if self.wheel:
            self.tick_soon()

    # -- descriptors

    @property
    def has_spare_fd(self) -> bool:
        """Whether an accepted client is sure to get an upstream socket; if not, do not accept."""
        return self._spare_fd >= 0

    def upstream_socket(
        self, target: Target, source: SockAddr | None, how: How
    ) -> socket.SocketType:
        """Make an upstream socket, from the spare descriptor when it is the last one.

        So a client that was accepted at the descriptor limit is served, and no further one is
        accepted until the spare is back. Raises OSError.
        """
        try:
            return sockets.upstream_socket(target, source, how)
        except OSError as err:
            if err.errno not in sockets.OUT_OF_RESOURCES or not self.has_spare_fd:
                raise
            self.shortage = err.errno
        os.close(self._spare_fd)
        self._spare_fd = -1
        self._loop.call_later(RESERVE_AFTER_S, self._reserve_again)
        return sockets.upstream_socket(target, source, how)

    def _reserve_again(self) -> None:
        if not (self._is_closed or self.recover_spare_fd()):
            self._loop.call_later(RESERVE_AFTER_S, self._reserve_again)

    def close_idle_pipes(self) -> bool:
        """Close pipes that wait for a session; False if there was none."""
        has_idle = self.pipes.statistics().idle > 0
        if has_idle:
            self.pipes.close()
        return has_idle

    def make_room(self, keep: Flow | None = None) -> bool:
        """Close idle pipes, or else the longest silent flow; False if there was nothing to close.

        The descriptors of a flow come back when the batch of events at hand is over. ``keep`` is
        not closed, being the one that room is made for.
        """
        if self.close_idle_pipes():
            return True
        return self.flows.make_room(keep)

    def recover_spare_fd(self) -> bool:
        """Try to reserve the spare descriptor again; True if it is there, else see ``shortage``."""
        if not self.has_spare_fd:
            self.make_room()
            try:
                self._spare_fd = _reserve_fd()
            except OSError as err:
                self.shortage = err.errno or 0
        return self.has_spare_fd

    def close(self) -> None:
        """Give back everything but the sessions, which must have ended."""
        self._is_closed = True
        self.connlog.close()
        self.poller.close()
        self.pipes.close()
        if self.has_spare_fd:
            os.close(self._spare_fd)
            self._spare_fd = -1


def _reserve_fd() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
