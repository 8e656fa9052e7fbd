"""Limits that hold for all workers together: shared counts, and a lock around each decision.

Theory of operation
-------------------
Sessions are counted twice: in memory that all workers share, where a decision looks, and in memory
of the worker's own. When a worker dies the shared counts are made anew from those of the workers
that live, so nothing that a dead one held, or was about to write, stays behind.

Dividing a limit by the number of workers would need no lock, but would be wrong: the kernel spreads
clients by a hash, and a client with five sessions may have all of them in one worker.

The lock is a record lock on a file that has no name (fcntl(2)): the kernel lets go of it when its
holder dies, whatever it was doing. It costs two system calls, for rules that have a limit only. It
is never waited for: it is held for microseconds, and who does not get it within LOCK_TRIES is
treated as over the limit.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from forwarder.board import ROWS
from forwarder.limits import CountTable, RateTable, pass_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Clients of limited rules that have sessions at the same time, all rules together. Beyond it new
# clients are refused: their limit could not be kept.
CLIENTS: Final = 65536
# Clients of rules with a rate per client whose last session is remembered.
RATED_CLIENTS: Final = 65536
LOCK_TRIES: Final = 200


# How much of the time that a line was idle can be made up for: late timers must not cost rate.
CATCH_UP_S: Final = 0.005


def _words(count: int) -> memoryview[int]:
    """Shared memory for so many numbers, all 0; its pages exist once they are touched."""
    return memoryview(mmap.mmap(-1, count * 8)).cast("Q")


def _times(count: int) -> memoryview[float]:
    return memoryview(mmap.mmap(-1, count * 8)).cast("d")


class Holdings:
    """What one worker holds: its part of the shared counts. Made by the master before it forks."""

    def __init__(self) -> None:
        self.rows = _words(ROWS)
        self.clients = CountTable(_words(2 * CLIENTS))


class Busy(Exception):  # noqa: N818 - an event, not a fault
    """Somebody else holds the lock for longer than anybody should."""


class Gate:
    """The shared side. Made by the master, inherited by every worker."""

    def __init__(self) -> None:
        self._rows = _words(ROWS)  # sessions by row; the first is of all rules
        self._dues = _times(ROWS)
        self._clients = CountTable(_words(2 * CLIENTS))
        self._rated = RateTable(_words(RATED_CLIENTS), _times(RATED_CLIENTS))
        self._lines = _times(2 * ROWS)
        self._lock_fd = os.memfd_create("forwarder-gate", os.MFD_CLOEXEC)

    def close(self) -> None:
        """Close the file that is locked."""
        os.close(self._lock_fd)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Decide alone. Raises Busy."""
        for _ in range(LOCK_TRIES):
            try:
                fcntl.lockf(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # EACCES or EAGAIN: somebody has it
                os.sched_yield()
        else:
            raise Busy
        try:
            yield
        finally:
            fcntl.lockf(self._lock_fd, fcntl.LOCK_UN)

    def draw(self, line: int, now: float, seconds: float) -> float:
        """Take a line for so long, if it is free. Returns 0, or when it will be. Raises Busy."""
        with self.locked():
            free_at = self._lines[line]
            if free_at > now:
                return free_at - now
            self._lines[line] = max(free_at, now - CATCH_UP_S) + seconds
        return 0.0

    # -- all of these under the lock

    def sessions(self, row: int) -> int:
        """How many sessions a rule has; row 0 is of all rules."""
        return self._rows[row]

    def sessions_of(self, key: int) -> int:
        """How many sessions a client has."""
        return self._clients.get(key)

    def pass_row(self, row: int, now: float, rate: float, burst: float) -> bool:
        """Let one more session of a rule begin, if its rate allows that."""
        due = pass_at(self._dues[row], now, rate, burst)
        if due is not None:
            self._dues[row] = due
        return due is not None

    def next_pass(self, row: int, now: float, rate: float, burst: float) -> float:
        """In how many seconds one may pass."""
        return max(0.0, self._dues[row] - now - (burst - 1) / rate)

    def pass_client(self, key: int, now: float, rate: float, burst: float) -> bool:
        """Let one more session of a client begin, if its rate allows that."""
        return self._rated.try_pass(key, now, rate, burst)

    def hold(self, mine: Holdings, row: int, key: int) -> bool:
        """Count a session of a rule, and of a client if ``key`` is not 0. False: no room for it."""
        if key and not mine.clients.add(key):
            return False
        if key and not self._clients.add(key):
            mine.clients.remove(key)
            return False
        for number in (0, row):
            mine.rows[number] += 1
            self._rows[number] += 1
        return True

    def let_go(self, mine: Holdings, row: int, key: int) -> None:
        """A session that was counted has ended."""
        if key:
            mine.clients.remove(key)
            self._clients.remove(key)
        for number in (0, row):
            mine.rows[number] -= 1
            self._rows[number] -= 1

    # -- the master

    def recount(self, living: Iterable[Holdings], rows: Iterable[int]) -> None:
        """A worker has died: count what the others hold, and nothing else. Raises Busy."""
        with self.locked():
            everyone = list(living)
            for row in (0, *rows):
                self._rows[row] = sum(mine.rows[row] for mine in everyone)
            self._clients.clear()
            for mine in everyone:
                for key, count in mine.clients.items():
                    self._clients.put(key, count)

    def forget(self, row: int) -> None:
        """A row begins anew for another rule."""
        self._rows[row] = 0
        self._dues[row] = 0.0


class Holder:
    """The gate as one worker uses it: what it holds is in ``mine``."""

    def __init__(self, gate: Gate, mine: Holdings) -> None:
        self.gate = gate
        self.mine = mine

    def hold(self, row: int, key: int) -> None:
        """Count a session that has begun already, whatever the limits are."""
        with self._locked():
            self.gate.hold(self.mine, row, key)

    def let_go(self, row: int, key: int) -> None:
        """A session that was counted has ended."""
        with self._locked():
            self.gate.let_go(self.mine, row, key)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock, however long it takes: a place that is never given back would be worse."""
        while True:
            try:
                with self.gate.locked():
                    yield
                    return
            except Busy:
                continue
