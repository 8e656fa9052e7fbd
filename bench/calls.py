"""Counting the system calls of a peer, which slows it: a pass of its own, without other figures.

By perf(1) and the tracepoint of the kernel, ten times cheaper than strace(1).
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Final

from bench.procs import BenchError, tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_EVENT: Final = "raw_syscalls:sys_enter"
_ATTACH_S: Final = 0.3  # until perf counts; it says nothing when it does
_END_S: Final = 10.0


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
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as perf:
        try:
            time.sleep(_ATTACH_S)
            units = load()
        finally:
            perf.send_signal(signal.SIGINT)
        _, said = perf.communicate(timeout=_END_S)
    for line in output.read_text().splitlines():
        count, _, rest = line.partition(",")
        if _EVENT in rest and count.isdigit():
            return int(count) / units
    raise BenchError(f"perf stat has counted nothing: {said}")
