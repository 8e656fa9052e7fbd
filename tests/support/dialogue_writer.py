"""Dialogues at random, but such that they end on a direct connection.

Not by a strategy of hypothesis: it takes 4 ms for one, ten times what holding it does, and what
fails is made small by ``smaller``, many candidates at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from support.dialogues import (
    MAX_BYTES,
    Buffers,
    Close,
    Dialogue,
    HalfClose,
    Linger,
    Meet,
    Op,
    Pause,
    Read,
    ReadAll,
    Reset,
    Send,
)

if TYPE_CHECKING:
    from random import Random

_EDGES: Final = (1, 16_384, 20_479, 20_480, 20_481, 65_536, 131_072, 262_144, 262_145)
"""Around the sizes of buffers and pipes on the way."""
_RANGES: Final = ((1, 10), (1, 3000), (10_000, 300_000), (300_000, 3_000_000))
_FEW_AT_A_TIME: Final = 300
"""Up to so many bytes are said or read one at a time."""
_PIECES: Final = (1 << 18, 1 << 18, 20_480, 5000, 1)
_PAUSES_MS: Final = (0, 0, 0, 1, 5, 10)
_STALLS_MS: Final = (1, 5, 10, 20, 50)
_LONG_STALL_MS: Final = 6500
"""Longer than a forwarder waits for anything that is not configured."""
_RECEIVE_BUFFERS: Final = (0, 4096, 16_384, 65_536)
_SEND_BUFFERS: Final = (0, 4608, 65_536)
_SLOW_BELOW: Final = 65_536
_MAX_BYTES_SLOWLY: Final = 60_000
"""A window this small is opened once in 40 ms (delayed acknowledgements): no more is said then."""
_LONG_ONE_IN: Final = 60
_KINDS: Final = (
    *("send",) * 6,
    *("read",) * 5,
    *("pause", "meet", "half-close", "linger", "close", "reset", "remark") * 2,
    *("answer and go", "end and meet"),
)
_MOST_STEPS: Final = 12


@dataclass
class _Writer:
    """Writes one script; knows how much it has said and read."""

    limit: int
    ops: list[Op] = field(default_factory=list)
    said: int = 0
    read: int = 0
    has_ended: bool = False
    is_gone: bool = False


def written(random: Random) -> Dialogue:
    """A dialogue: steps of both ends in one order, each end does its own in that order.

    Nobody reads what is not said before in that order, so they never wait for each other.
    """
    buffers = (_buffers(random), _buffers(random))
    sizes = {size for one in buffers for size in (one.receive, one.send)} - {0}
    limit = _MAX_BYTES_SLOWLY if min(sizes, default=MAX_BYTES) < _SLOW_BELOW else MAX_BYTES
    writers = (_Writer(limit), _Writer(limit))
    for _ in range(random.randint(1, _MOST_STEPS)):
        side = random.randrange(2)
        mine, other = writers[side], writers[1 - side]
        if not mine.is_gone:
            _write(random, random.choice(_KINDS), mine, other)
    return Dialogue(tuple(writers[0].ops), tuple(writers[1].ops), *buffers)


def _buffers(random: Random) -> Buffers:
    if random.randrange(2):
        return Buffers()
    return Buffers(random.choice(_RECEIVE_BUFFERS), random.choice(_SEND_BUFFERS))


def _size(random: Random) -> int:
    number = random.randrange(len(_RANGES) + 1)
    return random.choice(_EDGES) if number == len(_RANGES) else random.randint(*_RANGES[number])


def _write(random: Random, kind: str, mine: _Writer, other: _Writer) -> None:
    match kind:
        case "send":
            _write_send(random, mine, _size(random))
        case "read":
            _write_read(random, mine, other)
        case "pause":
            mine.ops.append(Pause(_stall_ms(random)))
        case "meet":
            _write_meet(mine, other)
        case "linger":
            mine.ops.append(Linger())
        case "half-close":
            _write_half_close(mine)
        case "close" | "reset":
            _write_going(mine, by_reset=kind == "reset")
        case _:
            _write_phrase(random, kind, mine, other)


def _write_phrase(random: Random, kind: str, mine: _Writer, other: _Writer) -> None:
    """Some steps that belong together, which are seldom found next to each other else."""
    match kind:
        case "remark":
            mine.ops.append(Pause(random.choice(_STALLS_MS)))
            _write_send(random, mine, random.randint(1, 10))
        case "answer and go":
            _write_send(random, mine, _size(random))
            _write_half_close(mine)
            mine.ops.append(Linger())
            _write_going(mine, by_reset=bool(random.randrange(2)))
        case "end and meet":
            _write_half_close(mine)
            mine.ops.append(Linger())
            _write_meet(mine, other)


def _stall_ms(random: Random) -> int:
    return _LONG_STALL_MS if not random.randrange(_LONG_ONE_IN) else random.choice(_STALLS_MS)


def _write_meet(mine: _Writer, other: _Writer) -> None:
    mine.ops.append(Meet())
    if not other.is_gone:
        other.ops.append(Meet())


def _write_half_close(mine: _Writer) -> None:
    if not mine.has_ended:
        mine.ops.append(HalfClose())
        mine.has_ended = True


def _write_going(mine: _Writer, *, by_reset: bool) -> None:
    mine.ops.append(Reset() if by_reset else Close())
    mine.is_gone = mine.has_ended = True


def _write_send(random: Random, mine: _Writer, size: int) -> None:
    count = min(size, mine.limit - mine.said)
    if mine.has_ended or not count:
        return
    mine.ops.append(Send(count, _piece(random, count)))
    mine.said += count


def _write_read(random: Random, mine: _Writer, other: _Writer) -> None:
    there = other.said - mine.read
    to_the_end = bool(random.randrange(2)) if other.has_ended else False
    if to_the_end:
        piece = _piece(random, there)
        mine.ops.append(ReadAll(piece, _pause(random, there, piece)))
        mine.read = other.said
    elif there:
        count = min(there, _size(random))
        piece = _piece(random, count)
        mine.ops.append(Read(count, piece, _pause(random, count, piece)))
        mine.read += count


def _piece(random: Random, count: int) -> int:
    piece = random.choice(_PIECES)
    return piece if piece > 1 or count <= _FEW_AT_A_TIME else 1 << 18


def _pause(random: Random, count: int, piece: int) -> int:
    """So long that all of them do not take more than 0.3 s."""
    pause_ms = random.choice(_PAUSES_MS)
    return pause_ms if count // piece * pause_ms < 300 else 0
