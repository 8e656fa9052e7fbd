"""A name that is answered for the first time while a session connects is one more address to try.

The other addresses of the rule refuse, or do not answer. On a clock that the test turns.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.by_hand import RACE_AFTER_S, RULE, Bench, StubPool, UdpBench, pool_of, target_of
from support.clogged import CloggedUpstream
from support.datagrams import drain, numbered, udp
from support.ends import accept, listen, receive_exactly, receive_to_end, receive_to_reset, reset
from support.waiting import eventually

from forwarder.config.model import Protocol, RelayMode
from forwarder.net.sockets import unix_target
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import ATTEMPTS_FAILED, CONNECTS_FAILED, ENDS, SESSIONS_TOTAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack

    from forwarder.net.sockets import Target

CONNECT_S = 10.0
SOON_S = 3 * TICK_S


@pytest.fixture(params=[RelayMode.AUTO, RelayMode.COPY], ids=["batched", "plain"])
def udp_bench(request: pytest.FixtureRequest) -> Iterator[UdpBench]:
    bench = UdpBench(request.param)
    yield bench
    bench.close()


def refusing(stack: ExitStack) -> Target:
    """An address that nobody listens on, and nobody else can take."""
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    return target_of(sock)


def unreachable_unix(stack: ExitStack) -> Target:
    """A unix socket that refuses while it is asked, not later."""
    del stack
    return unix_target("@nobody listens here")


def with_name(*known: Target) -> StubPool:
    """A rule of these addresses and a name that has not been answered."""
    pool = pool_of(known, CONNECT_S)
    pool.has_unanswered = True
    return pool


def answer(pool: StubPool, *found: socket.socket) -> None:
    """The name has been answered."""
    pool.resolved = (*map(target_of, found), *(pool.resolved or ()))
    pool.has_unanswered = False


def wait_refused(bench: Bench | UdpBench, pool: StubPool) -> None:
    def is_refused() -> bool:
        bench.relay.poller.turn()
        return pool.counts[ATTEMPTS_FAILED] > 0

    eventually(is_refused)


def turning(bench: Bench, condition: Callable[[], bool]) -> None:
    """Turn the relay until something has come of that."""

    def is_so() -> bool:
        bench.relay.poller.turn()
        bench.loop.pass_time(0)
        return condition()

    eventually(is_so)


def reads(bench: Bench, sock: socket.socket, wanted: bytes) -> None:
    sock.setblocking(False)
    found = bytearray()

    def has_come() -> bool:
        try:
            found.extend(sock.recv(100))
        except BlockingIOError:
            return False
        return found == wanted

    turning(bench, has_come)
    sock.settimeout(10)


def ended(pool: StubPool) -> dict[str, int]:
    return {code: n for i, code in enumerate(REASONS) if (n := pool.counts[ENDS + i])}


@pytest.mark.parametrize("kind", [refusing, unreachable_unix])
@pytest.mark.parametrize("connect_timeout_s", [CONNECT_S, 0.0], ids=["a limit", "no limit"])
def test_a_client_is_served_by_a_name_that_is_answered_after_the_others_have_refused(
    bench: Bench,
    stack: ExitStack,
    kind: Callable[[ExitStack], Target],
    connect_timeout_s: float,
) -> None:
    """*Result*: by that alone; none that has refused is asked twice."""
    pool = with_name(kind(stack), kind(stack))
    pool.rule = replace(RULE, connect_timeout_s=connect_timeout_s)
    client = stack.enter_context(bench.open(pool))
    wait_refused(bench, pool)
    bench.loop.pass_time(CONNECT_S - 1)
    assert len(bench.relay.sessions) == 1
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(SOON_S)
    far = stack.enter_context(accept(other))
    client.sendall(b"request")
    reads(bench, far, b"request")
    far.sendall(b"response")
    reads(bench, client, b"response")
    assert pool.counts[ATTEMPTS_FAILED] == 2
    assert pool.counts[CONNECTS_FAILED] == 0


@pytest.mark.parametrize("has_ended", [False, True], ids=["goes on", "half-closes"])
def test_what_the_client_says_meanwhile_arrives(
    bench: Bench, stack: ExitStack, *, has_ended: bool
) -> None:
    pool = with_name(refusing(stack))
    client = stack.enter_context(bench.open(pool))
    wait_refused(bench, pool)
    client.sendall(b"request")
    if has_ended:
        client.shutdown(socket.SHUT_WR)
    bench.loop.pass_time(1.0)
    bench.relay.poller.turn()
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(SOON_S)
    far = stack.enter_context(accept(other))
    bench.relay.poller.turn()
    if has_ended:
        assert receive_to_end(far) == b"request"
        far.sendall(b"response")
        far.close()
        turning(bench, lambda: not bench.relay.sessions)
        assert receive_to_end(client) == b"response"
        assert ended(pool) == {"client/data": 1}
    else:
        assert receive_exactly(far, 7) == b"request"


def test_a_client_that_is_reset_meanwhile_is_waited_for_no_more(
    bench: Bench, stack: ExitStack
) -> None:
    pool = with_name(refusing(stack))
    client = bench.open(pool)
    wait_refused(bench, pool)
    reset(client)
    turning(bench, lambda: not bench.relay.sessions)
    assert ended(pool) == {"client/connect/reset": 1}
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(CONNECT_S)
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.accept()


def test_a_client_that_has_asked_and_is_reset_meanwhile_is_heard(
    bench: Bench, stack: ExitStack
) -> None:
    """As by an upstream that answers late: what it has sent is acknowledged."""
    pool = with_name(refusing(stack))
    client = bench.open(pool)
    wait_refused(bench, pool)
    client.sendall(b"request")
    bench.relay.poller.turn()
    reset(client)
    bench.loop.pass_time(1.0)
    bench.relay.poller.turn()
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(SOON_S)
    far = stack.enter_context(accept(other))
    turning(bench, lambda: not bench.relay.sessions)
    assert receive_to_reset(far) == b"request"


def test_an_answer_without_an_address_ends_the_wait(bench: Bench, stack: ExitStack) -> None:
    pool = with_name(refusing(stack))
    client = stack.enter_context(bench.open(pool))
    wait_refused(bench, pool)
    answer(pool)
    bench.loop.pass_time(SOON_S)
    assert receive_to_reset(client) == b""
    assert ended(pool) == {"upstream/connect": 1}
    assert pool.counts[CONNECTS_FAILED] == 1


def test_the_wait_ends_with_the_time_to_connect(
    bench: Bench, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    pool = with_name(refusing(stack))
    client = stack.enter_context(bench.open(pool))
    wait_refused(bench, pool)
    bench.loop.pass_time(CONNECT_S - SOON_S)
    assert len(bench.relay.sessions) == 1
    bench.loop.pass_time(2 * SOON_S)
    assert receive_to_reset(client) == b""
    assert ended(pool) == {"upstream/connect": 1}
    assert "Connection refused; no name server answered in time" in caplog.text


@pytest.mark.parametrize("phase", [Phase.KILL, Phase.DRAIN])
def test_who_is_ended_while_it_waits_leaves_nothing(
    bench: Bench, stack: ExitStack, phase: Phase
) -> None:
    pool = with_name(refusing(stack))
    other = stack.enter_context(listen())
    before = set(procfs.descriptors(os.getpid()))
    with bench.open(pool) as client:
        wait_refused(bench, pool)
        bench.relay.abort_sessions(phase, "ended")
        bench.loop.pass_time(0)
        assert receive_to_reset(client) == b""
    assert not bench.relay.bench.wheel
    answer(pool, other)
    bench.loop.pass_time(CONNECT_S)
    assert set(procfs.descriptors(os.getpid())) == before


def test_a_name_is_raced_with_an_address_that_does_not_answer(
    bench: Bench, stack: ExitStack
) -> None:
    """*Result*: when it has been answered, and the other one has had its moment."""
    silent = stack.enter_context(CloggedUpstream())
    pool = with_name(target_of(silent.listener))
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(1.0)
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(RACE_AFTER_S + SOON_S)
    far = stack.enter_context(accept(other))
    client.sendall(b"request")
    reads(bench, far, b"request")


def test_a_name_that_was_answered_during_a_race_is_not_missed(
    bench: Bench, stack: ExitStack
) -> None:
    """Another session has seen its addresses first."""
    first, second = (stack.enter_context(CloggedUpstream()) for _ in range(2))
    pool = with_name(target_of(first.listener), target_of(second.listener))
    client = stack.enter_context(bench.open(pool))
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(2 * RACE_AFTER_S + 2 * SOON_S)
    far = stack.enter_context(accept(other))
    client.sendall(b"request")
    reads(bench, far, b"request")


# -- flows


def refused_for_a_connection(bench: UdpBench, stack: ExitStack) -> tuple[StubPool, socket.socket]:
    """A client of UDP whose question the only address that is known so far has refused by TCP."""
    pool = bench.pool(protocol=Protocol.UDP_TO_TCP, connect_timeout_s=CONNECT_S)
    pool.resolved, pool.has_unanswered = (refusing(stack),), True
    client = bench.client(bench.listen(pool))
    client.send(b"question")
    wait_refused(bench, pool)
    return pool, client


def test_datagrams_for_a_connection_wait_for_the_name(
    udp_bench: UdpBench, stack: ExitStack
) -> None:
    bench = udp_bench
    pool, client = refused_for_a_connection(bench, stack)
    client.send(b"another")
    bench.turn()
    bench.loop.pass_time(CONNECT_S - 1)
    assert bench.flows() == 1
    other = stack.enter_context(listen())
    answer(pool, other)
    bench.loop.pass_time(SOON_S)
    bench.turn()
    far = stack.enter_context(accept(other))
    assert receive_exactly(far, 15) == b"questionanother"
    far.sendall(b"answer")
    bench.turn()
    assert client.recv(100) == b"answer"
    assert pool.counts[SESSIONS_TOTAL] == 1


def test_a_flow_ends_when_the_name_is_not_answered_in_time(
    udp_bench: UdpBench, stack: ExitStack
) -> None:
    bench = udp_bench
    pool, _ = refused_for_a_connection(bench, stack)
    bench.loop.pass_time(CONNECT_S + SOON_S)
    assert bench.flows() == 0
    assert ended(pool) == {"upstream/connect": 1}


@pytest.mark.parametrize("protocol", [Protocol.UDP, Protocol.TCP_TO_UDP])
@pytest.mark.parametrize("count", [1, 3])
def test_datagrams_that_were_refused_are_sent_to_the_name(
    udp_bench: UdpBench, protocol: Protocol, count: int
) -> None:
    """However long it took to answer, and though the client says nothing more."""
    bench = udp_bench
    pool = bench.pool(protocol=protocol)
    with udp() as nobody:
        pool.resolved, pool.has_unanswered = (target_of(nobody),), True
    client = bench.client(bench.listen(pool)) if protocol is Protocol.UDP else bench.bridge(pool)
    sent = numbered(count)
    for content in sent:
        client.send(content)
        bench.turn(5)
    bench.loop.pass_time(5.0)
    assert pool.counts[ATTEMPTS_FAILED] > 0
    other = bench.upstream()
    answer(pool, other)
    bench.relay.follow_names()
    bench.turn(5)
    assert drain(other) == sent
    assert bench.flows() == 1


def test_an_upstream_that_cannot_be_had_is_waited_out_as_well(udp_bench: UdpBench) -> None:
    """The kernel says at once that there is no way there."""
    bench = udp_bench
    pool = bench.pool(connect_timeout_s=CONNECT_S)
    here = target_of(bench.upstream())
    nowhere = type(here)(socket.AF_INET6, ("fe80::1", 9, 0, 0))  # no interface is named
    pool.resolved, pool.has_unanswered = (nowhere,), True
    client = bench.client(bench.listen(pool))
    client.send(b"question")
    bench.turn()
    bench.loop.pass_time(1.0)
    assert bench.flows() == 1
    other = bench.upstream()
    answer(pool, other)
    bench.loop.pass_time(SOON_S)
    bench.turn()
    assert drain(other) == [b"question"]
