"""UDP ends: clients, upstreams that see who asks, and waiting for what arrives."""

from __future__ import annotations

import itertools
import socket
from typing import TYPE_CHECKING

from support.hosts import own_host
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterable

Address = tuple[str, int]

_BUFFER_BYTES = 4 * 1024 * 1024
_hosts = itertools.count(1)


def udp(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A bound UDP socket that waits patiently; the kernel gives the port unless told."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        sock.bind((host, port))
        sock.settimeout(PATIENCE_S)
    except BaseException:
        sock.close()
        raise
    return sock


def udp_client(address: Address, host: str = "") -> socket.socket:
    """A client that speaks to ``address`` alone, from ``host`` if given."""
    client = udp(host or ("::1" if ":" in address[0] else "127.0.0.1"))
    client.connect(address)
    return client


def free_udp_address(host: str = "") -> Address:
    """An address that nobody is bound to just now, by default of a host that no other test uses.

    It is not held: whoever did would be a member of the SO_REUSEPORT group and get its datagrams.
    """
    host = host or own_host(next(_hosts) % 250 + 1)
    with udp(host) as sock:
        return sock.getsockname()[0], sock.getsockname()[1]


def receive_all(sock: socket.socket, count: int) -> list[bytes]:
    """The next ``count`` datagrams."""
    return [sock.recv(65536) for _ in range(count)]


def drain(sock: socket.socket) -> list[bytes]:
    """What has arrived already."""
    found = []
    sock.setblocking(False)  # MSG_DONTWAIT does not keep Python from waiting first
    try:
        while True:
            found.append(sock.recv(65536))
    except BlockingIOError:
        return found
    finally:
        sock.settimeout(PATIENCE_S)


def numbered(count: int, sizes: Iterable[int] = (100,)) -> list[bytes]:
    """Datagrams that can be told apart, of the sizes in turn; those below 4 bytes cannot."""
    turn = itertools.cycle(sizes)
    return [
        number.to_bytes(4, "big").ljust(size := next(turn), b".")[:size] for number in range(count)
    ]
