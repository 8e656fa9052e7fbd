"""Questions of the master to workers and an old master: which answers are due, and until when.

The caller puts the answers together. Sends nothing itself.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Answered: TypeAlias = "Callable[[list[object], list[int]], None]"
"""Called with the answers of the workers, and with the pids of those that gave none."""

# A worker answers between two turns of its loop; one that is hung is replaced, not waited for.
ANSWER_WITHIN_S: Final = 3.0


@dataclass(slots=True)
class _Question:
    waiting: set[int]  # pids
    deadline: float
    callback: Answered
    answers: list[object] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)


class Questions:
    """Questions under way."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, _Question] = {}

    @property
    def deadline(self) -> float | None:
        """When :meth:`expire` has something to do; None for never."""
        return min((question.deadline for question in self._open.values()), default=None)

    def note(
        self,
        pids: Iterable[int],
        now: float,
        callback: Answered,
        within_s: float = ANSWER_WITHIN_S,
    ) -> int:
        """Note a question to these processes. Returns its number, for :meth:`on_answer`.

        ``callback`` is called once: when the last answer has come, or time is up. It gets the
        answers, and the pids of processes that gave none or could not answer.
        """
        number = next(self._numbers)
        self._open[number] = _Question(set(pids), now + within_s, callback)
        return number

    def is_awaited(self, number: object, pid: int) -> bool:
        """Whether that worker was asked that question and has not answered."""
        return self._awaiting(number, pid) is not None

    def _awaiting(self, number: object, pid: int) -> _Question | None:
        question = self._open.get(number) if isinstance(number, int) else None
        return question if question is not None and pid in question.waiting else None

    def on_answer(self, number: object, pid: int, answer: object) -> None:
        """A worker has answered; None if it could not."""
        if answer is None:
            self.on_answers(number, pid, [], [pid])
        else:
            self.on_answers(number, pid, [answer], [])

    def on_answers(
        self, number: object, pid: int, answers: Iterable[object], silent: Iterable[int]
    ) -> None:
        """A process that asked others has answered: their answers, and the pids of silent ones."""
        question = self._awaiting(number, pid)
        if question is not None:
            question.waiting.discard(pid)
            question.answers += answers
            question.silent += silent
            self._close_finished()

    def on_exit(self, pid: int) -> None:
        """A worker is gone, and its sessions with it; no question waits for it."""
        for question in self._open.values():
            question.waiting.discard(pid)
        self._close_finished()

    def expire(self, now: float) -> None:
        """Close the questions whose time is up."""
        for question in self._open.values():
            if now >= question.deadline:
                question.silent += question.waiting
                question.waiting.clear()
        self._close_finished()

    def _close_finished(self) -> None:
        finished = [number for number, question in self._open.items() if not question.waiting]
        for number in finished:
            question = self._open.pop(number)
            question.callback(question.answers, question.silent)
