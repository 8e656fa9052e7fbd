"""The program in the middle, and the streams through it, as processes. Judges nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import PORT, SERVER_PORT
from bench.peers import HOST
from bench.procs import PROC, BenchError, is_listening, read_proc, tree, wait_until
from bench.survival.contenders import command_line
from bench.survival.findings import Spell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.survival.contenders import Contender

WITHIN_S: Final = 60.0  # for what takes no time on an idle machine; arbitrary
RESTART_S: Final = 0.1  # after which systemd starts a service again: RestartSec=
PACE_MS: Final = 100


class Program:
    """One contender, which is started again when its master has ended. Owns its processes."""

    def __init__(self, contender: Contender, directory: Path, workers: int) -> None:
        self.contender = contender
        self.workers_wanted = workers
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []
        self._log = (directory / f"{contender.name}.log").open("wb")
        self.master = 0

    def start(self) -> None:
        """Start it, and wait until it serves."""
        started = subprocess.Popen(
            self.contender.command(self._directory),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(started)
        self.master = started.pid
        if self.contender.daemon:
            started.wait(WITHIN_S)
            pid_file = self._directory / f"{self.contender.name}.pid"
            wait_until(pid_file.exists, f"{pid_file} is there", WITHIN_S)
            self.master = int(pid_file.read_text())
        wait_until(lambda: is_listening(PORT), f"{self.contender.name} listens", WITHIN_S)
        wait_until(self._has_workers, f"{self.contender.name} has its workers", WITHIN_S)

    def _has_workers(self) -> bool:
        if not is_running(self.master):
            raise BenchError(f"{self.contender.name} has ended: see {self._log.name}")
        return len(self.workers()) >= self.expected

    @property
    def expected(self) -> int:
        """How many processes of workers there are when no old ones are left."""
        return 1 if self.contender.has_one else self.workers_wanted

    def pids(self) -> list[int]:
        """All that lives of it."""
        for one in self._started:
            one.poll()
        found = {proc.pid for one in self._started for proc in tree(one.pid)}
        if title := self.contender.daemon:  # nobody else has such ones in this namespace
            every = (int(path.name) for path in PROC.iterdir() if path.name.isdigit())
            found |= {pid for pid in every if command_line(pid).startswith(title)}
        return sorted(found)

    def workers(self) -> list[int]:
        """Those that serve and those that have to leave yet."""
        return [pid for pid in self.pids() if self.contender.is_worker(pid, self.master)]

    def see_to_it(self) -> None:
        """Start it again if its master has ended, as a service manager does."""
        if not is_running(self.master):
            time.sleep(RESTART_S)
            self.start()

    def is_rid_of_old_ones(self, old_master: int) -> bool:
        """Whether no worker too many is left, nor a master that was replaced."""
        is_master_gone = old_master == self.master or not is_running(old_master)
        return is_master_gone and len(self.workers()) <= self.expected

    def end(self) -> None:
        """Kill what there is of it."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for one in self._started:
            one.wait()
        self._log.close()


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    return read_proc(pid) is not None


class Streams:
    """A process of ``last.c``, and one of ``echo.c`` that it speaks to. Owns both."""

    def __init__(self, directory: Path, plain: int, bulk: int) -> None:
        self.count = plain + bulk
        self._upstream = subprocess.Popen([str(directory / "echo"), HOST, str(SERVER_PORT)])
        wait_until(lambda: is_listening(SERVER_PORT), "the upstream listens", WITHIN_S)
        numbers: Sequence[int] = (PORT, plain, bulk, PACE_MS)
        self._process = subprocess.Popen(
            [str(directory / "last"), HOST, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def spell(self) -> Spell:
        """What was seen since the last time. Raises BenchError when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("?\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError("the streams have ended") from None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError("the streams have ended")
        return Spell.of(line)

    def wait_all_open(self) -> None:
        """Until each stream has been answered, and is older than a second."""

        def are_open() -> bool:
            time.sleep(1.2)
            return len(self.spell().silences_s) == self.count

        wait_until(are_open, f"{self.count} streams", WITHIN_S)

    def end(self) -> None:
        """End both."""
        for process in (self._process, self._upstream):
            process.kill()
            process.wait()
        for file in (self._process.stdin, self._process.stdout):
            if file is not None:
                file.close()
