"""Flows and bridges of groups: each chooses a server, and leaves one that refuses or is down.

On a clock that the test turns. Whatever happens, nobody holds a server at the end: see ``Shared``.
"""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.by_hand import GroupPool, StubPool, UdpBench, target_of
from support.datagrams import drain, numbered, udp
from support.ends import accept, listen, receive_to_reset, reset
from support.groups import failed, find, look, order, servers_of, turning

from forwarder.balancing.table import CUTS, DRAINS, HAS_ORDER, Standing
from forwarder.config.model import Answers, Balance, OnDown, Protocol, RelayMode
from forwarder.relay.udp.flow import Flow
from forwarder.relay.wheel import TICK_S
from forwarder.stats.board import ROWS
from forwarder.stats.reasons import REASONS
from forwarder.stats.rows import (
    ATTEMPTS_FAILED,
    CONNECT_BUCKETS,
    CONNECT_MS,
    ENDS,
    SESSIONS,
    SESSIONS_TOTAL,
)
from forwarder.upstream.failures import FIRST_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack

    from forwarder.net.sockets import Target

SOON_S = 3 * TICK_S
ONE_EACH = {0: {"max_sessions": 1}, 1: {"max_sessions": 1}}
BY_UDP = pytest.mark.parametrize("protocol", [Protocol.UDP, Protocol.TCP_TO_UDP])


@pytest.fixture(params=[RelayMode.AUTO, RelayMode.COPY], ids=["batched", "plain"])
def bench(request: pytest.FixtureRequest) -> Iterator[UdpBench]:
    bench = UdpBench(request.param)
    yield bench
    bench.close()


def dead() -> tuple[Target, ...]:
    """A server where nobody is any more, which the kernel says."""
    with udp() as sock:
        return (target_of(sock),)


def at(*socks: socket.socket) -> tuple[Target, ...]:
    return tuple(map(target_of, socks))


def client_of(bench: UdpBench, pool: StubPool) -> socket.socket:
    """A client, by whatever the rule listens on."""
    if pool.rule.protocol is Protocol.TCP_TO_UDP:
        return bench.bridge(pool)
    return bench.client(bench.listen(pool))


def ask(bench: UdpBench, client: socket.socket, upstream: socket.socket, text: bytes) -> None:
    """Ask, and get an answer from there."""
    client.send(text)
    bench.turn(5)
    got, source = upstream.recvfrom(100)
    assert got == text
    upstream.sendto(b"answer to " + text, source)
    bench.turn(5)
    assert client.recv(200) == b"answer to " + text


def ended(pool: StubPool) -> dict[str, int]:
    return {code: n for i, code in enumerate(REASONS) if (n := pool.counts[ENDS + i])}


def held(pool: GroupPool) -> list[int]:
    """How many sessions each server has."""
    return [server.counts[SESSIONS] for server in servers_of(pool)]


def test_each_flow_gets_a_server_and_keeps_it(bench: UdpBench) -> None:
    socks = [bench.upstream() for _ in range(3)]
    pool = bench.group(*map(at, socks))
    listener = bench.listen(pool)
    for sock in socks:
        client = bench.client(listener)
        for text in numbered(3):
            ask(bench, client, sock, text)
    assert held(pool) == [1, 1, 1]
    for server in servers_of(pool):
        assert sum(server.counts[CONNECT_MS : CONNECT_MS + CONNECT_BUCKETS]) == 1


@BY_UDP
def test_a_question_that_is_refused_goes_to_another_server(
    bench: UdpBench, protocol: Protocol
) -> None:
    alive = bench.upstream()
    pool = bench.group(dead(), dead(), at(alive), protocol=protocol, balance=Balance.FIRST)
    client = client_of(bench, pool)
    ask(bench, client, alive, b"question")
    assert failed(pool) == [1, 1, 0]
    assert held(pool) == [0, 0, 1]
    assert bench.relay.servers.alarm[SESSIONS] == 2
    assert pool.counts[SESSIONS_TOTAL] == 1
    ask(bench, client, alive, b"another")


def test_a_server_that_refuses_does_not_count_as_one_that_works(bench: UdpBench) -> None:
    """A connect by UDP says nothing: it works when it has answered."""
    alive = bench.upstream()
    pool = bench.group(dead(), at(alive), balance=Balance.FIRST)
    ask(bench, client_of(bench, pool), alive, b"question")
    worked = [sum(s.counts[CONNECT_MS : CONNECT_MS + CONNECT_BUCKETS]) for s in servers_of(pool)]
    assert worked == [0, 1]


@BY_UDP
def test_where_all_refuse_nothing_goes_round(bench: UdpBench, protocol: Protocol) -> None:
    pool = bench.group(dead(), dead(), dead(), protocol=protocol)
    client = client_of(bench, pool)
    for count in range(3, 6):
        client.send(b"anybody?")
        bench.turn(50)
        assert pool.counts[ATTEMPTS_FAILED] == count, "each is asked once, then one each time"
    assert sum(held(pool)) == 1


def test_the_first_that_is_back_is_found(bench: UdpBench) -> None:
    servers = dead(), dead()
    pool = bench.group(*servers)
    client = client_of(bench, pool)
    client.send(b"anybody?")
    bench.turn(50)
    address = servers[1][0].sockaddr
    assert isinstance(address, tuple)
    back = bench.own(udp(*address[:2]))
    bench.loop.pass_time(FIRST_S)
    for _ in range(2):
        client.send(b"now?")
        bench.turn(10)
    assert b"now?" in drain(back)


def test_the_only_server_is_not_left(bench: UdpBench) -> None:
    pool = bench.group(dead(), changes=ONE_EACH)
    client = client_of(bench, pool)
    for count in range(1, 4):
        client.send(b"anybody?")
        bench.turn(20)
        assert pool.counts[ATTEMPTS_FAILED] == count
    assert held(pool) == [1]


@BY_UDP
@pytest.mark.parametrize("standing", [Standing.DOWN, Standing.EJECTED])
def test_a_flow_leaves_a_server_that_is_down_with_what_its_client_says_next(
    bench: UdpBench, protocol: Protocol, standing: Standing
) -> None:
    """Until then the server may still answer what it was asked."""
    socks = [bench.upstream() for _ in range(2)]
    pool = bench.group(*map(at, socks), protocol=protocol, balance=Balance.FIRST)
    client = client_of(bench, pool)
    ask(bench, client, socks[0], b"question")
    client.send(b"another")
    bench.turn()
    _, source = socks[0].recvfrom(100)
    find(bench, pool, 0, standing)
    look(bench, pool)
    socks[0].sendto(b"late answer", source)
    bench.turn()
    assert client.recv(100) == b"late answer"
    ask(bench, client, socks[1], b"next")
    assert held(pool) == [0, 1]
    find(bench, pool, 0, Standing.UP)
    look(bench, pool)
    ask(bench, client, socks[1], b"last")


def test_a_flow_stays_where_all_are_down(bench: UdpBench) -> None:
    socks = [bench.upstream() for _ in range(2)]
    pool = bench.group(*map(at, socks), balance=Balance.FIRST)
    client = client_of(bench, pool)
    ask(bench, client, socks[0], b"question")
    find(bench, pool, 1, Standing.DOWN)
    find(bench, pool, 0, Standing.DOWN)
    look(bench, pool)
    ask(bench, client, socks[0], b"next")


def test_a_flow_leaves_a_drained_server_only_when_it_has_to(bench: UdpBench) -> None:
    socks = [bench.upstream() for _ in range(2)]
    pool = bench.group(*map(at, socks), balance=Balance.FIRST)
    client = client_of(bench, pool)
    ask(bench, client, socks[0], b"question")
    order(bench, pool, 0, HAS_ORDER | DRAINS)
    look(bench, pool)
    ask(bench, client, socks[0], b"next")
    order(bench, pool, 0, HAS_ORDER | DRAINS | CUTS)
    look(bench, pool)
    ask(bench, client, socks[1], b"last")
    assert bench.flows() == 1


def apply(bench: UdpBench, pool: GroupPool) -> None:
    bench.relay.servers.apply({pool.rule.name: pool}, bench.relay.sessions)
    bench.loop.pass_time(0)


@BY_UDP
def test_a_flow_leaves_a_server_that_is_down_after_a_reload(
    bench: UdpBench, protocol: Protocol
) -> None:
    """The servers have other places in the group, and one more; a flow stays where it has gone."""
    socks = [bench.upstream() for _ in range(3)]
    one, other, more = map(at, socks)
    pool = bench.group(one, other, protocol=protocol, balance=Balance.FIRST)
    client = client_of(bench, pool)
    ask(bench, client, socks[0], b"question")
    rows = [ROWS + number for number in (5, 1, 2, 9)]
    again = bench.group(
        more, one, other, protocol=protocol, balance=Balance.FIRST, former=pool.balancer, rows=rows
    )
    apply(bench, again)
    ask(bench, client, socks[0], b"next")
    find(bench, again, 1, Standing.DOWN)
    look(bench, again)
    ask(bench, client, socks[2], b"another")
    bench.relay.follow_names()
    ask(bench, client, socks[2], b"last")
    assert [server.counts[SESSIONS_TOTAL] for server in servers_of(again)] == [1, 1, 0]


@BY_UDP
def test_a_flow_of_a_rule_that_was_no_group_leaves_its_server(
    bench: UdpBench, protocol: Protocol
) -> None:
    socks = [bench.upstream() for _ in range(2)]
    pool = bench.pool(socks[0], protocol=protocol)
    client = client_of(bench, pool)
    ask(bench, client, socks[0], b"question")
    again = bench.group(*map(at, socks), protocol=protocol, balance=Balance.FIRST)
    apply(bench, again)
    assert held(again) == [1, 0]
    find(bench, again, 0, Standing.DOWN)
    look(bench, again)
    ask(bench, client, socks[1], b"next")
    assert held(again) == [0, 1]
    find(bench, again, 0, Standing.UP)
    find(bench, again, 1, Standing.DOWN)
    look(bench, again)
    ask(bench, client, socks[0], b"last")
    assert held(again) == [1, 0]


@BY_UDP
def test_a_flow_follows_the_name_of_its_server(bench: UdpBench, protocol: Protocol) -> None:
    old, new, other = (bench.upstream() for _ in range(3))
    pool = bench.group(at(old), at(other), protocol=protocol, balance=Balance.HASH)
    client = client_of(bench, pool)
    client.send(b"question")
    bench.turn()
    (session,) = bench.relay.sessions
    server = session.server
    assert server is not None
    was_at = (old, other)[server.index]
    assert drain(was_at) == [b"question"]
    pool.addresses[server.index] = at(new)
    bench.relay.follow_names()
    ask(bench, client, new, b"next")
    assert session.server is server
    assert held(pool)[server.index] == 1


def test_a_flow_tries_another_address_of_its_server_first(bench: UdpBench) -> None:
    alive, other = bench.upstream(), bench.upstream()
    pool = bench.group((*dead(), *at(alive)), at(other), balance=Balance.FIRST)
    client = client_of(bench, pool)
    client.send(b"question")
    bench.turn(6)
    assert drain(alive) == [b"question"]
    assert drain(other) == []
    assert (held(pool), failed(pool)) == ([1, 0], [0, 0])


@BY_UDP
def test_clients_wait_for_a_server_with_room(bench: UdpBench, protocol: Protocol) -> None:
    """With what they have said so far."""
    sock = bench.upstream()
    pool = bench.group(
        at(sock), protocol=protocol, changes=ONE_EACH, max_queue=2, queue_timeout_s=5.0
    )
    first = client_of(bench, pool)
    first.send(b"first")
    bench.turn()
    (session,) = bench.relay.sessions
    client = client_of(bench, pool)
    sent = numbered(3)
    for content in sent:
        client.send(content)
        bench.turn()
    bench.loop.pass_time(1.0)
    assert drain(sock) == [b"first"]
    session.on_bug()
    bench.loop.pass_time(0)
    bench.turn()
    got = drain(sock)
    assert b"".join(got) == b"".join(sent)
    if protocol is Protocol.UDP:
        assert got == sent


def test_a_bridge_whose_client_goes_while_it_waits_waits_no_longer(bench: UdpBench) -> None:
    pool = bench.group(
        at(bench.upstream()), protocol=Protocol.TCP_TO_UDP, changes=ONE_EACH, max_queue=1
    )
    bench.bridge(pool)
    client = bench.bridge(pool)
    assert bench.flows() == 2
    reset(client)
    turning(bench, lambda: bench.flows() == 1)
    assert ended(pool) == {"client/connect/reset": 1}


def test_a_client_that_finds_all_servers_full_may_ask_again(bench: UdpBench) -> None:
    sock = bench.upstream()
    pool = bench.group(at(sock), changes=ONE_EACH)
    listener = bench.listen(pool)
    first, other = bench.client(listener), bench.client(listener)
    ask(bench, first, sock, b"question")
    other.send(b"no room")
    bench.turn()
    assert ended(pool) == {"us/limit": 1}
    (session,) = bench.relay.sessions
    session.on_bug()
    bench.turn()
    ask(bench, other, sock, b"again")


# -- UDP clients of TCP servers


def test_datagrams_go_to_another_server_by_tcp(bench: UdpBench, stack: ExitStack) -> None:
    there, refusing = stack.enter_context(listen()), stack.enter_context(socket.socket())
    refusing.bind(("127.0.0.1", 0))
    pool = bench.group(at(refusing), at(there), protocol=Protocol.UDP_TO_TCP, balance=Balance.FIRST)
    client = client_of(bench, pool)
    client.send(b"question")
    turning(bench, lambda: held(pool) == [0, 1])
    turning(bench, lambda: all(s.connected_at > 0 for s in bench.relay.sessions))
    far = stack.enter_context(accept(there))
    assert far.recv(100) == b"question"
    assert failed(pool) == [1, 0]


def test_a_flow_by_tcp_is_cut_when_its_server_is_down(bench: UdpBench, stack: ExitStack) -> None:
    there = stack.enter_context(listen())
    pool = bench.group(at(there), protocol=Protocol.UDP_TO_TCP, on_down=OnDown.RESET)
    client_of(bench, pool).send(b"question")
    turning(bench, lambda: any(s.connected_at > 0 for s in bench.relay.sessions))
    far = stack.enter_context(accept(there))
    find(bench, pool, 0, Standing.DOWN)
    look(bench, pool)
    assert receive_to_reset(far) == b"question"
    assert ended(pool) == {"us/upstream-down": 1}


def test_a_question_holds_its_server_until_it_is_answered(bench: UdpBench) -> None:
    """Flows that end with their answers: each asks whichever server has room."""
    socks = [bench.upstream() for _ in range(2)]
    pool = bench.group(*map(at, socks), changes=ONE_EACH)
    pool.rule = replace(pool.rule, answers=Answers.ONE)
    client = client_of(bench, pool)
    for sock in (*socks, *socks):
        ask(bench, client, sock, b"question")
        assert held(pool) == [0, 0]
    assert pool.counts[SESSIONS_TOTAL] == 4


def test_a_server_that_answers_from_another_port_is_the_same_server(bench: UdpBench) -> None:
    alive, answering = bench.upstream(), bench.upstream()
    pool = bench.group(dead(), at(alive), balance=Balance.FIRST)
    pool.rule = replace(pool.rule, answers=Answers.ANY_PORT)
    client = client_of(bench, pool)
    client.send(b"question")
    bench.turn(5)
    got, source = alive.recvfrom(100)
    assert got == b"question"
    answering.sendto(b"answer", source)
    bench.turn(5)
    assert client.recv(100) == b"answer"
    assert held(pool) == [0, 1]
    ask(bench, client, answering, b"next")


def test_a_place_is_not_free_before_the_socket_of_a_flow_that_leaves_is_closed(
    bench: UdpBench,
) -> None:
    socks = [bench.upstream() for _ in range(2)]
    pool = bench.group(*map(at, socks), changes=ONE_EACH, balance=Balance.FIRST)
    ask(bench, client_of(bench, pool), socks[0], b"question")
    (flow,) = bench.relay.sessions
    assert isinstance(flow, Flow)
    left = flow.upstream
    assert left is not None
    find(bench, pool, 0, Standing.DOWN)
    bench.relay.poller.read_clock()
    flow.move_on(deque([b"next"]))
    assert left.fileno() >= 0
    assert [bench.shared.gate.sessions(one.row) for one in servers_of(pool)] == [1, 1]
    bench.turn()
    assert left.fileno() < 0
    assert [bench.shared.gate.sessions(one.row) for one in servers_of(pool)] == [0, 1]
