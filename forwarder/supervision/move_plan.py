"""Sessions on their way from one process to another: who gets them, and what if nobody does. Pure.

Moves nothing and reads no clock; ``now`` is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.system.backoff import backoff

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# What cannot be moved yet (connecting, not settled) is asked for again after this time. Arbitrary.
BUSY_S: Final = 0.05
# After a consignment that came back, the next one; the pause doubles each time.
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 10.0
# A taker that has not answered by then does not get the sessions: they must not wait for a process
# that is stopped. An answer takes milliseconds.
TAKEN_WITHIN_S: Final = 0.5
# After that it is passed over for a while, if there are others.
PASSED_OVER_S: Final = 2.0
# So many takers may die before the sessions themselves are suspected of it.
MOST_DEATHS: Final = 3
# So many may not take sessions whose giver is gone, over 13 s, before they are reset. Arbitrary.
MOST_TRIES: Final = 8


@dataclass(frozen=True, slots=True)
class Taker:
    """A worker that can take sessions; how many it has, those on their way to it as well."""

    pid: int
    slot: int
    sessions: int


def choose(takers: Iterable[Taker], avoided: Collection[int]) -> Taker | None:
    """The one with the fewest sessions; one of ``avoided``, which are pids, only if all are."""
    return min(takers, key=lambda one: (one.pid in avoided, one.sessions, one.slot), default=None)


def share(sessions: int, takers: int, most: int) -> int:
    """How many sessions of a giver to ask for at a time, so that all takers get some."""
    return max(1, min(most, -(-sessions // max(1, takers))))


def next_ask(left: int, busy: int, failures: int, now: float) -> float | None:
    """When to ask a giver again, by its last answer; None: there is nothing left to move.

    ``failures``: consignments in a row that came back.
    """
    if failures:
        return now + pause(failures)
    if left:
        return now
    return now + BUSY_S if busy else None


def pause(failures: int) -> float:
    """How long to wait after consignments in a row that nobody has taken."""
    return backoff(failures, FIRST_PAUSE_S, LONGEST_PAUSE_S)


class Fate(Enum):
    """What becomes of sessions that nobody has taken."""

    SEND = "to the taker"
    BACK = "back to the giver"
    KEEP = "wait for a taker"
    RESET = "reset"


def fate(*, has_giver: bool, has_taker: bool, is_ending: bool, tries: int, deaths: int) -> Fate:
    """What becomes of sessions that nobody has taken.

    ``has_giver``: it can be told to go on with them. ``has_taker``: there is a worker for them,
    any that can be told something when ``is_ending``. ``tries``: to how many they were sent;
    ``deaths``: how many of these have died before they answered.
    """
    if has_giver:
        return Fate.SEND if has_taker and not tries and not is_ending else Fate.BACK
    if deaths >= MOST_DEATHS or tries >= MOST_TRIES:
        return Fate.RESET
    if has_taker:
        return Fate.SEND
    return Fate.RESET if is_ending else Fate.KEEP


@dataclass(slots=True)
class Outcome:
    """What became of an order.

    ``busy`` cannot be moved yet; ``back`` were not taken, ``why`` says why; ``silent`` are the pids
    of workers that have not answered in time.
    """

    moved: int = 0
    busy: int = 0
    back: int = 0
    why: str = ""
    silent: list[int] = field(default_factory=list)
