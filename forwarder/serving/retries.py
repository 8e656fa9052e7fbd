"""Rules with an address that cannot be bound yet: when to try again. Pure; ``now`` is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from forwarder.system.backoff import backoff

if TYPE_CHECKING:
    from collections.abc import Collection

# Each failure doubles the wait, from the first to the longest. Arbitrary: a boot brings addresses
# within seconds, a person within minutes.
FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 30.0


@dataclass(slots=True)
class Waiting:
    """A rule that waits, at least for some of its addresses: why, how often, until when."""

    why: str
    failures: int
    not_before: float


class Retries:
    """All rules that wait for their address, by name."""

    def __init__(self) -> None:
        self._waiting: dict[str, Waiting] = {}
        self._hastened = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def get(self, name: str) -> Waiting | None:
        """What is known of a rule that waits; None of another one."""
        return self._waiting.get(name)

    @property
    def deadline(self) -> float | None:
        """When the next rule is due; None for never."""
        return min((one.not_before for one in self._waiting.values()), default=None)

    def due(self, now: float) -> set[str]:
        """Rules to try now. Those that would be due within a second come along."""
        if self.deadline is None or now < self.deadline:
            return set()
        soon = now + FIRST_DELAY_S
        return {name for name, one in self._waiting.items() if one.not_before <= soon}

    def expect(self, name: str, why: str, now: float) -> None:
        """Note that a rule waits for an answer about its name, which is no failure yet."""
        self._waiting[name] = Waiting(why, 0, now + LONGEST_DELAY_S)

    def hasten(self, names: Collection[str], now: float) -> None:
        """Try these rules now, as far as they wait."""
        for name in self._waiting.keys() & set(names):
            self._waiting[name].not_before = now

    def on_failure(self, name: str, why: str, now: float) -> bool:
        """Note that a rule has to wait. Returns whether that is news."""
        one = self._waiting.get(name)
        is_news = one is None or not one.failures
        if one is None:
            one = self._waiting[name] = Waiting(why, 0, now)
        one.why = why
        one.failures += 1
        one.not_before = now + backoff(one.failures, FIRST_DELAY_S, LONGEST_DELAY_S)
        return is_news

    def hasten_all(self, now: float) -> None:
        """Something has changed: try all at once, but not more often than FIRST_DELAY_S apart."""
        if now >= self._hastened:
            self._hastened = max(now, self._hastened + FIRST_DELAY_S)
        for one in self._waiting.values():
            one.not_before = min(one.not_before, self._hastened)

    def on_success(self, name: str) -> int:
        """Note that a rule has its address. Returns how often it had failed; 0 if it never has."""
        one = self._waiting.pop(name, None)
        return 0 if one is None else one.failures

    def keep(self, names: Collection[str]) -> None:
        """Forget all rules but these."""
        for name in self._waiting.keys() - set(names):
            del self._waiting[name]
