"""IP literals as socket addresses, and the interface that some of them name: ``fe80::1%eth0``.

The kernel wants the index of the interface, which changes when the interface is recreated, and does
not exist while it is away. So such an address is worked out at each use, and not kept.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import IPv6Address

from forwarder.net.sockets import Target

_LARGEST_INDEX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Zoned:
    """An IPv6 address with its zone, an interface by name or by index, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}"

    @property
    def zone(self) -> str:
        """The interface."""
        return self.host.partition("%")[2]

    def target(self) -> Target | None:
        """The socket address now; None while there is no such interface. 2 us, never blocks."""
        index = index_of(self.zone)
        if not index:
            return None
        bare = self.host.partition("%")[0]
        # A zone in the text is for link-local addresses only; getaddrinfo refuses it elsewhere.
        is_local = IPv6Address(bare).is_link_local
        host = self.host if is_local else bare
        return Target(socket.AF_INET6, (host, self.port, 0, index))


def index_of(zone: str) -> int:
    """The index of an interface, 0 while there is none of that name."""
    try:
        return socket.if_nametoindex(zone)
    except (OSError, ValueError):
        number = int(zone) if zone.isdecimal() and len(zone) <= len(str(_LARGEST_INDEX)) else 0
        return number if number <= _LARGEST_INDEX else 0


def literal(host: str, port: int) -> Target | Zoned:
    """Where an IP literal leads to. Makes no system call, so it cannot fail."""
    if "%" in host:
        return Zoned(host, port)
    if ":" in host:
        return Target(socket.AF_INET6, (host, port, 0, 0))
    return Target(socket.AF_INET, (host, port))
