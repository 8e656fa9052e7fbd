"""Dialogues as hypothesis writes them: at random, but such that they end on a direct connection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from hypothesis import strategies as st

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

_EDGES: Final = (1, 16_384, 20_479, 20_480, 20_481, 65_536, 131_072, 262_144, 262_145)
"""Around the sizes of buffers and pipes on the way."""
_SIZES: Final = st.one_of(
    st.integers(1, 10),
    st.integers(1, 3000),
    st.sampled_from(_EDGES),
    st.integers(10_000, 300_000),
    st.integers(300_000, 3_000_000),
)
_FEW_AT_A_TIME: Final = 300
"""Up to so many bytes are said or read one at a time."""
_PIECES: Final = st.sampled_from((1 << 18, 1 << 18, 20_480, 5000, 1))
_PAUSES_MS: Final = st.sampled_from((0, 0, 0, 1, 5, 10))
_STALLS_MS: Final = st.sampled_from((1, 5, 10, 20, 50))
_LONG_STALL_MS: Final = 6500
"""Longer than a forwarder waits for anything that is not configured."""
_BUFFERS: Final = st.one_of(
    st.just(Buffers()),
    st.builds(
        Buffers, st.sampled_from((0, 4096, 16_384, 65_536)), st.sampled_from((0, 4608, 65_536))
    ),
)
_SLOW_BELOW: Final = 65_536
_MAX_BYTES_SLOWLY: Final = 60_000
"""A window this small is opened once in 40 ms (delayed acknowledgements): no more is said then."""
_KINDS: Final = st.sampled_from(
    ("send",) * 6
    + ("read",) * 5
    + ("pause", "meet", "half-close", "linger", "close", "reset", "remark") * 2
    + ("answer and go", "end and meet")
)
_RARELY: Final = st.integers(0, 39).map(lambda number: number == 39)


@dataclass
class _Writer:
    """Writes one script; knows how much it has said and read."""

    limit: int
    ops: list[Op] = field(default_factory=list)
    said: int = 0
    read: int = 0
    has_ended: bool = False
    is_gone: bool = False


@st.composite
def dialogues(draw: st.DrawFn) -> Dialogue:
    """A dialogue: steps of both ends in one order, each end does its own in that order.

    Nobody reads what is not said before in that order, so they never wait for each other.
    """
    buffers = (draw(_BUFFERS), draw(_BUFFERS))
    sizes = {size for one in buffers for size in (one.receive, one.send)} - {0}
    limit = _MAX_BYTES_SLOWLY if min(sizes, default=MAX_BYTES) < _SLOW_BELOW else MAX_BYTES
    writers = (_Writer(limit), _Writer(limit))
    steps = draw(st.lists(st.tuples(st.integers(0, 1), _KINDS), min_size=1, max_size=12))
    for side, kind in steps:
        mine, other = writers[side], writers[1 - side]
        if not mine.is_gone:
            _write(draw, kind, mine, other)
    return Dialogue(tuple(writers[0].ops), tuple(writers[1].ops), *buffers)


def _write(draw: st.DrawFn, kind: str, mine: _Writer, other: _Writer) -> None:
    match kind:
        case "send":
            _write_send(draw, mine)
        case "read":
            _write_read(draw, mine, other)
        case "pause":
            mine.ops.append(Pause(_LONG_STALL_MS if draw(_RARELY) else draw(_STALLS_MS)))
        case "meet":
            _write_meet(mine, other)
        case "linger":
            mine.ops.append(Linger())
        case "half-close":
            _write_half_close(mine)
        case "close" | "reset":
            _write_going(mine, by_reset=kind == "reset")
        case _:
            _write_phrase(draw, kind, mine, other)


def _write_phrase(draw: st.DrawFn, kind: str, mine: _Writer, other: _Writer) -> None:
    """Some steps that belong together, which are seldom found next to each other else."""
    match kind:
        case "remark":
            mine.ops.append(Pause(draw(_STALLS_MS)))
            _write_send(draw, mine, st.integers(1, 10))
        case "answer and go":
            _write_send(draw, mine)
            _write_half_close(mine)
            mine.ops.append(Linger())
            _write_going(mine, by_reset=draw(st.booleans()))
        case "end and meet":
            _write_half_close(mine)
            mine.ops.append(Linger())
            _write_meet(mine, other)


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


def _write_send(draw: st.DrawFn, mine: _Writer, sizes: st.SearchStrategy[int] = _SIZES) -> None:
    count = min(draw(sizes), mine.limit - mine.said)
    if mine.has_ended or not count:
        return
    mine.ops.append(Send(count, _piece(draw, count)))
    mine.said += count


def _write_read(draw: st.DrawFn, mine: _Writer, other: _Writer) -> None:
    there = other.said - mine.read
    to_the_end = draw(st.booleans()) if other.has_ended else False
    if to_the_end:
        piece = _piece(draw, there)
        mine.ops.append(ReadAll(piece, _pause(draw, there, piece)))
        mine.read = other.said
    elif there:
        count = min(there, draw(_SIZES))
        piece = _piece(draw, count)
        mine.ops.append(Read(count, piece, _pause(draw, count, piece)))
        mine.read += count


def _piece(draw: st.DrawFn, count: int) -> int:
    piece = draw(_PIECES)
    return piece if piece > 1 or count <= _FEW_AT_A_TIME else 1 << 18


def _pause(draw: st.DrawFn, count: int, piece: int) -> int:
    """So long that all of them do not take more than 0.3 s."""
    pause_ms = draw(_PAUSES_MS)
    return pause_ms if count // piece * pause_ms < 300 else 0
