"""Which name to look up next: when each is due, and how many look-ups run at once. Pure.

A look-up that is not answered holds its thread for as long as the system tries, up to a minute. So
names are of three kinds, and no kind waits for another: those that were answered quickly the last
time, new ones, and those that are slow or dead. A look-up that takes long is of the last kind from
then on.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Final

from forwarder.system.backoff import backoff

# How old an answer may be before it is refreshed, if nothing is known of its TTL (getaddrinfo gives
# none). Arbitrary; dynamic DNS names use 30 to 300 s.
NAME_TTL_S: Final = 30.0
# A TTL beyond it is cut: who has moved a name wants it to be seen some time. Arbitrary.
LONGEST_TTL_S: Final = 3600.0
# An answer is refreshed when it is so old, so that the next one is there when it ends.
_EARLY: Final = 0.9
# After a failure: each further one doubles the wait, up to the longest. Arbitrary.
FIRST_RETRY_S: Final = 1.0
LONGEST_RETRY_S: Final = NAME_TTL_S
# A name is not looked up again for this long after a look-up, however many ask for it.
REST_S: Final = 1.0
# A name without an answer by then counts as failed; a later answer is still taken. More than the 5
# s after which the second name server is asked (resolv.conf(5)), less than the default
# connect_timeout, so that sessions end with this reason.
LIMIT_S: Final = 8.0
# A name server answers within milliseconds, or after having asked others.
SLOW_S: Final = 2.0
# Look-ups of one kind at once. Two questions each, and dnsmasq refuses more than 150 at once.
MAX_OF_A_KIND: Final = 32
# Look-ups in all: new ones that turn out to be dead pile up, but not without end. Arbitrary; a
# thread takes about 20 KiB.
MAX_AT_ONCE: Final = 256
# Of these, kept for names that were answered quickly, whatever piles up.
RESERVED: Final = MAX_OF_A_KIND


class Kind(Enum):
    """What to expect of a name."""

    QUICK = "quick"
    NEW = "new"
    SLOW = "slow"


@dataclass(slots=True)
class _Name:
    host: str
    due_at: float
    kind: Kind = Kind.NEW
    failures: int = 0
    rests_until: float = -math.inf
    started_at: float | None = None
    is_overdue: bool = False  # and was reported as such
    is_wanted: bool = True
    ticket: int = 0  # of its valid place in the queue


class Schedule:
    """All wanted names, and the look-ups under way."""

    def __init__(self) -> None:
        self._names: dict[str, _Name] = {}
        self._running: dict[str, _Name] = {}
        self._counts: Counter[Kind] = Counter()
        self._queues: dict[Kind, list[tuple[float, int, _Name]]] = {kind: [] for kind in Kind}
        self._tickets = itertools.count(1)

    def want(self, host: str, now: float) -> None:
        """Look a name up, now and again and again."""
        name = self._names.get(host)
        if name is None:
            self._names[host] = name = _Name(host, now)
            self._enqueue(name, now)
        name.is_wanted = True

    def forget(self, host: str) -> None:
        """Look that name up no longer."""
        name = self._names.get(host)
        if name is not None:
            name.is_wanted = False
            if name.started_at is None:
                del self._names[host]
                name.ticket = 0

    def hurry(self, host: str, now: float) -> None:
        """Look a name up before its time, unless that was done just now."""
        name = self._names.get(host)
        if name is not None and name.started_at is None:
            due_at = max(now, name.rests_until)
            if due_at < name.due_at:
                self._enqueue(name, due_at)

    def take(self, now: float) -> str | None:
        """The next name to look up, which counts as begun; None if none is due or may begin."""
        for kind in Kind:
            queue = self._queues[kind]
            while queue and queue[0][1] != queue[0][2].ticket:
                heapq.heappop(queue)
            if queue and queue[0][0] <= now and self._may(kind):
                name = heapq.heappop(queue)[2]
                name.started_at, name.is_overdue, name.ticket = now, False, 0
                self._running[name.host] = name
                self._counts[kind] += 1
                return name.host
        return None

    def overdue(self, now: float) -> list[str]:
        """Names whose time is up, each reported once for a look-up.

        Look-ups that take long make room for others of their kind.
        """
        for name in self._running.values():
            if name.kind is not Kind.SLOW and now >= (name.started_at or 0.0) + SLOW_S:
                self._counts[name.kind] -= 1
                name.kind = Kind.SLOW
                self._counts[name.kind] += 1
        found = [
            name
            for name in self._running.values()
            if not name.is_overdue and now >= (name.started_at or 0.0) + LIMIT_S
        ]
        for name in found:
            name.is_overdue = True
        return [name.host for name in found if name.is_wanted]

    def done(
        self, host: str, now: float, *, has_failed: bool, good_for_s: float | None = None
    ) -> bool:
        """A look-up has ended. Returns whether the name is still wanted.

        ``good_for_s`` is how long its answer holds, if that is known; it is asked for again before
        that is over, but not within REST_S.
        """
        name = self._running.pop(host)
        self._counts[name.kind] -= 1
        took_s = now - (name.started_at or 0.0)
        name.kind = Kind.SLOW if took_s >= SLOW_S else Kind.QUICK
        name.started_at, name.rests_until = None, now + REST_S
        name.failures = name.failures + 1 if has_failed else 0
        if not name.is_wanted:
            del self._names[host]
            return False
        delay = NAME_TTL_S
        if good_for_s is not None:
            delay = max(REST_S, min(good_for_s, LONGEST_TTL_S) * _EARLY)
        if has_failed:
            delay = backoff(name.failures, FIRST_RETRY_S, LONGEST_RETRY_S)
        self._enqueue(name, now + delay)
        return True

    def deadline(self) -> float:
        """When :meth:`take` or :meth:`overdue` may have something without a look-up's end."""
        due = [queue[0][0] for kind, queue in self._queues.items() if queue and self._may(kind)]
        due += [
            (name.started_at or 0.0) + (LIMIT_S if name.kind is Kind.SLOW else SLOW_S)
            for name in self._running.values()
            if not name.is_overdue
        ]
        return min(due, default=math.inf)

    @property
    def running(self) -> int:
        """How many look-ups are under way."""
        return len(self._running)

    def _may(self, kind: Kind) -> bool:
        """Whether a look-up of that kind may begin beside those under way."""
        most = MAX_AT_ONCE if kind is Kind.QUICK else MAX_AT_ONCE - RESERVED
        return self._counts[kind] < MAX_OF_A_KIND and len(self._running) < most

    def _enqueue(self, name: _Name, due_at: float) -> None:
        name.due_at, name.ticket = due_at, next(self._tickets)
        heapq.heappush(self._queues[name.kind], (due_at, name.ticket, name))
