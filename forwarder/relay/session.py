"""What streams and flows have in common: a client, the search for its upstream, times.

Moves nothing and handles no events. A ``stream`` has TCP or unix sockets on both sides, a ``flow``
UDP on one or both.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.relay.dialer import Dialer
from forwarder.relay.group_dialer import GroupDialer
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    import socket

    from forwarder.balancing.server import Server
    from forwarder.limits.meter import Meter
    from forwarder.limits.restrictions import Restrictions
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.outages import Outages
    from forwarder.relay.poller import Poller
    from forwarder.relay.servers import Servers
    from forwarder.relay.workbench import Workbench
    from forwarder.upstream.pool import Pool


class SessionState(Enum):
    """See the pictures in ``stream`` and ``flow``. OPEN is for flows, the next four are not."""

    RESOLVING = "resolving"
    CONNECTING = "connecting"
    OPEN = "open"
    RELAYING = "relaying"
    HALF_CLOSED = "half-closed"
    LINGERING = "lingering"
    ABORTING = "aborting"
    CLOSED = "closed"


# Looking a member up in the class costs 100 ns in Python 3.11, several times per session.
_RESOLVING, _CONNECTING = SessionState.RESOLVING, SessionState.CONNECTING


# One number, as two of them, or a text, would take more in each session.
_BIRTH_BITS: Final = 32


def births(pid: int) -> int:
    """Where the ids begin of sessions that begin in a process: each is that plus how many before.

    Unique on this machine, until the process's number is another one's and so many have begun.
    """
    return pid << _BIRTH_BITS


def id_text(number: int) -> str:
    """The id of a session for people."""
    return f"{number >> _BIRTH_BITS}.{number & (1 << _BIRTH_BITS) - 1}"


class Movement(Protocol):
    """One direction of a session, as far as it is counted.

    ``moved`` counts bytes read from its source, ``counted`` those that are in the books,
    ``spliced`` those that never entered the process and are not in the books yet.
    """

    moved: int
    counted: int
    spliced: int


class Journal(Protocol):
    """Counts sessions and logs them; ``total`` is how many have begun."""

    @property
    def total(self) -> int:
        """How many sessions have begun."""

    def on_open(self, session: Session) -> None:
        """A session has reached its upstream."""

    def on_no_upstream(self, session: Session, why: str) -> None:
        """A session has found no upstream; its end follows."""

    def on_no_server(self, session: Session, why: str, phase: Phase) -> None:
        """A session gets no server, though none has failed; its end follows."""

    def on_end(self, session: Session, reason: CloseReason) -> None:
        """A session has ended: once for each."""

    def drop_datagrams(self, pool: Pool, count: int) -> None:
        """Datagrams are not passed on."""


class Home(Protocol):
    """What a session lives in: the relay of its worker, as far as sessions know it.

    ``births`` is where the ids of sessions that begin here begin, ``slot`` the worker's,
    ``sessions`` those that are open. ``poller`` is that of ``bench``: it is used for every event,
    so it is not one step further away.
    """

    births: int
    slot: int
    poller: Poller
    bench: Workbench
    outages: Outages
    restrictions: Restrictions
    servers: Servers
    sessions: dict[Session, None]

    @property
    def books(self) -> Journal:
        """Where sessions are counted."""


class Session:
    """A client and its upstream.

    ``c2u`` and ``u2c`` are made by the subclass, which owns the sockets. ``active_at``: when
    something last arrived, in the loop's time; ``tick`` is the wheel's. ``id``: see :func:`births`;
    it stays when the session goes on in another worker.
    """

    __slots__ = (
        "active_at",
        "c2u",
        "client_address",
        "connected_at",
        "deadline",
        "dialer",
        "held_as",
        "id",
        "pool",
        "relay",
        "server",
        "started_at",
        "state",
        "target",
        "tick",
        "u2c",
        "upstream",
    )

    c2u: Movement
    u2c: Movement
    takes_resets = False
    is_answered = True

    def __init__(self, relay: Home, pool: Pool, client_address: SockAddr) -> None:
        self.relay = relay
        self.id = relay.births + relay.books.total
        self.pool = pool
        self.client_address = client_address
        self.upstream: socket.SocketType | None = None
        self.state: SessionState = _RESOLVING
        self.started_at = self.active_at = relay.poller.now
        self.connected_at = 0.0  # 0: not yet
        self.tick = -1
        self.deadline = 0.0  # of RESOLVING, LINGERING, ABORTING
        self.dialer: Dialer | None = None  # while CONNECTING
        self.target: Target | None = None  # what was tried last, then what is connected
        self.held_as: int | None = None  # by the gate; None: not at all
        self.server: Server | None = None  # where there is a choice: what it is connected to

    def local(self) -> Target:
        """The address of ours that the client uses. Raises OSError when it is closed."""
        raise NotImplementedError

    # -- connecting

    def start(self) -> None:
        """Find a target and connect, now or when the name is resolved."""
        targets = self.pool.targets()
        if targets is None:
            limit_s = self.pool.rule.connect_timeout_s
            self.deadline = self.relay.poller.now + (limit_s or math.inf)
            self.arm(limit_s)
            self.pool.wait_for_targets(self._on_resolved)
        else:
            self.dial(targets)

    def _on_resolved(self, targets: tuple[Target, ...]) -> None:
        """Go on with the addresses of the upstream, unless this has ended meanwhile."""
        if self.state is not _RESOLVING:
            return
        self.relay.poller.read_clock()
        now = self.relay.servers.in_force(self.pool) if self.pool.balancer else self.pool
        if now is not None and now is not self.pool:
            self.choose()  # among the servers that its upstream stood for
        else:
            self.dial(targets)

    def check_resolving(self, now: float) -> float:
        """End this if no name was answered in time; returns its deadline, 0 if it has ended."""
        if now < self.deadline:
            return self.deadline
        self.fail("no name server answered in time", Who.US)
        return 0.0

    def dial(self, targets: tuple[Target, ...]) -> None:
        """Connect to one of ``targets``; none means that no name could be resolved.

        Where there is a balancer, it chooses among them.
        """
        if not targets:
            self.fail(f"no upstream address could be resolved: {self.pool.why_no_target()}")
            return
        if self.pool.balancer is not None:
            self.choose()
            return
        if self.pool.failures.known:
            targets = self.pool.failures.order(targets, self.relay.poller.now)
        self.state = _CONNECTING
        self.dialer = Dialer(self, targets, self.relay.poller, self.relay.outages)
        self.dialer.start()

    def choose(self, tried: int = 0, pool: Pool | None = None) -> None:
        """Let the balancer choose a server, none of ``tried``, a set of bits; and connect to it.

        The balancer of ``pool``, if that is not its own.
        """
        relay = self.relay
        self.state = _CONNECTING
        self.dialer = GroupDialer(self, relay.servers, relay.poller, relay.outages, tried, pool)
        self.dialer.start()

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """See :class:`forwarder.relay.dialer.Caller`, also for the methods that follow."""
        raise NotImplementedError

    def connect(self, upstream: socket.SocketType, target: Target) -> int:
        """Begin to connect."""
        raise NotImplementedError

    def on_dialing(self) -> None:
        """The first attempt begins."""

    def on_starved(self) -> None:
        """Descriptors have run out; they come back some time."""
        self.arm(TICK_S)

    def on_portless(self, target: Target) -> bool:
        """Local ports have run out; no session ends to make room for another."""
        del target
        return False

    def on_connected(self, upstream: socket.SocketType, mask: int) -> None:
        """``upstream`` is connected."""
        raise NotImplementedError

    def on_no_upstream(self, why: str, who: Who) -> None:
        """All have failed."""
        self.fail(why, who)

    def fail(self, why: str, who: Who = Who.UPSTREAM) -> None:
        """No upstream: a TCP client is reset, as it would be by the closed port itself."""
        self.relay.books.on_no_upstream(self, why)
        self.abort(CloseReason(who, Phase.CONNECT, why))

    def turn_away(self, why: str, phase: Phase) -> None:
        """No server, though none has failed: they are full, or not to be used."""
        self.relay.books.on_no_server(self, why, phase)
        self.abort(CloseReason(Who.US, phase, why))

    # -- limits

    def put_under(self, meters: tuple[Meter, Meter]) -> None:
        """Let each direction ask its meter before it moves. Not while an event is handled."""
        raise NotImplementedError

    # -- timers

    def on_timer(self, now: float) -> float:
        """End this if it is overdue; returns the next deadline, 0 for none."""
        raise NotImplementedError

    def arm(self, limit_s: float) -> None:
        """Call :meth:`on_timer` within ``limit_s``, 0 is never.

        An earlier call that is due stays due.
        """
        if limit_s > 0:
            self.relay.bench.arm(self, limit_s)

    # -- ending

    def close(self, reason: CloseReason) -> None:
        """End; all bytes are delivered, or the kernel will deliver them."""
        raise NotImplementedError

    def abort(self, reason: CloseReason) -> None:
        """End now; where there is a stream, by RST."""
        raise NotImplementedError

    def unlink(self) -> None:
        """Break the reference cycles, so that the memory is free at once, without the collector.

        Called after the batch in which this has ended. The place among the sessions is free only
        now: before, its sockets were open. So is the one among those of its server.
        """
        if self.held_as is not None:
            self.relay.restrictions.let_go(self)
        if self.server is not None:
            server, self.server = self.server, None
            self.relay.servers.let_go(self.pool, server)

    def on_bug(self) -> None:
        """An event handler failed: end this, the worker goes on."""
        self.abort(CloseReason(Who.US, Phase.ERROR, "bug"))
