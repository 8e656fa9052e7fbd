"""Bandwidth of a rule: what the directions of its sessions may move, and when they may go on.

Theory of operation
-------------------
All workers together keep one number per rule and direction in shared memory: until when the line is
taken. A worker that wants to move bytes draws a quantum if that time has passed, and so takes the
line for as long as the quantum lasts at the rate. What is moved beyond a quantum (a read is not cut
into pieces) is owed, and drawn for before more is moved. So the sum over all workers is the rate,
and no worker has to know how many there are.

A direction that has to wait stops reading, so the window of its sender closes, as with a slow
receiver; one timer per rule and direction lets those that wait go on, in turn. Nothing polls.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.limits.gate import Gate
    from forwarder.system.loop import Clock, Timer

log = logging.getLogger(__name__)

# A quantum lasts this long at the rate, within the bounds below: short enough to be smooth, long
# enough that drawing it costs nothing beside moving it. Arbitrary.
QUANTUM_S: Final = 0.01
# At the lowest rate one second of it: a first byte may wait this long for a worker that has drawn
# one.
SMALLEST_BYTES: Final = 1024
# What a direction moves before the others of its worker get their turn.
LARGEST_BYTES: Final = 1024 * 1024
# The loop's timers have steps of this. What is lost by waiting too long CATCH_UP_S gives back.
STEP_S: Final = 0.001


class Waiting(Protocol):
    """A direction of a session that waits for its turn."""

    def go_on(self, now: float) -> None:
        """Move more; called once for each time that it had to wait. ``now``: the loop's."""

    def on_bug(self) -> None:
        """:meth:`go_on` raised, which is a bug: end the session."""


class Meter:
    """One direction of all sessions of a rule in one worker."""

    __slots__ = (
        "_clock",
        "_gate",
        "_in_advance",
        "_left",
        "_line",
        "_loop",
        "_quantum",
        "_rate",
        "_served",
        "_timer",
        "_waiting",
    )

    def __init__(
        self,
        loop: Clock,
        gate: Gate,
        line: int,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``rate`` is bytes per second; ``line`` the number of the direction in the gate."""
        self._loop = loop
        self._gate = gate
        self._line = line
        self._clock = clock
        self._rate = rate
        self._quantum = quantum_of(rate)
        self._left = 0  # drawn and not moved yet; less than 0: owed
        self._in_advance = 0  # moved by those that cannot wait since the last turn
        self._waiting: OrderedDict[Waiting, None] = OrderedDict()
        self._served: Waiting | None = None  # whose turn it is
        self._timer: Timer | None = None

    def set_rate(self, rate: float) -> None:
        """Use another rate from now on, for those that wait, too; 0 is no limit."""
        if rate == self._rate:
            return
        self._rate = rate
        self._quantum = quantum_of(rate)
        self._left = max(self._left, 0) if rate else 0
        self._gate.free_line(self._line, self._clock() + (self._quantum / rate if rate else 0.0))
        if self._waiting:
            self._arm(0.0)

    def room(self, direction: Waiting) -> int:
        """How many bytes may be moved now; 0: ``direction`` is called when it may go on."""
        if direction is self._served or not self._waiting:
            wait_s = self._draw()
            if not wait_s:
                return self._left
            if self._timer is None:
                self._arm(wait_s)
        self._waiting[direction] = None
        return 0

    def room_now(self) -> int:
        """How many bytes may be moved now, for something that cannot wait.

        Beside directions that wait it gets its share by taking a quantum in advance for each of
        their turns.
        """
        if self._waiting:
            return max(self._quantum - self._in_advance, 0)
        return 0 if self._draw() else self._left

    def spend(self, moved: int) -> None:
        """Note that ``moved`` bytes were moved."""
        if self._rate:
            self._left -= moved

    def spend_now(self, moved: int) -> None:
        """Note that ``moved`` bytes were moved that could not wait."""
        self._in_advance += moved
        self.spend(moved)

    def holds_up(self, direction: Waiting) -> bool:
        """Whether a direction waits."""
        return direction in self._waiting

    def forget(self, direction: Waiting) -> None:
        """A direction has ended, and waits no more."""
        self._waiting.pop(direction, None)

    def _draw(self) -> float:
        """Get something to spend. Returns 0, or the seconds until there may be some."""
        if not self._rate:
            self._left = self._quantum
        while self._left <= 0:
            wait_s = self._gate.draw(self._line, self._clock(), self._quantum / self._rate)
            if wait_s > 0:
                return max(wait_s, STEP_S)
            self._left += self._quantum
        return 0.0

    def _arm(self, wait_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(wait_s, self._serve)

    def _serve(self) -> None:
        """Let those that wait go on, each once, as long as there is something left."""
        self._timer = None
        now = self._loop.time()
        wait_s = 0.0
        for _ in range(len(self._waiting)):
            if not self._waiting or (wait_s := self._draw()):
                break
            direction = self._served = self._waiting.popitem(last=False)[0]
            try:
                direction.go_on(now)
            except Exception:  # as in Poller: a bug must cost one session, not the worker
                log.exception("relay.bug while going on by a meter")
                direction.on_bug()
            self._served = None
            self._in_advance = 0
        if self._waiting:
            self._arm(wait_s)


def quantum_of(rate: float) -> int:
    """How many bytes are drawn at once; 0 is no limit."""
    return min(max(int(rate * QUANTUM_S), SMALLEST_BYTES), LARGEST_BYTES) if rate else LARGEST_BYTES
