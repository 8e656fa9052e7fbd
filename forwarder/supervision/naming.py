"""The master's part in names: which are wanted, and what was found. The checker looks them up.

What was found once stays, also when the checker dies or no name server answers. The master itself
never looks a name up.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.system.printable import field
from forwarder.system.rarely import Crowds
from forwarder.upstream.answers import Answer
from forwarder.upstream.asking import FORGET, HURRY, WANT
from forwarder.upstream.messages import read_answers, say_hosts
from forwarder.upstream.schedule import LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from forwarder.ipc.channel import Message
    from forwarder.upstream.known import KnownNames

log = logging.getLogger(__name__)

# A name without an answer of the helper for this long has failed: the helper is dead, hung, or has
# too many dead names to wait for.
SILENCE_S: Final = LIMIT_S + 4.0
# Rules that are named in one of these lines: thousands may lead to one name. Arbitrary.
MOST_RULES: Final = 5


class Asked(Protocol):
    """The helper that looks names up, see :class:`forwarder.supervision.helper.Helper`."""

    @property
    def is_started(self) -> bool:
        """Whether there is one."""

    @property
    def is_free(self) -> bool:
        """Whether there is one that takes a message at once."""

    def send(self, message: Message) -> None:
        """Send it a message."""


class Naming:
    """The names of the rules, and what is known of them."""

    def __init__(
        self, known: KnownNames, asked: Asked, on_answers: Callable[[Collection[str]], None]
    ) -> None:
        """``asked`` looks them up. ``on_answers`` gets the names that have changed."""
        self.known = known
        self._asked = asked
        self._on_answers = on_answers
        self._rules: dict[str, list[str]] = {}  # that have a name
        self._unanswered: dict[str, float] = {}  # until when that is no failure
        self._told: set[str] = set()  # what is looked up
        self._crowds = Crowds()

    def inherit(self, text: bytes) -> None:
        """Take in what a predecessor knew; what cannot be read is looked up again."""
        try:
            self.known.take(text)
        except (ValueError, TypeError, AttributeError, RecursionError) as err:
            log.warning("names: cannot read what the predecessor knew: %s", err)

    def learn(self, answers: Mapping[str, Answer]) -> None:
        """Take in what another process has found of names that will be used."""
        for host, answer in answers.items():
            self.known.put(host, answer)

    def use(self, rules: Mapping[str, list[str]], now: float) -> None:
        """Look these names up from now on, and no others; with the rules that have them."""
        self._rules = dict(rules)
        self.known.keep(rules.keys())
        unanswered = self._unanswered
        self._unanswered = {
            host: unanswered.get(host, now + SILENCE_S)
            for host in rules
            if host not in self.known.answers
        }
        self._tell()

    def turn(self, now: float) -> None:
        """Pass on what workers ask for, give up waiting for a dead helper, finish the log."""
        if self.known.hurried and self._asked.is_free:
            for message in say_hosts(HURRY, self.known.hurried):
                self._asked.send(message)
            self.known.hurried.clear()
        silent = [host for host, until in self._unanswered.items() if now >= until]
        why = "not looked up yet: the process that does that is busy or dead"
        self._take({host: Answer((), why, since=now) for host in silent}, now)
        for (event, _), more in self._crowds.over(now):
            log.log(_level(event), "%s and %d more names: `forwarder status`", event, more)

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        deadlines = (*self._unanswered.values(), self._crowds.deadline)
        return min((one for one in deadlines if one is not None), default=None)

    def describe(self, rules: Collection[dict[str, object]], now: float) -> list[dict[str, object]]:
        """Rules as in the status, each with those of its names that have no good answer now."""
        troubled: dict[str, list[dict[str, object]]] = {}
        for host, users in self._rules.items():
            answer = self.known.answers.get(host)
            if answer is None or answer.why:
                for rule in users:
                    troubled.setdefault(rule, []).append(_describe(host, answer, now))
        return [{**rule, "names": troubled.get(str(rule["name"]), [])} for rule in rules]

    def on_started(self) -> None:
        """There is a new helper: send it all names."""
        self._told.clear()
        self._tell()

    def on_found(self, message: Message, now: float) -> None:
        """Take in what the helper has found. Raises KeyError, TypeError or ValueError."""
        answers = read_answers(message)
        self._take({host: answer for host, answer in answers.items() if host in self._rules}, now)

    def _tell(self) -> None:
        if self._asked.is_started:
            for message in say_hosts(WANT, self._rules.keys() - self._told):
                self._asked.send(message)
            for message in say_hosts(FORGET, self._told - self._rules.keys()):
                self._asked.send(message)
            self._told = set(self._rules)

    def _take(self, answers: Mapping[str, Answer], at: float) -> None:
        changed = []
        for host, answer in answers.items():
            before = self.known.answers.get(host)
            now = self.known.put(host, answer)
            self._unanswered.pop(host, None)
            if now != before:
                changed.append(host)
                event = _event(before, now)
                if event and self._crowds.names((event, ""), host, at):
                    log.log(_level(event), "%s %s", event, self._what(host, now))
        if changed:
            self._on_answers(changed)

    def _what(self, host: str, answer: Answer) -> str:
        """What became of a name, for people."""
        used = ", ".join(_texts(answer))
        if answer.why:
            used = f"{answer.why}; in use: {used}" if used else answer.why
        rules = self._rules[host]
        others = f" and {len(rules) - MOST_RULES} more" if len(rules) > MOST_RULES else ""
        names = field(",".join(rules[:MOST_RULES]))
        return f"host={host} rules={names}{others}: {used}"


def _level(event: str) -> int:
    return logging.WARNING if event == "name.failed" else logging.INFO


def _event(before: Answer | None, now: Answer) -> str:
    """What the log calls a change; "" for one that it leaves out."""
    was_good = before is None or not before.why
    if now.why:
        return "name.failed" if was_good else ""
    if not was_good:
        return "name.works"
    is_moved = before is not None and (
        set(before.addresses) != set(now.addresses) or before.records != now.records
    )
    return "name.moved" if is_moved else ""


def _texts(answer: Answer) -> list[str]:
    """Addresses without a port, or the servers of a service, for people."""
    if answer.records:
        return [f"{one.host}:{one.port}" for one in answer.records]
    return [str(target.sockaddr[0]) for target in answer.addresses]


def _describe(host: str, answer: Answer | None, now: float) -> dict[str, object]:
    if answer is None:
        return {"host": host, "state": "asked", "why": "", "for_s": 0.0, "addresses": []}
    return {
        "host": host,
        "state": "failed",
        "why": answer.why,
        "for_s": round(max(0.0, now - answer.since), 1),
        "addresses": _texts(answer),
    }
