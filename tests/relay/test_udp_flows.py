"""Flows of UDP clients in a relay of this process, whose clock and loop the test turns by hand.

Each test runs over the batched and over the plain way. At the end of each nothing may be left.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.by_hand import RULE, UdpBench, no_names, target_of
from support.datagrams import drain, numbered, receive_all, udp
from support.limited_sends import LimitedSends

from forwarder.config.address import Address
from forwarder.config.model import AccessRule, Protocol, RelayMode, Upstream, Verdict
from forwarder.errors import Place
from forwarder.net import udp as net_udp
from forwarder.net.sockets import Target
from forwarder.relay.access import AccessList
from forwarder.relay.session import SessionState
from forwarder.relay.udp.directions import MAX_PENDING, DatagramDirection, FlowDirection
from forwarder.relay.udp_listener import UdpListener
from forwarder.relay.wheel import BUCKETS, TICK_S
from forwarder.stats.reasons import Phase
from forwarder.stats.rows import new_row
from forwarder.upstream.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.net.options import How

HOSTS = ["127.0.0.1", "0.0.0.0", "::1", "::"]
TURN_S = BUCKETS * TICK_S


@pytest.fixture(params=["batched", "plain", "batched before Linux 6.13"])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[UdpBench]:
    if "before" in request.param:
        monkeypatch.setattr(net_udp, "FINDS_FLOWS_BY_HASH", False)
    bench = UdpBench(RelayMode.COPY if request.param == "plain" else RelayMode.AUTO)
    yield bench
    bench.close()


def one_client(
    bench: UdpBench, host: str = "127.0.0.1", **rule: object
) -> tuple[socket.socket, UdpListener, socket.socket]:
    """An upstream, a listener of a rule that leads there, and a client of it."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, **rule), host)
    return upstream, listener, bench.client(listener)


def ask(
    bench: UdpBench, client: socket.socket, upstream: socket.socket, text: bytes
) -> tuple[str, int]:
    """Have a client's datagram arrive; returns from where it came."""
    client.send(text)
    bench.turn()
    got, source = upstream.recvfrom(65536)
    assert got == text
    return source[0], source[1]


def answer(
    bench: UdpBench,
    upstream: socket.socket,
    to: tuple[str, int],
    client: socket.socket,
    text: bytes,
) -> None:
    """Have an upstream's datagram arrive at the client."""
    upstream.sendto(text, to)
    bench.turn()
    assert client.recv(65536) == text


def settled(listener: UdpListener) -> list[bool]:
    """Of each flow of a listener, whether it has a socket of its own."""
    return [flow.is_settled for flow in listener._flows.values()]


# -- what passes


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_both_ways_before_and_after_a_flow_settles(bench: UdpBench, host: str, before: int) -> None:
    """Also unsolicited. Result: all of it arrives, as one flow."""
    upstream, listener, client = one_client(bench, host)
    source = ask(bench, client, upstream, b"first")
    assert settled(listener) == [False]
    for number in range(before):
        answer(bench, upstream, source, client, b"answer %d" % number)
    assert ask(bench, client, upstream, b"second") == source
    assert settled(listener) == [True]
    for number in range(3):
        answer(bench, upstream, source, client, b"more %d" % number)
    assert ask(bench, client, upstream, b"third") == source
    assert bench.flows() == 1
    assert bench.count("datagrams_dropped") == bench.count("icmp_errors") == 0


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("host", HOSTS)
def test_every_size_passes_both_ways(bench: UdpBench, host: str, is_settled: bool) -> None:
    sizes = [0, 1, 2, 512, 1200, 1472, 1473, 1500, 9000, 32768, 65506, 65507]
    upstream, _, client = one_client(bench, host)
    source = ask(bench, client, upstream, b"x")
    if is_settled:
        ask(bench, client, upstream, b"y")
    for size in sizes:
        content = os.urandom(size)
        assert ask(bench, client, upstream, content) == source
        answer(bench, upstream, source, client, content)
    assert bench.flows() == 1


@pytest.mark.parametrize("sizes", [[100], [1, 2, 0, 1000], [1200, 1200, 1200, 4]], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_boundaries_and_order_are_kept(bench: UdpBench, host: str, sizes: list[int]) -> None:
    """Five hundred at once, from the very first. U2: nothing is merged, no tail is cut."""
    upstream, _, client = one_client(bench, host)
    sent = numbered(500, sizes)
    for content in sent:
        client.send(content)
    bench.turn(8)
    assert receive_all(upstream, 1) == sent[:1]
    assert drain(upstream) == sent[1:]
    for content in sent:
        client.send(content)
    bench.turn(8)
    got, source = upstream.recvfrom(65536)
    assert [got, *drain(upstream)] == sent
    for content in sent:
        upstream.sendto(content, source)
    bench.turn(8)
    assert drain(client) == sent


def test_what_was_queued_before_a_flow_settles_comes_first(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More comes while the flow gets its socket, before and after it is connected."""
    upstream, listener, client = one_client(bench)
    ask(bench, client, upstream, b"0")
    original = net_udp.flow_socket

    def slowly(
        sock: socket.socket, peer: bytes, how: How, **_: bool
    ) -> tuple[socket.SocketType, bool]:
        client.send(b"2")
        client.send(b"3")
        made = original(sock, peer, how)
        client.send(b"4")
        return made

    monkeypatch.setattr(net_udp, "flow_socket", slowly)
    client.send(b"1")
    bench.turn()
    client.send(b"5")
    bench.turn()
    assert drain(upstream) == [b"1", b"2", b"3", b"4", b"5"]
    assert settled(listener) == [True]


@contextmanager
def before_connect(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> Iterator[None]:
    """Do ``action`` whenever a socket of a flow is bound and not yet connected."""
    original = socket.SocketType.connect

    class Slow(socket.SocketType):
        def connect(self, address: object) -> None:
            action()
            original(self, address)  # type: ignore[arg-type]

    def of_slow(family: int, _how: How, *, v6only: bool) -> socket.SocketType:
        made = Slow(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(net_udp, "_new_flow_socket", of_slow)
        yield


@pytest.mark.parametrize("host", HOSTS)
def test_a_client_whose_flow_settles_takes_nothing_from_others(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """Others send between bind and connect, with settled flows there. Result: one flow for each."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), host)
    clients = [bench.client(listener) for _ in range(40)]
    for client in clients[:20]:
        ask(bench, client, upstream, b"x")
        ask(bench, client, upstream, b"x")
    count = 0

    def meanwhile() -> None:
        nonlocal count
        count += 1
        for client in clients:
            client.send(b"meanwhile")

    ask(bench, clients[20], upstream, b"x")
    with before_connect(monkeypatch, meanwhile):
        clients[20].send(b"y")
        bench.turn(10)
    assert count
    assert bench.flows() == len(clients)
    sources = {upstream.recvfrom(100)[1] for _ in range(1 + count * len(clients))}
    assert len(sources) == len(clients)
    assert drain(upstream) == []


@pytest.mark.parametrize("host", HOSTS)
def test_a_new_client_that_strays_into_the_socket_of_another_stays_there(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """The kernel gives what it sends next to another worker's listener. Result: one flow each."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), host)
    # As if of another worker.
    beside = bench.listen(bench.pool(upstream), host, beside=listener)
    first = bench.client(listener)
    ask(bench, first, upstream, b"x")
    clients = [bench.client(listener) for _ in range(40)]
    strays = list(clients)

    def meanwhile() -> None:
        while strays:
            strays.pop().send(b"1")

    with before_connect(monkeypatch, meanwhile):
        first.send(b"y")
        bench.turn(5)
    if not net_udp.FINDS_FLOWS_BY_HASH:  # with one more listener others stray, too
        assert sum(settled(listener)) + sum(settled(beside)) > 1
        return
    for client in clients:
        client.send(b"2")
    bench.turn(5)
    assert bench.flows() == 41
    assert len(drain(upstream)) == 81


@pytest.mark.skipif(not net_udp.FINDS_FLOWS_BY_HASH, reason="before Linux 6.13 it cannot be had")
@pytest.mark.parametrize("host", HOSTS)
def test_a_socket_that_is_bound_and_not_yet_connected_is_no_listener(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """What others send then stays with the listeners, which may be those of other workers."""
    monkeypatch.setattr(net_udp, "FINDS_FLOWS_BY_HASH", True)
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), host)
    clients = [bench.client(listener) for _ in range(30)]
    made: list[socket.SocketType] = []
    original = net_udp._new_flow_socket

    class Half(socket.SocketType):
        def connect(self, address: object) -> None:
            """Not yet."""

        def getsockname(self) -> tuple[str, int]:
            asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
            return (asked if ":" in asked else f"::ffff:{asked}", 0)

    def half(family: int, how: How, *, v6only: bool) -> socket.SocketType:
        sock = original(family, how, v6only=v6only)
        made.append(Half(family, socket.SOCK_DGRAM, 0, sock.detach()))
        return made[-1]

    monkeypatch.setattr(net_udp, "_new_flow_socket", half)
    clients[0].send(b"x")
    listener.sock.settimeout(10)
    peer = bench.relay.bench.batch
    assert peer.receive_from(listener.sock.fileno()) == 1
    net_udp.flow_socket(listener.sock, peer.peer(0), listener.pool.client_how(listener.sock.family))
    for client in clients:
        client.send(b"y")
    assert drain_raw(listener.sock) == len(clients)
    for sock in made:
        sock.close()


def drain_raw(sock: socket.socket) -> int:
    """How many datagrams wait."""
    sock.setblocking(False)
    count = 0
    try:
        while True:
            sock.recv(100)
            count += 1
    except BlockingIOError:
        return count


def test_a_hundred_clients_at_once_each_have_a_flow(bench: UdpBench) -> None:
    """Interleaved, answered in reverse. Result: every answer goes to who asked."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), "0.0.0.0")
    clients = [bench.client(listener) for _ in range(100)]
    for round_number in range(4):
        for number, client in enumerate(clients):
            client.send(b"%d %d" % (number, round_number))
        bench.turn(8)
        asked = [upstream.recvfrom(100) for _ in clients]
        for text, source in reversed(asked):
            upstream.sendto(b"to " + text, source)
        bench.turn(8)
        for number, client in enumerate(clients):
            assert drain(client) == [b"to %d %d" % (number, round_number)]
    assert bench.flows() == 100


def test_many_answers_to_one_question(bench: UdpBench) -> None:
    upstream, _, client = one_client(bench)
    source = ask(bench, client, upstream, b"?")
    sent = numbered(400, [700])
    for content in sent:
        upstream.sendto(content, source)
    bench.turn(8)
    assert drain(client) == sent


def test_an_ipv6_client_is_one_flow(bench: UdpBench) -> None:
    """U5."""
    upstream = bench.upstream("::1")
    listener = bench.listen(bench.pool(upstream), "::1")
    client = bench.client(listener)
    sources = {ask(bench, client, upstream, b"%d" % number) for number in range(10)}
    assert len(sources) == 1
    assert bench.flows() == 1


def test_a_new_flow_sends_nothing_of_its_own(bench: UdpBench) -> None:
    """U1."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    ask(bench, bench.client(listener), upstream, b"x")
    bench.turn()
    assert drain(upstream) == []


@pytest.mark.parametrize("is_settled", [False, True])
def test_an_empty_datagram_is_one_and_ends_nothing(bench: UdpBench, is_settled: bool) -> None:
    """U6, both ways, and as the first of a flow."""
    upstream, _, client = one_client(bench)
    source = ask(bench, client, upstream, b"")
    if is_settled:
        ask(bench, client, upstream, b"")
    for _ in range(2):
        answer(bench, upstream, source, client, b"")
    assert ask(bench, client, upstream, b"still here") == source
    assert bench.flows() == 1


# -- addresses


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize(
    ("bound", "asked"),
    [
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2", "127.1.2.3"]),
        ("::", ["::1", "127.0.0.1", "127.0.0.2"]),
    ],
)
def test_answers_come_from_the_address_that_was_asked(
    bench: UdpBench, bound: str, asked: list[str], is_settled: bool
) -> None:
    """One client socket asks several. Result: a flow for each, every answer from the right one."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), bound)
    port = listener.sock.getsockname()[1]
    for family in (socket.AF_INET, socket.AF_INET6):
        hosts = [host for host in asked if (":" in host) is (family == socket.AF_INET6)]
        if not hosts:
            continue
        client = bench.own(udp("127.0.0.1" if family == socket.AF_INET else "::1"))
        for _ in range(3 if is_settled else 1):
            sources = []
            for host in hosts:
                client.sendto(b"to " + host.encode(), (host, port))
                bench.turn()
                text, source = upstream.recvfrom(100)
                assert text == b"to " + host.encode()
                sources.append(source)
            assert len(set(sources)) == len(hosts)
            for host, source in reversed(list(zip(hosts, sources, strict=True))):
                upstream.sendto(b"from " + host.encode(), source)
                bench.turn()
                text, where = client.recvfrom(100)
                assert (text, where[0], where[1]) == (b"from " + host.encode(), host, port)
    assert bench.flows() == len(asked)
    assert all(settled(listener)) is is_settled


def test_one_port_at_two_addresses_of_a_client_are_two_flows(bench: UdpBench) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    one = bench.client(listener, "127.0.0.1")
    two = bench.own(udp("127.0.0.2", one.getsockname()[1]))
    two.connect(listener.sock.getsockname())
    assert ask(bench, one, upstream, b"1") != ask(bench, two, upstream, b"2")
    assert bench.flows() == 2


def test_the_source_address_is_used(bench: UdpBench) -> None:
    upstream = bench.upstream()
    pool = bench.pool(upstream)
    pool.bound = ("127.0.0.9", 0)
    listener = bench.listen(pool)
    client = bench.client(listener)
    source = ask(bench, client, upstream, b"x")
    assert source[0] == "127.0.0.9"
    answer(bench, upstream, source, client, b"y")


def test_who_is_denied_gets_no_flow(bench: UdpBench) -> None:
    """Counted; others are served."""
    upstream = bench.upstream()
    deny = AccessRule(verdict=Verdict.DENY, pattern="127.0.0.66", place=Place("test"))
    listener = bench.listen(bench.pool(upstream), access=(deny,))
    denied = bench.client(listener, "127.0.0.66")
    for _ in range(3):
        denied.send(b"x")
    bench.turn()
    assert drain(upstream) == []
    assert bench.flows() == 0
    assert bench.count("datagrams_dropped") == 3
    ask(bench, bench.client(listener), upstream, b"allowed")


# -- time


@pytest.mark.parametrize("limit_s", [1.0, 72.0, 3 * TURN_S])
@pytest.mark.parametrize("who", ["client", "upstream"])
@pytest.mark.parametrize("is_settled", [False, True])
def test_either_side_keeps_a_flow_alive(
    bench: UdpBench, who: str, is_settled: bool, limit_s: float
) -> None:
    """U4. Result: it lives while one side talks, and ends a time-out after the last word."""
    upstream, _, client = one_client(bench, udp_timeout_s=limit_s)
    source = ask(bench, client, upstream, b"x")
    if is_settled:
        ask(bench, client, upstream, b"x")
    bench.turn()
    for _ in range(5):
        bench.loop.pass_time(limit_s * 0.9)
        if who == "upstream":
            answer(bench, upstream, source, client, b"answer")
        elif is_settled:
            assert ask(bench, client, upstream, b"x") == source
        else:
            assert bench.flows() == 1
            return  # the client's next word settles the flow
    bench.turn()
    bench.loop.pass_time(limit_s - 2 * TICK_S)
    assert bench.flows() == 1, "ended early"
    bench.loop.pass_time(4 * TICK_S)
    assert bench.flows() == 0


def test_after_the_time_out_a_new_flow_begins(bench: UdpBench) -> None:
    """Result: the sockets of the old one are gone; what the upstream sends there is refused."""
    upstream, _, client = one_client(bench, udp_timeout_s=10.0)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - their number is all that counts
    old = ask(bench, client, upstream, b"1")
    ask(bench, client, upstream, b"2")
    bench.turn()
    bench.loop.pass_time(11)
    assert bench.flows() == 0
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above
    new = ask(bench, client, upstream, b"3")
    assert new != old
    answer(bench, upstream, new, client, b"4")


def test_no_time_out_means_none(bench: UdpBench) -> None:
    upstream, _, client = one_client(bench, udp_timeout_s=0.0)
    source = ask(bench, client, upstream, b"1")
    bench.loop.pass_time(1e6)
    answer(bench, upstream, source, client, b"2")


# -- too many


@contextmanager
def few_descriptors(free: int) -> Iterator[None]:
    """Let this process open no more than so many descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + free, hard))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[-free:]:
            os.close(fd)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken[:-free]:
            os.close(fd)


def test_beyond_max_flows_the_longest_silent_goes(bench: UdpBench) -> None:
    """Counted. An answer counts as a sign of life."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, max_flows=3))
    clients = [bench.client(listener) for _ in range(5)]
    sources = []
    for client in clients[:3]:
        sources.append(ask(bench, client, upstream, b"x"))
        bench.loop.pass_time(0.1)
    answer(bench, upstream, sources[0], clients[0], b"y")
    sources.append(ask(bench, clients[3], upstream, b"x"))
    assert bench.flows() == 3
    assert bench.count("flows_evicted") == 1
    for number in (0, 2, 3):
        answer(bench, upstream, sources[number], clients[number], b"alive")
    assert ask(bench, clients[1], upstream, b"again") != sources[1]
    assert bench.count("flows_evicted") == 2
    assert bench.flows() == 3


def test_all_ports_of_a_range_have_the_limit_of_flows_together(bench: UdpBench) -> None:
    """Also where each port leads to one of its own, and so has a pool of its own."""
    rule = replace(
        RULE,
        protocol=Protocol.UDP,
        listen=Address("127.0.0.1", 8000, 10),
        upstreams=(Upstream(Address("127.0.0.1", 9000, 10)),),
    )
    whole = Pool(rule, no_names(), 1, new_row())
    first, second = whole.at(1), whole.at(2)
    assert first is not second
    table = bench.relay.flows.of(first)
    assert bench.relay.flows.of(second) is table
    assert bench.relay.flows.of(whole) is table


def test_the_limit_of_flows_follows_the_number_of_workers(bench: UdpBench) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream, max_flows=8))
    for workers, limit in ((1, 8), (4, 2), (2, 4)):
        bench.relay.flows.workers = workers
        for _ in range(10):
            ask(bench, bench.client(listener), upstream, b"x")
        assert bench.flows() == limit


def test_flows_that_may_not_settle_are_served_all_the_same(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwarder.relay.udp.flow_tables.MAX_SETTLED", 2)
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), "0.0.0.0")
    clients = [bench.client(listener) for _ in range(5)]
    for _ in range(3):
        for client in clients:
            source = ask(bench, client, upstream, b"?")
            answer(bench, upstream, source, client, b"!")
    assert sorted(settled(listener)) == [False] * 3 + [True] * 2
    assert bench.flows() == 5


@pytest.mark.expects_log
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_without_sockets_of_their_own_flows_are_served(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """No right to bind the port: one warning, and no further try. No descriptor: another try."""
    tries = 0

    def refuse(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(number, os.strerror(number))

    upstream, listener, client = one_client(bench)
    monkeypatch.setattr(net_udp, "flow_socket", refuse)
    for _ in range(4):
        source = ask(bench, client, upstream, b"?")
        answer(bench, upstream, source, client, b"!")
    assert tries == (1 if number == errno.EACCES else 3)
    warnings = [record for record in caplog.records if "udp.unsettled" in record.message]
    assert len(warnings) == (1 if number == errno.EACCES else 0)
    monkeypatch.undo()
    ask(bench, client, upstream, b"?")
    assert settled(listener) == [number == errno.EMFILE]


def test_when_descriptors_run_out_the_longest_silent_flow_goes(bench: UdpBench) -> None:
    """The limit is reached. Result: whoever is new is served, within a few ticks."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    clients = [bench.client(listener) for _ in range(12)]
    with few_descriptors(5):
        for client in clients:
            client.send(b"x")
            for _ in range(4):
                bench.turn()
                bench.loop.pass_time(TICK_S)
    assert len(drain(upstream)) == len(clients)
    assert bench.count("flows_evicted") > 0
    assert bench.count("connects_failed") == 0


# -- upstreams


def test_the_one_that_needs_a_descriptor_may_be_the_longest_silent_itself(bench: UdpBench) -> None:
    """As when its upstream has moved. Result: the next one makes room."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    for _ in range(3):
        ask(bench, bench.client(listener), upstream, b"x")
    first, second, third = bench.relay.sessions
    assert bench.relay.descriptors.make_room(keep=first)
    assert list(bench.relay.sessions) == [first, third]
    assert second.state is SessionState.CLOSED


def test_an_upstream_that_refuses_and_comes_back_has_the_same_flow(bench: UdpBench) -> None:
    upstream = bench.upstream()
    address = upstream.getsockname()
    listener = bench.listen(bench.pool(upstream))
    client = bench.client(listener)
    source = ask(bench, client, upstream, b"1")
    ask(bench, client, upstream, b"2")
    upstream.close()
    for _ in range(20):
        client.send(b"to nobody")
        bench.turn()
    assert bench.flows() == 1
    assert bench.count("icmp_errors") > 0
    back = bench.own(udp(*address))
    assert ask(bench, client, back, b"3") == source
    answer(bench, back, source, client, b"4")
    assert bench.flows() == 1


def test_a_client_that_refuses_answers_ends_nothing(bench: UdpBench) -> None:
    """Its port is closed for a moment. Result: counted, and the flow goes on."""
    upstream, _, client = one_client(bench)
    own, asked = client.getsockname(), client.getpeername()
    source = ask(bench, client, upstream, b"1")
    ask(bench, client, upstream, b"2")
    client.close()
    for _ in range(5):
        upstream.sendto(b"to nobody", source)
        bench.turn()
    assert bench.count("icmp_errors") > 0
    again = bench.own(udp(*own))
    again.connect(asked)
    answer(bench, upstream, source, again, b"3")
    assert ask(bench, again, upstream, b"4") == source


def test_what_is_too_large_is_dropped_and_counted_and_the_flow_lives(bench: UdpBench) -> None:
    """IPv6 to IPv4."""
    upstream, _, client = one_client(bench, "::1")
    source = ask(bench, client, upstream, b"1")
    for _ in range(2):
        client.send(bytes(65527))
        bench.turn()
    assert ask(bench, client, upstream, b"2") == source
    assert bench.count("datagrams_dropped") == 2
    assert drain(upstream) == []


def test_upstreams_take_turns(bench: UdpBench) -> None:
    """With the real pool that is: here the order of its targets is what is tried."""
    one, two = bench.upstream(), bench.upstream()
    pool = bench.pool(one, two)
    listener = bench.listen(pool)
    ask(bench, bench.client(listener), one, b"x")
    pool.resolved = (target_of(two), target_of(one))
    ask(bench, bench.client(listener), two, b"y")


def test_the_next_upstream_is_tried_when_one_cannot_be(bench: UdpBench) -> None:
    """No socket can be made for it: there is no such local address for IPv4. Result: served."""
    four, six = bench.upstream(), bench.upstream("::1")
    pool = bench.pool(four, six)
    pool.bound = ("203.0.113.1", 0)
    listener = bench.listen(pool)
    ask(bench, bench.client(listener), six, b"x")
    assert bench.count("connects_failed") == 0


def test_no_upstream_can_be_had(bench: UdpBench, caplog: pytest.LogCaptureFixture) -> None:
    """Result: counted, logged once, no flow is left, and what waited is counted."""
    upstream = bench.upstream()
    pool = bench.pool(upstream)
    pool.bound = ("203.0.113.1", 0)
    listener = bench.listen(pool)
    client = bench.client(listener)
    for _ in range(3):
        client.send(b"x")
        bench.turn()
    assert bench.flows() == 0
    assert bench.count("connects_failed") == 3
    assert bench.count("datagrams_dropped") == 3
    assert sum("connect.failed" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("count", [1, 10, MAX_PENDING + 50])
def test_what_comes_before_the_name_is_resolved_is_delivered(bench: UdpBench, count: int) -> None:
    """In order, and no more of it than is kept."""
    upstream = bench.upstream()
    pool = bench.pool(upstream)
    resolved, pool.resolved = pool.resolved, None
    assert resolved is not None
    listener = bench.listen(pool)
    client = bench.client(listener)
    sent = numbered(count, [50])
    for content in sent[:MAX_PENDING]:
        client.send(content)
        bench.turn(1)
    for content in sent[MAX_PENDING:]:
        client.send(content)
        bench.turn(1)
    pool.waiting.pop()(resolved)
    bench.turn()
    got = drain(upstream)
    assert got == sent[: len(got)]
    # What came to the flow's own socket after the bound was reached waits in its queue.
    assert len(got) + bench.count("datagrams_dropped") == count
    assert len(got) >= min(count, MAX_PENDING)
    client.send(b"and on")
    bench.turn()
    assert upstream.recv(100) == b"and on"


def test_a_name_that_is_not_resolved_in_time_ends_the_flow(
    bench: UdpBench, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = bench.upstream()
    pool = bench.pool(upstream, connect_timeout_s=5.0)
    resolved, pool.resolved = pool.resolved, None
    assert resolved is not None
    listener = bench.listen(pool)
    bench.client(listener).send(b"x")
    bench.turn()
    bench.loop.pass_time(4.8)
    assert bench.flows() == 1
    bench.loop.pass_time(0.4)
    assert bench.flows() == 0
    assert bench.count("datagrams_dropped") == 1
    pool.waiting.pop()(resolved)
    assert bench.flows() == 0
    assert drain(upstream) == []
    assert any("connect.failed" in record.message for record in caplog.records)


# -- ways that are blocked


def test_answers_wait_while_the_listeners_socket_is_full(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills again and again while they are sent. Result: all arrive, in order, in the end."""
    upstream, _, client = one_client(bench)
    source = ask(bench, client, upstream, b"x")
    clogged = LimitedSends(monkeypatch, bench.relay)
    sent = numbered(20, [100])
    for content in sent:
        upstream.sendto(content, source)
    bench.turn()
    assert drain(client) == []
    for number in range(20):
        clogged.room = 1
        bench.turn(1)
        assert drain(client) == sent[number : number + 1]
    clogged.room = 100
    answer(bench, upstream, source, client, b"and on")


def test_a_flow_that_ends_while_it_waits_for_the_listener_disturbs_nobody(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    clients = [bench.client(listener) for _ in range(2)]
    sources = [ask(bench, client, upstream, b"x") for client in clients]
    clogged = LimitedSends(monkeypatch, bench.relay)
    for source in sources:
        upstream.sendto(b"waits", source)
        bench.turn(1)
    next(iter(listener._flows.values())).on_bug()
    bench.turn(2)
    clogged.room = 100
    bench.turn(3)
    assert drain(clients[1]) == [b"waits"]
    assert drain(clients[0]) == []
    assert not caplog.records


def test_a_listener_watches_for_room_no_longer_when_the_flow_that_waited_has_ended(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events are level-triggered. Result: no event is left, and the worker rests."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    source = ask(bench, bench.client(listener), upstream, b"x")
    LimitedSends(monkeypatch, bench.relay)
    upstream.sendto(b"waits", source)
    bench.turn(1)
    bench.relay.abort_sessions(Phase.KILL, "killed")
    bench.turn()
    assert not select.select([bench.relay.poller._epoll], [], [], 0)[0]


def test_what_a_full_socket_did_not_take_is_kept_however_much_was_read(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a listener may make a flow keep; it was read from the flow's own socket."""
    upstream, _, client = one_client(bench)
    ask(bench, client, upstream, b"x")
    ask(bench, client, upstream, b"y")
    clogged = LimitedSends(monkeypatch, bench.relay)
    parts = numbered(MAX_PENDING + 64, [500])
    for start in range(0, len(parts), 40):
        content = b"".join(parts[start : start + 40])
        client.sendmsg([content], [(17, 103, (500).to_bytes(2, "little"))])
    bench.turn(6)
    assert drain(upstream) == []
    clogged.room = 10_000
    bench.turn(4)
    assert drain(upstream) == parts
    assert bench.count("datagrams_dropped") == 0


def test_a_socket_that_is_not_full_any_more_says_nothing_of_what_leaves_it(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of a flow. Otherwise each datagram that is sent would be an event of its own."""
    upstream, _, client = one_client(bench)
    source = ask(bench, client, upstream, b"x")
    ask(bench, client, upstream, b"y")
    with monkeypatch.context() as patch:
        LimitedSends(patch, bench.relay)
        client.send(b"waits")
        upstream.sendto(b"waits", source)
        bench.relay.poller.turn()
    bench.turn()
    assert (drain(upstream), drain(client)) == ([b"waits"], [b"waits"])
    masks: list[int] = []
    on_events = FlowDirection.on_events

    def noted(way: FlowDirection, mask: int) -> None:
        masks.append(mask)
        on_events(way, mask)

    monkeypatch.setattr(FlowDirection, "on_events", noted)
    for _ in range(3):
        ask(bench, client, upstream, b"z")
        answer(bench, upstream, source, client, b"answer")
    assert set(masks) == {select.EPOLLIN}


# -- bugs


def test_a_bug_in_a_flow_costs_the_others_of_its_batch_nothing(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    unlucky, lucky = (bench.client(listener) for _ in range(2))
    ask(bench, unlucky, upstream, b"x")
    (flow,) = listener._flows.values()
    with monkeypatch.context() as patch:
        raise_for(patch, "take", flow.c2u)
        unlucky.send(b"lost")
        lucky.send(b"arrives")
        bench.turn()
    assert drain(upstream) == [b"arrives"]
    assert flow.state is SessionState.CLOSED
    assert caplog.text.count("relay.bug") == 1


def test_a_bug_in_a_flow_that_waits_for_the_listener_costs_the_others_nothing(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    clients = [bench.client(listener) for _ in range(2)]
    sources = [ask(bench, client, upstream, b"x") for client in clients]
    with monkeypatch.context() as patch:
        LimitedSends(patch, bench.relay)
        for source in sources:
            upstream.sendto(b"waits", source)
        bench.relay.poller.turn()
    unlucky = next(iter(listener._flows.values()))
    with monkeypatch.context() as patch:
        raise_for(patch, "resume", unlucky.u2c)
        bench.turn()
    assert [drain(client) for client in clients] == [[], [b"waits"]]
    assert unlucky.state is SessionState.CLOSED
    assert caplog.text.count("relay.bug") == 1


def raise_for(patch: pytest.MonkeyPatch, name: str, unlucky: FlowDirection) -> None:
    """Have a method of one way raise what it never should."""
    method = getattr(DatagramDirection, name)

    def act(way: DatagramDirection, *arguments: int) -> None:
        if way is unlucky:
            raise ZeroDivisionError
        method(way, *arguments)

    patch.setattr(DatagramDirection, name, act)


# -- the end of a listener


@pytest.mark.parametrize("host", HOSTS)
def test_flows_outlive_their_listener(bench: UdpBench, host: str) -> None:
    """It is stopped with data in its queue, for settled flows and others. Result: all go on."""
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream), host)
    clients = [bench.client(listener) for _ in range(20)]
    sources = [ask(bench, client, upstream, b"x") for client in clients]
    for client in clients[:10]:
        ask(bench, client, upstream, b"y")
    for client in clients:
        client.send(b"queued")
    newcomer = bench.client(listener)
    newcomer.send(b"new")
    listener.stop()
    listener.sock.close()
    bench.turn(6)
    assert sorted(drain(upstream)) == [b"new"] + [b"queued"] * 20
    assert all(settled(listener))
    for client, source in zip(clients, sources, strict=True):
        answer(bench, upstream, source, client, b"answer")
        assert ask(bench, client, upstream, b"question") == source
    assert ask(bench, newcomer, upstream, b"z") not in sources


def test_a_listener_that_stops_takes_those_along_that_wait_for_it(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream, listener, client = one_client(bench)
    source = ask(bench, client, upstream, b"x")
    clogged = LimitedSends(monkeypatch, bench.relay)
    upstream.sendto(b"waits", source)
    bench.turn()
    listener.stop()
    clogged.room = 100
    bench.turn()
    assert drain(client) == [b"waits"]


def test_silent_flows_end_at_a_stop_and_busy_ones_do_not(bench: UdpBench) -> None:
    upstream = bench.upstream()
    listener = bench.listen(bench.pool(upstream))
    silent, busy = bench.client(listener), bench.client(listener)
    ask(bench, silent, upstream, b"x")
    source = ask(bench, busy, upstream, b"x")
    bench.turn()
    bench.loop.pass_time(2)
    answer(bench, upstream, source, busy, b"y")
    bench.relay.end_silent_flows(1.0)
    assert bench.flows() == 1
    answer(bench, upstream, source, busy, b"z")


def test_a_flow_beside_a_wildcard_on_its_port_takes_nothing_from_that(
    bench: UdpBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule on ::1 and one on the IPv6 wildcard alone. Result: each client gets its rule's."""
    one, two = bench.upstream(), bench.upstream()
    listener = bench.listen(bench.pool(one), "::1")
    port = listener.sock.getsockname()[1]
    pool = bench.pool(two)
    target = Target(socket.AF_INET6, ("::", port))
    sock = bench.own(net_udp.listen_udp(target, v6only=True, options=pool.rule.options))
    everybody = AccessList.compile((), ())
    wildcard = UdpListener(bench.loop, bench.relay, sock, pool, everybody)
    wildcard.start()
    bench.listeners.append(wildcard)
    client = bench.client(listener)
    ask(bench, client, one, b"x")

    def meanwhile() -> None:
        for _ in range(5):
            client.send(b"z")

    with before_connect(monkeypatch, meanwhile):
        client.send(b"y")
        bench.turn(4)
    assert drain(two) == []
    assert sorted(drain(one)) == [b"y"] + [b"z"] * 5
    wildcard.stop()
    assert not bench.relay.wildcard_ports[port]
    ask(bench, client, one, b"and on")
