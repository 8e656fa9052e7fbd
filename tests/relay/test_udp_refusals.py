"""Upstreams that refuse datagrams: they are left for others, and nothing that can be had is lost.

Each test runs over the batched and over the plain way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections import deque
from typing import TYPE_CHECKING

import pytest
from support.by_hand import StubPool, UdpBench, target_of
from support.datagrams import drain, numbered, udp
from support.icmp import too_big
from support.namespaces import network

from forwarder.config.model import Protocol, RelayMode
from forwarder.net import datagrams
from forwarder.net import udp as udp_module
from forwarder.net.sockets import NO_PORT
from forwarder.relay.udp.flow import Flow
from forwarder.relay.udp.trial import KEPT
from forwarder.stats.rows import ATTEMPTS_FAILED, SESSIONS_TOTAL
from forwarder.upstream.failures import FIRST_S, MOST_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr, Target


@pytest.fixture(params=[RelayMode.AUTO, RelayMode.COPY], ids=["batched", "plain"])
def bench(request: pytest.FixtureRequest) -> Iterator[UdpBench]:
    bench = UdpBench(request.param)
    yield bench
    bench.close()


def dead() -> Target:
    """An address where nobody is any more, which the kernel says."""
    with udp() as sock:
        return target_of(sock)


def revive(bench: UdpBench, target: Target) -> socket.socket:
    """Somebody is there again."""
    assert isinstance(target.sockaddr, tuple)
    return bench.own(udp(*target.sockaddr[:2]))


def asking(bench: UdpBench, pool: StubPool) -> tuple[socket.socket, Flow]:
    """A client that has asked once, and its flow."""
    client = bench.client(bench.listen(pool))
    client.send(b"question")
    bench.turn()
    (flow,) = bench.relay.sessions
    assert isinstance(flow, Flow)
    return client, flow


def pool_of(bench: UdpBench, *upstreams: socket.socket | Target, **rule: object) -> StubPool:
    pool = bench.pool(**rule)
    pool.resolved = tuple(
        target_of(up) if isinstance(up, socket.socket) else up for up in upstreams
    )
    return pool


def test_the_first_question_reaches_the_next_though_the_client_does_not_repeat_it(
    bench: UdpBench,
) -> None:
    alive = bench.upstream()
    pool = pool_of(bench, dead(), dead(), alive)
    client = bench.client(bench.listen(pool))
    client.send(b"question")
    bench.turn(5)
    got, source = alive.recvfrom(100)
    assert got == b"question"
    alive.sendto(b"answer", source)
    bench.turn()
    assert client.recv(100) == b"answer"
    assert pool.counts[ATTEMPTS_FAILED] == 2
    assert pool.counts[SESSIONS_TOTAL] == 1


@pytest.mark.parametrize("count", [2, KEPT])
def test_all_that_was_said_before_the_refusal_arrives_in_order(bench: UdpBench, count: int) -> None:
    alive = bench.upstream()
    client = bench.client(bench.listen(pool_of(bench, dead(), alive)))
    sent = numbered(count)
    for content in sent:
        client.send(content)
    bench.turn(5)
    assert drain(alive) == sent


def test_what_is_kept_for_the_next_is_bounded_and_the_last_is_what_counts(
    bench: UdpBench,
) -> None:
    alive = bench.upstream()
    client = bench.client(bench.listen(pool_of(bench, dead(), alive)))
    sent = numbered(3 * KEPT)
    for content in sent:
        client.send(content)
    bench.turn(5)
    assert drain(alive) == sent[-KEPT:]


def test_later_clients_do_not_go_there_first(bench: UdpBench) -> None:
    alive = bench.upstream()
    pool = pool_of(bench, dead(), alive)
    listener = bench.listen(pool)
    for _ in range(5):
        client = bench.client(listener)
        client.send(b"question")
        bench.turn(5)
        assert drain(alive) == [b"question"]
    assert pool.counts[ATTEMPTS_FAILED] == 1


def test_one_that_refuses_after_it_has_answered_is_left_too(bench: UdpBench) -> None:
    """With what the client says next; what was refused is lost, as it would be directly."""
    first, second = bench.upstream(), bench.upstream()
    client = bench.client(bench.listen(pool_of(bench, first, second)))
    for _ in range(2):
        client.send(b"question")
        bench.turn()
        _, source = first.recvfrom(100)
        first.sendto(b"answer", source)
        bench.turn()
        assert client.recv(100) == b"answer"
    first.close()
    client.send(b"lost")
    bench.turn(5)
    assert drain(second) == []
    client.send(b"again")
    bench.turn(5)
    got, source = second.recvfrom(100)
    assert got == b"again"
    second.sendto(b"there", source)
    bench.turn()
    assert client.recv(100) == b"there"
    assert bench.flows() == 1


def test_the_only_one_is_not_left_and_is_known_to_work_when_it_answers(
    bench: UdpBench, caplog: pytest.LogCaptureFixture
) -> None:
    target = dead()
    pool = pool_of(bench, target)
    client = bench.client(bench.listen(pool))
    for _ in range(3):
        client.send(b"anybody?")
        bench.turn(5)
    assert list(pool.failures.known) == [target]
    back = revive(bench, target)
    client.send(b"now?")
    bench.turn(5)
    got, source = back.recvfrom(100)
    assert got == b"now?"
    back.sendto(b"yes", source)
    bench.turn()
    assert client.recv(100) == b"yes"
    assert not pool.failures.known
    assert caplog.text.count("upstream.failed") == 1


def test_where_all_refuse_nothing_goes_round_and_the_first_that_is_back_is_found(
    bench: UdpBench,
) -> None:
    targets = (dead(), dead(), dead())
    pool = pool_of(bench, *targets)
    client = bench.client(bench.listen(pool))
    client.send(b"anybody?")
    bench.turn(50)
    assert pool.counts[ATTEMPTS_FAILED] == len(targets)
    for _ in range(3):
        client.send(b"anybody?")
        bench.turn(50)
    assert pool.counts[ATTEMPTS_FAILED] == len(targets) + 3, "each question is asked once"
    back = revive(bench, targets[1])
    bench.loop.pass_time(FIRST_S)
    for _ in range(2):
        client.send(b"now?")
        bench.turn(10)
    assert b"now?" in drain(back)
    assert MOST_S > FIRST_S


def test_an_address_that_cannot_be_had_is_no_reason_to_end(bench: UdpBench) -> None:
    """The kernel says at once that there is no way there. *Result*: the next, at once."""
    nowhere = target_of(bench.upstream())
    nowhere = type(nowhere)(socket.AF_INET6, ("fe80::1", 9, 0, 0))  # no interface is named
    alive = bench.upstream()
    client = bench.client(bench.listen(pool_of(bench, nowhere, alive)))
    client.send(b"question")
    bench.turn(5)
    assert drain(alive) == [b"question"]


def test_what_a_stream_has_said_reaches_the_next(bench: UdpBench) -> None:
    alive = bench.upstream()
    pool = pool_of(bench, dead(), alive, protocol=Protocol.TCP_TO_UDP)
    client = bench.bridge(pool)
    client.sendall(b"question")
    bench.turn(6)
    got, source = alive.recvfrom(100)
    assert got == b"question"
    alive.sendto(b"answer", source)
    bench.turn()
    assert client.recv(100) == b"answer"
    client.sendall(b"more")
    bench.turn()
    assert alive.recv(100) == b"more"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make up an ICMP error")
def test_a_narrow_way_to_an_upstream_is_no_refusal(bench: UdpBench) -> None:
    """A router says that a datagram was too big for its link, as path MTU discovery wants it."""
    with network():
        first, second = bench.upstream(), bench.upstream()
        pool = pool_of(bench, first, second)
        client = bench.client(bench.listen(pool))
        for _ in range(3):
            client.send(b"question")
            bench.turn()
            got, source = first.recvfrom(100)
            assert got == b"question"
            too_big(source, first.getsockname())
            bench.turn(5)
            assert bench.count("icmp_errors") > 0
        assert not pool.failures.known
        assert drain(second) == []


def test_what_this_host_lacks_is_not_laid_to_an_upstream(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receive fails for want of memory."""
    first, second = bench.upstream(), bench.upstream()
    pool = pool_of(bench, first, second)
    client = bench.client(bench.listen(pool))
    client.send(b"question")
    bench.turn()
    first.sendto(b"answer", first.recvfrom(100)[1])
    with monkeypatch.context() as patch:
        fail_to_receive(patch, errno.ENOMEM)
        bench.turn()
    assert not pool.failures.known
    client.send(b"again")
    bench.turn(5)
    assert drain(first) == [b"again"]
    assert drain(second) == []


def fail_to_receive(patch: pytest.MonkeyPatch, number: int) -> None:
    """Have each receive fail with that errno."""

    def fail(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    patch.setattr(datagrams._libc, "recvmmsg", fail)

    class Failing(socket.socket):
        def recv_into(self, *_: object) -> int:
            raise OSError(number, os.strerror(number))

    patch.setattr(socket, "socket", Failing)  # of the plain way


def test_an_upstream_that_is_gone_already_does_not_lend_its_refusal_to_the_next(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses, and its name moves, before anything comes of that."""
    old, new = bench.upstream(), bench.upstream()
    pool = pool_of(bench, old)
    client, flow = asking(bench, pool)
    with monkeypatch.context() as patch:
        patch.setattr(
            bench.relay.bench.batch, "send", lambda _to, first, _last: first
        )  # it is full
        client.send(b"next")
        bench.relay.poller.turn()
    flow.on_report(errno.ECONNREFUSED)
    pool.resolved = (target_of(new),)
    bench.relay.follow_names()
    bench.turn(5)
    assert drain(new) == [b"next"]
    assert not pool.failures.known


def test_answers_that_wait_for_the_listener_come_though_there_is_another_upstream_by_then(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listener's socket is full, and is not any more while there is no descriptor."""
    old, new = bench.upstream(), bench.upstream()
    pool = pool_of(bench, old)
    client, flow = asking(bench, pool)
    with monkeypatch.context() as patch:
        patch.setattr(bench.relay.bench.batch, "send", lambda _to, first, _last: first)
        old.sendto(b"answer", old.recvfrom(100)[1])
        bench.relay.poller.turn()
        patch.setattr(udp_module, "upstream_socket", starved)
        pool.resolved = (target_of(new),)
        flow.move_on(deque([b"again"]))
        bench.turn()
    assert drain(client) == [b"answer"]
    bench.loop.pass_time(1)
    bench.turn()
    got, source = new.recvfrom(100)
    assert got == b"again"
    new.sendto(b"from there", source)
    bench.turn()
    assert drain(client) == [b"from there"]


def test_others_make_room_for_a_flow_each_time_that_it_connects(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no local port for it when it begins, and none when its upstream has moved."""
    old, new = bench.upstream(), bench.upstream()
    pool = pool_of(bench, old)
    listener = bench.listen(pool)
    for _ in range(2):
        bench.client(listener).send(b"somebody else")
        bench.turn()
    refusals = [NO_PORT]
    make = udp_module.upstream_socket

    def portless(target: Target, source: SockAddr | None, how: How) -> socket.SocketType:
        if refusals:
            raise OSError(refusals.pop(), "the test says so")
        return make(target, source, how)

    monkeypatch.setattr(udp_module, "upstream_socket", portless)
    client = bench.client(listener)
    client.send(b"question")
    bench.turn()
    assert drain(old) == [b"somebody else"] * 2 + [b"question"]
    *_, flow = bench.relay.sessions
    assert isinstance(flow, Flow)
    refusals.append(NO_PORT)
    pool.resolved = (target_of(new),)
    flow.move_on(deque([b"again"]))
    bench.turn()
    assert drain(new) == [b"again"]
    assert list(bench.relay.sessions) == [flow]


def starved(*_: object) -> socket.socket:
    """Instead of a socket."""
    raise OSError(errno.EMFILE, "the test says so")


def test_a_client_that_is_gone_says_nothing_of_the_upstream(bench: UdpBench) -> None:
    upstream = bench.upstream()
    pool = pool_of(bench, upstream)
    client = bench.client(bench.listen(pool))
    for _ in range(2):
        client.send(b"question")
        bench.turn()
        _, source = upstream.recvfrom(100)
    client.close()
    for _ in range(3):
        upstream.sendto(b"answer", source)
        bench.turn()
    assert bench.count("icmp_errors") > 0
    assert not pool.failures.known


@pytest.mark.parametrize("protocol", [Protocol.UDP, Protocol.TCP_TO_UDP])
def test_a_flow_follows_a_name_that_has_moved_with_what_the_client_says_next(
    bench: UdpBench, protocol: Protocol
) -> None:
    """Until then the old address may still answer what it was asked."""
    old, new = bench.upstream(), bench.upstream()
    pool = pool_of(bench, old, protocol=protocol)
    client = bench.client(bench.listen(pool)) if protocol is Protocol.UDP else bench.bridge(pool)
    client.send(b"question")
    bench.turn()
    _, source = old.recvfrom(100)
    pool.resolved = (target_of(new),)
    bench.relay.follow_names()
    old.sendto(b"late answer", source)
    bench.turn()
    assert client.recv(100) == b"late answer"
    for content in (b"next", b"and next"):
        client.send(content)
        bench.turn()
        got, source = new.recvfrom(100)
        assert got == content
        new.sendto(b"from there", source)
        bench.turn()
        assert client.recv(100) == b"from there"
    assert drain(old) == []
    assert bench.flows() == 1


def test_a_flow_stays_where_its_name_still_leads_or_nothing_is_known(bench: UdpBench) -> None:
    one, two = bench.upstream(), bench.upstream()
    pool = pool_of(bench, one)
    client = bench.client(bench.listen(pool))
    client.send(b"first")
    bench.turn()
    pool.resolved = (target_of(two), target_of(one))
    bench.relay.follow_names()
    client.send(b"second")
    bench.turn()
    assert drain(one) == [b"first", b"second"]
