"""Questions of the master to all its workers: who has still to answer, and when to give up.

The answers of different workers are put together by whoever asked. Sends nothing itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# A worker answers between two turns of its loop; one that is hung is replaced, not waited for.
ANSWER_WITHIN_S: Final = 3.0


@dataclass(slots=True)
class _Question:
    waiting: set[int]  # pids
    deadline: float
    callback: Callable[[list[object]], None]
    answers: list[object] = field(default_factory=list)


class Questions:
    """Questions under way."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, _Question] = {}

    @property
    def deadline(self) -> float | None:
        """When :meth:`expire` has something to do; None for never."""
        return min((question.deadline for question in self._open.values()), default=None)

    def begin(
        self, pids: Iterable[int], now: float, callback: Callable[[list[object]], None]
    ) -> int:
        """Note a question to these workers. Returns its number, for :meth:`on_answer`.

        ``callback`` gets all answers, once: when the last one is there, or what there is in time.
        """
        number = next(self._numbers)
        self._open[number] = _Question(set(pids), now + ANSWER_WITHIN_S, callback)
        return number

    def on_answer(self, number: object, pid: int, answer: object) -> None:
        """A worker has answered."""
        question = self._open.get(number) if isinstance(number, int) else None
        if question is not None and pid in question.waiting:
            question.answers.append(answer)
            question.waiting.discard(pid)
            self._close_finished()

    def on_exit(self, pid: int) -> None:
        """A worker is gone; nobody need wait for it."""
        for question in self._open.values():
            question.waiting.discard(pid)
        self._close_finished()

    def expire(self, now: float) -> None:
        """Give up waiting where it is time."""
        for question in self._open.values():
            if now >= question.deadline:
                question.waiting.clear()
        self._close_finished()

    def _close_finished(self) -> None:
        finished = [number for number, question in self._open.items() if not question.waiting]
        for number in finished:
            question = self._open.pop(number)
            question.callback(question.answers)
