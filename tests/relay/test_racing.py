"""An upstream that does not answer costs one session a moment: the race, and what is remembered.

On a clock that the test turns, so that "at once" means that no time has passed at all.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support import procfs, sockdiag
from support.by_hand import (
    RACE_AFTER_S,
    RULE,
    Bench,
    StubPool,
    UdpBench,
    accepted,
    pool_of,
    target_of,
)
from support.clogged import CloggedUpstream
from support.ends import accept, listen, listen_unix, receive_to_reset, reset
from support.waiting import eventually

from forwarder.config.address import parse_listen
from forwarder.config.model import Protocol, RelayMode, Upstream
from forwarder.net import sockets
from forwarder.net.sockets import Target
from forwarder.relay.dialer import MAX_ATTEMPTS
from forwarder.relay.poller import Poller
from forwarder.relay.tcp import fast_open
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import REASONS, Phase
from forwarder.stats.rows import ATTEMPTS_FAILED, CONNECTS_FAILED, ENDS, new_row
from forwarder.system.rarely import INTERVAL_S, MOST_NAMED
from forwarder.upstream.failures import FIRST_S
from forwarder.upstream.names import Names
from forwarder.upstream.pool import Pool

if TYPE_CHECKING:
    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr

RACE_S = RACE_AFTER_S + 2 * TICK_S  # a tick is as fine as it gets


def silent(stack: ExitStack) -> CloggedUpstream:
    return stack.enter_context(CloggedUpstream())


def at(*upstreams: CloggedUpstream | socket.socket) -> tuple[Target, ...]:
    return tuple(
        target_of(up.listener if isinstance(up, CloggedUpstream) else up) for up in upstreams
    )


def asking() -> int:
    """How many connects of this process are not answered."""
    return sockdiag.states(os.getpid()).count(sockdiag.SYN_SENT)


def ended(pool: StubPool) -> dict[str, int]:
    return {code: n for i, code in enumerate(REASONS) if (n := pool.counts[ENDS + i])}


def works(bench: Bench, near: socket.socket, far: socket.socket) -> None:
    """Bytes pass both ways while the test turns the relay."""
    for one, other in ((near, far), (far, near)):
        one.sendall(b"some bytes")
        other.setblocking(False)
        found = bytearray()

        def arrives(other: socket.socket = other, found: bytearray = found) -> bool:
            bench.relay.poller.turn()
            try:
                found.extend(other.recv(100))
            except BlockingIOError:
                return False
            return found == b"some bytes"

        eventually(arrives)


def test_the_next_is_tried_beside_one_that_does_not_answer_and_wins(
    bench: Bench, stack: ExitStack
) -> None:
    other = stack.enter_context(listen())
    pool = pool_of(at(silent(stack), other), 10.0)
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(RACE_AFTER_S - TICK_S)
    assert asking() == 1
    bench.loop.pass_time(3 * TICK_S)
    far = stack.enter_context(accept(other))
    works(bench, client, far)
    assert asking() == 0, "the loser is closed"
    (session,) = bench.relay.sessions
    assert str(session.target) == "{}:{}".format(*other.getsockname())


def test_the_first_may_still_win_and_each_of_them_has_all_its_time(
    bench: Bench, stack: ExitStack
) -> None:
    first, second = silent(stack), silent(stack)
    client = stack.enter_context(bench.open(pool_of(at(first, second), 10.0)))
    bench.loop.pass_time(RACE_S)
    assert asking() == 2
    bench.loop.pass_time(9.0)
    assert asking() == 2
    first.open()

    def answered() -> bool:
        bench.relay.poller.turn()
        return asking() == 0

    eventually(answered)
    works(bench, client, stack.enter_context(accept(first.listener)))


def test_a_session_is_given_up_when_the_last_attempt_has_had_its_time(
    bench: Bench, stack: ExitStack
) -> None:
    pool = pool_of(at(silent(stack), silent(stack)), 1.0)
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(1.0 + 2 * TICK_S)
    assert len(bench.relay.sessions) == 1
    bench.loop.pass_time(RACE_AFTER_S + 2 * TICK_S)
    assert not bench.relay.sessions
    assert asking() == 0
    assert receive_to_reset(client) == b""
    assert ended(pool) == {"upstream/connect": 1}
    assert (pool.counts[ATTEMPTS_FAILED], pool.counts[CONNECTS_FAILED]) == (2, 1)


def test_what_does_not_answer_costs_one_session_its_wait_and_no_other(
    bench: Bench, stack: ExitStack
) -> None:
    """Until it is time to see whether it answers: that again costs one session a moment."""
    other = stack.enter_context(listen())
    pool = pool_of(at(silent(stack), other), 10.0)
    stack.enter_context(bench.open(pool))
    bench.loop.pass_time(RACE_S)
    stack.enter_context(accept(other))
    for _ in range(5):
        client = stack.enter_context(bench.open(pool))
        works(bench, client, stack.enter_context(accept(other)))
        assert asking() == 0
    bench.loop.pass_time(FIRST_S)
    stack.enter_context(bench.open(pool))
    assert asking() == 1
    for _ in range(5):
        client = stack.enter_context(bench.open(pool))
        works(bench, client, stack.enter_context(accept(other)))


def test_what_refuses_is_not_asked_again_at_once(bench: Bench, stack: ExitStack) -> None:
    dead, other = stack.enter_context(socket.socket()), stack.enter_context(listen())
    dead.bind(("127.0.0.1", 0))
    pool = pool_of(at(dead, other), 10.0)
    for _ in range(5):
        client = stack.enter_context(bench.open(pool))
        bench.relay.poller.turn()
        works(bench, client, stack.enter_context(accept(other)))
    assert pool.counts[ATTEMPTS_FAILED] == 1
    assert pool.counts[CONNECTS_FAILED] == 0


def test_what_is_remembered_makes_no_rule_unusable(bench: Bench, stack: ExitStack) -> None:
    """Its only upstream has refused just now, and is there again."""
    back = stack.enter_context(socket.socket())
    back.bind(("127.0.0.1", 0))
    pool = pool_of(at(back), 10.0)
    with bench.open(pool) as client:
        bench.relay.poller.turn()
        assert receive_to_reset(client) == b""
    back.listen()
    client = stack.enter_context(bench.open(pool))
    bench.relay.poller.turn()
    works(bench, client, stack.enter_context(accept(back)))
    assert not pool.failures.known


@pytest.mark.parametrize("how", ["the client resets", "a kill", "a drain"])
def test_who_ends_while_there_is_a_race_leaves_nothing(
    bench: Bench, stack: ExitStack, how: str
) -> None:
    pool = pool_of(at(silent(stack), silent(stack)), 10.0)
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(RACE_S)
    assert asking() == 2
    before = set(procfs.descriptors(os.getpid()))
    if how == "the client resets":
        reset(client)

        def is_over() -> bool:
            bench.relay.poller.turn()
            return not bench.relay.sessions

        eventually(is_over)
    else:
        phase = Phase.KILL if how == "a kill" else Phase.DRAIN
        bench.relay.abort_sessions(phase, how)
        bench.loop.pass_time(0)
        assert receive_to_reset(client) == b""
    assert asking() == 0
    assert len(before - set(procfs.descriptors(os.getpid()))) >= 3, "client and both upstreams"
    assert not bench.relay.bench.wheel


def test_not_more_than_a_few_are_tried_at_once(bench: Bench, stack: ExitStack) -> None:
    one = silent(stack)
    pool = pool_of(at(one) * (MAX_ATTEMPTS + 3), 5.0)
    stack.enter_context(bench.open(pool))
    bench.loop.pass_time(4.0)
    assert asking() == MAX_ATTEMPTS


def test_a_race_takes_no_descriptor_that_others_need(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """*Result*: it goes on with what it has, and when there are some again it races."""
    other = stack.enter_context(listen())
    client = stack.enter_context(bench.open(pool_of(at(silent(stack), other), 10.0)))

    def none_left(_target: Target, _source: SockAddr | None, _how: How) -> socket.SocketType:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(sockets, "upstream_socket", none_left)
        bench.loop.pass_time(2.0)
    assert asking() == 1
    assert bench.relay.descriptors.has_spare
    bench.loop.pass_time(RACE_S)
    works(bench, client, stack.enter_context(accept(other)))


def sends_early(monkeypatch: pytest.MonkeyPatch) -> list[SockAddr]:
    """Have what a client has said go with the SYN; returns where it is sent to."""
    asked = []

    def connect_fast(
        client: socket.SocketType, upstream: socket.SocketType, to: SockAddr, view: memoryview
    ) -> tuple[int, int]:
        asked.append(to)
        count = 0
        with suppress(BlockingIOError):  # it has said nothing yet
            count = client.recv_into(view, 100, socket.MSG_PEEK)
        return upstream.connect_ex(to), count

    monkeypatch.setattr(fast_open, "connect", connect_fast)
    return asked


def test_what_went_with_a_syn_is_not_sent_to_a_rival(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """*Result*: no race while the first has it, though it is avoided from then on."""
    asked = sends_early(monkeypatch)
    first, other = silent(stack), stack.enter_context(listen())
    pool = pool_of(at(first, other), 10.0)
    pool.opens_fast = True
    client = stack.enter_context(bench.open(pool))  # has said nothing yet
    bench.loop.pass_time(RACE_S)
    assert len(asked) == 1, "a rival is connected as usual"
    works(bench, client, stack.enter_context(accept(other)))
    pool.failures.forget(pool.resolved[0] if pool.resolved else target_of(other))

    session_client, sock, address = _client_that_has_spoken(stack)
    bench.relay.open_session(pool, sock, address)
    bench.loop.pass_time(3 * RACE_S)
    assert asking() == 1
    assert pool.failures.known
    session_client.close()


def test_a_rival_of_a_unix_socket_that_waits_gets_nothing_with_its_syn(
    bench: Bench,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """*Result*: when the unix socket wins after all, it gets what the client has said."""
    asked = sends_early(monkeypatch)
    path = str(tmp_path_factory.mktemp("early") / "full")
    full = stack.enter_context(listen_unix(path, backlog=0))
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
    pool = pool_of((target_of(full), *at(silent(stack))), 10.0)
    pool.has_unix = pool.opens_fast = True
    _, sock, address = _client_that_has_spoken(stack)
    bench.relay.open_session(pool, sock, address)
    bench.loop.pass_time(RACE_S)
    assert asking() == 1
    accept(full).close()
    bench.loop.pass_time(2 * TICK_S)
    bench.relay.poller.turn()
    far = stack.enter_context(accept(full))
    assert far.recv(100) == b"request"
    assert not asked


def _client_that_has_spoken(
    stack: ExitStack,
) -> tuple[socket.socket, socket.SocketType, SockAddr]:
    client, sock, address = accepted()
    stack.enter_context(client)
    client.sendall(b"request")
    eventually(lambda: sock.recv(7, socket.MSG_PEEK) == b"request")
    return client, sock, address


def test_a_unix_socket_whose_queue_is_full_is_raced_too(
    bench: Bench, stack: ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its connect has not even begun, and is tried again and again beside the rival."""
    path = str(tmp_path_factory.mktemp("race") / "full")
    full = stack.enter_context(listen_unix(path, backlog=0))
    filler = stack.enter_context(socket.socket(socket.AF_UNIX))
    filler.connect(path)
    slow = silent(stack)
    pool = pool_of((target_of(full), *at(slow)), 10.0)
    pool.has_unix = True
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(RACE_S)
    assert asking() == 1
    accept(full).close()
    bench.loop.pass_time(2 * TICK_S)
    bench.relay.poller.turn()
    works(bench, client, stack.enter_context(accept(full)))
    assert asking() == 0


def test_a_queue_that_stays_full_leads_to_the_next_of_whatever_kind(
    bench: Bench, stack: ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = str(tmp_path_factory.mktemp("full") / "full")
    stack.enter_context(listen_unix(path, backlog=0))
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
    pool = pool_of((sockets.unix_target(path),), 1.0)
    pool.has_unix = True
    client = stack.enter_context(bench.open(pool))
    bench.loop.pass_time(1.0 + 3 * TICK_S)
    assert receive_to_reset(client) == b""
    assert ended(pool) == {"upstream/connect": 1}


def test_an_upstream_that_the_poller_does_not_take_sees_no_empty_stream(
    bench: Bench, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected before that is known. *Result*: a reset; it is connected again later."""
    other = stack.enter_context(listen())

    def none_taken(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Poller, "register", none_taken)
        client = stack.enter_context(bench.open(pool_of(at(other), 10.0)))
        assert receive_to_reset(stack.enter_context(accept(other))) == b""
    bench.loop.pass_time(3 * TICK_S)
    works(bench, client, stack.enter_context(accept(other)))


def test_who_asks_all_ports_of_a_dead_range_does_not_fill_the_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = "192.0.2.1", "192.0.2.2"
    ends = tuple(Upstream(parse_listen(f"{host}:8000-8999")) for host in hosts)
    rule = replace(RULE, listen=parse_listen("10.0.0.1:1000-1999"), upstreams=ends)
    whole = Pool(rule, Names(lambda _host: None, lambda: 0.0), 1, new_row())
    for offset in range(1, 1000):
        pool = whole.at(offset)
        for target in pool.targets() or ():
            bench.relay.outages.on_attempt_failed(pool, target, "refused", has_others=True)
    assert whole.counts[ATTEMPTS_FAILED] == 2 * 999
    assert len(caplog.messages) == 1


def test_many_upstreams_that_fail_at_once_take_few_lines(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """And few when they work again."""
    caplog.set_level(logging.INFO)
    targets = [Target(socket.AF_INET, ("192.0.2.1", port)) for port in range(1, 41)]
    pool, outages = pool_of(tuple(targets), 10.0), bench.relay.outages
    for word in ("failed", "recovered"):
        caplog.clear()
        for target in targets:
            if word == "failed":
                outages.on_attempt_failed(pool, target, "refused", has_others=True)
            else:
                outages.on_attempt_worked(pool, target)
        assert len(caplog.messages) == MOST_NAMED
        bench.loop.pass_time(INTERVAL_S)
        bench.relay.poller.read_clock()
        outages.look()
        assert caplog.messages[-1] == f"upstream.{word} rule=test and 35 more upstreams"


def test_carry_is_unchanged_after_a_race(bench: Bench, stack: ExitStack) -> None:
    """No state of the race is left in what relays."""
    other = stack.enter_context(listen())
    stack.enter_context(bench.open(pool_of(at(silent(stack), other), 10.0)))
    bench.loop.pass_time(RACE_S)
    bench.relay.poller.turn()
    (session,) = bench.relay.sessions
    assert session.dialer is None
    assert len(bench.relay.bench.wheel) == 1


def test_a_udp_client_of_a_tcp_upstream_has_the_same_race(stack: ExitStack) -> None:
    udp = UdpBench(RelayMode.AUTO)
    other = stack.enter_context(listen())
    rule = replace(pool_of((), 10.0).rule, protocol=Protocol.UDP_TO_TCP)
    pool = StubPool(rule, at(silent(stack), other))
    udp.pools.append(pool)
    listener = udp.listen(pool)
    client = udp.client(listener)
    client.send(b"question")
    udp.turn()
    assert asking() == 1
    udp.loop.pass_time(RACE_S)
    udp.turn()
    far = stack.enter_context(accept(other))
    assert far.recv(100) == b"question"
    assert asking() == 0
    udp.close()
