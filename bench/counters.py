"""What perf stat and strace -c have counted, read from what they write. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HARDWARE: Final = ("cycles", "instructions", "cache-misses", "branches")
SOFTWARE: Final = ("context-switches", "cpu-migrations", "page-faults", "task-clock")


def parse_stat(text: str) -> dict[str, float | None]:
    """Read perf stat -x, : counts by event; None where the machine does not have it.

    ``count,unit,event,...``, see perf-stat(1); task-clock is in ms. An event may come back with a
    modifier, as ``cycles:u``, when only user mode may be counted.
    """
    found: dict[str, float | None] = {}
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) < 3 or line.startswith("#"):
            continue
        event = fields[2]
        name = event if event.count(":") != 1 or "_" in event else event.partition(":")[0]
        found[name] = None if fields[0].startswith("<") else float(fields[0])
    return found


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: how often it was made, how often it failed, and its share of their time."""

    name: str
    count: int
    errors: int
    time_percent: float


def parse_strace(text: str) -> list[Call]:
    """Read strace -c: the calls, those first that took most time; the line of sums is left out."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        # % time, seconds, usecs/call, calls, errors if there were any, name
        if len(fields) not in (5, 6) or not fields[3].isdigit() or fields[-1] == "total":
            continue
        errors = int(fields[4]) if len(fields) == 6 else 0
        found.append(Call(fields[-1], int(fields[3]), errors, float(fields[0])))
    return found
