"""Names to listen on that a start waits for, but not forever. Pure; ``now`` is passed in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from forwarder.config.address import Address

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from forwarder.config.model import Rule

# How long a start is incomplete while a name has no answer; the rest is served meanwhile.
FIRST_ANSWER_S: Final = 5.0


class FirstAnswers:
    """``rules`` have such names, until they listen or have to wait for longer.

    ``deadline`` is when they have to.
    """

    def __init__(self) -> None:
        self.rules: set[str] = set()
        self.deadline = math.inf
        self._unanswered: set[str] = set()

    def expect(self, rules: Iterable[Rule], known: Container[str], now: float) -> None:
        """Wait for those names of these rules that are not known."""
        for rule in rules:
            listen = rule.listen
            if listen.is_literal or not isinstance(listen, Address) or listen.host in known:
                continue
            self.rules.add(rule.name)
            self._unanswered.add(listen.host)
            self.deadline = now + FIRST_ANSWER_S

    def on_answers(self, hosts: Iterable[str]) -> None:
        """Note that these names have been looked up."""
        self._unanswered.difference_update(hosts)

    def is_unanswered(self, rule: Rule) -> bool:
        """Whether the name that a rule listens on has had no answer yet."""
        return isinstance(rule.listen, Address) and rule.listen.host in self._unanswered

    def expire(self, now: float) -> None:
        """Stop waiting when it is time."""
        if not self.rules or now >= self.deadline:
            self.rules.clear()
            self.deadline = math.inf
