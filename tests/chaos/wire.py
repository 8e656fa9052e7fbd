"""What clients and upstreams agree on: who says what, so that each byte can be checked. Pure.

A client has a number, and its address says it. So the log of the program, and the kernel's tables,
name the same sessions as the load.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

MOST: Final = 1 << 22  # clients of a run
_FIRST_NETWORK: Final = 64  # 127.64.0.0/10 is the clients'
_TEXT: Final = random.Random(7).randbytes(1 << 20)
PART: Final = 1 << 16
_TWICE: Final = _TEXT + _TEXT[:PART]

HEAD: Final = struct.Struct("!4sIBQQ")  # MAGIC, number, mode, and two numbers that the mode wants
GREETING: Final = struct.Struct("!4sIH")  # MAGIC, number, the port of the upstream
DATAGRAM: Final = struct.Struct("!II")  # number, position
MAGIC: Final = b"chao"
TRAILER_BYTES: Final = 100  # after the end of the other side


class Mode(IntEnum):
    """What the upstream does after its greeting; ``first`` and ``second`` are those of HEAD."""

    ECHO = 1
    """Sends back what it gets; after the end TRAILER_BYTES, and its own end. Waits ``first``
    milliseconds before it reads."""
    PUSH = 2
    """Sends ``first`` bytes and its end, then reads on for as long as it can."""
    ANSWER = 3
    """Reads to the end, then sends ``first`` bytes in ``second`` milliseconds, and its end."""
    RESET = 4
    """Sends back what it gets, and resets after ``first`` bytes."""


@dataclass(frozen=True)
class Ports:
    """Where everybody listens. Nobody else is in the network of a run."""

    plain: int = 9000
    metered: int = 9001
    limited: int = 9002
    group: int = 9003
    to_unix: int = 9004
    udp: int = 9005
    udptotcp: int = 9006
    tcptoudp: int = 9007
    extra: int = 9008  # of a rule that comes and goes
    span: tuple[int, ...] = (9010, 9011, 9012, 9013)
    upstream: int = 9100
    upstream_raw: int = 9101  # sends back whatever it gets
    upstream_udp: int = 9102
    upstream_span: tuple[int, ...] = (9110, 9111, 9112, 9113)
    victim: int = 9120  # the upstream that is killed
    taken: int = 9130  # somebody listens here, and lets nobody share it


PORTS: Final = Ports()
MOST_LIMITED: Final = 8  # max_sessions of that rule
FLOW_TIMEOUT_S: Final = 3


def address_of(number: int) -> str:
    """The address that only this client has."""
    if not 0 < number < MOST:
        raise ValueError(f"client {number} of {MOST}")
    return f"127.{_FIRST_NETWORK + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def number_of(host: str) -> int:
    """Which client has this address; 0 for none."""
    parts = host.removeprefix("::ffff:").split(".")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        return 0
    first, second, third, fourth = map(int, parts)
    is_ours = first == 127 and _FIRST_NETWORK <= second < _FIRST_NETWORK + (MOST >> 16)
    return (second - _FIRST_NETWORK << 16 | third << 8 | fourth) if is_ours else 0


def text(number: int, at: int, count: int) -> memoryview:
    """What a client says at this place, up to PART bytes; others say something else there."""
    start = (number * 7919 + at) % len(_TEXT)
    return memoryview(_TWICE)[start : start + min(count, PART)]


def is_text(number: int, at: int, data: bytes | memoryview) -> bool:
    """Whether ``data`` is what that client says there."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        wanted = text(number, at + done, len(view) - done)
        if view[done : done + len(wanted)] != wanted:
            return False
        done += len(wanted)
    return True
