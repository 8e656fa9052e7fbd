"""What is done to a program, one row of the table each."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bench.procs import wait_until
from bench.survival.findings import Blow
from bench.survival.program import WITHIN_S, is_running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench.survival.program import Program, Streams

PATIENCE_S: Final = 5.0  # for old processes to go, and for what an event costs to be seen
STOP_S: Final = 6.0  # twice hang_timeout
SIZES: Final = (8, 1, 4, 2)


@dataclass(frozen=True, slots=True)
class Event:
    """What happens. ``do`` gets the number of the event; ``leave_something``: old processes."""

    what: str
    do: Callable[[Program, Path, int], None]
    leave_something: bool = True


def _kill_worker(program: Program, _directory: Path, number: int) -> None:
    workers = program.workers()
    pid = workers[number % len(workers)]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "a worker dies", WITHIN_S)
    time.sleep(0.05)  # in which a master that goes with its worker has gone
    program.see_to_it()


def _stop_worker(program: Program, _directory: Path, number: int) -> None:
    workers = program.workers()
    pid = workers[number % len(workers)]
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + STOP_S
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    if is_running(pid):
        os.kill(pid, signal.SIGCONT)


def _reload(program: Program, directory: Path, _number: int) -> None:
    program.contender.reload(program.master, directory)


def _upgrade(program: Program, directory: Path, _number: int) -> None:
    program.master = program.contender.upgrade(program.master, directory)


def _resize(program: Program, directory: Path, number: int) -> None:
    size = SIZES[number % len(SIZES)]
    program.workers_wanted = size
    program.contender.resize(program.master, directory, size)


def _kill_master(program: Program, _directory: Path, _number: int) -> None:
    pid = program.master
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "the master dies", WITHIN_S)
    program.see_to_it()


EVENTS: Final = {
    "kill": Event("kill -9 of a worker", _kill_worker, leave_something=False),
    "hang": Event(f"a worker hangs for {STOP_S:g} s", _stop_worker, leave_something=False),
    "reload": Event("reload", _reload),
    "upgrade": Event("upgrade of the program", _upgrade),
    "resize": Event("other number of workers", _resize),
    "master": Event("kill -9 of the master, restart", _kill_master),
}


def happen(event: Event, program: Program, streams: Streams, directory: Path, number: int) -> Blow:
    """Let it happen, and see for a while what comes of it."""
    streams.wait_all_open()
    old_master = program.master
    event.do(program, directory, number)
    began_s = time.monotonic()
    stayed_s: float | None = None
    while (passed_s := time.monotonic() - began_s) < PATIENCE_S:
        if stayed_s is None and program.is_rid_of_old_ones(old_master):
            stayed_s = passed_s
        time.sleep(0.02)
    return Blow(streams.spell(), streams.count, stayed_s)
