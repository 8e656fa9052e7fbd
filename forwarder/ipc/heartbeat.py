"""Signs of life of the workers, in memory they share with the master. No lock and no message.

One double per worker process, with a single writer: the worker stores the time of its last loop
turn, the master reads it. An aligned 8-byte store cannot be seen half done on any machine that
CPython runs on.
"""

from __future__ import annotations

import mmap
from typing import Final

from forwarder.config.model import MAX_WORKERS

# Cells are used in turn. Four times as many as workers, for those that drain beside their
# successors; a worker that outlives that many others shares its cell, and may hide that the other
# hangs.
CELLS: Final = 4 * MAX_WORKERS
# Interval between signs of life of a worker. Its loop turns at least this often.
BEAT_S: Final = 1.0


class Heartbeats:
    """Made by the master before it forks, shared with every worker."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, CELLS * 8)
        self._times = memoryview(self._memory).cast("d")
        self._next = 0

    def new_cell(self, now: float) -> int:
        """The cell of a worker that is about to be forked; it counts as alive at ``now``."""
        cell = self._next
        self._next = (cell + 1) % CELLS
        self._times[cell] = now
        return cell

    def beat(self, cell: int, now: float) -> None:
        """Note that the worker of ``cell`` was alive at ``now``, in monotonic seconds."""
        self._times[cell] = now

    def last(self, cell: int) -> float:
        """When the worker of ``cell`` was last alive; the monotonic clock is the same for all."""
        return self._times[cell]


class Vigil:
    """How long children have given no sign of life, less the time we were stopped ourselves.

    ``looked_at`` is when :meth:`look` was called last.
    """

    def __init__(self, now: float) -> None:
        self.looked_at = self._awake_since = now

    def look(self, now: float, limit_s: float) -> None:
        """Call it several times in ``limit_s``, and before :meth:`silent_s`."""
        if now - self.looked_at > limit_s / 2:
            # We were stopped ourselves, and so were they (a paused container, a suspended
            # machine): none could give a sign of life.
            self._awake_since = now
        self.looked_at = now

    def silent_s(self, heard_at: float, now: float) -> float:
        """Seconds since the last sign of life, at ``heard_at``, or since we woke up, if later."""
        return now - max(heard_at, self._awake_since)
