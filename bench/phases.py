"""The phases of a life and their report. Does nothing to anybody."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.load import Counts
from bench.machine import machine

if TYPE_CHECKING:
    import argparse

    from bench.instance import Size


@dataclass
class Phase:
    """What was done, what became of the clients meanwhile, and what is wrong with that.

    ``allowed`` are clients that may be lost: their sessions were in a process that was killed.
    """

    name: str
    seconds: float = 0.0
    counts: Counts = field(default_factory=Counts)
    allowed: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Note clients that were dropped and must not have been."""
        if self.counts.never or self.counts.lost > self.allowed:
            self.problems.append(f"dropped: {self.counts}")


def grown(before: dict[int, Size], after: dict[int, Size]) -> str:
    """Memory and descriptors of the master, and of the worker that has grown most of those left."""
    master, *workers = before
    left = [pid for pid in workers if pid in after]
    most = sorted(left, key=lambda pid: after[pid].rss_kib - before[pid].rss_kib)[-1:]
    return ", ".join(
        f"{name} {before[pid].rss_kib} to {after[pid].rss_kib} KiB, "
        f"{before[pid].fds} to {after[pid].fds} descriptors"
        for name, pid in zip(("master", "worker"), (master, *most), strict=False)
    )


def print_report(args: argparse.Namespace, phases: list[Phase]) -> None:
    """Print a table of the phases, then the notes, then what is wrong."""
    print(f"{args.rate} new connections a second, {args.streams} streams. {machine()}\n")
    columns = ("served", "refused", "reset", "cut", "wrong", "late", "streams lost", "may be lost")
    print(f"| | seconds | {' | '.join(columns)} | slowest, ms | MB of streams |")
    print("|---|" + "---:|" * (len(columns) + 3))
    for phase in phases:
        it = phase.counts
        streams = it.streams_reset + it.streams_cut + it.streams_late + it.streams_wrong
        cells = [it.served, it.refused + it.streams_refused, it.reset, it.cut, it.wrong, it.late]
        cells += [streams, phase.allowed, it.slowest_ms, it.stream_bytes // 1_000_000]
        print(f"| {phase.name} | {phase.seconds:.0f} | {' | '.join(map(str, cells))} |")
    print()
    for phase in phases:
        for note in phase.notes:
            print(f"- {phase.name}: {note}")
        for problem in phase.problems:
            print(f"- **{phase.name}: {problem}**")
