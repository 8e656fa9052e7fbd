"""How often to log what may happen thousands of times a second, or to thousands at once. Pure.

At once when it begins, then every so often, with a count of what happened in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

# A failing upstream of a busy rule fails thousands of times a second; log it this often at most.
INTERVAL_S: Final = 10.0
# Things to remember; one more replaces the one that may be logged again first. Arbitrary; usually
# more than there are rules that fail at the same time.
MAX_KNOWN: Final = 4096
# Of many things to which the same happens at once, as in an outage, so many are named. Arbitrary.
MOST_NAMED: Final = 5
# The others are counted when it has happened to none for this long, or has gone on for INTERVAL_S.
QUIET_S: Final = 2.0


class Rarely:
    """Remembers what was logged when. One for each process or part of it; does not log."""

    __slots__ = ("_interval_s", "_known")

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        # When each thing may be logged again, which is their order, and how often it was left out.
        self._known: dict[str, tuple[float, int]] = {}

    def note(self, about: str, now: float) -> str | None:
        """Note that ``about`` has happened, at ``now``, in seconds of a monotonic clock.

        Returns None to leave it out this time; else what to add to the message: nothing, or how
        often it was left out since the last time.
        """
        until, unsaid = self._known.get(about, (now, 0))
        if now < until:
            self._known[about] = (until, unsaid + 1)
            return None
        self._known.pop(about, None)
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[about] = (now + self._interval_s, 0)
        return f" ({unsaid} more since the last report)" if unsaid else ""


@dataclass(slots=True)
class _Crowd:
    """Things to which the same happens: those that were named, and those that were not."""

    latest: float  # when it is over in any case
    until: float = 0.0
    named: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


class Crowds:
    """What happens to many things at once: the first few are named, the others counted.

    For each kind of event, which is an event and what the things belong to. Does not log.
    """

    __slots__ = ("_crowds", "_interval_s")

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._crowds: dict[tuple[str, str], _Crowd] = {}

    def names(self, kind: tuple[str, str], one: str, now: float) -> bool:
        """Note that it has happened to ``one``. Returns whether to name it.

        ``now`` is of a monotonic clock.
        """
        crowd = self._crowds.get(kind)
        if crowd is None:
            crowd = self._crowds[kind] = _Crowd(now + self._interval_s)
        crowd.until = min(crowd.latest, now + QUIET_S)
        if one in crowd.named or len(crowd.named) < MOST_NAMED:
            crowd.named.add(one)
            return True
        crowd.others.add(one)
        return False

    @property
    def deadline(self) -> float | None:
        """When :meth:`over` has something to say, perhaps; None for never."""
        return min((crowd.until for crowd in self._crowds.values()), default=None)

    def over(self, now: float) -> list[tuple[tuple[str, str], int]]:
        """The kinds of which others than those named were not told yet, and how many."""
        due = [kind for kind, crowd in self._crowds.items() if now >= crowd.until]
        found = [(kind, len(self._crowds.pop(kind).others)) for kind in due]
        return [(kind, more) for kind, more in found if more]
