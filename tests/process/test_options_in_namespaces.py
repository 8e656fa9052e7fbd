"""Options that need a network of their own: another's address, and devices. See ``network``."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from support.configured import rule
from support.ends import accept, carry, connect, listen
from support.waiting import PATIENCE_S

from process.conftest import ADDRESSES

if TYPE_CHECKING:
    from support.namespaces import Namespace

    from process.conftest import Network

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces"),
]
PORT: Final = 7000


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
