"""Local ports that run out: in a network of one's own, where there are few. By the real command."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import control
from support.by_hand import UdpBench
from support.configured import rule
from support.datagrams import udp
from support.ends import accept, connect, listen, receive_to_reset
from support.namespaces import network
from support.waiting import eventually

from forwarder.config.model import Protocol, RelayMode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import StartForwarder
    from support.forwarder import Forwarder

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set local ports")
# Local ports that there are, and those of them that flows may have.
PORTS: Final = 80
MOST: Final = 70
FIRST: Final = 40000
AT: Final = ("127.0.0.1", 5300)
UPSTREAM: Final = ("127.0.0.1", 9000)
HOSTS: Final = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


@pytest.fixture(autouse=True)
def few_ports() -> Iterator[None]:
    with network():
        # Clients of the test are bound below.
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{FIRST} {FIRST + PORTS - 1}")
        yield


def totals(path: Path) -> dict[str, int]:
    found = control.ask(f"{path}.sock", "status")["totals"]
    assert isinstance(found, dict)
    return found


def ends(path: Path) -> dict[str, int]:
    rules = control.ask(f"{path}.sock", "status")["rules"]
    assert isinstance(rules, list)
    found = rules[0]["ends"]
    assert isinstance(found, dict)
    return found


def start(
    start_forwarder: StartForwarder, tmp_path: Path, more: str, workers: int
) -> tuple[Forwarder, Path]:
    path = tmp_path / "forwarder.toml"
    path.write_text(f'workers = {workers}\ncontrol = "{path}.sock"\n' + rule(AT, UPSTREAM, more))
    return start_forwarder("-c", str(path)), path


def clients(stack: ExitStack, count: int) -> Iterator[socket.socket]:
    """Clients whose own ports are below the few."""
    for number in range(count):
        client = stack.enter_context(udp("127.0.0.1", 20000 + number))
        client.connect(AT)
        yield client


@pytest.mark.expects_log("limit.reached .*local ports")
@pytest.mark.parametrize("workers", [1, 2])
def test_one_shot_clients_make_room_for_others_and_leave_ports_to_other_programs(
    start_forwarder: StartForwarder, tmp_path: Path, workers: int
) -> None:
    """Five times as many clients as there are ports, each of which asks once and stays.

    *Result*: each is answered, and another program still gets its ports.
    """
    with ExitStack() as stack:
        upstream = stack.enter_context(udp(*UPSTREAM))
        _, path = start(start_forwarder, tmp_path, 'protocol = "udp"', workers)
        for number, client in enumerate(clients(stack, 5 * PORTS)):
            client.send(b"%d" % number)
            question, flow = upstream.recvfrom(100)
            upstream.sendto(question, flow)
            assert client.recv(100) == b"%d" % number
        for _ in range(PORTS - MOST - 2):
            other = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            other.connect(("127.0.0.1", 1))
        eventually(lambda: totals(path)["flows_evicted"] >= 5 * PORTS - MOST)
        eventually(lambda: 0 < totals(path)["sessions"] <= MOST, lambda: totals(path))
        assert ends(path)["us/limit"] >= 5 * PORTS - MOST


@pytest.mark.expects_log("limit.reached .*local ports")
def test_when_others_have_all_ports_the_longest_silent_flow_makes_room(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(udp(*UPSTREAM))
        _, path = start(start_forwarder, tmp_path, 'protocol = "udp"', 1)
        turn = clients(stack, 60)
        for _ in range(20):
            next(turn).send(b"early")
            upstream.recv(100)
        with ExitStack() as greed:
            for _ in range(PORTS):
                other = greed.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                try:
                    other.bind(("", 0))
                except OSError:
                    break
            for client in turn:
                client.send(b"late")
                question, flow = upstream.recvfrom(100)
                upstream.sendto(question, flow)
                assert client.recv(100) == b"late"
        eventually(lambda: totals(path)["flows_evicted"] == 40, lambda: totals(path))


@pytest.mark.expects_log("limit.reached .*local ports")
def test_flows_over_tcp_make_room_for_others(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """More than there are ports towards the upstream: the port of a flow that goes is free."""
    with ExitStack() as stack:
        upstream = stack.enter_context(listen(*UPSTREAM))
        _, path = start(start_forwarder, tmp_path, 'protocol = "udptotcp"', 1)
        for number, client in enumerate(clients(stack, 3 * PORTS)):
            client.send(b"%d" % number)
            peer = stack.enter_context(accept(upstream))
            assert peer.recv(100) == b"%d" % number
            peer.sendall(b"answer")
            assert client.recv(100) == b"answer"
        eventually(lambda: totals(path)["flows_evicted"] >= 3 * PORTS - MOST)


@pytest.mark.expects_log("connect.failed .*no local port is free")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_session_without_a_local_port_says_so(
    start_forwarder: StartForwarder, tmp_path: Path, host: str
) -> None:
    """A program has all ports towards the upstream. The client is reset; it is our fault."""
    with ExitStack() as stack:
        upstream = stack.enter_context(listen(host, UPSTREAM[1]))
        path = tmp_path / "forwarder.toml"
        path.write_text(f'control = "{path}.sock"\n' + rule(AT, upstream.getsockname()[:2]))
        start_forwarder("-c", str(path))
        for _ in range(PORTS):
            stack.enter_context(connect((host, UPSTREAM[1])))
        client = stack.enter_context(socket.socket())
        client.settimeout(30)
        client.bind(("127.0.0.1", 20000))
        with suppress(ConnectionResetError):  # it may hear of that while it connects still
            client.connect(AT)
            receive_to_reset(client)
        eventually(lambda: ends(path).get("us/connect") == 1, lambda: ends(path))


def test_sockets_of_tcp_clients_count_for_the_ports_too() -> None:
    """All ways of ending give a port back. In this process."""
    bench = UdpBench(RelayMode.AUTO)
    upstream = bench.upstream()
    pool = bench.pool(upstream, protocol=Protocol.TCP_TO_UDP)
    client = bench.bridge(pool)
    bench.turn()
    assert bench.relay.flows.ports.used(pool.rule) == 1
    other = bench.pool(upstream)
    asker = bench.client(bench.listen(other))
    asker.send(b"x")
    bench.turn()
    assert bench.relay.flows.ports.used(pool.rule) == 2
    client.close()
    bench.relay.end_silent_flows(0)
    bench.turn()
    bench.close()
    assert bench.relay.flows.ports.used(pool.rule) == 0


def test_flows_stay_where_tcp_clients_have_more_ports_than_flows_could_give_back() -> None:
    """A TCP client of a UDP upstream makes no room for others."""
    bench = UdpBench(RelayMode.AUTO)
    bench.relay.flows.ports.limit = 4
    upstream = bench.upstream()
    bridges = bench.pool(upstream, protocol=Protocol.TCP_TO_UDP)
    for _ in range(6):
        bench.bridge(bridges)
    listener = bench.listen(bench.pool(upstream))
    for _ in range(5):
        bench.client(listener).send(b"x")
        bench.turn()
    assert bench.flows() == 6 + 2
    bench.close()
