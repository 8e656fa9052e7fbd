"""Addresses of UDP clients as bytes, and as the kernel's tables write them."""

from __future__ import annotations

import socket
import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.net import peers, proc

ports = st.integers(0, 65535)
ipv4 = st.ip_addresses(v=4).map(lambda host: IPv4Address(int(host)))
ipv6 = st.ip_addresses(v=6).map(lambda host: IPv6Address(int(host)))


@given(ipv4, ports, st.one_of(st.none(), ipv4))
def test_ipv4_peers_go_there_and_back(
    host: IPv4Address, port: int, local: IPv4Address | None
) -> None:
    packed = local.packed if local else b""
    peer = peers.pack(socket.AF_INET, (str(host), port), packed)
    assert peers.address_of(peer) == (str(host), port)
    assert peers.split(peer) == (peer[:16], packed)
    assert peers.local_host(peer) == (str(local) if local else None)


@given(ipv6, ports, st.integers(0, 0xFFFFFFFF), st.one_of(st.none(), ipv6))
def test_ipv6_peers_go_there_and_back(
    host: IPv6Address, port: int, scope: int, local: IPv6Address | None
) -> None:
    """Compared as the kernel writes addresses: Python's ipaddress writes some otherwise."""
    packed = local.packed if local else b""
    text = socket.inet_ntop(socket.AF_INET6, host.packed)
    peer = peers.pack(socket.AF_INET6, (text, port, 0, scope), packed)
    assert peers.address_of(peer) == (text, port, 0, scope)
    assert peers.split(peer) == (peer[:28], packed)
    expected = socket.inet_ntop(socket.AF_INET6, packed) if local else None
    assert peers.local_host(peer) == expected


def test_port_scope_and_asked_address_tell_clients_apart() -> None:
    one = peers.pack(socket.AF_INET6, ("fe80::1", 5, 0, 2))
    assert one != peers.pack(socket.AF_INET6, ("fe80::1", 6, 0, 2))
    assert one != peers.pack(socket.AF_INET6, ("fe80::1", 5, 0, 3))
    assert one != peers.pack(socket.AF_INET6, ("fe80::1", 5, 0, 2), bytes(16))


def test_flow_information_and_the_name_of_an_interface_play_no_part() -> None:
    assert peers.pack(socket.AF_INET6, ("fe80::1%eth0", 5, 77, 2)) == peers.pack(
        socket.AF_INET6, ("fe80::1", 5, 0, 2)
    )


@given(st.one_of(ipv4, ipv6), ports)
def test_the_kernels_tables_are_read_as_they_are_written(
    host: IPv4Address | IPv6Address, port: int
) -> None:
    words = [host.packed[at : at + 4] for at in range(0, len(host.packed), 4)]
    text = "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    assert proc.decode(f"{text}:{port:04X}") == (socket.inet_ntop(family, host.packed), port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_socket_is_found_in_the_kernels_tables(host: str) -> None:
    """Connected or not, by what the table of its family says."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    table = Path("/proc/net/udp6" if ":" in host else "/proc/net/udp")
    if not table.exists():
        pytest.skip("no /proc/net here")
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        where = sock.getsockname()[:2]
        assert (False, *where) in list(proc.local_addresses([table]))
        assert proc.encode(sock) in [fields[1] for fields in proc.rows(table)]
        assert proc.decode(proc.encode(sock)) == where
        sock.connect((host, 9))
        assert (True, *where) in list(proc.local_addresses([table]))


def test_a_table_that_is_not_there_is_empty() -> None:
    assert proc.rows(Path("/nonexistent/udp")) == []
