"""The address of a UDP client as bytes: a key for tables, and what the kernel wants to send to it.

A peer is a Linux ``sockaddr_in`` or ``sockaddr_in6`` (ip(7), ipv6(7)), followed by the address of
this host that the client wrote to if the listener is bound to a wildcard: a client that writes to
two of our addresses has two flows. Pure.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from forwarder.net.sockets import IpSockAddr

# Requests, reports and sets the address of ours in a datagram (ip(7)); linux/in.h.
IP_PKTINFO: Final = 8

_FAMILY: Final = struct.Struct("=H")
_IPV4: Final = struct.Struct("=H2s4s8x")
_IPV6: Final = struct.Struct("=H2s4x16sI")  # without flow information
_MAPPED: Final = bytes(10) + b"\xff\xff"  # an IPv4 address as an IPv6 one, RFC 4291 2.5.5.2
_NO_HOST: Final = b"\0\0\0\0"
_EVERY_HOST: Final = b"\xff\xff\xff\xff"
SOCKADDR_BYTES: Final = {int(socket.AF_INET): _IPV4.size, int(socket.AF_INET6): _IPV6.size}


def pack(family: int, address: IpSockAddr, local: bytes = b"") -> bytes:
    """The peer of a socket address with a numeric host; ``local`` is our packed address or none."""
    host, port = address[0], address[1]
    packed = socket.inet_pton(family, host.partition("%")[0])
    if family == socket.AF_INET:
        return _IPV4.pack(family, port.to_bytes(2, "big"), packed) + local
    scope = address[3] if len(address) == 4 else 0
    return _IPV6.pack(family, port.to_bytes(2, "big"), packed, scope) + local


def split(peer: bytes) -> tuple[bytes, bytes]:
    """The socket address and our own address (or none) of a peer."""
    size = SOCKADDR_BYTES[_FAMILY.unpack_from(peer)[0]]
    return peer[:size], peer[size:]


def address_of(peer: bytes) -> IpSockAddr:
    """The client's address, in the form of Python's sockets."""
    family = _FAMILY.unpack_from(peer)[0]
    if family == socket.AF_INET:
        _, port, packed = _IPV4.unpack_from(peer)
        return (socket.inet_ntop(family, packed), int.from_bytes(port, "big"))
    _, port, packed, scope = _IPV6.unpack_from(peer)
    return (socket.inet_ntop(family, packed), int.from_bytes(port, "big"), 0, scope)


def is_answerable(peer: bytes) -> bool:
    """Whether a client can be answered: it has a port, and an address that is its own.

    A socket connected to port 0 takes datagrams from every port of the address, one connected to
    the unspecified address is connected to this host (connect(2) on Linux).
    """
    if peer[2:4] == b"\0\0":
        return False
    address = peer[4:8]
    if len(peer) >= _IPV6.size:  # more than an IPv4 address and our own
        address = peer[8:24]
        if address[:12] != _MAPPED:
            return address[0] != 0xFF and any(address)
        address = address[12:]
    is_group = 224 <= address[0] < 240
    return not is_group and address not in (_NO_HOST, _EVERY_HOST)


def is_from(peer: bytes, host: str) -> bool:
    """Whether a peer has this numeric address, of its own family and with or without a scope."""
    family = _FAMILY.unpack_from(peer)[0]
    packed = peer[4:8] if family == socket.AF_INET else peer[8:24]
    return packed == socket.inet_pton(family, host.partition("%")[0])


def local_host(peer: bytes) -> str | None:
    """Our own address of a peer, if it has one."""
    local = split(peer)[1]
    if not local:
        return None
    return socket.inet_ntop(socket.AF_INET if len(local) == 4 else socket.AF_INET6, local)
