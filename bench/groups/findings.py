"""From what clients and servers have seen to the figures of a table. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SERVED = "served"


class Knock(NamedTuple):
    """One client of ``knock.c``: began at ``began_s`` (monotonic), reached ``server`` or nobody."""

    began_s: float
    took_s: float
    outcome: str
    server: str


class Seen(NamedTuple):
    """What a server has had of sessions, as ``greet.c`` says it."""

    open: int
    most: int
    total: int


def knocks(text: str) -> list[Knock]:
    """Read the output of ``knock.c``. Raises ValueError if it is something else."""
    found = []
    for line in text.splitlines():
        began, took, outcome, server = line.split(" ")
        found.append(Knock(float(began) / 1e6, float(took) / 1e6, outcome, server))
    return found


def seen(text: str) -> dict[str, Seen]:
    """Read an answer of ``greet.c``, by address."""
    rows = (line.split(" ") for line in text.splitlines() if line)
    return {row[0]: Seen(*map(int, row[1:])) for row in rows}


def per_second(found: Iterable[Knock]) -> float:
    """How many were served a second, from the first that came to the last that was served."""
    served = [knock for knock in found if knock.outcome == SERVED]
    if not served:
        return 0.0
    last = max(knock.began_s + knock.took_s for knock in served)
    return len(served) / (last - min(knock.began_s for knock in served))


def percentile(values: Iterable[float], part: float) -> float:
    """The smallest value that ``part`` (0 to 1) of all do not exceed; NaN of none."""
    every = sorted(values)
    if not every:
        return float("nan")
    rank = -int(-part * len(every) // 1)  # rounded up
    return every[min(max(rank, 1), len(every)) - 1]


@dataclass(frozen=True, slots=True)
class Span:
    """What became of the clients that began in one stretch of time; durations in seconds."""

    count: int
    rate: float
    failed: Counter[str]
    p50_s: float
    p99_s: float
    slowest_s: float

    @classmethod
    def of(cls, every: Sequence[Knock], since_s: float, until_s: float) -> Span:
        """Those that began from ``since_s`` on and before ``until_s``."""
        began = [knock for knock in every if since_s <= knock.began_s < until_s]
        took = [knock.took_s for knock in began if knock.outcome == SERVED]
        return cls(
            count=len(began),
            rate=len(began) / (until_s - since_s),
            failed=Counter(knock.outcome for knock in began if knock.outcome != SERVED),
            p50_s=percentile(took, 0.5),
            p99_s=percentile(took, 0.99),
            slowest_s=max(took, default=float("nan")),
        )


def failures(failed: Counter[str]) -> str:
    """Such as ``3: reset 2, late 1``."""
    if not failed:
        return "0"
    kinds = ", ".join(f"{name} {count}" for name, count in failed.most_common())
    return f"{failed.total():,}: {kinds}"


def ms(seconds: float) -> str:
    """Milliseconds for a table; a dash for NaN."""
    return f"{seconds * 1e3:,.1f}" if seconds == seconds else "-"  # noqa: PLR0124  # NaN is not itself


def shares(every: Iterable[Knock]) -> Counter[str]:
    """How many clients each server has served."""
    return Counter(knock.server for knock in every if knock.outcome == SERVED)


def too_many(most: Mapping[str, Seen], limit: int) -> int:
    """By how many sessions the worst server exceeded its limit at the worst moment."""
    return max((max(0, one.most - limit) for one in most.values()), default=0)


def strays(every: Iterable[Knock], server: str, since_s: float) -> int:
    """How many clients that began from ``since_s`` on were led to a server that was down."""
    return sum(knock.server == server and knock.began_s >= since_s for knock in every)
