"""What the monkey does, in which order: all of it from a seed. Pure.

An act names nothing of the world that it happens in, as that differs each time: ``which`` of the
workers is a share of those there are.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


class Deed(Enum):
    """What can be done."""

    RELOAD = "reload"
    BAD_RELOAD = "reload an invalid file"
    RESIZE = "resize"
    UPGRADE = "upgrade"
    MOVE = "move sessions to another worker"
    KILL_WORKER = "kill a worker"
    STOP_WORKER = "stop a worker for a moment"
    HANG_WORKER = "stop a worker until it is taken for hung"
    RETIRE_WORKER = "SIGTERM to a worker"
    STOP_MASTER = "stop the master for a moment"
    KILL_MASTER = "kill the master, and start another one"
    KILL_IN_UPGRADE = "kill a master amid an upgrade"
    KILL_CHECKER = "kill the checker"
    FILL_DISK = "fill the disk of the log"
    ROTATE = "rotate the log"
    FEW_DESCRIPTORS = "lower the limit of descriptors"
    FLOOD = "flood the control socket"
    KILL_UPSTREAM = "kill an upstream, and start it again"


@dataclass(frozen=True)
class Act:
    """A deed and how. ``which`` is a share of those to choose from, from 0 up to 1.

    ``pause_s`` is how long to wait before it, ``for_s`` how long it lasts, ``size`` how many or
    which variant, ``flag`` what else there is to say: see the monkey.
    """

    deed: Deed
    pause_s: float
    which: float
    size: int
    for_s: float
    flag: bool

    def __str__(self) -> str:
        return (
            f"{self.deed.value}: which={self.which:.2f} size={self.size} for={self.for_s:.2f} s "
            f"flag={self.flag}"
        )


# How often, relative to the others.
WEIGHTS: Final = {
    Deed.RELOAD: 4,
    Deed.BAD_RELOAD: 2,
    Deed.RESIZE: 5,
    Deed.UPGRADE: 3,
    Deed.MOVE: 3,
    Deed.KILL_WORKER: 5,
    Deed.STOP_WORKER: 2,
    Deed.HANG_WORKER: 1,
    Deed.RETIRE_WORKER: 2,
    Deed.STOP_MASTER: 2,
    Deed.KILL_MASTER: 2,
    Deed.KILL_IN_UPGRADE: 1,
    Deed.KILL_CHECKER: 1,
    Deed.FILL_DISK: 1,
    Deed.ROTATE: 2,
    Deed.FEW_DESCRIPTORS: 1,
    Deed.FLOOD: 1,
    Deed.KILL_UPSTREAM: 2,
}
_HURRY: Final = 0.4  # so many acts come upon the heels of the one before


def plan(seed: int, deeds: frozenset[Deed] = frozenset(Deed)) -> Iterator[Act]:
    """Acts without end, as cards from a deck: by mere chance rare ones would be missed."""
    lot = random.Random(seed)
    weights = {deed: weight for deed, weight in WEIGHTS.items() if deed in deeds}
    while True:
        deck = list(itertools.chain.from_iterable([deed] * n for deed, n in weights.items()))
        lot.shuffle(deck)
        for deed in deck:
            in_a_hurry = lot.random() < _HURRY
            yield Act(
                deed=deed,
                pause_s=lot.uniform(0, 0.1) if in_a_hurry else lot.uniform(0.2, 1.5),
                which=lot.random(),
                size=lot.randrange(12),
                for_s=lot.uniform(0.05, 1.5),
                flag=lot.random() < 0.5,
            )
