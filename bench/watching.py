"""A program that looks at others while they are loaded: perf, strace, py-spy.

Starts only the watcher; the load is the caller's.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.procs import BenchError, tail

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    Found = TypeVar("Found")

_ATTACH_S: Final = 0.5  # until it has attached; none of them says when it has
_END_S: Final = 60.0  # strace and py-spy write what they have at the end, py-spy for some seconds
# Of a program that ends as it should on SIGINT: perf, py-spy; strace, which passes the signal on.
_ENDED: Final = (0, 128 + signal.SIGINT, -signal.SIGINT)


def find(program: str) -> str | None:
    """Where a program is: on PATH, or beside this Python, where extras are installed."""
    beside = Path(sys.executable).parent / program
    return shutil.which(program) or (str(beside) if beside.exists() else None)


def watch(command: Sequence[str], directory: Path, load: Callable[[], Found]) -> Found:
    """Run a load while a command watches, which is then interrupted and ends by itself.

    Raises BenchError when it ended before, or not as it should.
    """
    log = directory / "watcher.log"
    with log.open("wb") as out:
        watcher = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        time.sleep(_ATTACH_S)
        if watcher.poll() is not None:
            raise BenchError(f"{command[0]} has ended: {tail(log)}")
        found = load()
        watcher.send_signal(signal.SIGINT)
        status = watcher.wait(_END_S)
    except subprocess.TimeoutExpired as err:
        raise BenchError(f"{command[0]} does not end: {tail(log)}") from err
    finally:
        watcher.kill()
        watcher.wait()
    if status not in _ENDED:
        raise BenchError(f"{command[0]}: exit status {status}: {tail(log)}")
    return found
