"""A run: where and when it was, its parts with all figures; as JSON, and read from it.

Measures nothing.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from bench import machine
from bench.peers import version_of
from bench.reloads import Reloads
from bench.report import Results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.peers import Peer
    from bench.rounds import Part


@dataclass(slots=True)
class Section:
    """What was found in one part of a run. ``measures`` and ``peers`` are in report order."""

    title: str
    rounds: int
    seconds: int
    measures: list[str]
    peers: list[str]
    results: Results = field(default_factory=Results)

    @classmethod
    def of(cls, part: Part) -> Section:
        """One without figures yet."""
        measures = [measure.name for measure in part.measures]
        peers = [peer.name for peer in part.peers]
        return cls(part.title, part.rounds, part.seconds, measures, peers)


@dataclass(slots=True)
class Run:
    """All of it.

    ``peers`` are version and settings by name, ``absent`` who was not there, ``failures`` what went
    wrong with a peer, whose figure of that round is missing.
    """

    date: str
    machine: dict[str, str]
    peers: dict[str, list[str]]
    absent: list[str]
    failures: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    reloads: Reloads | None = None

    @classmethod
    def begin(cls, peers: Sequence[Peer], absent: Sequence[str]) -> Run:
        """A run of now, here. Asks every peer for its version."""
        return cls(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            machine={
                "processor": f"{machine.processor()}, {os.cpu_count()} CPUs",
                "memory": f"{machine.memory_gib():.1f} GiB",
                "kernel": machine.kernel(),
                "loads": machine.loads(),
                "load average at the start": machine.load_average(),
            },
            peers={peer.name: [version_of(peer), peer.settings.strip()] for peer in peers},
            absent=list(absent),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.reloads or any(section.results.rounds for section in self.sections))

    def write(self, path: Path) -> None:
        """Write every single figure, for whoever wants other statistics than ours."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(path: Path) -> Run:
    """Read what :meth:`Run.write` wrote. Raises OSError, or ValueError if it is something else."""
    try:
        content = json.loads(path.read_text())
        reloads = content.pop("reloads")
        sections = [
            Section(results=_results(found.pop("results")["rounds"]), **found)
            for found in content.pop("sections")
        ]
        return Run(sections=sections, reloads=Reloads(**reloads) if reloads else None, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path}: not the JSON of a run: {err!r}") from err


def _results(rounds: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Results:
    # JSON has no numbers as keys: those of rounds come back as text.
    results = Results()
    for measure, by_peer in rounds.items():
        for peer, by_round in by_peer.items():
            for number, figures in by_round.items():
                results.add(measure, peer, int(number), figures)
    return results
