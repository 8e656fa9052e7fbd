"""Everything that happens to a forwarder in its life, in one go, under steady load: who is dropped?

Run from the project root as ``python -m bench.lifecycle``. Standard library only. The exit status
is 1 when anybody was dropped who must not be, or a process was replaced or grew where none may.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from bench import instance
from bench.command_line import add_forwarder, exit_on_signal, positive
from bench.instance import Instance
from bench.load import Storm
from bench.peers import FD_LIMIT, HOST, require_programs
from bench.phases import Phase, grown, print_report
from bench.procs import (
    BenchError,
    compiled,
    running,
    set_fd_limit,
    tail,
    wait_ready,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.instance import Size

MOST_WORKERS = 8
WORKERS = 4
AFTERWARDS_S = 2.0  # those that waited for a hung worker are to be served in its phase
SETTLE_S = 180.0  # patience for what takes a moment; the machine may be busy with others


class Run:
    """One forwarder, its load, and the phases so far."""

    def __init__(
        self,
        it: Instance,
        args: argparse.Namespace,
        ports: Sequence[int],
        upstream: int,
        phases: list[Phase],
    ) -> None:
        """``storm`` must be set before the first phase."""
        self.it = it
        self.storm: Storm
        self.phases = phases
        self._args = args
        self._ports = ports
        self._upstream = upstream

    def gentle_steps(self) -> list[Callable[[], None]]:
        """What must cost nobody anything."""
        args = self._args
        return [
            lambda: self.reload(args.reloads),
            lambda: self.resize(args.resizes),
            lambda: self.upgrade(args.upgrades),
        ]

    def rough_steps(self) -> list[Callable[[], None]]:
        """What may cost the sessions in a killed process, and nobody else."""
        return [self.kill_workers, self.hang_worker, self.kill_master]

    def configure(self, *, with_other: bool) -> None:
        """Write a configuration: the loaded rule, the same each time, with or without another."""
        ports = self._ports if with_other else self._ports[:1]
        rules = [
            f'[[forwarding_rules]]\nlisten = "{HOST}:{port}"\nupstream = "{HOST}:{self._upstream}"'
            for port in ports
        ]
        settings = f'workers = {WORKERS}\ncontrol = "{self.it.control}"\n'
        new = self.it.config.with_suffix(".new")
        new.write_text(settings + "\n".join(rules) + "\n")
        new.rename(self.it.config)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Do something; the clients that end meanwhile are counted."""
        phase = Phase(name)
        print(f"{name} ...", file=sys.stderr, flush=True)
        before, began = self.storm.counts(), time.monotonic()
        yield phase
        phase.seconds = time.monotonic() - began
        phase.counts = self.storm.counts() - before
        phase.judge()
        self.phases.append(phase)

    def settle(self) -> None:
        """Wait until nothing is under way: one master, workers in their slots, all ready."""
        wait_until(self.it.is_ready, "all workers ready, none retiring", SETTLE_S)

    # -- without a loss

    def reload(self, times: int) -> None:
        """SIGHUP after SIGHUP, each waited for; the loaded rule never changes."""
        self.settle()
        master, workers = self.it.pid, set(self.it.workers())
        self._reload_once(1, master)  # the first one brings in code that is not loaded yet
        self._reload_once(2, master)
        before = self._least()
        with self.phase(f"{times} reloads") as phase:
            for number in range(times):
                self._reload_once(number + 3, master)
            self.settle()
            if (self.it.pid, set(self.it.workers())) != (master, workers):
                phase.problems.append("a process was replaced")
            wait_until(lambda: self._has_no_more(before), "no more descriptors", SETTLE_S)
            phase.notes.append(grown(before, self.it.sizes()))

    def _reload_once(self, number: int, master: int) -> None:
        self.configure(with_other=bool(number % 2))
        before = self.it.status()["generation"]
        os.kill(master, signal.SIGHUP)
        wait_until(lambda: self.it.status()["generation"] != before, "a new generation", SETTLE_S)

    def _least(self) -> dict[int, Size]:
        """The sizes of all processes: the least of some looks, for a session may be ending."""
        looks = [self.it.sizes() for _ in range(5)]
        return {pid: min((look[pid] for look in looks), key=lambda it: it.fds) for pid in looks[0]}

    def _has_no_more(self, before: dict[int, Size]) -> bool:
        """Whether no process has more descriptors than it had."""
        now = self.it.sizes()
        return all(now[pid].fds <= size.fds for pid, size in before.items())

    def resize(self, times: int) -> None:
        """Half of them by signal, one worker at a time; half by request, from 1 to 8 at once."""
        for count in (MOST_WORKERS, WORKERS):  # sockets are made once, and kept
            self.it.ask("workers", count=str(count))
        master, before = self.it.pid, self._least()
        with self.phase(f"{times} resizes, 1 to {MOST_WORKERS} workers") as phase:
            up, down = range(1, MOST_WORKERS + 1), range(MOST_WORKERS - 1, 0, -1)
            walk = [*up[WORKERS:], *down, *up[1:WORKERS]] * times
            for last, size in pairwise([WORKERS, *walk[: times // 2]]):
                self.it.signal(signal.SIGTTIN if size > last else signal.SIGTTOU)
                wait_until(lambda: self._serving() == size, f"{size} workers", SETTLE_S)  # noqa: B023
            for number in range(times - times // 2):
                size = (1, MOST_WORKERS, 3, 5)[number % 4]
                self.it.ask("workers", count=str(size))
            self.it.ask("workers", count=str(WORKERS))
            phase.notes.append(grown(before, self._least()))
            if self.it.pid != master:
                phase.problems.append("the master was replaced")

    def _serving(self) -> int:
        return sum(state == "ready" for state in self.it.workers().values())

    def upgrade(self, times: int) -> None:
        """Each master by the next; streams stay in the workers of the first."""
        with self.phase(f"{times} upgrades") as phase:
            masters, old = {self.it.pid}, self._least()[self.it.pid]
            for _ in range(times):
                self.it.ask("upgrade")
                masters.add(self.it.pid)
            new = self._least()[self.it.pid]
            phase.notes.append(
                f"master {old.rss_kib} to {new.rss_kib} KiB, {old.fds} to {new.fds} descriptors"
            )
            if len(masters) != times + 1:
                phase.problems.append("a master came twice")

    # -- with the loss of what was in a killed process

    def kill_workers(self) -> None:
        """Kill -9 of each worker in turn. It is suspended first, to count what it has."""
        self.settle()
        with self.phase(f"kill -9 of {WORKERS} workers") as phase:
            for pid in self.it.workers():
                phase.allowed += self._suspend(pid)
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: pid not in self.it.workers(), "it is replaced", SETTLE_S)  # noqa: B023
                self.settle()
            phase.notes.append(f"{phase.allowed} sessions were in them")

    def hang_worker(self) -> None:
        """SIGSTOP of a worker, until another one is in its place."""
        with self.phase("SIGSTOP of a worker") as phase:
            pid = next(iter(self.it.workers()))
            phase.allowed = self._suspend(pid)
            began = time.monotonic()
            wait_until(lambda: pid not in self.it.workers(), "it is replaced", SETTLE_S)
            self.settle()
            phase.notes.append(f"replaced after {time.monotonic() - began:.1f} s")
            time.sleep(AFTERWARDS_S)
            phase.notes.append(f"{phase.allowed} sessions were in it")

    def kill_master(self) -> None:
        """Kill -9 of the master, and a new one at once."""
        self.settle()
        with self.phase("kill -9 of the master, restart") as phase:
            orphans = set(self.it.workers())
            began = time.monotonic()
            self.it.kill_master()
            self.it.start()
            self.settle()
            phase.notes.append(f"served by a new one after {time.monotonic() - began:.1f} s")
            if orphans & set(self.it.workers()):
                phase.problems.append("an orphan is said to be a worker")

    def _suspend(self, pid: int) -> int:
        """Stop a process; returns how many clients it has accepted."""
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: instance.is_stopped(pid), "it is suspended", SETTLE_S)
        return instance.sessions_of(pid, self._ports[0])

    def end_load(self) -> None:
        """No more clients; those that are connected still have to be served."""
        before = self.storm.last
        phase = Phase("end of the load", counts=self.storm.end() - before)
        phase.judge()
        self.phases.append(phase)

    def stop(self) -> None:
        """TERM. Nothing may be left."""
        phase = Phase("TERM")
        began = time.monotonic()
        self.it.signal(signal.SIGTERM)
        wait_until(lambda: not self.it.sizes(), "every process has ended", SETTLE_S)
        phase.seconds = time.monotonic() - began
        self.phases.append(phase)


@contextmanager
def held_port() -> Iterator[int]:
    """A port of the kernel's choice that nobody else is given. Not listening: servers share it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((HOST, 0))
        yield holder.getsockname()[1]


def free_port() -> int:
    """A port that was free just now."""
    with held_port() as port:
        return port


def measure(args: argparse.Namespace, directory: Path, phases: list[Phase]) -> None:
    """Go through all phases; those that were finished are in ``phases`` whatever happens."""
    with ExitStack() as stack:
        upstream = free_port()
        echo = [compiled(directory, "echo"), HOST, str(upstream)]
        wait_ready(stack.enter_context(running("upstream", echo, directory)), upstream)
        ports = [stack.enter_context(held_port()) for _ in range(2)]
        it = Instance(args.forwarder, directory)
        stack.callback(it.end)
        storm_command = [compiled(directory, "storm"), HOST, str(ports[0])]
        run = Run(it, args, ports, upstream, phases)
        run.configure(with_other=False)
        it.start()
        for steps in (run.gentle_steps(), run.rough_steps()):
            run.storm = Storm(storm_command, rate=args.rate, streams=args.streams)
            stack.callback(run.storm.close)
            for step in steps:
                step()
            run.end_load()
        run.stop()


def main(argv: Sequence[str]) -> int:
    """Measure and report. Returns 1, after reporting what there is, when something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.lifecycle", description=__doc__)
    parser.add_argument("--rate", type=positive, default=2000, metavar="N", help="connections/s")
    parser.add_argument("--streams", type=positive, default=50, metavar="N")
    parser.add_argument("--reloads", type=positive, default=1000, metavar="N")
    parser.add_argument("--resizes", type=positive, default=100, metavar="N")
    parser.add_argument("--upgrades", type=positive, default=20, metavar="N")
    add_forwarder(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, exit_on_signal)
    phases: list[Phase] = []
    is_whole = False
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        try:
            require_programs({"gcc", args.forwarder[0]})
            set_fd_limit(FD_LIMIT)
            measure(args, Path(name), phases)
            is_whole = True
        except BenchError as err:
            print(f"bench: {err}", file=sys.stderr)
            log = Path(name, "forwarder.log")
            print(tail(log) if log.exists() else "", file=sys.stderr)
        except KeyboardInterrupt:
            return 130
        finally:
            print_report(args, phases)
    return 0 if is_whole and not any(phase.problems for phase in phases) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
