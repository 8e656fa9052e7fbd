"""Counting the system calls of a peer, which slows it: a pass of its own, without other figures.

By perf(1) and the tracepoint of the kernel, ten times cheaper than strace(1).
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from bench.counters import parse_stat
from bench.procs import BenchError, tree
from bench.watching import watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_EVENT: Final = "raw_syscalls:sys_enter"


def can_count() -> bool:
    """Whether there is a perf that may count system calls."""
    if shutil.which("perf") is None:
        return False
    command = ["perf", "stat", "-x,", "-e", _EVENT, "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def count_calls(root: int, directory: Path, load: Callable[[], float]) -> float:
    """Run a load; the system calls of the tree meanwhile, for each unit that the load returns."""
    pids = ",".join(str(proc.pid) for proc in tree(root))
    output = directory / "calls"
    command = ["perf", "stat", "-x,", "-o", str(output), "-e", _EVENT, "-p", pids]
    units = watch(command, directory, load)
    count = parse_stat(output.read_text()).get(_EVENT)
    if count is None:
        raise BenchError("perf stat has counted nothing")
    return count / units
