"""UDP through the real command: each way of moving datagrams, one worker and several, v4 and v6."""

from __future__ import annotations

import json
import random
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support import procfs
from support.datagrams import (
    drain,
    free_udp_address,
    numbered,
    receive_all,
    udp,
    udp_client,
)
from support.ends import accept, connect, listen, receive_exactly, receive_to_end, written
from support.forwarder import Forwarder, reserve_port
from support.processes import run_command
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import StartForwarder

pytestmark = pytest.mark.process

VARIANTS = [
    ("splice", 1, "127.0.0.1"),
    ("splice", 3, "0.0.0.0"),
    ("splice", 3, "::"),
    ("copy", 1, "0.0.0.0"),
    ("copy", 3, "::1"),
]


class UdpTunnel(NamedTuple):
    """A running forwarder: where clients ask, and the upstream that they get to."""

    address: tuple[str, int]
    upstream: socket.socket

    def client(self) -> socket.socket:
        return udp_client(self.address)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda param: "-".join(map(str, param)))
def tunnel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[UdpTunnel]:
    """One for the whole module and variant."""
    relay, workers, host = request.param
    with udp("::1" if ":" in host else "127.0.0.1") as upstream:
        address = free_udp_address(host)
        path = tmp_path_factory.mktemp("udp") / "udp.toml"
        path.write_text(
            f'workers = {workers}\nrelay = "{relay}"\n[[forwarding_rules]]\nprotocol = "udp"\n'
            f'listen = "{written(address)}"\nupstream = "{written(upstream.getsockname())}"\n'
        )
        forwarder = Forwarder(["-c", str(path)])
        asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        try:
            yield UdpTunnel((asked, address[1]), upstream)
            assert forwarder.stop() == 0
            assert not forwarder.trouble(), forwarder.trouble()
        finally:
            if forwarder.process.returncode is None:
                forwarder.kill()


def test_sizes_up_to_the_largest_both_ways(tunnel: UdpTunnel) -> None:
    with tunnel.client() as client:
        for size in (0, 1, 100, 1472, 1473, 9000, 65506, 65507):
            content = random.Random(size).randbytes(size)
            client.send(content)
            got, source = tunnel.upstream.recvfrom(65536)
            assert got == content
            tunnel.upstream.sendto(content, source)
            assert client.recv(65536) == content


@pytest.mark.parametrize("sizes", [[1200], [30, 700, 0, 1400]], ids=str)
def test_bursts_keep_their_order_and_boundaries(tunnel: UdpTunnel, sizes: list[int]) -> None:
    with tunnel.client() as client:
        for _ in range(10):
            sent = numbered(100, sizes)
            for content in sent:
                client.send(content)
            first, source = tunnel.upstream.recvfrom(65536)
            assert [first, *receive_all(tunnel.upstream, 99)] == sent
            for content in sent:
                tunnel.upstream.sendto(content, source)
            assert receive_all(client, 100) == sent


def test_interleaved_clients_each_get_their_own_answers(tunnel: UdpTunnel) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(tunnel.client()) for _ in range(100)]
        sources: dict[bytes, object] = {}
        for turn in range(5):
            for number, client in enumerate(clients):
                client.send(b"%d %d" % (number, turn))
            for _ in clients:
                text, source = tunnel.upstream.recvfrom(100)
                who = text.split()[0]
                assert sources.setdefault(who, source) == source, "a client is one flow"
                tunnel.upstream.sendto(b"1 to " + text, source)
                tunnel.upstream.sendto(b"2 to " + text, source)
            for number, client in enumerate(clients):
                mine = b"to %d %d" % (number, turn)
                assert receive_all(client, 2) == [b"1 " + mine, b"2 " + mine]
        assert len(set(sources.values())) == 100
        assert all(drain(client) == [] for client in clients)


def test_an_upstream_may_speak_first_and_last(tunnel: UdpTunnel) -> None:
    """Unsolicited, to a flow of one datagram and to one of several."""
    with tunnel.client() as client:
        client.send(b"hello")
        _, source = tunnel.upstream.recvfrom(100)
        sent = numbered(50)
        for content in sent:
            tunnel.upstream.sendto(content, source)
        assert receive_all(client, 50) == sent
        client.send(b"more")
        assert tunnel.upstream.recvfrom(100) == (b"more", source)
        for content in sent:
            tunnel.upstream.sendto(content, source)
        assert receive_all(client, 50) == sent


# -- rules of their own


@pytest.mark.parametrize("protocol", ["udp", "udptotcp", "tcptoudp"])
def test_an_upstream_may_have_a_name(
    start_forwarder: StartForwarder, tmp_path: Path, protocol: str
) -> None:
    """What is sent meanwhile waits. oxidinetd wants a literal for TCP to UDP."""
    with ExitStack() as stack:
        by_tcp = protocol == "tcptoudp"
        address = (
            stack.enter_context(reserve_port()).getsockname() if by_tcp else free_udp_address()
        )
        upstream = stack.enter_context(listen() if protocol == "udptotcp" else udp())
        path = tmp_path / "name.toml"
        path.write_text(
            f'workers = 1\n[[forwarding_rules]]\nlisten = "{written(address)}"\n'
            f'protocol = "{protocol}"\nupstream = "localhost:{upstream.getsockname()[1]}"\n'
        )
        it = start_forwarder("-c", str(path))
        client = stack.enter_context(connect(address) if by_tcp else udp_client(address))
        for text in (b"1", b"2", b"3"):
            client.send(text)
        peer = stack.enter_context(accept(upstream)) if protocol == "udptotcp" else upstream
        got = b""
        while len(got) < 3:
            got += peer.recv(100)
        assert got == b"123"
        client.close()
        peer.close()
        assert it.stop() == 0


def test_flows_beyond_the_limit_are_counted_in_the_status(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(udp())
        address = free_udp_address()
        path = tmp_path / "few.toml"
        path.write_text(
            f'workers = 1\ncontrol = "{tmp_path}/control"\n[[forwarding_rules]]\nmax_flows = 5\n'
            f'listen = "{written(address)}"\nprotocol = "udp"\n'
            f'upstream = "{written(upstream.getsockname())}"\n'
        )
        it = start_forwarder("-c", str(path))
        clients = [stack.enter_context(udp_client(address)) for _ in range(8)]
        for client in clients:
            client.send(b"x")
            upstream.recv(10)

        def totals() -> dict[str, int]:
            done = run_command("status", "--json", "--control", f"{tmp_path}/control")
            found: dict[str, int] = json.loads(done.stdout)["totals"]
            return found

        eventually(lambda: totals()["flows_evicted"] == 3)
        assert totals()["sessions"] == 5
        assert it.stop() == 0


def test_nothing_of_a_flow_is_left_after_its_time(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    """Of UDP flows, of those to TCP, and of TCP clients that have said all. Result: as before."""
    with ExitStack() as stack:
        datagrams = stack.enter_context(udp())
        stream = stack.enter_context(listen())
        addresses = {
            "udp": free_udp_address(),
            "udptotcp": free_udp_address(),
            "tcptoudp": stack.enter_context(reserve_port()).getsockname(),
        }
        path = tmp_path / "short.toml"
        path.write_text(
            "workers = 1\n"
            + "".join(
                f'[[forwarding_rules]]\nlisten = "{written(address)}"\nprotocol = "{protocol}"\n'
                f'timeout = "1s"\nupstream = '
                f'"{written((stream if protocol == "udptotcp" else datagrams).getsockname())}"\n'
                for protocol, address in addresses.items()
            )
        )
        it = start_forwarder("-c", str(path))
        (worker,) = it.workers()
        before = procfs.without_pipes(worker)
        streams: list[socket.socket] = []
        for _ in range(20):
            for protocol in ("udp", "udptotcp"):
                client = stack.enter_context(udp_client(addresses[protocol]))
                client.send(b"x")
                client.send(b"y")
            client = stack.enter_context(connect(addresses["tcptoudp"]))
            client.sendall(b"z")
            client.shutdown(socket.SHUT_WR)
            peer = stack.enter_context(accept(stream))
            assert receive_exactly(peer, 2) == b"xy"
            streams += [client, peer]
        for end in streams:
            assert receive_to_end(end) == b""
        eventually(lambda: procfs.without_pipes(worker) == before)
        assert it.stop() == 0
