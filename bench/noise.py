"""Whether two lists of figures differ by more than chance makes them: a permutation test. Pure.

The rank sum (Wilcoxon, Mann and Whitney), for it asks nothing of how figures are distributed: one
round that somebody else has spoiled weighs no more than its rank.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from math import comb
from statistics import mean, median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LEVEL: Final = 0.05  # of the probability below which a change is no longer called chance
# Every way to split the figures is looked at up to so many, else that many drawn ones; arbitrary.
_SPLITS: Final = 20_000
_SEED: Final = 1  # so that the same two runs are judged the same twice


class Verdict(StrEnum):
    """What can be said about a change."""

    CHANGED = "beyond the noise"
    NOISE = "within the noise"
    TOO_FEW = "too few rounds"


@dataclass(frozen=True, slots=True)
class Change:
    """From one median to another; ``ratio`` is nan when the first is zero."""

    before: float
    after: float
    ratio: float
    probability: float
    verdict: Verdict


def change(before: Sequence[float], after: Sequence[float]) -> Change:
    """Compare the figures of two runs. Neither may be empty."""
    first, second = median(before), median(after)
    probability = two_sided(before, after)
    # 3 rounds against 3 can be split in 20 ways, and two of them are as extreme as it gets: 0.1.
    if 2 / comb(len(before) + len(after), len(before)) >= LEVEL:
        verdict = Verdict.TOO_FEW
    else:
        verdict = Verdict.CHANGED if probability < LEVEL else Verdict.NOISE
    ratio = second / first if first else float("nan")
    return Change(first, second, ratio, probability, verdict)


def two_sided(first: Sequence[float], second: Sequence[float]) -> float:
    """How often a random split of all figures has rank sums at least as unequal as these."""
    ranked = ranks([*first, *second])
    count = len(first)
    expected = count * mean(ranked)
    # Half a rank is the smallest difference there is; the rest is rounding.
    seen = abs(sum(ranked[:count]) - expected) - 0.25
    splits = list(_splits(ranked, count))
    return sum(abs(sum(split) - expected) >= seen for split in splits) / len(splits)


def _splits(ranked: Sequence[float], count: int) -> Iterable[Sequence[float]]:
    if comb(len(ranked), count) <= _SPLITS:
        return combinations(ranked, count)
    draw = random.Random(_SEED)  # nothing is secret here
    drawn = [draw.sample(ranked, count) for _ in range(_SPLITS)]
    return [ranked[:count], *drawn]  # with the one that was seen, so that it is never 0


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1 on; equal ones share the mean of theirs."""
    ordered = sorted(values)
    last = {value: number for number, value in enumerate(ordered, start=1)}
    first = {value: number for number, value in reversed([*enumerate(ordered, start=1)])}
    return [(first[value] + last[value]) / 2 for value in values]
