"""Groups of servers in trouble: the forwarder beside HAProxy and nginx.

Run from the project root, as root, as ``python -m bench.groups``. Everything is in namespaces of
its own.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.command_line import add_forwarder, exit_on_signal, positive
from bench.features import print_report
from bench.groups import checks, killed, least, limit, names, rate, reloads
from bench.groups.contenders import contenders
from bench.groups.place import Place, ready_namespace
from bench.machine import machine
from bench.peers import FD_LIMIT, require_programs
from bench.procs import BenchError, compiled, set_fd_limit
from bench.report import Results, Table
from bench.rounds import run_rounds, say

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from bench.groups.contenders import Contender

SCENARIOS: Final[dict[str, ModuleType]] = {
    "killed": killed,
    "least": least,
    "limit": limit,
    "reloads": reloads,
    "checks": checks,
    "names": names,
}
RATE: Final = "rate"  # in rounds, as other measurements of rates
NEEDED: Final = {"gcc", "ip", "nft", "dnsmasq", "ab"}
SPACES: Final = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def main(argv: Sequence[str]) -> int:
    """Run in namespaces of its own. Returns 1, after reporting what there is, if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.groups", description=__doc__)
    everything = ",".join((*SCENARIOS, RATE))
    parser.add_argument("--only", default=everything, metavar="SCENARIO,...", help=everything)
    parser.add_argument("--programs", default="forwarder,haproxy,nginx", metavar="PROGRAM,...")
    parser.add_argument("--rate", type=positive, default=1000, metavar="N", help="connections/s")
    parser.add_argument("--seconds", type=positive, default=30, metavar="S", help="of each run")
    parser.add_argument("--reloads", type=positive, default=1000, metavar="N")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="of rates")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    add_forwarder(parser)
    args = parser.parse_args(argv)
    all_programs = contenders(args.forwarder)
    wanted, programs = args.only.split(","), args.programs.split(",")
    if unknown := ({*wanted} - {*SCENARIOS, RATE}) | ({*programs} - {*all_programs}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, exit_on_signal)
    if not args.inside:
        command = ["unshare", *SPACES, sys.executable, "-m", "bench.groups", *argv, "--inside"]
        return subprocess.run(command, check=False).returncode
    every = [all_programs[name] for name in programs]
    failures: list[str] = []
    try:
        require_programs(NEEDED | {one.program for one in every})
        set_fd_limit(FD_LIMIT)
        ready_namespace()
        print(f"{machine()}\n")
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            place = Place(Path(name), args.rate, args.seconds, args.reloads)
            for tool in ("greet", "knock"):
                compiled(place.directory, tool)
            for scenario in wanted:
                if scenario == RATE:
                    _rates(place, every, args.rounds, failures)
                else:
                    _scenario(SCENARIOS[scenario], place, every, failures)
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    return 1 if failures else 0


def _scenario(
    scenario: ModuleType, place: Place, every: Sequence[Contender], failures: list[str]
) -> None:
    rows = [["", *scenario.HEAD]]
    for contender in every:
        say(f"{scenario.__name__.rpartition('.')[2]}: {contender.name}")
        try:
            rows += [[contender.name, *row] for row in scenario.run(place, contender)]
        except BenchError as err:
            say(f"bench: {contender.name}: {err}")
            failures.append(str(err))
    print(Table(scenario.HEADING, rows).as_markdown(), flush=True)


def _rates(place: Place, every: Sequence[Contender], rounds: int, failures: list[str]) -> None:
    # No more than three programs of one machine at a time: a part for each of them.
    for part in rate.parts(every, rounds, max(1, place.seconds // 10)):
        results = Results()
        run_rounds(part, place.directory, results, failures)
        print_report(part, results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
