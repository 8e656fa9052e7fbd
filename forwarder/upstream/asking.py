"""What looks names up for all workers, side by side, in the checker. Decides nothing.

Threads wait for the name servers; a system call that may take a minute cannot be cancelled, so
nobody ever waits for them, and the process ends without them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.upstream.answers import Answer
from forwarder.upstream.lookup import Lookups, look_up, with_lifetime
from forwarder.upstream.messages import read_hosts, say_answers
from forwarder.upstream.schedule import LIMIT_S, Schedule
from forwarder.upstream.ttl import lifetimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.ipc.channel import Message

# Messages of the master, each with names: look them up from now on, no longer, soon.
WANT, FORGET, HURRY = "want", "forget", "hurry"
# What the answers are sent in.
FOUND: Final = "found"
# When no thread can be started: the pause before the next attempt.
NO_THREAD_S: Final = 1.0


class Asking:
    """The names that are wanted, the look-ups under way, and what was found.

    Owns a pipe, readable when a look-up has ended.
    """

    def __init__(self, look: Callable[[str], Answer] | None = None) -> None:
        """``look`` looks up, and blocks. Raises OSError."""
        self._schedule = Schedule()
        self._lookups = Lookups(look or with_lifetime(look_up, lifetimes()))
        self._answers: dict[str, Answer] = {}
        self._unsent: dict[str, Answer] = {}
        self._no_thread_until = 0.0

    def fileno(self) -> int:
        """See the class."""
        return self._lookups.fileno()

    def close(self) -> None:
        """Give up what is under way."""
        self._lookups.close()

    def hear(self, message: Message, now: float) -> None:
        """Heed a message about names. Raises KeyError or TypeError for another one."""
        actions: dict[object, Callable[[str], None]] = {
            WANT: lambda host: self._schedule.want(host, now),
            FORGET: self._forget,
            HURRY: lambda host: self._schedule.hurry(host, now),
        }
        for host in read_hosts(message):
            actions[message["op"]](host)

    def turn(self, now: float) -> None:
        """Take in what was found, and begin the look-ups that are due."""
        for host, answer in self._lookups.take():
            is_wanted = self._schedule.done(
                host, now, has_failed=bool(answer.why), good_for_s=answer.good_for_s
            )
            if is_wanted:
                self._note(host, replace(answer, since=now))
        for host in self._schedule.overdue(now):
            why = f"no answer within {LIMIT_S:.0f} s"
            if host not in self._unsent:
                self._note(host, Answer((), why, since=now))
        self._begin_due(now)

    def deadline(self) -> float:
        """When :meth:`turn` has something to do without a look-up's end."""
        return max(self._schedule.deadline(), self._no_thread_until)

    def answer(self, host: str) -> Answer | None:
        """What is known of a name, as workers use it; None if it was never answered."""
        return self._answers.get(host)

    def take_answers(self) -> Iterator[Message]:
        """Messages with what was found since the last time."""
        unsent, self._unsent = self._unsent, {}
        return say_answers(FOUND, unsent)

    def _note(self, host: str, answer: Answer) -> None:
        self._unsent[host] = answer
        known = self._answers.get(host)
        answer = answer.after(known)
        if answer != known:
            self._answers[host] = answer

    def _forget(self, host: str) -> None:
        self._schedule.forget(host)
        self._answers.pop(host, None)

    def _begin_due(self, now: float) -> None:
        if now < self._no_thread_until:
            return
        while self._lookups.have(self._schedule.running + 1) or self._schedule.running == 0:
            host = self._schedule.take(now)
            if host is None:
                return
            self._lookups.begin(host)
        self._no_thread_until = now + NO_THREAD_S
