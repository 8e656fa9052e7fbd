"""Deadlines of many sessions at the price of one timer. Pure: never reads a clock.

A ring of buckets, one per tick. An entry whose deadline moved on (because data passed) is not
touched on the hot path; when its old bucket comes round it says its new deadline and is put there.
"""

from __future__ import annotations

from typing import Final, Protocol

# 0.1 s is far below every timeout that makes sense on a network and costs ten wake-ups a second
# while anything is armed. Arbitrary.
TICK_S: Final = 0.1
# With 0.1 s ticks one turn takes 51.2 s; longer deadlines go round again. Arbitrary.
BUCKETS: Final = 512


class Timed(Protocol):
    """What can be put on the wheel. ``tick`` belongs to the wheel: -1 when not on it."""

    tick: int

    def on_timer(self, now: float) -> float:
        """Act if due. Returns the next deadline, or 0 to leave the wheel."""


class Wheel:
    """Entries by the tick in which they must be looked at. ``now`` values are monotonic seconds."""

    __slots__ = ("_buckets", "_count", "_tick")

    def __init__(self, now: float) -> None:
        self._buckets: list[set[Timed]] = [set() for _ in range(BUCKETS)]
        self._count = 0
        self._tick = int(now / TICK_S)

    def __len__(self) -> int:
        return self._count

    def add(self, entry: Timed, deadline: float) -> None:
        """Look at ``entry`` by ``deadline`` or up to one tick later.

        One that is looked at earlier already stays where it is, and is asked for its deadline then.
        """
        tick = int(deadline / TICK_S) + 1
        if tick >= self._tick + BUCKETS:
            tick = self._tick + BUCKETS - 1
        elif tick <= self._tick:
            tick = self._tick + 1
        if entry.tick >= 0:
            if entry.tick <= tick:
                return
            self.discard(entry)
        entry.tick = tick
        self._buckets[tick % BUCKETS].add(entry)
        self._count += 1

    def discard(self, entry: Timed) -> None:
        """Take ``entry`` off, if it is on."""
        if entry.tick >= 0:
            self._buckets[entry.tick % BUCKETS].discard(entry)
            entry.tick = -1
            self._count -= 1

    def advance(self, now: float) -> None:
        """Look at all entries whose tick has passed. An entry may add or discard others."""
        target = int(now / TICK_S)
        # After a pause longer than one turn every bucket is due once, not once per missed turn.
        self._tick = max(self._tick, target - BUCKETS)
        while self._tick < target:
            self._tick += 1
            bucket = self._buckets[self._tick % BUCKETS]
            for entry in tuple(bucket):
                if entry in bucket:  # one before it in this round may have taken it off
                    self.discard(entry)
                    deadline = entry.on_timer(now)
                    if deadline:
                        self.add(entry, deadline)
            if not bucket:
                self._buckets[self._tick % BUCKETS] = set()  # one that was large stays large
