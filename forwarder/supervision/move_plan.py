"""Sessions on their way from one process to another: who gets them, and what if nobody does. Pure.

Moves nothing and reads no clock; ``now`` is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from forwarder.system.backoff import backoff

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# Sessions in one message; its descriptors bound it, too, see ``ipc.consignment``.
MOST_AT_ONCE: Final = 100
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


@dataclass(frozen=True, slots=True)
class Taker:
    """A worker that can take sessions; how many it has, those on their way to it as well."""

    pid: int
    slot: int
    sessions: int


def choose(takers: Iterable[Taker], slot: int | None, avoided: Collection[int]) -> Taker | None:
    """The one with the fewest sessions, of ``slot`` if that is given; none if there is none.

    ``avoided``: pids of those that are chosen only where no other can be.
    """
    fit = [one for one in takers if slot in (None, one.slot)]
    return min(fit, key=lambda one: (one.pid in avoided, one.sessions, one.slot), default=None)


def share(sessions: int, takers: int) -> int:
    """How many sessions of a giver to ask for at a time, so that all takers get some."""
    return max(1, min(MOST_AT_ONCE, -(-sessions // max(1, takers))))


def next_ask(left: int, busy: int, failures: int, now: float) -> float | None:
    """When to ask a giver again, by its last answer; None: there is nothing left to move.

    ``failures``: consignments in a row that came back.
    """
    if failures:
        return now + backoff(failures, FIRST_PAUSE_S, LONGEST_PAUSE_S)
    if left:
        return now
    return now + BUSY_S if busy else None


class Fate(Enum):
    """What becomes of sessions that nobody has taken."""

    SEND = "to the taker"
    BACK = "back to the giver"
    KEEP = "wait for a taker"
    RESET = "reset"


def fate(*, has_giver: bool, has_taker: bool, is_ending: bool, tries: int, deaths: int) -> Fate:
    """What becomes of sessions that nobody has taken.

    ``has_giver``: it can be told to go on with them. ``has_taker``: there is a worker for them,
    when ``is_ending`` any that lives. ``tries``: takers that they were sent to; ``deaths``: those of
    them that have died before they answered.
    """
    if has_giver:
        return Fate.SEND if has_taker and not tries and not is_ending else Fate.BACK
    if deaths >= MOST_DEATHS:
        return Fate.RESET
    if has_taker:
        return Fate.SEND
    return Fate.RESET if is_ending else Fate.KEEP
