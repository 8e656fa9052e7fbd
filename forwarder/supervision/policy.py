"""What to do about workers: when to start the next one, and which accept on which sockets. Pure.

Starts nothing and reads no clock; ``now`` is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from forwarder.system.backoff import backoff

if TYPE_CHECKING:
    from collections.abc import Collection

# A worker that lived this long had a stable life: its death starts a new count. Arbitrary.
STABLE_S: Final = 10.0
# The first death is answered at once; each further one doubles the wait, up to this.
FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 30.0
# From this many quick deaths in a row it is called a crash loop, and logged as such.
CRASH_LOOP_DEATHS: Final = 5


@dataclass(slots=True)
class Backoff:
    """When the worker of a slot may be started again."""

    quick_deaths: int = 0
    not_before: float = field(default=0.0)

    def on_death(self, started_at: float, now: float) -> float:
        """Note a death. Returns the seconds to wait before the next start, 0 for none."""
        if now - started_at >= STABLE_S:
            self.quick_deaths = 0
        self.quick_deaths += 1
        delay = 0.0
        if self.quick_deaths > 1:
            delay = backoff(self.quick_deaths - 1, FIRST_DELAY_S, LONGEST_DELAY_S)
        self.not_before = now + delay
        return delay

    @property
    def is_crash_loop(self) -> bool:
        """Whether this slot's workers keep dying young."""
        return self.quick_deaths >= CRASH_LOOP_DEATHS


def share_sockets(
    socket_slots: int, ready: Collection[int], starting: Collection[int]
) -> dict[int, list[int]]:
    """Which worker accepts on which slot's sockets.

    Sockets exist for slots 0 to ``socket_slots`` - 1; ``ready`` and ``starting`` are the slots of
    the workers that serve, or are about to. Every worker has its own slot's sockets. Those of a
    slot without a ready worker are adopted by the ready ones in turn, so that no client waits in a
    queue that no worker serves. Returns worker slot to socket slots, each in ascending order.
    """
    shares: dict[int, list[int]] = {slot: [] for slot in sorted({*ready, *starting})}
    adopters = sorted(ready)
    for slot in range(socket_slots):
        if slot in shares:
            shares[slot].append(slot)
        if slot not in ready and adopters:
            shares[adopters[slot % len(adopters)]].append(slot)
    return {slot: sorted(set(mine)) for slot, mine in shares.items()}
