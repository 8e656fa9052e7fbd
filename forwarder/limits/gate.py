"""Limits that hold for all workers together: shared counts, and a lock around each decision.

Theory of operation
-------------------
Sessions are counted twice: in memory that all workers share, on which decisions rest, and in memory
of the worker's own. When a worker dies the master rebuilds the shared counts from those of the
living workers, so nothing that the dead one held, or was about to write, stays behind.

Dividing a limit by the number of workers would need no lock, but would be wrong: the kernel spreads
clients by a hash, and a client with five sessions may have all of them in one worker.

The lock is a record lock on a file that has no name (fcntl(2)): the kernel lets go of it when its
holder dies, whatever it was doing. It costs two system calls, only for rules that have a limit. A
worker holds it for microseconds, or for a time slice if it loses its processor; but one that hangs
or is stopped may hold it until the master kills it. So no worker waits for longer than PATIENCE_S,
and one that has waited in vain only tries, now and then, until the lock is free. What cannot be
decided then is decided later, what cannot be given back is owed (:class:`Holder`).
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN
from fcntl import lockf as _lockf
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.limits.tables import CountTable, RateTable, pass_at, table_words
from forwarder.stats.board import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# Clients of limited rules that have sessions at the same time, all rules together. Beyond it new
# clients are refused: their limit could not be kept.
CLIENTS: Final = 65536
# Clients of rules with a rate per client whose last session is remembered.
RATED_CLIENTS: Final = 65536
# How long a loop may stand still for the lock, once: some time slices, as its holder may have lost
# its processor to others.
PATIENCE_S: Final = 0.02
# How often a stuck lock is tried.
STUCK_S: Final = 0.02
# How long it then takes until all workers, which try every STUCK_S, have counted what they owe:
# until then a limit may only seem to be met.
RECOVERY_S: Final = 3 * STUCK_S
# Tries before the processor is given away for longer; the lock is mostly free at the first. A nap
# is as long as the wait was before it.
_YIELDS: Final = 20
# What is owed is worked off in parts, so that the lock is not held for long.
_PART: Final = 256
# How much of the time that a line was idle can be made up for: late timers must not cost rate.
CATCH_UP_S: Final = 0.005
_TRY: Final = LOCK_EX | LOCK_NB


def _words(count: int) -> memoryview[int]:
    """Shared memory for ``count`` numbers, all 0; its pages exist once they are touched."""
    return memoryview(mmap.mmap(-1, count * 8)).cast("Q")


def _times(count: int) -> memoryview[float]:
    return memoryview(mmap.mmap(-1, count * 8)).cast("d")


class Holdings:
    """What one worker holds: its part of the shared counts. Made by the master before it forks."""

    def __init__(self) -> None:
        self.rows = _words(2 * ROWS)
        self.clients = CountTable(_words(table_words(CLIENTS)))


class Busy(Exception):  # noqa: N818 - an event, not a fault
    """Another process holds the lock for longer than any should."""


class Gate:
    """The shared side. Made by the master, inherited by every worker."""

    def __init__(self) -> None:
        self._rows = _words(2 * ROWS)  # sessions by row, see Board; the first is of all rules
        self._dues = _times(ROWS)
        self._clients = CountTable(_words(table_words(CLIENTS)))
        self._rated = RateTable(_words(RATED_CLIENTS), _times(RATED_CLIENTS))
        self._lines = _times(2 * ROWS)
        self._lock_fd = os.memfd_create("forwarder-gate", os.MFD_CLOEXEC)
        # Of this process. 0: not at all.
        self._stuck_since = self._stuck_until = self._owed_until = 0.0

    def fileno(self) -> int:
        """The file that is locked."""
        return self._lock_fd

    def close(self) -> None:
        """Close the file that is locked."""
        os.close(self._lock_fd)

    # -- the lock

    @property
    def is_stuck(self) -> bool:
        """Whether the lock could not be taken a moment ago."""
        return self._stuck_until > 0 and time.monotonic() < self._stuck_until

    @property
    def stuck_s(self) -> float:
        """For how long, in seconds, this process has not got the lock; 0: the last time it did."""
        return time.monotonic() - self._stuck_since if self._stuck_since else 0.0

    @property
    def is_settled(self) -> bool:
        """Whether the lock is not stuck, and no worker owes anything because it was."""
        if self._owed_until and time.monotonic() >= self._owed_until:
            self._owed_until = 0.0
        return not (self._owed_until or self.is_stuck)

    def lock(self) -> None:
        """Begin to decide alone. Raises Busy. Blocks for PATIENCE_S at most."""
        try:
            _lockf(self._lock_fd, _TRY)
        except OSError:  # EACCES or EAGAIN: another process has it
            self._wait()
        if self._stuck_until:
            self._stuck_since = self._stuck_until = 0.0
            self._owed_until = time.monotonic() + RECOVERY_S

    def unlock(self) -> None:
        """Let the others decide."""
        _lockf(self._lock_fd, LOCK_UN)

    def __enter__(self) -> Gate:
        """Begin to decide alone, as :meth:`lock`."""
        self.lock()
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()

    def _wait(self) -> None:
        began = now = time.monotonic()
        tries = 0
        while not self._stuck_until and now < began + PATIENCE_S:
            tries += 1
            if tries < _YIELDS:
                os.sched_yield()
            else:
                time.sleep(now - began)
            try:
                _lockf(self._lock_fd, _TRY)
            except OSError:
                now = time.monotonic()
                continue
            return
        self._stuck_since = self._stuck_since or now
        self._stuck_until = now + STUCK_S
        raise Busy

    # -- bandwidth

    def draw(self, line: int, now: float, seconds: float) -> float:
        """Take a line for ``seconds``, if it is free. Returns 0, or the seconds until it will be.

        Goes on without the lock if that is stuck: a quantum too much now and then is better than
        all sessions standing still because of one worker.
        """
        try:
            with self:
                return self._draw(line, now, seconds)
        except Busy:
            return self._draw(line, now, seconds)

    def _draw(self, line: int, now: float, seconds: float) -> float:
        free_at = self._lines[line]
        if free_at > now:
            return free_at - now
        self._lines[line] = max(free_at, now - CATCH_UP_S) + seconds
        return 0.0

    def free_line(self, line: int, at: float) -> None:
        """Make a line free by a time at the latest: it has become faster."""
        self._lines[line] = min(self._lines[line], at)

    # -- all of these under the lock

    def sessions(self, row: int) -> int:
        """How many sessions a rule or a server has; row 0 is of all rules."""
        return self._rows[row]

    @property
    def sessions_by_row(self) -> memoryview[int]:
        """The same of all rows, only to be read."""
        return self._rows.toreadonly()

    def sessions_of(self, key: int) -> int:
        """How many sessions a client has."""
        return self._clients.get(key)

    def may_pass(self, row: int, now: float, rate: float, burst: float) -> bool:
        """Whether one more session of a rule may begin by its rate; :meth:`pass_row` lets it."""
        return pass_at(self._dues[row], now, rate, burst) is not None

    def pass_row(self, row: int, now: float, rate: float) -> None:
        """One more session of a rule begins."""
        self._dues[row] = max(self._dues[row], now) + 1 / rate

    def unpass_row(self, row: int, rate: float) -> None:
        """It did not begin after all."""
        self._dues[row] = max(self._dues[row] - 1 / rate, 0.0)

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
        self._count(mine, row)
        return True

    def hold_anyway(self, mine: Holdings, row: int, key: int) -> None:
        """Count a session that is there already; not for its client if there is no room."""
        if not self.hold(mine, row, key):
            self._count(mine, row)

    def let_go(self, mine: Holdings, row: int, key: int) -> None:
        """A session that was counted has ended."""
        if key and mine.clients.remove(key):
            self._clients.remove(key)
        for rows in (mine.rows, self._rows):
            if count := rows[row]:
                rows[row] = count - 1
            if count := rows[0]:
                rows[0] = count - 1

    def take_server(self, mine: Holdings, row: int) -> None:
        """Count a session of a server, beside that of its rule; or one that waits in a group."""
        mine.rows[row] += 1
        self._rows[row] += 1

    def change_servers(
        self, mine: Holdings, changes: Mapping[int, int], moves: Mapping[int, int]
    ) -> None:
        """The same for several rows: so many sessions more, or less.

        ``moves``: so many of them are ours that were counted in another worker, or the reverse.
        """
        own, everyone = mine.rows, self._rows
        for row, change in changes.items():
            own[row] = max(own[row] + change + moves.get(row, 0), 0)
            everyone[row] = max(everyone[row] + change, 0)
        for row in moves.keys() - changes.keys():
            own[row] = max(own[row] + moves[row], 0)

    def pass_on(self, mine: Holdings, row: int, key: int) -> None:
        """A session that was counted goes on in another worker: only what we hold changes."""
        if key:
            mine.clients.remove(key)
        for number in (0, row):
            if count := mine.rows[number]:
                mine.rows[number] = count - 1

    def take_on(self, mine: Holdings, row: int, key: int) -> None:
        """The other worker's side of that."""
        if key:
            mine.clients.add(key)
        for number in (0, row):
            mine.rows[number] += 1

    def _count(self, mine: Holdings, row: int) -> None:
        # Our own first: whenever we are killed, the shared count is not below that of the others.
        for rows in (mine.rows, self._rows):
            rows[0] += 1
            rows[row] += 1

    # -- the master

    def recount(self, living: Iterable[Holdings], rows: Iterable[int]) -> None:
        """A worker has died: count what the others hold, and nothing else. Raises Busy."""
        with self:
            everyone = list(living)
            for row in (0, *rows):
                self._rows[row] = sum(mine.rows[row] for mine in everyone)
            if len(self._clients):
                self._clients.clear()
            for mine in everyone:
                for key, count in mine.clients.items():
                    self._clients.add(key, count)

    def forget(self, row: int) -> None:
        """A row starts over for another rule: no client waits for what the former one did."""
        self._dues[row] = 0.0
        self._lines[2 * row] = self._lines[2 * row + 1] = 0.0


_Deed: TypeAlias = "Callable[[Gate, Holdings, int, int], None]"


class Holder:
    """The gate as one worker uses it: what it holds is in ``mine``.

    As a context manager it is the lock of the gate; entering it works off what is owed. What is to
    be counted while another process has the lock is owed, so that no loop stands still for it.
    """

    __slots__ = ("_changes", "_moves", "_owed", "gate", "mine")

    def __init__(self, gate: Gate, mine: Holdings) -> None:
        self.gate = gate
        self.mine = mine
        # Of rules: what is to be done; row, key, and the rate of which one is given back, 0: none.
        self._owed: deque[tuple[_Deed, int, int, float]] = deque()
        # Of servers: by how many the sessions of a row have changed; how many went from or to
        # other workers.
        self._changes: dict[int, int] = {}
        self._moves: dict[int, int] = {}

    def __enter__(self) -> Gate:
        gate = self.gate
        gate.lock()
        if self._changes or self._moves:
            gate.change_servers(self.mine, self._changes, self._moves)
            self._changes.clear()
            self._moves.clear()
        if self._owed:
            self._work_off()
        return gate

    def __exit__(self, *_: object) -> None:
        self.gate.unlock()

    def hold(self, row: int, key: int) -> None:
        """Count a session that has begun already, whatever the limits are, at :meth:`settle`."""
        self._owed.append((Gate.hold_anyway, row, key, 0.0))

    def let_go(self, row: int, key: int, rate: float = 0.0) -> None:
        """A session that was counted has ended; as for :meth:`hold`.

        With a ``rate`` it has not begun at all, and another one may in its place.
        """
        self._owed.append((Gate.let_go, row, key, rate))

    def take_server(self, row: int) -> None:
        """Count a session of a server, or one that waits, at :meth:`settle`."""
        self._changes[row] = self._changes.get(row, 0) + 1

    def leave_server(self, row: int) -> None:
        """What was counted in the row of a server or a group is over; as :meth:`take_server`."""
        self._changes[row] = self._changes.get(row, 0) - 1

    def pass_on(self, row: int, key: int) -> None:
        """A session that was counted goes on in another worker; as :meth:`hold`."""
        self._owed.append((Gate.pass_on, row, key, 0.0))

    def take_on(self, row: int, key: int) -> None:
        """One that another worker has passed on is ours; as :meth:`hold`."""
        self._owed.append((Gate.take_on, row, key, 0.0))

    def pass_server_on(self, row: int) -> None:
        """A session that is counted for a server goes on in another worker."""
        self._moves[row] = self._moves.get(row, 0) - 1

    def take_server_on(self, row: int) -> None:
        """The other worker's side of that."""
        self._moves[row] = self._moves.get(row, 0) + 1

    def settle(self) -> bool:
        """Count what is owed. Returns whether all of it is counted."""
        while self._owed or self._changes or self._moves:
            try:
                with self:
                    pass
            except Busy:
                return False
        return True

    def _work_off(self) -> None:
        owed, gate, mine = self._owed, self.gate, self.mine
        for _ in range(min(len(owed), _PART)):
            do, row, key, rate = owed.popleft()
            do(gate, mine, row, key)
            if rate:
                gate.unpass_row(row, rate)
