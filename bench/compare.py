"""What has changed between two runs, and whether it is beyond the noise.

``python -m bench.compare A.json B.json``. The rounds of two runs are not interleaved: what the
machine did meanwhile is in the difference, too. The columns with a ratio of ``python -m bench``,
old beside new in one run, are the better proof.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measures import BY_NAME
from bench.noise import LEVEL, Change, Verdict, change
from bench.report import Table
from bench.run import Run, Section, read

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from bench.measures import Figure


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one peer in both runs."""

    measure: str
    peer: str
    figure: Figure
    change: Change

    @property
    def judgement(self) -> str:
        """The verdict, and which way it went."""
        if self.change.verdict is not Verdict.CHANGED:
            return self.change.verdict
        is_better = (self.change.after > self.change.before) == self.figure.is_rate
        return f"**{'better' if is_better else 'worse'}**, {self.change.verdict}"

    def cells(self) -> list[str]:
        """As the row of a table."""
        digits, it = self.figure.digits, self.change
        figures = [f"{it.before:,.{digits}f}", f"{it.after:,.{digits}f}", f"{it.ratio:.3f}"]
        name = [self.measure, self.peer, self.figure.heading]
        return [*name, *figures, f"{it.probability:.3f}", self.judgement]


def lines(before: Section, after: Section, only: Collection[str] = ()) -> Iterator[Line]:
    """Every figure that both have."""
    for name in before.measures:
        if only and name not in only:
            continue
        for peer in before.peers:
            for figure in BY_NAME[name].columns:
                values = [
                    list(section.results.values(name, peer, figure.key).values())
                    for section in (before, after)
                ]
                if all(values):
                    yield Line(name, peer, figure, change(*values))


def tables(
    before: Run, after: Run, only: Collection[str] = (), peers: Collection[str] = ()
) -> Iterator[tuple[Table, list[Line]]]:
    """A table for each part that both runs have, and what is in it."""
    later = {section.title: section for section in after.sections}
    for section in before.sections:
        if section.title in later:
            found = [
                line
                for line in lines(section, later[section.title], only)
                if not peers or line.peer in peers
            ]
            if found:
                head = ["measure", "peer", "figure", "A", "B", "B/A", "p", ""]
                yield Table(section.title, [head, *(line.cells() for line in found)]), found


def summary(found: Sequence[Line]) -> str:
    """How many changes, and how many of them would be there by chance alone."""
    judged = [line for line in found if line.change.verdict is not Verdict.TOO_FEW]
    changed = sum(line.change.verdict is Verdict.CHANGED for line in judged)
    return (
        f"{len(found)} figures, {len(found) - len(judged)} with too few rounds to tell; "
        f"{changed} of the others are beyond the noise (p < {LEVEL}). By chance alone it would be "
        f"up to {len(judged) * LEVEL:.0f}."
    )


def main(argv: Sequence[str]) -> int:
    """Print the tables. The exit status says only whether there were two runs to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--only", default="", metavar="MEASURE,...")
    parser.add_argument("--peers", default="", metavar="PEER,...")
    args = parser.parse_args(argv)
    try:
        before, after = read(args.before), read(args.after)
    except (OSError, ValueError) as err:
        parser.error(str(err))
    only, peers = (text.split(",") if text else [] for text in (args.only, args.peers))
    every: list[Line] = []
    print(f"A: {args.before}, {before.date}\nB: {args.after}, {after.date}\n")
    for table, found in tables(before, after, only, peers):
        print(table.as_markdown())
        every += found
    print(summary(every) if every else "No part, measure and peer is in both.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
