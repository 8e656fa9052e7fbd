"""What a session takes is free when it has ended, without the collector, which runs rarely here."""

from __future__ import annotations

import gc
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, cast

import pytest
from support.by_hand import Bench, StubPool, pool_of, target_of
from support.ends import accept, listen, receive_to_reset, reset
from support.waiting import eventually

from forwarder.relay.dialer import Attempt, Dialer
from forwarder.relay.tcp.direction import Direction
from forwarder.relay.tcp.metered import put_under_meters
from forwarder.relay.tcp.session import Session
from forwarder.stats.reasons import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.limits.meter import Meter

KINDS: Final = (Session, Direction, Dialer, Attempt)


class Generous:
    """A meter that lets everybody move."""

    def room(self, direction: Direction) -> int:
        """Always some."""
        del direction
        return 1 << 20

    def spend(self, count: int) -> None:
        """There is enough."""

    def forget(self, direction: Direction) -> None:
        """Nobody waits."""


METERS: Final = cast("tuple[Meter, Meter]", (Generous(), Generous()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    gc.collect()
    gc.disable()
    try:
        yield bench
    finally:
        gc.enable()
        bench.relay.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def left() -> list[str]:
    return sorted(type(one).__name__ for one in gc.get_objects() if isinstance(one, KINDS))


def turn_until(bench: Bench, condition: Callable[[], bool]) -> None:
    def is_so() -> bool:
        bench.relay.poller._turn()
        bench.loop.pass_time(0)
        return condition()

    eventually(is_so)


def served(bench: Bench, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends of a session that has moved something."""
    upstream = stack.enter_context(listen())
    client = stack.enter_context(bench.open(pool_of((target_of(upstream),), 10.0)))
    far = stack.enter_context(accept(upstream))
    client.sendall(b"request")
    far.setblocking(False)

    def has_come() -> bool:
        try:
            return far.recv(100) == b"request"
        except BlockingIOError:
            return False

    turn_until(bench, has_come)
    return client, far


@pytest.mark.parametrize("metered", ["never", "from the beginning", "later"])
@pytest.mark.parametrize("end", ["fin", "reset", "kill"])
def test_a_session_that_has_ended(bench: Bench, stack: ExitStack, metered: str, end: str) -> None:
    if metered == "from the beginning":
        bench.relay.meters[1] = METERS
    client, far = served(bench, stack)
    if metered == "later":
        for session in bench.relay.sessions:
            put_under_meters(cast("Session", session), METERS)
        del session
    if end == "fin":
        client.close()
        far.close()
    elif end == "reset":
        reset(client)
    else:
        bench.relay.abort_sessions(Phase.KILL, "killed")
    turn_until(bench, lambda: not bench.relay.sessions)
    assert left() == []


def test_a_client_that_finds_no_upstream(bench: Bench, stack: ExitStack) -> None:
    dead = stack.enter_context(socket.socket())
    dead.bind(("127.0.0.1", 0))
    client = stack.enter_context(bench.open(pool_of((target_of(dead),) * 2, 10.0)))
    turn_until(bench, lambda: not bench.relay.sessions)
    assert receive_to_reset(client) == b""
    assert left() == []


def test_a_client_whose_name_is_answered_with_nothing(bench: Bench, stack: ExitStack) -> None:
    pool: StubPool = pool_of(None, 10.0)
    client = stack.enter_context(bench.open(pool))
    for tell in pool.waiting:
        tell(())
    del tell
    pool.waiting.clear()
    turn_until(bench, lambda: not bench.relay.sessions)
    assert receive_to_reset(client) == b""
    assert left() == []
