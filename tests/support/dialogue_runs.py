"""Many dialogues, held directly and over other routes, judged, and made small if they fail."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

from support.dialogue_driver import Driver, Route
from support.dialogue_writer import written
from support.dialogues import Dialogue, Outcome, complaints, differences, smaller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Held = tuple[Dialogue, Route]

_LIMIT_S: Final = 50.0
"""Per dialogue, without its pauses, while hundreds of others are held on a busy machine."""
_LIMIT_OF_SMALLER_S: Final = 3.0
"""The same while a failing dialogue is made smaller: few are held then, and many may hang."""
_SLOW_S: Final = 4.0
"""What a dialogue may take longer than directly, beside what the kernel may add; beyond that it is
held again, alone."""
_TRIES: Final = 6
"""How often a smaller dialogue is held, at once, to see whether it fails as well."""
_ROUNDS: Final = 60
_SHOWN: Final = 3


def written_dialogues(count: int, seed: int) -> list[Dialogue]:
    """So many dialogues, always the same for a seed."""
    random = Random(seed)
    return [written(random) for _ in range(count)]


def hold(
    pairs: Sequence[Held],
    at_once: int = 200,
    limit_s: float = _LIMIT_S,
    when_open: Callable[[], object] | None = None,
) -> list[Outcome]:
    """Hold dialogues over their routes; see :meth:`Driver.hold`."""
    driver = Driver(at_once, limit_s)
    try:
        return driver.hold(pairs, when_open)
    finally:
        driver.close()


@dataclass
class Failure:
    """A dialogue that went otherwise than it must."""

    dialogue: Dialogue
    route: Route
    said: list[str]
    outcome: Outcome
    direct: Outcome

    def kind(self) -> str:
        """The same for failures that look alike."""
        return self.route.carrier.name + re.sub(r"\d+", "", self.said[0])

    def __str__(self) -> str:
        """With the dialogue as code, to be pasted as a named one."""
        views = [
            f"  {way} {end}: {seen}"
            for way, outcome in (("directly", self.direct), ("here", self.outcome))
            for end, seen in (("client", outcome.client), ("upstream", outcome.upstream))
        ]
        head = f"over {self.route.carrier.name}: {'; '.join(self.said)}"
        return "\n".join([head, self.dialogue.as_code(), *views])


class Judge:
    """Holds dialogues over routes and directly, and compares."""

    def __init__(self, direct: dict[bool, Route]) -> None:
        """``direct``: ways without anything between, by TCP, and with True by a unix socket."""
        self._direct = direct

    def failures(self, pairs: Sequence[Held]) -> list[Failure]:
        """Those that fail; if all that they do is take long, then also when held alone, twice."""
        found = self._judged(pairs, slow_s=_SLOW_S)
        sure = [failure for failure in found if failure.said]
        for failure in found:
            if not failure.said:
                pair = (failure.dialogue, failure.route)
                again = [one for _ in range(2) for one in self._judged([pair], slow_s=_SLOW_S)]
                sure += [one for one in again if one.said] or again[: len(again) // 2]
        for failure in sure:
            failure.said = failure.said or [f"takes {failure.outcome.took_s:.1f} s"]
        return sure

    def _judged(
        self, pairs: Sequence[Held], slow_s: float, limit_s: float = _LIMIT_S
    ) -> list[Failure]:
        """Failures; one that only took long has nothing said of it."""
        ways = [self._direct[all(route.carrier.unix)] for _, route in pairs]
        direct = hold([(dialogue, way) for (dialogue, _), way in zip(pairs, ways, strict=True)])
        here = hold(pairs, limit_s=limit_s)
        found = []
        for (dialogue, route), way, one, other in zip(pairs, ways, direct, here, strict=True):
            said = [f"DIRECTLY: {law}" for law in complaints(one, way.carrier)]
            said += complaints(other, route.carrier) or differences(one, other, route.carrier)
            may_take_s = one.took_s + slow_s + dialogue.kernel_delays_s()
            if said or other.took_s > may_take_s:
                found.append(Failure(dialogue, route, said, other, one))
        return found

    def smallest(self, failure: Failure) -> Failure:
        """A failure of a simpler dialogue over the same route, as simple as can be found."""
        for _ in range(_ROUNDS):
            simpler = self._simpler(failure)
            if simpler is None:
                break
            failure = simpler
        return failure

    def _simpler(self, failure: Failure) -> Failure | None:
        candidates = list(smaller(failure.dialogue))
        pairs = [(one, failure.route) for one in candidates for _ in range(_TRIES)]
        failing = [
            one
            for one in self._judged(pairs, slow_s=_LIMIT_S, limit_s=_LIMIT_OF_SMALLER_S)
            if one.kind() == failure.kind()
        ]
        return min(failing, key=lambda one: _weight(one.dialogue), default=None)


def complaints_at_once(pairs: Sequence[Held], when_open: Callable[[], object]) -> list[Failure]:
    """Failures of dialogues of which all connect first, then ``when_open`` is called.

    They are judged by the laws alone, not compared with direct ones.
    """
    outcomes = hold(pairs, len(pairs), when_open=when_open)
    return [
        Failure(dialogue, route, said, outcome, Outcome())
        for (dialogue, route), outcome in zip(pairs, outcomes, strict=True)
        if (said := complaints(outcome, route.carrier))
    ]


def _weight(dialogue: Dialogue) -> tuple[int, int]:
    return len(dialogue.client) + len(dialogue.upstream), len(dialogue.as_code())


def report(judge: Judge, failures: Iterable[Failure]) -> str:
    """The failures, one of each kind, and of the first kinds the smallest that shows it."""
    kinds: dict[str, list[Failure]] = {}
    for failure in failures:
        kinds.setdefault(failure.kind(), []).append(failure)
    parts = []
    for number, (kind, alike) in enumerate(kinds.items()):
        one = min(alike, key=lambda failure: _weight(failure.dialogue))
        shown = judge.smallest(one) if number < _SHOWN else one
        parts.append(f"{len(alike)} times: {kind}\n{shown}")
    return "\n\n".join(parts)
