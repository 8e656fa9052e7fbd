"""Real programs at the ends of UDP rules, and beside them: DNS, and rinetd on the same task."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from support.datagrams import Address, drain, free_udp_address, numbered, udp, udp_client
from support.dns import ADDRESS, LONG_NAME, NAME, dig, dns_server
from support.ends import accept, connect, listen, receive_exactly, written
from support.forwarder import reserve_port
from support.programs import debian
from support.waiting import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from process.conftest import Launch

pytestmark = pytest.mark.process


# -- DNS


@debian("dnsmasq", "dig")
def test_dns_between_udp_and_tcp(launch: Launch, tmp_path: Path) -> None:
    """A client by UDP gets to the server by TCP and the other way round, framed by length.

    Result: many queries of each kind, one of them with an answer that needs TCP or EDNS.
    """
    with ExitStack() as stack:
        server = stack.enter_context(dns_server())
        by_udp = free_udp_address()
        by_tcp = stack.enter_context(reserve_port()).getsockname()
        path = tmp_path / "dns.toml"
        path.write_text(
            "".join(
                f'[[forwarding_rules]]\nlisten = "{written(address)}"\n'
                f'upstream = "{written(server)}"\nprotocol = "{protocol}"\nframing = "length"\n'
                for address, protocol in ((by_udp, "udptotcp"), (by_tcp, "tcptoudp"))
            )
        )
        it = launch("-c", str(path), "--workers", "2")
        direct = dig(server, LONG_NAME, "+tcp", "TXT")
        assert len(direct) > 1500
        for _ in range(5):
            assert dig(by_udp, NAME) == ADDRESS
            assert dig(by_tcp, NAME, "+tcp") == ADDRESS
            assert dig(by_udp, LONG_NAME, "+bufsize=4096", "TXT") == direct
            assert dig(by_tcp, LONG_NAME, "+tcp", "+bufsize=4096", "TXT") == direct
        assert it.stop() == 0
        assert not it.trouble()


@debian("dnsmasq", "dig")
def test_dns_through_rules_for_udp_and_tcp(launch: Launch, tmp_path: Path) -> None:
    """Both on one port, as for a real name server; dig turns to TCP when an answer is cut."""
    with ExitStack() as stack:
        server = stack.enter_context(dns_server())
        address = stack.enter_context(reserve_port()).getsockname()
        path = tmp_path / "dns.toml"
        path.write_text(
            "".join(
                f'[[forwarding_rules]]\nlisten = "{written(address)}"\n'
                f'upstream = "{written(server)}"\nprotocol = "{protocol}"\n'
                for protocol in ("udp", "tcp")
            )
        )
        it = launch("-c", str(path), "--workers", "2")
        direct = dig(server, LONG_NAME, "+tcp", "TXT")
        for _ in range(5):
            assert dig(address, NAME) == ADDRESS
            assert dig(address, LONG_NAME, "+noedns", "TXT") == direct
        assert it.stop() == 0


# -- rinetd 0.73, where it does what it should


@contextmanager
def rinetd(tmp_path: Path, rule: str) -> Iterator[None]:
    """Run rinetd with one rule; it is up once something is bound."""
    conf = tmp_path / "rinetd.conf"
    conf.write_text(f"{rule}\npidlogfile {tmp_path}/rinetd.pid\n")
    with subprocess.Popen(
        ["rinetd", "-f", "-c", str(conf)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.fixture(params=["rinetd", "forwarder"])
def start(
    launch: Launch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], None]]:
    """Run one of the two with a rule, in the very same file."""
    with ExitStack() as stack:

        def by_rinetd(rule: str) -> None:
            stack.enter_context(rinetd(tmp_path, rule))

        def by_forwarder(rule: str) -> None:
            conf = tmp_path / "forwarder.conf"
            conf.write_text(rule + "\n")
            stack.callback(launch("-c", str(conf), "--workers", "2").stop)

        yield by_rinetd if request.param == "rinetd" else by_forwarder


def wait_bound(address: tuple[str, int]) -> None:
    """Until somebody has the UDP address."""

    def is_bound() -> bool:
        try:
            udp(*address).close()
        except OSError:
            return True
        return False

    eventually(is_bound)


def receive_content(upstream: socket.socket) -> tuple[bytes, Address]:
    """A datagram and who sent it; rinetd begins a flow with an empty one of its own."""
    content, source = upstream.recvfrom(65536)
    return (content, source) if content else receive_content(upstream)


@debian("rinetd")
def test_small_datagrams_one_at_a_time(start: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(udp())
        address = free_udp_address()
        rule = "{} {}/udp {} {}/udp".format(*address, *upstream.getsockname())
        start(rule)
        wait_bound(address)
        client = stack.enter_context(udp_client(address))
        sources = set()
        for content in numbered(50, [4, 100, 1200]):
            client.send(content)
            got = receive_content(upstream)
            assert got[0] == content
            sources.add(got[1])
            upstream.sendto(content[::-1], got[1])
            assert client.recv(65536) == content[::-1]
        assert len(sources) == 1
        assert drain(client) == []


@debian("rinetd")
def test_udp_to_a_raw_stream(start: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(listen())
        address = free_udp_address()
        rule = "{} {}/udp {} {}/tcp".format(*address, *upstream.getsockname())
        start(rule)
        wait_bound(address)
        client = stack.enter_context(udp_client(address))
        client.send(b"first")
        peer = stack.enter_context(accept(upstream))
        assert receive_exactly(peer, 5) == b"first"
        for content in numbered(30, [10, 700]):
            client.send(content)
            assert receive_exactly(peer, len(content)) == content
            peer.sendall(content[::-1])
            assert client.recv(65536) == content[::-1]


@debian("rinetd")
def test_a_raw_stream_to_udp(start: Callable[[str], None]) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(udp())
        address = stack.enter_context(reserve_port()).getsockname()
        rule = "{} {}/tcp {} {}/udp".format(*address, *upstream.getsockname())
        start(rule)

        clients: list[socket.socket] = []

        def is_up() -> bool:
            with suppress(ConnectionRefusedError):
                clients.append(connect(address))
            return bool(clients)

        eventually(is_up)
        client = stack.enter_context(clients[0])
        for content in numbered(30, [10, 700]):
            client.sendall(content)
            got = receive_content(upstream)
            assert got[0] == content
            upstream.sendto(content[::-1], got[1])
            assert receive_exactly(client, len(content)) == content[::-1]
