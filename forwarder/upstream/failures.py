"""Which addresses of a rule have failed just now, so that others are tried before them. Pure.

Also what else cannot be used: a missing interface, under the text that names it.

An address that has failed is avoided for a while; each time it fails again after that, for twice as
long. After the while one session tries it first, and only one: the others go on avoiding it until
the outcome is known. No address is ever left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.net.sockets import Target
    from forwarder.net.zones import Zoned

# How long an address is avoided after its first failure, and at most. Arbitrary: a restarted
# service is back within the first, and the last costs one session a minute its wait.
FIRST_S: Final = 2.0
MOST_S: Final = 60.0
# Addresses of one rule that are remembered: more than a name can have. Arbitrary.
MAX_KNOWN: Final = 256
# An address that no session has tried for this long is forgotten. Arbitrary.
FORGET_S: Final = 600.0


@dataclass(slots=True)
class Failure:
    """How an address fails: ``why``, ``since`` when, and when it did so last, in seconds."""

    why: str
    since: float
    last: float
    pause_s: float = FIRST_S
    until: float = 0.0  # others are tried first until then
    is_tried: bool = False  # one session tries it first; the outcome is not known yet


class Failures:
    """The addresses of a rule that fail in one worker. ``known`` has them all; usually none."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: dict[Target | Zoned | str, Failure] = {}

    def note(self, target: Target | Zoned | str, why: str, now: float) -> bool:
        """``target`` has failed. Returns whether that is news."""
        failure = self.known.get(target)
        if failure is not None:
            if failure.is_tried or now >= failure.until:
                failure.pause_s = min(2 * failure.pause_s, MOST_S)
                failure.until = now + failure.pause_s
                failure.is_tried = False
            failure.last = now
            failure.why = why
            return False
        if len(self.known) >= MAX_KNOWN:
            del self.known[min(self.known, key=lambda known: self.known[known].last)]
        self.known[target] = Failure(why, now, now, until=now + FIRST_S)
        return True

    def forget(self, target: Target | Zoned | str) -> bool:
        """``target`` works. Returns whether that is news."""
        return self.known.pop(target, None) is not None

    def expire(self, now: float) -> None:
        """Forget what no session has tried for long."""
        for target in [one for one, how in self.known.items() if now >= how.last + FORGET_S]:
            self.forget(target)

    def is_avoided(self, target: Target, now: float) -> bool:
        """Whether others are tried before ``target``."""
        failure = self.known.get(target)
        return failure is not None and now < failure.until

    def is_worth_a_try(self, target: Target, now: float) -> bool:
        """Whether ``target`` has not failed within the last moments."""
        failure = self.known.get(target)
        return failure is None or now >= failure.last + FIRST_S

    def order(self, targets: Iterable[Target], now: float) -> tuple[Target, ...]:
        """The same targets, those that are avoided behind the others.

        Call it once for each session: the first target may be one that this session tries for all.
        """
        first, last = [], []
        for target in targets:
            failure = self.known.get(target)
            if failure is None:
                first.append(target)
            elif now < failure.until:
                last.append(target)
            else:
                if not first:
                    failure.is_tried = True
                    failure.until = now + failure.pause_s
                first.append(target)
        return (*first, *last)
