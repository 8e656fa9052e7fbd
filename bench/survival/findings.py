"""From what streams have seen to the figures of a table. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.groups.findings import ms, percentile

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Spell:
    """What ``last.c`` has seen between two questions. ``lost`` are older than a second.

    ``silences_s``: how long each stream that was open all the time has waited at most.
    """

    lost: int
    young: int
    wrong: int
    failed: int
    silences_s: tuple[float, ...]

    @classmethod
    def of(cls, line: str) -> Spell:
        """Read an answer of ``last.c``. Raises ValueError if it is something else."""
        lost, young, wrong, failed, *silences = map(int, line.split())
        return cls(lost, young, wrong, failed, tuple(one / 1e6 for one in silences))


@dataclass(frozen=True, slots=True)
class Blow:
    """One event: what streams saw of it, of how many, and how long old processes stayed.

    ``stayed_s`` is None when they were still there when the next event came, or if none is to go.
    """

    spell: Spell
    streams: int
    stayed_s: float | None


HEAD = (
    "what happens",
    "times",
    "streams lost, of",
    "wrong bytes",
    "connects failed",
    "silence p50, ms",
    "silence p99, ms",
    "longest, ms",
    "old processes stay",
)


def row(what: str, blows: Sequence[Blow], patience_s: float, *, leave_something: bool) -> list[str]:
    """A row of the table. ``leave_something``: old processes are to go after such an event."""
    silences = [one for blow in blows for one in blow.spell.silences_s]
    lost = sum(blow.spell.lost + blow.spell.young for blow in blows)
    total = sum(blow.streams for blow in blows)
    return [
        what,
        str(len(blows)),
        f"{lost:,} of {total:,}",
        f"{sum(blow.spell.wrong for blow in blows):,}",
        f"{sum(blow.spell.failed for blow in blows):,}",
        ms(percentile(silences, 0.5)),
        ms(percentile(silences, 0.99)),
        ms(max(silences, default=float("nan"))),
        _stay(blows, patience_s) if leave_something else "-",
    ]


def _stay(blows: Sequence[Blow], patience_s: float) -> str:
    stayed = [blow.stayed_s for blow in blows]
    times = [one for one in stayed if one is not None]
    longest = f"{max(times):,.1f} s" if times else ""
    left = len(stayed) - len(times)
    if not left:
        return longest
    return f"after {left} of {len(stayed)} longer than {patience_s:g} s"
