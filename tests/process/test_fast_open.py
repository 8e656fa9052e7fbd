"""TCP Fast Open on either side, in a network of its own: see ``network``."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from support.configured import rule
from support.ends import accept, carry, connect, listen, receive_exactly, receive_to_end
from support.processes import state
from support.waiting import PATIENCE_S, eventually

from process.conftest import ADDRESSES

if TYPE_CHECKING:
    from contextlib import ExitStack

    from process.conftest import Network

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces"),
]
_SYN_DATA: Final = 32  # TCPI_OPT_SYN_DATA, linux/tcp.h: the data of a SYN was acknowledged
PORT: Final = 7000


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
