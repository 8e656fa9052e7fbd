"""When each server is checked, and how many at once. Pure.

A server is one key here, whatever number of rules lead to it, and it has one check at a time.
Checks that are due while as many as may are under way wait, the one due first before the others.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Checks under way: a descriptor or two each, and for some kinds a process. Arbitrary.
MOST_AT_ONCE: Final = 64
# A server is not checked again for this long after a check has begun, however many ask for it.
REST_S: Final = 0.1


class _Server:
    """What is planned for one server."""

    __slots__ = ("began_at", "due_at", "ticket")

    def __init__(self) -> None:
        self.began_at = -math.inf
        self.due_at = math.inf
        self.ticket = 0  # of its valid place in the queue; 0 while its check is under way


class Plan:
    """The checks of all servers that are checked, by their seats."""

    def __init__(self, draw: Callable[[], float]) -> None:
        """``draw`` gives random numbers from 0 up to 1."""
        self._draw = draw
        self._servers: dict[int, _Server] = {}
        self._queue: list[tuple[float, int, int]] = []  # when due, ticket, seat
        self._tickets = 0
        self._running: set[int] = set()

    @property
    def running(self) -> int:
        """How many checks are under way."""
        return len(self._running)

    def __contains__(self, seat: int) -> bool:
        return seat in self._servers

    def spread(self, seats: Sequence[int], over_s: float, now: float) -> None:
        """Check these servers from now on, the first time spread evenly over so many seconds."""
        for number, seat in enumerate(seats):
            server = self._servers[seat] = _Server()
            self._enqueue(seat, server, now + over_s * (number + self._draw()) / len(seats))

    def remove(self, seat: int) -> None:
        """Check that server no longer; a check under way counts as ended."""
        if self._servers.pop(seat, None) is not None:
            self._running.discard(seat)

    def hurry(self, seat: int, now: float) -> None:
        """Check a server at once, unless it was checked just now or is being checked."""
        server = self._servers.get(seat)
        if server is not None and server.ticket:
            due_at = max(now, server.began_at + REST_S)
            if due_at < server.due_at:
                self._enqueue(seat, server, due_at)

    def take(self, now: float) -> int | None:
        """The next server to check, whose check counts as begun; None if none is due or may be."""
        queue = self._queue
        while queue and len(self._running) < MOST_AT_ONCE:
            due_at, ticket, seat = queue[0]
            server = self._servers.get(seat)
            if server is None or server.ticket != ticket:
                heapq.heappop(queue)
            elif due_at > now:
                return None
            else:
                heapq.heappop(queue)
                server.began_at, server.ticket = now, 0
                self._running.add(seat)
                return seat
        return None

    def done(self, seat: int, interval_s: float, jitter: float, now: float) -> None:
        """The check of a server has ended; the next one is due an interval after it began.

        ``jitter`` is the part of the interval that it may be shorter or longer.
        """
        server = self._servers.get(seat)
        if server is not None and seat in self._running:
            self._running.discard(seat)
            length_s = interval_s * (1 + jitter * (2 * self._draw() - 1))
            self._enqueue(seat, server, max(now, server.began_at + length_s))

    def deadline(self) -> float:
        """When :meth:`take` may have something; infinite while as many as may are under way."""
        queue = self._queue
        while queue:
            due_at, ticket, seat = queue[0]
            server = self._servers.get(seat)
            if server is not None and server.ticket == ticket:
                return due_at if len(self._running) < MOST_AT_ONCE else math.inf
            heapq.heappop(queue)
        return math.inf

    def _enqueue(self, seat: int, server: _Server, due_at: float) -> None:
        self._tickets += 1
        server.due_at, server.ticket = due_at, self._tickets
        heapq.heappush(self._queue, (due_at, self._tickets, seat))
