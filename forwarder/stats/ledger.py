"""What all workers have counted: their boards, which row is whose, and what dead ones have left.

The master's. Reads the boards; writes to them only where no worker does any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.stats.board import ROWS, Board
from forwarder.stats.rows import SESSIONS, WORDS, Rows, Tally, rule_counters, worker_counters

if TYPE_CHECKING:
    from collections.abc import Iterable

_ZEROS: Final = memoryview(bytes(8 * WORDS)).cast("Q")

# Least time between samples. The workers write their totals once a second.
SAMPLE_S: Final = 2.0
_RATES: Final = ("sessions_total", "bytes_c2u", "bytes_u2c")


class Ledger:
    """Counters of this instance since its start."""

    def __init__(self) -> None:
        self._rows = Rows(ROWS)
        self._tally = Tally()
        self._boards: list[Board] = []
        self._samples: list[tuple[float, dict[str, int]]] = []  # the older first, at most two

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
        """A board for a worker that is about to be forked."""
        board = Board()
        self._boards.append(board)
        return board

    def close(self, board: Board) -> None:
        """A worker is gone: keep what it has counted."""
        if board in self._boards:
            self._boards.remove(board)
            numbers = [0, *self._rows.used()]
            self._tally.on_exit({number: board.row(number) for number in numbers})

    def rows_in_use(self) -> Iterable[int]:
        """All rows in which something may be counted, except the workers' own."""
        return self._rows.used()

    def row(self, rule: str) -> int:
        """The row in which all workers count a rule."""
        return self._rows.of(rule)

    def forget(self, known: Iterable[str]) -> list[int]:
        """Drop the counters of rules that are not ``known`` any more and have no session left.

        Returns their rows, which new rules will get.
        """
        forgotten = []
        for name, number in self._rows.forgettable(known).items():
            if not self._rows.is_shared(number):
                rows = [board.row(number) for board in self._boards]
                if any(row[SESSIONS] for row in rows):
                    continue
                for row in rows:
                    # SESSIONS is 0. A worker that does not know this yet may be about to count
                    # there, and must be able to count down again.
                    row[SESSIONS + 1 :] = _ZEROS[SESSIONS + 1 :]
                self._tally.forget(number)
            self._rows.forget(name)
            forgotten.append(number)
        return forgotten

    def worker(self, board: Board) -> dict[str, int]:
        """The counters of one living worker."""
        return worker_counters(board.row(0))

    def totals(self) -> dict[str, int]:
        """The counters of all workers."""
        return worker_counters(self._sum(0))

    def sum(self, column: int) -> int:
        """One counter over all rules and workers, as of now; :meth:`totals` lag by a beat."""
        rows = self._rows.used()
        return self._tally.sum(column) + sum(
            board.row(number)[column] for board in self._boards for number in rows
        )

    def rule(self, name: str) -> dict[str, object]:
        """The counters of a rule over all workers."""
        return rule_counters(self._sum(self._rows.of(name)))

    def _sum(self, number: int) -> list[int]:
        return self._tally.total(number, (board.row(number) for board in self._boards))
