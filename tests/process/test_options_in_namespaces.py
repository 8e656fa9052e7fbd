"""Options that need a network of their own: another's address, devices, TCP Fast Open.

Three namespaces: clients -- the forwarder -- upstreams, joined by two pairs of veth(4).
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from support.configured import Configured, rule
from support.ends import accept, carry, connect, listen, receive_exactly, receive_to_end
from support.namespaces import Namespace, join
from support.processes import run_command, state
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces"),
]
_SYN_DATA: Final = 32  # TCPI_OPT_SYN_DATA, linux/tcp.h: the data of a SYN was acknowledged
PORT: Final = 7000


@dataclass
class Network:
    """``addresses`` of client, forwarder on either side, and upstream, by version of IP."""

    clients: Namespace
    middle: Namespace
    upstreams: Namespace
    path: Path
    launch: Launch

    def start(self, text: str) -> Configured:
        """Start a forwarder with two workers; its notifications do not reach us from there."""
        self.path.write_text("workers = 2\n" + text)
        it = self.launch("-c", str(self.path), prefix=self.middle.prefix, expect_ready=False)
        it.wait_logged(r"master\.ready")
        return Configured(it, self.path)

    def check(self, *command: str, text: str) -> tuple[int, str]:
        """Run a command with this configuration; how it ends, and what it says."""
        self.path.write_text(text)
        done = run_command(*command, "-c", str(self.path), prefix=self.middle.prefix)
        return done.returncode, done.stderr


ADDRESSES: Final = {
    "IPv4": ("10.1.0.2", "10.1.0.1", "10.2.0.1", "10.2.0.2"),
    "IPv6": ("fd01::2", "fd01::1", "fd02::1", "fd02::2"),
}


@pytest.fixture
def network(tmp_path: Path, launch: Launch) -> Iterator[Network]:
    """The three, with addresses and routes; answers of upstreams come to the forwarder itself."""
    with Namespace() as clients, Namespace() as middle, Namespace() as upstreams:
        join(clients, middle, ("c0", "near"))
        join(middle, upstreams, ("far", "u0"))
        for version, (client, near, far, upstream) in ADDRESSES.items():
            size, more = ("24", "") if version == "IPv4" else ("64", " nodad")
            clients.ip(f"addr add {client}/{size} dev c0{more}")
            middle.ip(
                f"addr add {near}/{size} dev near{more}", f"addr add {far}/{size} dev far{more}"
            )
            upstreams.ip(f"addr add {upstream}/{size} dev u0{more}")
            six, every = ("-6 ", "::/0") if version == "IPv6" else ("", "0.0.0.0/0")
            upstreams.ip(f"{six}route add default via {far}")
            middle.ip(
                f"{six}rule add iif far from {upstream} lookup 100",
                f"{six}route add local {every} dev lo table 100",
            )
        yield Network(clients, middle, upstreams, tmp_path / "forwarder.toml", launch)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed at the end."""
    with ExitStack() as found:
        yield found


def datagram_socket(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(PATIENCE_S)
    return sock


@pytest.mark.parametrize("version", ["IPv4", "IPv6"])
def test_upstreams_of_a_transparent_rule_see_the_address_of_the_client(
    network: Network, version: str
) -> None:
    """TCP and UDP; also with workers that are nobody, and clients that came to the wildcard."""
    client, near, _, upstream = ADDRESSES[version]
    with ExitStack() as stack:
        server = stack.enter_context(network.upstreams.call(partial(listen, upstream, PORT)))
        server.settimeout(PATIENCE_S)
        talks = stack.enter_context(
            network.upstreams.call(partial(datagram_socket, (upstream, PORT)))
        )
        it = network.start(
            'user = "nobody"\n'
            + rule(("::", PORT), (upstream, PORT), "transparent = true")
            + rule((near, PORT), (upstream, PORT), 'protocol = "udp"\ntransparent = true')
        )
        with network.clients.call(partial(connect, (near, PORT))) as sock, accept(server) as peer:
            assert peer.getpeername()[0] == client
            carry(sock, peer, b"there" * 10_000)
            carry(peer, sock, b"back" * 10_000)
        asking = stack.enter_context(network.clients.call(partial(datagram_socket, (client, 0))))
        for _ in range(3):
            asking.sendto(b"question", (near, PORT))
            question, flow = talks.recvfrom(100)
            assert (question, flow[0]) == (b"question", client)
            talks.sendto(b"answer", flow)
            assert asking.recv(100) == b"answer"
        assert it.forwarder.stop() == 0


def test_a_rule_that_is_bound_to_a_device_has_clients_of_that_device_only(
    network: Network, stack: ExitStack
) -> None:
    """By a reload: to the other device, to none, to one that comes later.

    Result: who comes in by another device is refused, and the listening sockets stay.
    """
    _, near, far, upstream = ADDRESSES["IPv4"]
    server = stack.enter_context(network.upstreams.call(partial(listen, upstream, PORT)))
    server.settimeout(PATIENCE_S)

    def text(options: str) -> str:
        return "workers = 2\n" + rule(("0.0.0.0", PORT), (upstream, PORT), options)

    def served() -> tuple[bool, bool]:
        return (
            is_served(network.clients, (near, PORT), server),
            is_served(network.middle, (far, PORT), server),
        )

    it = network.start(text('device = "near"').partition("\n")[2])
    # A host comes to an address of its own by the device that has it.
    assert served() == (True, False)
    assert "~1" in it.reload(text('device = "far"'))
    assert served() == (False, True)
    assert "~1" in it.reload(text('upstream_device = "far"'))
    assert served() == (True, True)
    assert "stays in force" in it.reload(text('device = "later"'))
    assert "~1" in it.reload(text('upstream_device = "near"\nconnect_timeout = 0.2'))
    refused = pytest.raises(ConnectionResetError)  # no upstream is to be found behind that one
    with network.clients.call(partial(connect, (near, PORT))) as sock, refused:
        sock.recv(1)
    assert it.forwarder.stop() == 0


def test_a_device_that_comes_later_is_waited_for(network: Network, stack: ExitStack) -> None:
    _, near, _, upstream = ADDRESSES["IPv4"]
    server = stack.enter_context(network.upstreams.call(partial(listen, upstream, PORT)))
    server.settimeout(PATIENCE_S)
    it = network.start(
        rule(("0.0.0.0", PORT), (upstream, PORT), 'device = "later"\nbind = "retry"')
    )
    it.forwarder.wait_logged("bind.waiting .*No such device")
    network.middle.ip("link set near down", "link set near name later", "link set later up")
    it.forwarder.wait_logged("bind.done")
    assert is_served(network.clients, (near, PORT), server)
    assert it.forwarder.stop() == 0


def is_served(where: Namespace, address: tuple[str, int], server: socket.socket) -> bool:
    """Whether a client there gets through."""
    try:
        sock = where.call(partial(connect, address))
    except ConnectionRefusedError:
        return False
    with sock, accept(server) as peer:
        carry(sock, peer, b"there")
    return True


# -- TCP Fast Open


def fast_listener(address: tuple[str, int]) -> socket.socket:
    sock = listen(*address)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    sock.settimeout(PATIENCE_S)
    return sock


def had_data_in_syn(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5] & _SYN_DATA)


def open_fast(address: tuple[str, int], data: bytes) -> socket.socket:
    """Send with the first segment, if this host has been there before."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    sock.sendto(data, socket.MSG_FASTOPEN, address)  # blocks until all of it is on its way
    sock.settimeout(PATIENCE_S)
    return sock


@pytest.mark.parametrize("version", ["IPv4", "IPv6"])
def test_fast_open_on_both_sides(network: Network, stack: ExitStack, version: str) -> None:
    """The first session gets the cookies, the second one begins with data in both SYNs."""
    _, near, _, upstream = ADDRESSES[version]
    for there in (network.clients, network.middle, network.upstreams):
        there.sysctl("ipv4/tcp_fastopen", 3)
    server = stack.enter_context(network.upstreams.call(partial(fast_listener, (upstream, PORT))))
    it = network.start(rule((near, PORT), (upstream, PORT), 'fast_open = "both"'))
    data = b"request" * 100
    found = []
    for _ in range(3):
        # What a client sends in the SYN is there when it is accepted.
        client = network.clients.call(partial(open_fast, (near, PORT), data))
        with client as sock, accept(server) as peer:
            assert receive_exactly(peer, len(data)) == data
            carry(peer, sock, b"answer")
            carry(sock, peer, b"more" * 50_000)
            found.append((had_data_in_syn(sock), had_data_in_syn(peer)))
            sock.shutdown(socket.SHUT_WR)
            assert receive_to_end(peer) == b""
    assert found[0][0] is False
    assert found[2] == (True, True)
    assert it.forwarder.stop() == 0


def test_with_fast_open_a_server_may_speak_first_and_an_upstream_may_be_away(
    network: Network, stack: ExitStack
) -> None:
    """Data waits for the upstream while the worker is stopped; the first upstream refuses it.

    Result: the second one gets all of it, once; the client that sends nothing is connected, too.
    """
    _, near, _, upstream = ADDRESSES["IPv4"]
    for there in (network.middle, network.upstreams):
        there.sysctl("ipv4/tcp_fastopen", 3)
    away = stack.enter_context(network.upstreams.call(partial(fast_listener, (upstream, PORT + 1))))
    server = stack.enter_context(network.upstreams.call(partial(fast_listener, (upstream, PORT))))
    text = rule((near, PORT), (upstream, PORT), 'fast_open = "connect"')
    both = f'upstream = ["{upstream}:{PORT + 1}", "{upstream}:{PORT}"]'
    it = network.start(re.sub("upstream = .*", both, text, count=1))
    for _ in range(4):  # both give their cookie, to each worker
        with network.clients.call(partial(connect, (near, PORT))) as sock:
            sock.settimeout(PATIENCE_S)
            # In turn, so one of the two; whoever it is speaks first.
            with accept(first_ready(away, server)) as peer:
                carry(peer, sock, b"220 welcome")
                carry(sock, peer, b"HELO")
    away.close()
    for _ in range(4):
        workers = it.forwarder.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: all(state(pid) == "T" for pid in workers), "not stopped")  # noqa: B023
        with network.clients.call(partial(connect, (near, PORT))) as sock:
            sock.sendall(b"x" * 50_000)
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            with accept(server) as peer:
                sock.shutdown(socket.SHUT_WR)
                assert receive_to_end(peer) == b"x" * 50_000
                carry(peer, sock, b"answer")
    assert it.forwarder.stop() == 0


def first_ready(*listeners: socket.socket) -> socket.socket:
    """The one of some listeners that somebody has connected to."""
    ready, _, _ = select.select(listeners, [], [], PATIENCE_S)
    found: socket.socket = ready[0]
    return found


def test_where_fast_open_is_turned_off_the_configuration_is_refused(network: Network) -> None:
    for value, side, word in ((1, "listen", "accept"), (2, "connect", "begin")):
        network.middle.sysctl("ipv4/tcp_fastopen", value)
        text = rule(("127.0.0.1", PORT), ("127.0.0.1", 1), f'fast_open = "{side}"')
        for command in ("check", "run"):
            code, said = network.check(command, text=text)
            assert code == 78
            assert f"forwarder.toml:4:1: fast_open: this system does not {word}" in said
            assert "`sysctl net.ipv4.tcp_fastopen=3`" in said


def test_a_client_that_is_gone_before_its_early_data_was_taken_costs_only_its_session(
    network: Network, stack: ExitStack
) -> None:
    """It resets while the upstream has not answered; afterwards another one is served."""
    _, near, _, upstream = ADDRESSES["IPv4"]
    for there in (network.middle, network.upstreams):
        there.sysctl("ipv4/tcp_fastopen", 3)
    server = stack.enter_context(network.upstreams.call(partial(fast_listener, (upstream, PORT))))
    it = network.start(rule((near, PORT), (upstream, PORT), 'fast_open = "connect"'))
    for _ in range(6):
        with network.clients.call(partial(connect, (near, PORT))) as sock:
            sock.sendall(b"x" * 1000)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: drain(server), "nobody is served any more")
    with network.clients.call(partial(connect, (near, PORT))) as sock:
        sock.sendall(b"last one")
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: take_one(server) == b"last one", "not served")
    assert it.forwarder.stop() == 0


def drain(server: socket.socket) -> bool:
    """Always true; who is queued is closed."""
    server.setblocking(False)
    try:
        while True:
            server.accept()[0].close()
    except BlockingIOError:
        server.settimeout(PATIENCE_S)
    return True


def take_one(server: socket.socket) -> bytes:
    """What the next session sends, to its end."""
    with accept(server) as peer:
        try:
            return receive_to_end(peer)
        except ConnectionResetError:
            return b""
