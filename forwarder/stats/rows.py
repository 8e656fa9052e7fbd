"""What is counted, where each number stands, and sums over the workers. Pure.

A worker counts in rows of WORDS unsigned 64-bit numbers, of which it is the only writer; any
process may read them at any time. There is one row per rule, one per server of a group, and one for
the worker itself. The rows are in memory that the master owns (see ``board``), so counts outlive a
worker.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

from forwarder.stats.reasons import REASONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Row: TypeAlias = "memoryview[int]"

# Counters of one rule, or one server, in one worker. SESSIONS are open now; all others only grow.
# REFUSED are clients that were turned away and got no session. ATTEMPTS_FAILED: connects to one
# address that were refused, or not answered in time. SESSIONS_CUT: sessions reset by a stop or by
# drain_timeout, or lost with their worker. BYTES_* include open sessions as of the last beat.
# MOVED_IN, MOVED_OUT: sessions that went on in another worker, of this instance or of another one.
# At any time, sum of ENDS + SESSIONS + MOVED_OUT = SESSIONS_TOTAL + REFUSED + MOVED_IN.
(
    SESSIONS,
    SESSIONS_TOTAL,
    REFUSED,
    CONNECTS_FAILED,
    BYTES_C2U,
    BYTES_U2C,
    BYTES_SPLICED,
    DATAGRAMS_DROPPED,
    ATTEMPTS_FAILED,
    SESSIONS_CUT,
    MOVED_IN,
    MOVED_OUT,
) = range(12)
# How long connecting took: below 1 ms, below 2, 4, 8 ... ms, and longer.
CONNECT_MS: Final = MOVED_OUT + 1
CONNECT_BUCKETS: Final = 16
_BOUNDS_S: Final = tuple(2**bucket / 1000 for bucket in range(CONNECT_BUCKETS - 1))
# How often sessions ended for each reason, in the order of ``reasons.REASONS``.
ENDS: Final = CONNECT_MS + CONNECT_BUCKETS
WORDS: Final = 64
assert ENDS + len(REASONS) <= WORDS  # noqa: S101 - a row has room for all reasons


def new_row() -> Row:
    """A row of this process alone."""
    return memoryview(bytearray(8 * WORDS)).cast("Q")


_LOST: Final = ENDS + REASONS.index("us/error")  # where sessions of a killed worker are counted

# Counters of one worker, in its own row, written at each beat. ``sessions`` are open now and
# ``pipes_made``, ``pipes_idle`` and ``pipe_pages`` exist now; all others only grow.
COUNTERS: Final = (
    "sessions",
    "sessions_total",
    "refused",
    "connects_failed",
    "bytes_c2u",
    "bytes_u2c",
    "bytes_spliced",
    "pipes_refused",
    "datagrams_dropped",
    "icmp_errors",
    "flows_evicted",
    "accept_pauses",
    "pipes_made",
    "pipes_idle",
    "pipe_pages",
    "log_lines_dropped",
    "moved_in",
    "moved_out",
)
OWN_SESSIONS: Final = COUNTERS.index("sessions")
_STATES: Final = frozenset({"sessions", "pipes_made", "pipes_idle", "pipe_pages"})


def connect_bucket(seconds: float) -> int:
    """Where in a row a connect of this duration is counted."""
    return CONNECT_MS + bisect_right(_BOUNDS_S, seconds)


def connect_label(bucket: int) -> str:
    """What the nth bucket holds, in milliseconds."""
    return f"<{1 << bucket}" if bucket < CONNECT_BUCKETS - 1 else f">={1 << (bucket - 1)}"


def rule_counters(row: Sequence[int]) -> dict[str, object]:
    """The counters of a rule, as in the status; of ends and connect times only those that occur."""
    return {
        "sessions": row[SESSIONS],
        "sessions_total": row[SESSIONS_TOTAL],
        "refused": row[REFUSED],
        "connects_failed": row[CONNECTS_FAILED],
        "attempts_failed": row[ATTEMPTS_FAILED],
        "bytes_c2u": row[BYTES_C2U],
        "bytes_u2c": row[BYTES_U2C],
        "bytes_spliced": row[BYTES_SPLICED],
        "datagrams_dropped": row[DATAGRAMS_DROPPED],
        "moved_in": row[MOVED_IN],
        "moved_out": row[MOVED_OUT],
        "connect_ms": {
            connect_label(bucket): row[CONNECT_MS + bucket]
            for bucket in range(CONNECT_BUCKETS)
            if row[CONNECT_MS + bucket]
        },
        "ends": {
            code: row[ENDS + index] for index, code in enumerate(REASONS) if row[ENDS + index]
        },
    }


def worker_counters(row: Sequence[int]) -> dict[str, int]:
    """The counters of a worker, as in the status."""
    return dict(zip(COUNTERS, row, strict=False))


_Key = TypeVar("_Key", bound=Hashable)


class Rows(Generic[_Key]):
    """What is counted in which row, for as long as it is served or has sessions.

    The rows are those from ``first`` to ``end``, without the latter. The first is not given to
    anybody; the last is for all that come when no other is left.
    """

    def __init__(self, first: int, end: int) -> None:
        self._shared = end - 1
        self._rows: dict[_Key, int] = {}
        self._free: list[int] = []
        self._next = first + 1

    def of(self, key: _Key) -> int:
        """The row of a rule or server, which gets one if it has none."""
        row = self._rows.get(key)
        if row is None:
            if self._free:
                row = self._free.pop()
            elif self._next < self._shared:
                row = self._next
                self._next += 1
            else:
                row = self._shared
            self._rows[key] = row
        return row

    def find(self, key: _Key) -> int | None:
        """The row that it has, if it has one."""
        return self._rows.get(key)

    def adopt(self, key: _Key, row: int) -> bool:
        """Give it this row, if both are free; the shared row always is. Returns whether it has."""
        if key in self._rows:
            return self._rows[key] == row
        if self._next <= row < self._shared:
            self._free += range(self._next, row)
            self._next = row + 1
        elif row in self._free:
            self._free.remove(row)
        elif row != self._shared:
            return False
        self._rows[key] = row
        return True

    def used(self) -> Iterable[int]:
        """All rows in use."""
        return set(self._rows.values())

    def items(self) -> Iterable[tuple[_Key, int]]:
        """What has a row, and which."""
        return self._rows.items()

    def forgettable(self, known: Iterable[_Key]) -> dict[_Key, int]:
        """Rows of what is not ``known`` any more."""
        return {key: self._rows[key] for key in self._rows.keys() - set(known)}

    def is_shared(self, row: int) -> bool:
        """Whether it is the one for all that have none of their own."""
        return row == self._shared

    def forget(self, key: _Key) -> None:
        """Give the row to the next one that comes; it must be zero everywhere.

        The shared row is not given away.
        """
        row = self._rows.pop(key)
        if not self.is_shared(row):
            self._free.append(row)


class Tally:
    """Sums of rows: of workers that live, and of those that are gone."""

    def __init__(self) -> None:
        self._gone: dict[int, list[int]] = {}

    def on_exit(self, rows: Mapping[int, Sequence[int]]) -> None:
        """A worker is gone, and its sessions with it; its counts stay.

        It ended its sessions itself, each for its reason, unless it was killed or crashed.
        """
        for number, row in rows.items():
            kept = list(row)
            if number:
                kept[_LOST] += kept[SESSIONS]
                kept[SESSIONS_CUT] += kept[SESSIONS]
                kept[SESSIONS] = 0
            else:
                for name in _STATES:
                    kept[COUNTERS.index(name)] = 0
            if any(kept):
                self._add(number, kept)

    def lose(self, number: int, sessions: int) -> None:
        """Sessions of a rule have ended on their way from one worker to another."""
        lost = [0] * WORDS
        lost[_LOST] = lost[SESSIONS_CUT] = lost[MOVED_IN] = sessions
        self._add(number, lost)

    def _add(self, number: int, row: Sequence[int]) -> None:
        self._gone[number] = _add(self._gone.get(number, [0] * WORDS), row)

    def total(self, number: int, living: Iterable[Sequence[int]]) -> list[int]:
        """One row over all workers since the start; ``living`` are those of workers that live."""
        found = list(self._gone.get(number, [0] * WORDS))
        for row in living:
            found = _add(found, row)
        return found

    def sum(self, column: int) -> int:
        """One counter over all rows, but the workers' own, and all workers that are gone."""
        return sum(row[column] for number, row in self._gone.items() if number)

    def forget(self, number: int) -> None:
        """Start a row over."""
        self._gone.pop(number, None)


def _add(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return list(map(operator.add, one, other))
