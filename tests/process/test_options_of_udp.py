"""Socket options of UDP rules: of the listener, of the own socket of a flow, and of upstreams'."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
from support.borrowed import listening, peer_of, sockets_of
from support.configured import Configured, rule
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set marks")
Values = dict[str, object]
WRITTEN = (
    'protocol = "udp"\nrcvbuf = 50000\nsndbuf = 40000\nmark = 5\nupstream_mark = 6\n'
    'device = "lo"\nupstream_device = "lo"\ndscp = 10\n'
)
CLIENT_SIDE: Values = {
    "rcvbuf": 100000,
    "sndbuf": 80000,
    "mark": 5,
    "device": b"lo",
    "dscp": 40,
}


def values(sock: socket.socket) -> Values:
    # IPv4 flows may have IPv6 sockets with mapped addresses.
    is_v6 = sock.family == socket.AF_INET6 and "::ffff:" not in sock.getsockname()[0]
    level, name = (
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if is_v6 else (socket.IPPROTO_IP, socket.IP_TOS)
    )
    return {
        "rcvbuf": sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF),
        "sndbuf": sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        "mark": sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK),
        "device": sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0"),
        "dscp": sock.getsockopt(level, name),
    }


def plain(family: int) -> Values:
    """What the sockets of a rule without options have: large buffers, if granted."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for name in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, name, 4 * 1024 * 1024)
        return values(sock)


def datagram_socket(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    sock.settimeout(PATIENCE_S)
    return sock


@pytest.fixture(params=["127.0.0.1", "::1"], ids=["IPv4", "IPv6"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and an upstream."""
    with datagram_socket(request.param) as client, datagram_socket(request.param) as upstream:
        yield client, upstream


def free_address(host: str) -> tuple[str, int]:
    """A port that was free just now; a holder of it would be given datagrams."""
    with datagram_socket(host) as sock:
        name = sock.getsockname()
        return name[0], name[1]


def ask(
    client: socket.socket, upstream: socket.socket, address: tuple[str, int]
) -> tuple[str, int]:
    """A question and its answer; returns where the upstream is asked from."""
    client.sendto(b"question", address)
    question, flow = upstream.recvfrom(100)
    assert question == b"question"
    upstream.sendto(b"answer", flow)
    assert client.recv(100) == b"answer"
    return flow[0], flow[1]


def both(
    pid: int, client: socket.socket, upstream: socket.socket, address: tuple[str, int]
) -> tuple[Values, Values]:
    """Options of the two sockets of a flow. The second datagram makes it settle."""
    ask(client, upstream, address)
    asked_from = ask(client, upstream, address)

    def found() -> tuple[list[Values], list[Values]]:
        with sockets_of(pid) as socks:
            own = [values(s) for s in socks if peer_of(s) == client.getsockname()[:2]]
            out = [values(s) for s in socks if s.getsockname()[:2] == asked_from]
            return own, out

    eventually(lambda: all(found()), "the flow has no two sockets")
    own, out = found()
    return own[0], out[0]


@as_root
def test_the_sockets_of_a_flow_have_the_options_of_the_rule_and_a_reload_changes_them(
    launch: Launch, tmp_path: Path, ends: tuple[socket.socket, socket.socket]
) -> None:
    client, upstream = ends
    host, port = upstream.getsockname()[:2]
    address = free_address(host)
    path = tmp_path / "forwarder.toml"
    path.write_text(rule(address, (host, port), WRITTEN))
    it = Configured(launch("-c", str(path), "--workers", "1"), path)
    (worker,) = it.forwarder.workers()
    assert listening([it.forwarder.pid], address, values) == [CLIENT_SIDE]
    assert both(worker, client, upstream, address) == (CLIENT_SIDE, CLIENT_SIDE | {"mark": 6})

    assert "~1" in it.reload(rule(address, (host, port), 'protocol = "udp"'))
    expected = plain(client.family)
    assert listening([it.forwarder.pid], address, values) == [expected]
    with datagram_socket(host) as other:
        assert both(worker, other, upstream, address) == (expected, expected)
    ask(client, upstream, address)
    assert it.forwarder.stop() == 0
