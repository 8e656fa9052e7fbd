"""What a session takes is free when it has ended, without the collector, which runs rarely here."""

from __future__ import annotations

import errno
import gc
import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
from support.by_hand import RULE, Bench, StubPool, accepted, pool_of, target_of
from support.ends import accept, listen, receive_to_reset, reset
from support.waiting import eventually

from forwarder.config.model import Protocol
from forwarder.limits.gate import Gate
from forwarder.limits.meter import Meter
from forwarder.relay.dialer import Attempt, Dialer
from forwarder.relay.poller import Poller
from forwarder.relay.tcp.direction import Direction
from forwarder.relay.tcp.stream import Stream
from forwarder.relay.udp.directions import FlowDirection
from forwarder.relay.udp.flow import Flow
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import ENDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack

    from forwarder.relay.poller import Handler

KINDS: Final = (Stream, Flow, Direction, FlowDirection, Dialer, Attempt)


class Watched(Bench):
    """A relay whose objects are looked for among all that there are, but for what was before."""

    def __init__(self) -> None:
        super().__init__()
        self._before = objects()

    def left(self) -> list[str]:
        """What is still there."""
        before = set(map(id, self._before))
        return sorted(type(one).__name__ for one in objects() if id(one) not in before)


def objects() -> list[object]:
    return [one for one in gc.get_objects() if isinstance(one, KINDS)]


@pytest.fixture
def bench() -> Iterator[Watched]:
    gc.collect()
    gc.disable()
    bench = Watched()
    try:
        yield bench
    finally:
        gc.enable()
        bench.close()


@pytest.fixture
def meters(bench: Watched) -> Iterator[tuple[Meter, Meter]]:
    """Those of a rule whose limit was taken away: they let everybody move."""
    gate = Gate()
    yield Meter(bench.loop, gate, 0, 0.0), Meter(bench.loop, gate, 1, 0.0)
    gate.close()


def turn_until(bench: Watched, condition: Callable[[], bool]) -> None:
    def is_so() -> bool:
        bench.relay.poller.turn()
        bench.loop.pass_time(0)
        return condition()

    eventually(is_so)


def served(bench: Watched, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
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
def test_a_session_that_has_ended(
    bench: Watched, stack: ExitStack, meters: tuple[Meter, Meter], metered: str, end: str
) -> None:
    if metered == "from the beginning":
        bench.relay.restrictions.meters[1] = meters
    client, far = served(bench, stack)
    if metered == "later":
        for session in bench.relay.sessions:
            session.put_under(meters)
        del session
    if end == "fin":
        client.close()
        far.close()
    elif end == "reset":
        reset(client)
    else:
        bench.relay.abort_sessions(Phase.KILL, "killed")
    turn_until(bench, lambda: not bench.relay.sessions)
    assert bench.left() == []


@pytest.mark.parametrize("end", ["in the queue", "served", "of refusals"])
def test_a_session_of_a_group(bench: Watched, stack: ExitStack, end: str) -> None:
    sock, dead = stack.enter_context(listen()), stack.enter_context(socket.socket())
    dead.bind(("127.0.0.1", 0))
    servers = [dead, dead] if end == "of refusals" else [dead, sock]
    pool = bench.group(
        *((target_of(one),) for one in servers), changes={1: {"max_sessions": 1}}, max_queue=5
    )
    clients = [stack.enter_context(bench.open(pool)) for _ in range(3)]
    if end != "of refusals":
        turn_until(bench, lambda: any(one.connected_at > 0 for one in bench.relay.sessions))
        bench.relay.abort_sessions(Phase.KILL, "killed")
    if end == "in the queue":
        clients.append(stack.enter_context(bench.open(pool)))
        bench.relay.abort_sessions(Phase.KILL, "killed")
    turn_until(bench, lambda: not bench.relay.sessions)
    assert bench.left() == []


def test_a_client_that_finds_no_upstream(bench: Watched, stack: ExitStack) -> None:
    dead = stack.enter_context(socket.socket())
    dead.bind(("127.0.0.1", 0))
    client = stack.enter_context(bench.open(pool_of((target_of(dead),) * 2, 10.0)))
    turn_until(bench, lambda: not bench.relay.sessions)
    assert receive_to_reset(client) == b""
    assert bench.left() == []


def test_a_client_whose_name_is_answered_with_nothing(bench: Watched, stack: ExitStack) -> None:
    pool: StubPool = pool_of(None, 10.0)
    client = stack.enter_context(bench.open(pool))
    for tell in pool.waiting:
        tell(())
    del tell
    pool.waiting.clear()
    turn_until(bench, lambda: not bench.relay.sessions)
    assert receive_to_reset(client) == b""
    assert bench.left() == []


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.TCP_TO_UDP])
def test_a_client_that_the_poller_did_not_take_in_time(
    bench: Watched, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    """It takes the upstreams that are tried, each of which is given up for want of the client."""
    upstream = stack.enter_context(listen())
    rule = replace(RULE, connect_timeout_s=1.0, protocol=protocol)
    pool = StubPool(rule, (target_of(upstream),))
    client, sock, address = accepted()
    stack.enter_context(client)
    register = Poller.register

    def register_others(poller: Poller, fd: int, handler: Handler, *events: int) -> None:
        if fd == sock.fileno():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        register(poller, fd, handler, *events)

    with monkeypatch.context() as patched:
        patched.setattr(Poller, "register", register_others)
        bench.relay.open_session(pool, sock, address)
        bench.loop.pass_time(2.0)
    assert receive_to_reset(client) == b""
    assert pool.counts[ENDS + REASONS.index("us/connect")] == 1
    assert bench.left() == []
