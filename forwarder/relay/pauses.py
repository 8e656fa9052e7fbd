"""Listeners that rest when descriptors or memory run out: logged once for all of a worker.

At its limit a worker accepts a client for each that leaves, so every listener rests and goes on
many times a second. That is one shortage: it is over when no listener has rested for a while.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from typing import TYPE_CHECKING, Final

from forwarder.system import kernel
from forwarder.system.rarely import Rarely

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.system.loop import Clock

log = logging.getLogger(__name__)

# A shortage is over when no listener has rested for this long. Listeners try ten times a second.
CALM_S: Final = 5.0
# How often a cause is logged, while it lasts or if it comes again.
INTERVAL_S: Final = 60.0
BUG: Final = -1  # in place of an errno: accepting has met a bug
# How long a listener rests when descriptors or memory are used up. Clients wait in its queue.
PAUSE_S: Final = 0.1


class Pauses:
    """The rests of all listeners of a worker. ``total`` counts them."""

    __slots__ = (
        "_before",
        "_began_at",
        "_count_sessions",
        "_is_told",
        "_last_at",
        "_loop",
        "_rarely",
        "total",
    )

    def __init__(self, loop: Clock, count_sessions: Callable[[], int]) -> None:
        """``count_sessions``: how many sessions the worker has now."""
        self.total = 0
        self._loop = loop
        self._count_sessions = count_sessions
        self._rarely = Rarely(INTERVAL_S)
        self._before = 0  # how many there were before this shortage
        self._began_at: float | None = None  # None: there is no shortage
        self._last_at = 0.0
        self._is_told = False

    def note(self, number: int) -> None:
        """A listener rests, or rests on, because of this errno (or ``BUG``)."""
        now = self._last_at = self._loop.time()
        if self._began_at is None:
            self._began_at, self._before = now, self.total
            self._loop.call_later(CALM_S, self._look)
        self.total += 1
        more = self._rarely.note(errno.errorcode.get(number, ""), now)
        if more is not None:
            self._is_told = True
            log.warning("accept.paused: %s%s", self._describe(number), more)

    def _look(self) -> None:
        """Log the end of a shortage that is over."""
        now = self._loop.time()
        if now < self._last_at + CALM_S:
            self._loop.call_later(self._last_at + CALM_S - now, self._look)
            return
        if self._is_told and self._began_at is not None:
            log.info(
                "accept.resumed: after %d pauses in %.1f s",
                self.total - self._before,
                self._last_at - self._began_at,
            )
        self._began_at, self._is_told = None, False

    def _describe(self, number: int) -> str:
        """What is short, how much there is of it, which clients wait, and what to do."""
        sessions = f"{self._count_sessions()} sessions"
        if number == errno.EMFILE:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return (
                f"{limit} of {limit} descriptors in use, {sessions}; new clients of all rules "
                "wait in the queue; raise LimitNOFILE= or ulimit -n"
            )
        if number == errno.ENFILE:
            limits = kernel.setting("fs/file-max") or "fs.file-max"
            return (
                f"the whole system has its {limits} files open, {sessions} here; new clients of "
                "all rules wait in the queue; raise fs.file-max, or find their programs: lsof"
            )
        if number in (errno.ENOMEM, errno.ENOBUFS):
            return (
                f"the kernel has no memory for another socket ({os.strerror(number)}), {sessions}; "
                "new clients wait in the queue; see MemoryMax= of the service, net.ipv4.tcp_mem, "
                "and free memory"
            )
        if number == errno.ENOSPC:
            limit_text = kernel.setting("fs/epoll/max_user_watches") or "fs.epoll.max_user_watches"
            return (
                f"the limit of {limit_text} descriptors that this user's programs may watch is "
                f"reached, {sessions}; new clients wait in the queue; raise "
                "fs.epoll.max_user_watches"
            )
        why = os.strerror(number) if number != BUG else "an unexpected error, see relay.bug"
        return f"{why}, {sessions}; new clients wait in the queue"
