"""Reading the kernel's tables of sockets, proc(5). Knows nothing of what the sockets are for."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


def rows(table: Path) -> list[list[str]]:
    """The fields of each socket of a table such as /proc/net/udp; none where it cannot be read."""
    with suppress(OSError):
        return [line.split() for line in table.read_text().splitlines()[1:]]
    return []


def local_addresses(tables: Iterable[Path]) -> Iterator[tuple[bool, str, int]]:
    """Of each socket: whether it is connected, its local host and port."""
    for table in tables:
        for fields in rows(table):
            host, port = decode(fields[1])
            yield int(fields[2].rpartition(":")[2], 16) != 0, host, port


def decode(text: str) -> tuple[str, int]:
    """A host and port as the tables write them: the address in host byte order, word by word."""
    host, _, port = text.partition(":")
    words = [int(host[at : at + 8], 16) for at in range(0, len(host), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)


def encode(sock: socket.socket) -> str:
    """Where a socket is bound, as the tables write it."""
    host, port = sock.getsockname()[:2]
    raw = socket.inet_pton(sock.family, host.partition("%")[0])
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
