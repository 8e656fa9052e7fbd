"""Signs of life of the workers, in memory they share with the master. No lock and no message.

One double per slot, with a single writer: the worker stores the time of its last loop turn, the
master reads it. An aligned 8-byte store cannot be seen half done on any machine CPython runs on.
"""

from __future__ import annotations

import mmap
from typing import Final

MAX_SLOTS: Final = 1024  # the most workers a configuration may ask for
# How often a worker says that it lives. Its loop turns at least so often.
BEAT_S: Final = 1.0


class Heartbeats:
    """Made by the master before it forks, shared with every worker."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MAX_SLOTS * 8)
        self._times = memoryview(self._memory).cast("d")

    def beat(self, slot: int, now: float) -> None:
        """Say that the worker of ``slot`` was alive at ``now``, in monotonic seconds."""
        self._times[slot] = now

    def last(self, slot: int) -> float:
        """When the worker of ``slot`` was alive last; the monotonic clock is the same for all."""
        return self._times[slot]
