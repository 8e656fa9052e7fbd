"""The relay of one worker: which clients get a session, all sessions, their end.

Opens no listener and sends nothing to the master; the worker does. It stands on parts of their own:
``workbench``, ``books``, ``outages``, ``descriptors``, ``restrictions``, ``udp.flow_tables``.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

from forwarder.config.model import Protocol, RelayMode
from forwarder.limits.admission import client_host
from forwarder.limits.gate import Busy
from forwarder.limits.restrictions import Restrictions
from forwarder.net import sockets
from forwarder.relay.books import Books
from forwarder.relay.descriptors import Descriptors
from forwarder.relay.moving.deposits import Deposits
from forwarder.relay.outages import Outages
from forwarder.relay.pauses import Pauses
from forwarder.relay.servers import Servers
from forwarder.relay.session import SessionState, births
from forwarder.relay.tcp.stream import Stream
from forwarder.relay.udp.bridge import Bridge
from forwarder.relay.udp.directions import FlowDirection
from forwarder.relay.udp.flow import Flow
from forwarder.relay.udp.flow_tables import FlowTables
from forwarder.relay.udp.trial import Trial
from forwarder.relay.workbench import Workbench
from forwarder.stats.reasons import CloseReason, Phase, Who
from forwarder.stats.rows import SESSIONS_CUT
from forwarder.system.printable import field

if TYPE_CHECKING:
    import socket
    from collections.abc import Collection, Iterable

    from forwarder.balancing.balancer import Balancer
    from forwarder.balancing.server import Server
    from forwarder.config.model import Settings
    from forwarder.limits.admission import Admission
    from forwarder.limits.gate import Holder
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.session import Session
    from forwarder.relay.udp.client_flow import Adopter
    from forwarder.stats.rows import Row
    from forwarder.system.loop import Loop
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

_TCP: Final = Protocol.TCP


class Relay:
    """``sessions`` are those with TCP on both sides and flows, which have UDP on one or both.

    ``flows.workers`` is how many relays there are, which share what is limited per rule.
    """

    def __init__(
        self,
        loop: Loop,
        mode: RelayMode,
        holder: Holder,
        pipe_budget_pages: int = 0,
        slot: int = 0,
    ) -> None:
        """Join ``loop``. ``mode`` must not be SPLICE on a system without it."""
        self.slot = slot
        self.births = births(os.getpid())
        # In order of age, but for those that came from other workers. Not a set, which takes 16 to
        # 64 bytes more for each.
        self.sessions: dict[Session, None] = {}
        self.bench = bench = Workbench(loop, mode, pipe_budget_pages)
        self.poller = bench.poller
        self.books = Books(bench, slot)
        self.outages = Outages(bench)
        self.flows = FlowTables(self.books.on_limit)
        self.descriptors = Descriptors(loop, bench, self.flows)
        self.deposits = Deposits(loop, bench)
        self.restrictions = Restrictions(loop, holder, bench.poller.defer)
        self._servers_as_of = 0  # a revision of their table
        self.servers = Servers(loop, bench.poller, self.restrictions)
        # Used for every client, so it is not one step further away.
        self.admissions = self.restrictions.admissions
        self.pauses = Pauses(loop, lambda: len(self.sessions))
        # How many UDP listeners are on the IPv6 wildcard, by port.
        self.wildcard_ports: Counter[int] = Counter()
        # Those that receive, by the address that they are bound to.
        self.udp_listeners: dict[Target, list[Adopter]] = {}
        bench.batch.on_report = self._on_report

    # -- new sessions

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
            self.books.on_limited(pool, address, partial(sockets.bound_to, client), admission)
            sockets.set_abort_on_close(client)
            client.close()
        else:
            self._open(pool, client, address, held_as)

    def _open(
        self, pool: Pool, client: socket.SocketType, address: SockAddr, held_as: int | None = None
    ) -> None:
        make = Stream if pool.rule.protocol is _TCP else Bridge
        session = make(self, pool, client, address)
        session.held_as = held_as
        self.begin(session)

    def begin(self, session: Session) -> None:
        """Count a session that was made just now, and start it."""
        self.books.on_begin(session)
        try:
            session.start()
        except Exception:  # as in Poller: a bug must cost one session, not the worker
            log.exception("relay.bug while connecting rule=%s", field(session.pool.rule.name))
            session.on_bug()

    # -- all sessions

    def apply(self, settings: Settings, pools: Collection[Pool]) -> None:
        """Put in force what holds for all sessions, and the limits of these pools' rules."""
        self.restrictions.apply(pools, settings.max_sessions, self.sessions)
        self.deposits.apply(settings.deposit_after_s, pools, self.sessions)

    def count(self, row: Row) -> None:
        """Count what open sessions have moved so far, and write the counters of ``row``, our own.

        Walks over all sessions: for a beat, not for an event.
        """
        books, batch = self.books, self.bench.batch
        for session in self.sessions:
            books.count_moved(session)
        self.deposits.look(self.sessions)
        pipes = self.bench.pipes.statistics()
        counters = (
            len(self.sessions),
            books.total,
            books.refused,
            books.failed,
            books.bytes_c2u,
            books.bytes_u2c,
            books.bytes_spliced,
            pipes.refused,
            books.datagrams_dropped + batch.dropped,
            batch.errors,
            self.flows.evicted,
            self.pauses.total,
            pipes.made,
            pipes.idle,
            pipes.pages,
            books.connlog.dropped,
            books.moved_in,
            books.moved_out,
        )
        for index, value in enumerate(counters):
            row[index] = value

    def abort_sessions(
        self, phase: Phase, why: str, sessions: Iterable[Session] | None = None
    ) -> None:
        """End sessions by RST, all or some; one that has ended is skipped."""
        is_cut = phase in (Phase.DRAIN, Phase.SHUTDOWN)
        for session in tuple(self.sessions if sessions is None else sessions):
            if is_cut and session.state is not SessionState.CLOSED:
                session.pool.counts[SESSIONS_CUT] += 1
            session.abort(CloseReason(Who.US, phase, why))

    def end_all(self, phase: Phase) -> None:
        """End all sessions as the worker leaves; at a bug (ERROR) those that do not outlive it."""
        if phase is Phase.ERROR:
            has = self.deposits.has
            self.abort_sessions(phase, "bug", [one for one in self.sessions if not has(one)])
        else:
            is_late = phase is Phase.DRAIN
            self.abort_sessions(phase, "drain_timeout" if is_late else "worker stopped")

    def end_silent_flows(self, limit_s: float) -> None:
        """End flows in which nothing has moved for ``limit_s``, if that is how they end."""
        self.poller.read_clock()
        for session in tuple(self.sessions):
            if isinstance(session, Flow):
                session.end_if_silent_for(limit_s)

    def follow_names(self) -> None:
        """Names have other addresses: flows follow. Walks over all sessions; it is rare."""
        self.poller.read_clock()
        for session in tuple(self.sessions):
            if isinstance(session, Flow):
                session.follow()

    def look_at_servers(self, balancers: Iterable[Balancer], revision: int) -> None:
        """End the sessions of servers that have to be left; flows leave those that are down.

        ``revision`` is that of the table of servers.
        """
        abort = partial(self.abort_sessions, Phase.UPSTREAM_DOWN)
        self.poller.read_clock()
        for balancer in balancers:
            if expelled := balancer.expelled():
                abort("the server is down, or was taken out of use", self._with(expelled))
            if part := balancer.returning(self.poller.now):
                on_backup = self._with(one for one in balancer.servers if one.is_backup)
                count = math.ceil(len(on_backup) * part)
                abort("another server than a backup is up again", on_backup[:count])
        if revision != self._servers_as_of:
            self._servers_as_of = revision
            for session in tuple(self.sessions):
                if isinstance(session, Flow):
                    session.leave_if_down()

    def _with(self, servers: Iterable[Server]) -> list[Session]:
        rows = {server.row for server in servers}
        sessions = self.sessions
        return [one for one in sessions if one.server is not None and one.server.row in rows]

    def _on_report(self, fd: int, number: int) -> None:
        """The kernel reports that a peer is not there, or why nothing can be sent to it."""
        handler = self.poller.handler(fd)
        if isinstance(handler, FlowDirection | Trial):
            handler.on_report(number)

    def close(self) -> None:
        """Give back everything but the sessions, which must have ended."""
        self.books.connlog.close()
        self.bench.close()
        self.descriptors.close()
