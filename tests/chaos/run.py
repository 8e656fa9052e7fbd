"""A run: the load, the monkey amid it, and what is found at the end."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from chaos import acts, checks
from chaos.checks import Level
from chaos.clients import HANG_S
from chaos.model import OK, TURNED_AWAY, Ability, Ending
from chaos.monkey import Monkey
from chaos.place import ChaosError, Child, Place, wait_until

if TYPE_CHECKING:
    from chaos.acts import Deed

# How many sessions of each kind at once. Two processes, so that one who is busy delays no other.
STREAMS: Final = {
    "short": 6,
    "long": 16,
    "quiet": 8,
    "bulk": 1,
    "answered": 4,
    "pushed": 3,
    "slow": 2,
    "stalled": 2,
    "stalled upstream": 1,
    "reset": 2,
    "reset by upstream": 2,
    "metered": 1,
    "to unix": 3,
    "unix": 2,
    "unix long": 2,
}
OTHERS: Final = {
    "limited": 11,
    "group": 4,
    "group long": 6,
    "span": 3,
    "tcptoudp": 3,
    "udp": 8,
    "udptotcp": 3,
}
_SECOND_FIRST: Final = 1 << 20  # clients of the second process have numbers from here on
_THIRD_FIRST: Final = 2 << 20  # of the checks


@dataclass
class Report:
    """What was found. ``problems``: what must not be."""

    seed: int
    seconds: float
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    acts: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    excuses: Counter[str] = field(default_factory=Counter)
    silence_s: float = 0.0
    abilities: str = ""

    def text(self) -> str:
        """For people; with the acts if anything is wrong."""
        total = self.outcomes.total()
        bad = {key: n for key, n in self.outcomes.items() if key[1] not in {OK, TURNED_AWAY}}
        lines = [
            f"seed {self.seed}: {self.acts} acts in {self.seconds:.0f} s, {total} sessions, "
            f"{sum(bad.values())} lost, longest silence {self.silence_s:.2f} s",
            f"the instance can: {self.abilities or 'neither move nor deposit sessions'}",
            *(f"  {kind}: {n} {outcome}" for (kind, outcome), n in sorted(bad.items())),
            *(f"  excused: {n} {what}" for what, n in sorted(self.excuses.items())),
        ]
        if self.problems:
            lines += ["what was done:", *self.notes, "what is wrong:", *self.problems]
            lines.append(f"again: make chaos SEED={self.seed} MINUTES={self.seconds / 60:g}")
        return "\n".join(lines)


def run(seed: int, seconds: float, deeds: frozenset[Deed], kept: str = "") -> Report:
    """Run in the namespaces that the caller has made. ``kept``: where to copy all logs to."""
    report = Report(seed, seconds)
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        place = Place(Path(name))
        try:
            _run(place, report, deeds)
        except ChaosError as err:
            report.problems.append(str(err))
        finally:
            if kept:
                shutil.copytree(name, kept, ignore=shutil.ignore_patterns("*.sock"))
            if report.problems:
                report.problems += ["the last it said:", *place.said()[-40:]]
            place.end()
    return report


def _run(place: Place, report: Report, deeds: frozenset[Deed]) -> None:
    place.prepare()
    place.serve()
    wait_until(lambda: len(place.checkers()) == 1, "the checker has begun")
    place.fill_slots()
    report.problems += checks.look_at_counters(place, _THIRD_FIRST)
    checks.wait_for_rest(place)
    before = Level.at_rest(place)
    outputs = [place.directory / "streams", place.directory / "others"]
    loads = [
        _load(place, outputs[0], report.seed, 0, STREAMS),
        _load(place, outputs[1], report.seed + 1, _SECOND_FIRST, OTHERS),
    ]
    monkey = Monkey(place)
    monkey.note(f"begins at {monkey.began:.3f}")
    try:
        report.acts = monkey.run(acts.plan(report.seed, deeds), report.seconds)
        monkey.settle()
        abilities = place.abilities()
        if Ability.MOVES in abilities:
            report.problems += checks.look_for_old_ones(place)
            monkey.note("the old ones should have gone")
        for load in loads:
            load.finish(HANG_S * 2)
            monkey.note("a load has ended")
    finally:
        report.notes = monkey.notes
        report.problems += monkey.problems
        for load in loads:
            load.kill()
    checks.wait_for_rest(place)
    endings = [ending for output in outputs for ending in _read(output)]
    monkey.note("nothing is open any more")
    _judge(place, report, endings, monkey, before, abilities)
    monkey.note("all is checked")


def _load(place: Place, output: Path, seed: int, first: int, mix: dict[str, int]) -> Child:
    words = [f"{kind}={n}" for kind, n in mix.items()]
    unix = str(place.directory / "listen.sock")
    arguments = (str(output), unix, str(seed), str(first), *words)
    return Child("chaos.clients", *arguments, directory=place.directory)


def _read(path: Path) -> list[Ending]:
    return [Ending(**json.loads(line)) for line in path.read_text().splitlines()]


def _judge(
    place: Place,
    report: Report,
    endings: list[Ending],
    monkey: Monkey,
    before: Level,
    abilities: frozenset[Ability],
) -> None:
    events = monkey.events
    report.abilities = ", ".join(sorted(ability.value for ability in abilities))
    report.outcomes = Counter((ending.kind, ending.outcome) for ending in endings)
    # Others rest on purpose, and it is not their own silence.
    heard = [it.silence_s for it in endings if it.kind == "long" and it.outcome == OK]
    report.silence_s = max(heard, default=0.0)
    report.problems += checks.look_at_processes(place, before)
    report.problems += checks.look_at_gauges(place)
    wrong_lines, recognised = checks.look_at_log(place, endings, events)
    lost, report.excuses = checks.look_at_endings(endings, events, abilities, recognised)
    report.problems += [*checks.shortened(lost), *checks.shortened(wrong_lines)]
    report.problems += checks.look_at_counters(place, _THIRD_FIRST + 100)
    report.problems += checks.shortened(checks.look_at_own_log(place, monkey.ended))
    report.problems += place.stop()
