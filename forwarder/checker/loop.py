"""Events and timers of one process: epoll and a heap. A check costs it some microseconds.

Not asyncio, whose transports, futures and streams cost several times what a check itself does.
"""

from __future__ import annotations

import heapq
import logging
import math
import select
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# A wake-up later than this was no busy machine: the process was stopped, SIGSTOP or a paused
# container. Arbitrary.
STOPPED_S: Final = 1.0
# Cancelled timers stay in the heap until their time, unless they are most of it, and this many.
MOST_CANCELLED: Final = 256


class Timer:
    """A call at a time, unless it is cancelled before. Made by :meth:`Loop.call_at`."""

    __slots__ = ("_call", "_loop")

    def __init__(self, loop: Loop, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._loop = loop

    @property
    def is_waiting(self) -> bool:
        """Whether its time has not come, nor was it cancelled."""
        return self._call is not None

    def cancel(self) -> None:
        """Do not call; without effect once it was called or cancelled."""
        if self._call is not None:
            self._call = None
            self._loop.on_cancelled()

    def take(self) -> Callable[[], None] | None:
        """What to call, once; None if it was cancelled."""
        call, self._call = self._call, None
        return call


class _Watch:
    """What is called for the events of a descriptor; another object after each ``watch``."""

    __slots__ = ("on_events",)

    def __init__(self, on_events: Callable[[int], None]) -> None:
        self.on_events = on_events


class Loop:
    """The events and timers of a process. ``now`` is monotonic, in seconds, of the last wake-up.

    An error in what it calls is logged, and ends nothing. Nothing is called from within a method
    other than :meth:`turn`. Owns an epoll descriptor.
    """

    def __init__(self) -> None:
        """Raises OSError."""
        self.now = time.monotonic()
        self.stopped_s = 0.0  # how long the process was stopped before the last wake-up
        self._epoll = select.epoll()
        self._watches: dict[int, _Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = 0
        self._cancelled = 0  # of those in the heap

    def close(self) -> None:
        """Close the epoll descriptor. What is watched stays its owner's."""
        self._epoll.close()

    @property
    def pending(self) -> int:
        """How many timers it keeps."""
        return len(self._timers)

    # -- descriptors

    def watch(self, fd: int, events: int, on_events: Callable[[int], None]) -> None:
        """Call ``on_events`` with what has happened, level triggered: again until it is handled.

        ``events`` and what is passed are ``select.EPOLL*``; EPOLLERR and EPOLLHUP are always
        watched. The descriptor stays its owner's, who must :meth:`unwatch` it before closing it.
        Raises OSError: ENOSPC or ENOMEM.
        """
        self._epoll.register(fd, events)
        self._watches[fd] = _Watch(on_events)

    def change(self, fd: int, events: int) -> None:
        """Watch other events of a descriptor."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Watch a descriptor no longer; what has happened already is not reported."""
        if self._watches.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # -- timers

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        """Call at a monotonic time, but not before the next turn; ``now`` is as soon as possible.

        Events that have happened by then are reported first.
        """
        timer = Timer(self, call)
        self._serial += 1
        heapq.heappush(self._timers, (when, self._serial, timer))
        return timer

    def on_cancelled(self) -> None:
        """A timer in the heap was cancelled."""
        self._cancelled += 1
        if self._cancelled > max(MOST_CANCELLED, len(self._timers) // 2):
            # In place: a turn may be going through the list.
            self._timers[:] = [entry for entry in self._timers if entry[2].is_waiting]
            heapq.heapify(self._timers)
            self._cancelled = 0

    # -- one turn

    def turn(self, limit_s: float) -> None:
        """Wait for events or the next timer, ``limit_s`` at most, and call what there is to call.

        Blocks.
        """
        woken_at = self.now
        due_at = min(self._timers[0][0] if self._timers else math.inf, woken_at + limit_s)
        events = self._epoll.poll(max(0.0, due_at - time.monotonic()))
        self.now = now = time.monotonic()
        late_s = now - max(due_at, woken_at)  # counted from then: it may be stopped at any time
        self.stopped_s = late_s if late_s > STOPPED_S else 0.0
        watches = self._watches
        # By watch, not by descriptor: one that is closed here may be another's a moment later.
        happened = [(fd, watches.get(fd), what) for fd, what in events]
        for fd, watch, what in happened:
            if watch is not None and watches.get(fd) is watch:
                try:
                    watch.on_events(what)
                except Exception:  # a bug must cost one check, not all that is checked
                    log.exception("checker.bug")
        if self._timers and self._timers[0][0] <= now:
            self._run_due(now)

    def _run_due(self, now: float) -> None:
        """Call what is due; what that adds waits for the next turn, or there might be no end."""
        due = []
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.is_waiting:
                due.append(timer)
            else:
                self._cancelled -= 1
        for timer in due:
            call = timer.take()
            if call is not None:
                try:
                    call()
                except Exception:  # see above
                    log.exception("checker.bug")
