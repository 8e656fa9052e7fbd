"""ICMP errors that are made up. Only root may send them, and only in a network of one's own."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.datagrams import Address

_UNREACHABLE, _TOO_BIG = 3, 4  # RFC 792


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def too_big(source: Address, to: Address, mtu: int = 1400) -> None:
    """Tell ``source`` that a UDP datagram to ``to`` did not fit into a link on the way."""
    ends = socket.inet_aton(source[0]) + socket.inet_aton(to[0])
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 1500, 1, 0x4000, 64, socket.IPPROTO_UDP, 0) + ends
    header = struct.pack("!HHHH", source[1], to[1], 1480, 0)
    body = struct.pack("!HH", 0, mtu) + ip + header
    told = struct.pack("!BBH", _UNREACHABLE, _TOO_BIG, 0) + body
    told = told[:2] + struct.pack("!H", checksum(told)) + body
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(told, (source[0], 0))
