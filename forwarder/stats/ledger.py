"""What all workers have counted: their boards, which row is whose, and what dead ones have left.

The master's. Reads the boards; writes to them only where no worker does any more.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

from forwarder.stats.board import ROWS, SHARED_ROW, Board
from forwarder.stats.rows import (
    MOVED_IN,
    MOVED_OUT,
    OWN_SESSIONS,
    SESSIONS,
    WORDS,
    Rows,
    Tally,
    rule_counters,
    worker_counters,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_ZEROS: Final = memoryview(bytes(8 * WORDS)).cast("Q")

# Least time between samples. The workers write their totals once a second.
SAMPLE_S: Final = 2.0
_RATES: Final = ("sessions_total", "bytes_c2u", "bytes_u2c")

Server: TypeAlias = tuple[str, str]
"""A server of a group: the names of both. An empty second one stands for the group itself."""

_Key = TypeVar("_Key", bound=Hashable)


class Ledger:
    """Counters of this instance since its start.

    What a session counts for its rule it counts for its server, too; so sums are over rules only.
    """

    def __init__(self) -> None:
        self._rules: _Part[str] = _Part(0)
        self._servers: _Part[Server] = _Part(ROWS)
        self._boards: list[Board] = []
        self._samples: list[tuple[float, dict[str, int]]] = []  # the older first, at most two
        # Sessions by rule that are on their way from one worker to another, in none of both.
        self.afloat: Callable[[], Mapping[str, int]] = dict

    def sample(self, now: float) -> None:
        """Remember the totals now and then, for :meth:`rates`."""
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
            self._samples = [*self._samples[-1:], (now, self.totals())]

    def rates(self, now: float) -> dict[str, float]:
        """Per second, over the last few seconds: new sessions, bytes each way."""
        totals = self.totals()
        then, before = self._samples[0] if self._samples else (now, totals)
        seconds = now - then
        return {
            f"{key}_per_s": round((totals[key] - before[key]) / seconds, 1) if seconds > 0 else 0.0
            for key in _RATES
        }

    def open(self) -> Board:
        """A board for a worker that is about to be forked. Owned until :meth:`close`.

        Raises OSError.
        """
        board = Board()
        self._boards.append(board)
        return board

    def close(
        self,
        board: Board,
        moved: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """A worker is gone: keep what it has counted.

        ``moved``, by row: so many of its sessions go on elsewhere.
        """
        if board in self._boards:
            self._boards.remove(board)
            for number, count in moved.items():
                row = board.row(number)
                row[SESSIONS] = max(0, row[SESSIONS] - count)
                row[MOVED_OUT] += count
            self._rules.on_exit(board, 0)
            self._servers.on_exit(board)
            board.close()

    def end(self) -> None:
        """Close the boards of workers that outlive their master; they go on counting."""
        for board in self._boards:
            board.close()

    def rows_in_use(self) -> list[int]:
        """All rows in which something may be counted, except the workers' own."""
        return [*self._rules.rows.used(), *self._servers.rows.used()]

    def worker(self, board: Board) -> dict[str, int]:
        """The counters of one living worker."""
        return worker_counters(board.row(0))

    def sessions(self, board: Board) -> int:
        """How many sessions one living worker has, as of now. Looks at all rules."""
        return sum(board.row(number)[SESSIONS] for number in self._rules.rows.used())

    def recent_sessions(self, board: Board) -> int:
        """The same as of its last beat, or the last time that sessions came or went by a move."""
        return board.row(0)[OWN_SESSIONS]

    def totals(self) -> dict[str, int]:
        """The counters of all workers."""
        return worker_counters(self._rules.total(0, self._boards))

    def totals_now(self) -> dict[str, int]:
        """The same for people, who compare them: sessions as of now, those on their way as well."""
        now = {"sessions": SESSIONS, "moved_in": MOVED_IN, "moved_out": MOVED_OUT}
        return {**self.totals(), **{name: self.sum(column) for name, column in now.items()}}

    def sum(self, column: int) -> int:
        """One counter over all rules and workers, as of now; :meth:`totals` lag by a beat."""
        rows = self._rules.rows.used()
        counted = sum(board.row(number)[column] for board in self._boards for number in rows)
        afloat = sum(self.afloat().values()) if column == SESSIONS else 0
        return self._rules.tally.sum(column) + counted + afloat

    def lose(self, rule: str, sessions: int) -> None:
        """Sessions that no worker has any more have ended, as those of a killed worker."""
        row = self._rules.rows.find(rule)
        self._rules.tally.lose(SHARED_ROW if row is None else row, sessions)

    # -- rules

    def row(self, rule: str) -> int:
        """The row in which all workers count a rule."""
        return self._rules.rows.of(rule)

    def rule(self, name: str) -> dict[str, object]:
        """The counters of a rule over all workers."""
        row = self._rules.total(self.row(name), self._boards)
        row[SESSIONS] += self.afloat().get(name, 0)
        return rule_counters(row)

    def forget(self, known: Iterable[str]) -> list[int]:
        """Drop the counters of rules that are not ``known`` any more and have no session left.

        Returns their rows, which new rules will get.
        """
        return list(self._rules.forget({*known, *self.afloat()}, self._boards).values())

    # -- servers

    def server_row(self, group: str, server: str) -> int:
        """The row in which all workers count a server of a group."""
        return self._servers.rows.of((group, server))

    def find_server(self, group: str, server: str) -> int | None:
        """The row that it has, if it has one."""
        return self._servers.rows.find((group, server))

    def adopt_server(self, group: str, server: str, row: int) -> bool:
        """Give a server this row, if both are free. Returns whether it has it."""
        return self._servers.rows.adopt((group, server), row)

    def servers(self) -> list[tuple[Server, int]]:
        """All servers that have a row, those that are forgotten soon as well; and their rows."""
        return list(self._servers.rows.items())

    def has_own_row(self, row: int) -> bool:
        """Whether the row of a server is that server's alone."""
        return not self._servers.rows.is_shared(row)

    def server(self, group: str, server: str) -> dict[str, object]:
        """The counters of a server over all workers; of one that has no row all are 0.

        Why sessions end is counted for rules only, except that they were lost with their worker.
        """
        row = self.find_server(group, server)
        return rule_counters(_ZEROS if row is None else self._servers.total(row, self._boards))

    def server_name(self, row: int) -> str | None:
        """The name of the server that a row counts, if it counts one only."""
        return next((name for (_, name), at in self._servers.rows.items() if at == row), None)

    def forget_servers(
        self, known: Iterable[Server], is_free: Callable[[int], bool] = lambda _: True
    ) -> dict[Server, int]:
        """Drop the counters of servers that are not ``known`` any more and have no session left.

        ``is_free`` says whether nothing else is held in a row. Returns their rows, which other
        servers will get.
        """
        return self._servers.forget(known, self._boards, is_free)


class _Part(Generic[_Key]):
    """The rows of all rules, or those of all servers, and what dead workers counted in them."""

    def __init__(self, first: int) -> None:
        self.rows: Rows[_Key] = Rows(first, first + ROWS)
        self.tally = Tally()

    def total(self, number: int, boards: Iterable[Board]) -> list[int]:
        return self.tally.total(number, (board.row(number) for board in boards))

    def on_exit(self, board: Board, *more: int) -> None:
        self.tally.on_exit({number: board.row(number) for number in (*more, *self.rows.used())})

    def forget(
        self,
        known: Iterable[_Key],
        boards: Iterable[Board],
        is_free: Callable[[int], bool] = lambda _: True,
    ) -> dict[_Key, int]:
        forgotten = {}
        for key, number in self.rows.forgettable(known).items():
            if not self.rows.is_shared(number):
                rows = [board.row(number) for board in boards]
                if any(row[SESSIONS] for row in rows) or not is_free(number):
                    continue
                for row in rows:
                    # SESSIONS is 0. A worker that does not know this yet may be about to count
                    # there, and must be able to count down again.
                    row[SESSIONS + 1 :] = _ZEROS[SESSIONS + 1 :]
                self.tally.forget(number)
            self.rows.forget(key)
            forgotten[key] = number
        return forgotten
