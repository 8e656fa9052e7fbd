"""Sessions of a relay in this process, whose clock and loop the test turns by hand."""

from __future__ import annotations

import heapq
import itertools
import socket
from typing import TYPE_CHECKING, cast

import pytest
from support.clogged import CloggedUpstream
from support.ends import connect, receive_to_reset

from forwarder.addr import Address
from forwarder.config.model import RelayMode, Rule
from forwarder.errors import Phase, Place
from forwarder.net.options import to_connect
from forwarder.net.sockets import Target
from forwarder.relay.relay import Relay
from forwarder.relay.wheel import BUCKETS, TICK_S
from forwarder.stats import new_row

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterator

    from forwarder.net.sockets import SockAddr
    from forwarder.upstream.pool import Pool

TURN_S = BUCKETS * TICK_S


class HandLoop:
    """What a relay uses of an event loop."""

    def __init__(self) -> None:
        self.now = 5000.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """The test turns the relay itself."""

    def remove_reader(self, fd: int) -> None:
        """See :meth:`add_reader`."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_later(0, callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + delay, next(self._order), callback))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, calling what is due on the way."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            at, _, callback = heapq.heappop(self._timers)
            self.now = max(self.now, at)
            callback()
        self.now = end


class StubPool:
    """A pool whose names are resolved when the test says so."""

    def __init__(self, targets: tuple[Target, ...] | None, connect_timeout_s: float) -> None:
        self.rule = Rule(
            name="test",
            listen=Address("127.0.0.1", 1),
            upstreams=(Address("127.0.0.1", 2),),
            connect_timeout_s=connect_timeout_s,
            place=Place("test"),
        )
        self.row, self.counts = 1, new_row()
        self.has_unix = self.opens_fast = False
        self.how = to_connect(self.rule.options, is_udp=False)
        self._targets = targets
        self.waiting: list[Callable[[tuple[Target, ...]], None]] = []

    def targets(self) -> tuple[Target, ...] | None:
        return self._targets

    def wait_for_targets(self, callback: Callable[[tuple[Target, ...]], None]) -> None:
        self.waiting.append(callback)

    def source(self, family: int, client: SockAddr) -> None:
        """None: the kernel chooses."""

    def on_failure(self) -> None:
        """Nothing to look up again."""


class Bench:
    """A relay, its loop, and the clients given to it."""

    def __init__(self) -> None:
        self.loop = HandLoop()
        self.relay = Relay(cast("AbstractEventLoop", self.loop), RelayMode.AUTO, 1024)

    def open(self, pool: StubPool) -> socket.socket:
        """Give the relay a new client; returns the client's end."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client = connect(listener.getsockname())
            fd, address = listener._accept()  # type: ignore[attr-defined]
        accepted = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
        accepted.setblocking(False)
        self.relay.poller._turn()
        self.relay.open_session(cast("Pool", pool), accepted, address)
        return client


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.relay.abort_sessions(Phase.SHUTDOWN, "the test is over")
    bench.loop.pass_time(0)
    bench.relay.close()


@pytest.mark.parametrize("idle_s", [0.0, TURN_S - 3, TURN_S + 20, 1e6])
@pytest.mark.parametrize("timeout_s", [1.0, 10.0, TURN_S, 3 * TURN_S])
def test_a_connect_gets_all_its_time_and_no_more(
    bench: Bench, idle_s: float, timeout_s: float
) -> None:
    """However long the relay was idle before, and however many turns of the wheel it takes."""
    with CloggedUpstream() as clogged:
        target = Target(socket.AF_INET, clogged.listener.getsockname())
        bench.loop.pass_time(idle_s)
        with bench.open(StubPool((target,), timeout_s)) as client:
            bench.loop.pass_time(timeout_s - 2 * TICK_S)
            assert len(bench.relay.sessions) == 1, "given up early"
            bench.loop.pass_time(4 * TICK_S)
            assert not bench.relay.sessions
            assert receive_to_reset(client) == b""


@pytest.mark.parametrize("idle_s", [0.0, TURN_S + 20])
def test_resolving_gets_all_its_time_and_no_more(bench: Bench, idle_s: float) -> None:
    bench.loop.pass_time(idle_s)
    with bench.open(StubPool(None, 10.0)) as client:
        bench.loop.pass_time(9.8)
        assert len(bench.relay.sessions) == 1
        bench.loop.pass_time(0.4)
        assert not bench.relay.sessions
        assert receive_to_reset(client) == b""


@pytest.mark.parametrize("how", ["no address", "too late"])
def test_many_clients_whose_name_is_not_resolved_are_all_reset(bench: Bench, how: str) -> None:
    """None of their descriptors has ever been watched.

    *Result*: no error on the way (it would keep the others from hearing), no session left.
    """
    pool = StubPool(None, 1.0)
    clients = [bench.open(pool) for _ in range(300)]
    try:
        if how == "no address":
            for callback in pool.waiting:
                callback(())
        bench.loop.pass_time(2)
        assert not bench.relay.sessions
        for client in clients:
            assert receive_to_reset(client) == b""
    finally:
        for client in clients:
            client.close()


def test_an_answer_after_the_deadline_opens_nothing(bench: Bench) -> None:
    pool = StubPool(None, 1.0)
    with bench.open(pool) as client:
        bench.loop.pass_time(2)
        assert receive_to_reset(client) == b""
        (late,) = pool.waiting
        late((Target(socket.AF_INET, ("127.0.0.1", 1)),))
        assert not bench.relay.sessions
