"""A relay in this process, whose clock and loop the test turns by hand."""

from __future__ import annotations

import heapq
import itertools
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from forwarder.balancing.balancer import Balancer, Surroundings
from forwarder.balancing.table import ServerTable
from forwarder.config.address import Address, UnixAddress
from forwarder.config.model import AccessRule, Group, Protocol, RelayMode, Rule, Upstream
from forwarder.errors import Place
from forwarder.limits.gate import STUCK_S, Gate, Holder, Holdings
from forwarder.net import udp as net_udp
from forwarder.net.sockets import SockAddr, Target
from forwarder.relay.access import AccessList
from forwarder.relay.relay import Relay
from forwarder.relay.udp_listener import UdpListener
from forwarder.stats.board import ROWS
from forwarder.stats.reasons import Phase
from forwarder.stats.rows import COUNTERS, DATAGRAMS_DROPPED, SESSIONS, new_row
from forwarder.upstream.names import Names
from forwarder.upstream.pool import Pool
from support.datagrams import free_udp_address, udp, udp_client
from support.ends import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from forwarder.stats.rows import Row

    Changes = Mapping[int, Mapping[str, object]]


class HandTimer:
    """A call that is due some time."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Do not call."""
        self.callback = None


class HandLoop:
    """What a relay uses of an event loop. ``calls``: how often a timer was made."""

    def __init__(self) -> None:
        self.now = 5000.0
        self.calls = 0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, HandTimer]] = []

    def time(self) -> float:
        return self.now

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """The test turns the relay itself."""

    def remove_reader(self, fd: int) -> None:
        """See :meth:`add_reader`."""

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.call_later(0, callback)

    def call_later(self, delay: float, callback: Callable[[], object]) -> HandTimer:
        timer = HandTimer(callback)
        self.calls += 1
        heapq.heappush(self._timers, (self.now + delay, next(self._order), timer))
        return timer

    def pass_time(self, seconds: float) -> None:
        """Let time pass, calling what is due on the way."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            at, _, timer = heapq.heappop(self._timers)
            self.now = max(self.now, at)
            if timer.callback is not None:
                timer.callback()
        self.now = end


RULE = Rule(
    name="test",
    listen=Address("127.0.0.1", 1),
    upstreams=(Upstream(Address("127.0.0.1", 2)),),
    place=Place("test"),
)


RACE_AFTER_S = RULE.group.attempt_delay_s


def no_names() -> Names:
    """A table of names that nobody looks up."""
    return Names(lambda _: None, lambda: 0.0)


class StubPool(Pool):
    """A pool whose upstreams are the test's, and whose names are resolved when the test says so.

    ``bound``: the local address of upstream sockets, if they have one.
    """

    def __init__(self, rule: Rule, targets: tuple[Target, ...] | None) -> None:
        super().__init__(rule, no_names(), 1, new_row())
        self.local = None
        self.resolved = targets
        self.waiting: list[Callable[[tuple[Target, ...]], None]] = []
        self.bound: SockAddr | None = None

    def targets(self) -> tuple[Target, ...] | None:
        return self.resolved

    def leads_to(self, target: Target) -> bool:
        return target in (self.resolved or ())

    def wait_for_targets(self, callback: Callable[[tuple[Target, ...]], None]) -> None:
        self.waiting.append(callback)

    def why_no_target(self) -> str:
        return "some.example: Name or service not known"

    def source(self, family: int, client: SockAddr) -> SockAddr | None:
        """The local address of upstream sockets."""
        del client
        return self.bound if family == socket.AF_INET else None

    def at(self, offset: int) -> StubPool:
        """The pool of a port of a range, which no rule here has: it is the same for all."""
        del offset
        return self


class GroupPool(StubPool):
    """A pool with a balancer over servers of the test, of which each has the addresses it says."""

    def __init__(self, rule: Rule, balancer: Balancer, *servers: tuple[Target, ...] | None) -> None:
        super().__init__(rule, None)
        self.balancer: Balancer | None = balancer
        self.addresses: list[tuple[Target, ...] | None] = [*servers]

    def targets(self) -> tuple[Target, ...] | None:
        self.has_unanswered = None in self.addresses
        self.without_address = sum(1 << i for i, one in enumerate(self.addresses) if not one)
        self.resolved = tuple(target for one in self.addresses for target in one or ())
        return self.resolved or (None if self.has_unanswered else ())

    def leads_to(self, target: Target) -> bool:
        return target in (self.targets() or ())


class Shared:
    """What workers share: the gate, the table of servers; and a board of which all rows are here.

    :meth:`close` asserts that nobody holds anything any more.
    """

    def __init__(self) -> None:
        self.gate = Gate()
        self.table = ServerTable()
        self.rows: dict[int, Row] = {}

    def row(self, number: int) -> Row:
        """A row of the board."""
        return self.rows.setdefault(number, new_row())

    def close(self) -> None:
        """Nothing may be left of what has ended."""
        held = {number: self.gate.sessions(number) for number in self.rows}
        assert not any(held.values()), held
        counted = {number: row[SESSIONS] for number, row in self.rows.items()}
        assert not any(counted.values()), counted
        self.gate.close()
        self.table.close()


def group_of(
    relay: Relay,
    shared: Shared,
    clock: Callable[[], float],
    servers: Sequence[tuple[Target, ...] | None],
    rule: Rule,
    *,
    changes: Changes | None = None,
    former: Balancer | None = None,
    rows: Sequence[int] = (),
    group: Mapping[str, object],
) -> GroupPool:
    """A pool of a group; ``group`` are its fields, ``changes`` fields of upstreams by index.

    ``former``: what chose before a reload. ``rows``: those of the servers, and of the group.
    """
    upstreams = tuple(
        Upstream(
            _end(servers[index], index),
            **(changes or {}).get(index, {}),  # type: ignore[arg-type]  # fields of an upstream
        )
        for index in range(len(servers))
    )
    made = Group(**{"name": "some group", **group})  # type: ignore[arg-type]  # the fields of a group
    rule = replace(rule, upstreams=upstreams, group=made)
    surroundings = Surroundings(
        table=shared.table,
        row_of=shared.row,
        holder=relay.restrictions.holder,
        settle_soon=relay.restrictions.settle_soon,
        clock=clock,
    )
    rows = rows or range(ROWS + 1, ROWS + len(servers) + 2)
    shared.row(rows[-1])
    return GroupPool(rule, Balancer(made, upstreams, rows, surroundings, former), *servers)


def _end(addresses: tuple[Target, ...] | None, index: int) -> Address | UnixAddress:
    """What the configuration might say of a server."""
    if not addresses or len(addresses) > 1:
        return Address(f"server{index}.example", 1)
    sockaddr = addresses[0].sockaddr
    return UnixAddress(sockaddr) if isinstance(sockaddr, str) else Address(*sockaddr[:2])


def target_of(sock: socket.socket) -> Target:
    """Where a socket of the test is."""
    return Target(sock.family, sock.getsockname())


def pool_of(targets: tuple[Target, ...] | None, connect_timeout_s: float) -> StubPool:
    """A pool of a TCP rule."""
    return StubPool(replace(RULE, connect_timeout_s=connect_timeout_s), targets)


def accepted() -> tuple[socket.socket, socket.SocketType, SockAddr]:
    """A TCP client, the socket that a listener makes of it, and where the client is."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = connect(listener.getsockname())
        fd, address = listener._accept()  # type: ignore[attr-defined]
    sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return client, sock, address


class Bench:
    """A relay, its loop, and the clients given to it."""

    def __init__(self) -> None:
        self.loop = HandLoop()
        self.shared = Shared()
        holder = Holder(self.shared.gate, Holdings())
        self.relay = Relay(self.loop, RelayMode.AUTO, holder, 1024)

    def group(
        self,
        *servers: tuple[Target, ...] | None,
        connect_timeout_s: float = 10.0,
        changes: Changes | None = None,
        former: Balancer | None = None,
        rows: Sequence[int] = (),
        **group: object,
    ) -> GroupPool:
        """A pool of a TCP rule with a group of these servers; see :func:`group_of`."""
        rule = replace(RULE, connect_timeout_s=connect_timeout_s)
        return group_of(
            self.relay,
            self.shared,
            self.loop.time,
            servers,
            rule,
            changes=changes,
            former=former,
            rows=rows,
            group=group,
        )

    def open(self, pool: StubPool) -> socket.socket:
        """Give the relay a new client; returns the client's end."""
        client, sock, address = accepted()
        self.relay.poller.turn()
        self.relay.open_session(pool, sock, address)
        return client

    def close(self) -> None:
        """End everything; nothing may be left that has a time."""
        self.relay.abort_sessions(Phase.SHUTDOWN, "the test is over")
        self.loop.pass_time(2 * STUCK_S)  # for what is counted later
        assert not self.relay.bench.wheel
        self.relay.close()
        self.shared.close()


class UdpBench:
    """A relay with a UDP rule, or a bridge from TCP, and all that tests hold of it.

    :meth:`close` ends what is left and asserts that nothing has leaked.
    """

    def __init__(self, mode: RelayMode, *, workers: int = 1) -> None:
        self.loop = HandLoop()
        self.shared = Shared()
        holder = Holder(self.shared.gate, Holdings())
        self.relay = Relay(self.loop, mode, holder, 1024)
        self.relay.flows.workers = workers
        self.sockets: list[socket.socket] = []
        self.listeners: list[UdpListener] = []
        self.pools: list[StubPool] = []

    def own(self, sock: socket.socket) -> socket.socket:
        """Close a socket when the test is over."""
        self.sockets.append(sock)
        return sock

    def upstream(self, host: str = "127.0.0.1") -> socket.socket:
        """A UDP upstream; it does not wait for what has not come yet."""
        return self.own(udp(host))

    def pool(self, *upstreams: socket.socket, **rule: object) -> StubPool:
        """A pool of the upstreams; ``rule`` are fields of the rule, UDP by default."""
        fields: dict[str, object] = {"protocol": Protocol.UDP, **rule}
        changed = replace(RULE, **fields)  # type: ignore[arg-type]  # the fields of a rule
        pool = StubPool(changed, tuple(map(target_of, upstreams)))
        self.pools.append(pool)
        return pool

    def group(
        self,
        *servers: tuple[Target, ...] | None,
        protocol: Protocol = Protocol.UDP,
        changes: Changes | None = None,
        former: Balancer | None = None,
        rows: Sequence[int] = (),
        **group: object,
    ) -> GroupPool:
        """A pool of a rule with a group of these servers; see :func:`group_of`."""
        rule = replace(RULE, protocol=protocol)
        pool = group_of(
            self.relay,
            self.shared,
            self.loop.time,
            servers,
            rule,
            changes=changes,
            former=former,
            rows=rows,
            group=group,
        )
        self.pools.append(pool)
        return pool

    def listen(
        self,
        pool: StubPool,
        host: str = "127.0.0.1",
        access: tuple[AccessRule, ...] = (),
        beside: UdpListener | None = None,
    ) -> UdpListener:
        """A listener of the pool; ``beside``: another one of its group, on the same address."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # A port that the kernel chooses for a socket with SO_REUSEPORT may be another listener's.
        port = beside.sock.getsockname()[1] if beside else free_udp_address(host)[1]
        target = Target(family, (host, port))
        sock = self.own(
            net_udp.listen_udp(
                target,
                v6only=family == socket.AF_INET6 and host != "::",
                options=pool.rule.options,
            )
        )
        rules = AccessList.compile((), access)
        listener = UdpListener(self.loop, self.relay, sock, pool, rules)
        listener.start()
        self.listeners.append(listener)
        return listener

    def client(self, listener: UdpListener, host: str = "", to: str = "") -> socket.socket:
        """A client of a listener, from ``host``, that asks the address ``to``."""
        bound = listener.sock.getsockname()
        asked = to or {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound[0], bound[0])
        return self.own(udp_client((asked, bound[1]), host))

    def bridge(self, pool: StubPool) -> socket.socket:
        """Give the relay a TCP client; returns the client's end."""
        client, sock, address = accepted()
        self.relay.open_session(pool, sock, address)
        return self.own(client)

    def turn(self, times: int = 3) -> None:
        """Let the relay handle what has happened, and what follows from that."""
        for _ in range(times):
            self.relay.poller.turn()
            self.loop.pass_time(0)

    def flows(self) -> int:
        """How many flows there are."""
        return len(self.relay.sessions)

    def count(self, name: str) -> int:
        """One of the relay's counters."""
        row = new_row()
        self.relay.count(row)
        return row[COUNTERS.index(name)]

    def close(self) -> None:
        """End everything; nothing may be left of what has ended."""
        self.relay.abort_sessions(Phase.SHUTDOWN, "the test is over")
        self.loop.pass_time(2 * STUCK_S)  # for what is counted later
        for listener in self.listeners:
            assert not listener._flows
            assert listener._settled == 0
        assert not self.relay.sessions
        assert not self.relay.bench.wheel
        assert not self.relay.flows
        dropped = sum(pool.counts[DATAGRAMS_DROPPED] for pool in self.pools)
        assert self.relay.books.datagrams_dropped == dropped
        self.relay.close()
        self.shared.close()
        for sock in self.sockets:
            sock.close()
