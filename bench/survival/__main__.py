"""Long streams through kills, reloads, upgrades and resizes: the forwarder, HAProxy and nginx.

Run from the project root, as root, as ``python -m bench.survival``. Everything is in namespaces of
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
from bench.groups.place import ready_namespace
from bench.machine import machine
from bench.peers import FD_LIMIT, require_programs
from bench.procs import BenchError, compiled, set_fd_limit
from bench.report import Table
from bench.rounds import say
from bench.survival import findings
from bench.survival.contenders import RefusedError, contenders
from bench.survival.events import EVENTS, PATIENCE_S, happen
from bench.survival.program import Program, Streams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.survival.contenders import Contender

NEEDED: Final = {"gcc", "ip"}
SPACES: Final = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# Process 1 of the namespace: a shell reaps what others have left to it.
REAPER: Final = ("sh", "-c", '"$@"; exit $?', "sh")
HEADING: Final = "Long streams when something happens to the program between"


def main(argv: Sequence[str]) -> int:
    """Run in namespaces of its own. Returns 1, after reporting what there is, if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.survival", description=__doc__)
    parser.add_argument("--only", default=",".join(EVENTS), metavar="EVENT,...")
    parser.add_argument("--programs", default="forwarder,haproxy,nginx", metavar="PROGRAM,...")
    parser.add_argument("--streams", type=positive, default=300, metavar="N", help="with pauses")
    parser.add_argument("--bulk", type=positive, default=4, metavar="N", help="without")
    parser.add_argument("--times", type=positive, default=8, metavar="N", help="of each event")
    parser.add_argument("--workers", type=positive, default=2, metavar="N")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    add_forwarder(parser)
    args = parser.parse_args(argv)
    all_programs = contenders(args.forwarder)
    wanted, programs = args.only.split(","), args.programs.split(",")
    if unknown := ({*wanted} - {*EVENTS}) | ({*programs} - {*all_programs}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, exit_on_signal)
    if not args.inside:
        inner = [sys.executable, "-m", "bench.survival", *argv, "--inside"]
        return subprocess.run(["unshare", *SPACES, *REAPER, *inner], check=False).returncode
    every = [all_programs[name] for name in programs]
    failures: list[str] = []
    rows = [["", *findings.HEAD]]
    try:
        require_programs(NEEDED | {one.program for one in every})
        set_fd_limit(FD_LIMIT)
        ready_namespace()
        print(f"{machine()}\n")
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            for tool in ("echo", "last"):
                compiled(Path(name), tool)
            for event in wanted:
                for contender in every:
                    say(f"{event}: {contender.name}")
                    try:
                        row = _row(event, contender, Path(name), args)
                        rows.append([contender.name, *row])
                        say("  ".join(row))
                    except BenchError as err:
                        say(f"bench: {contender.name}: {err}")
                        failures.append(str(err))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    heading = f"{HEADING}: {args.streams} that say 1,000 bytes ten times a second, {args.bulk} bulk"
    print(Table(heading, rows).as_markdown(), flush=True)
    return 1 if failures else 0


def _row(name: str, contender: Contender, directory: Path, args: argparse.Namespace) -> list[str]:
    """All that happens to one instance of a program is of one kind."""
    event = EVENTS[name]
    contender.write(args.workers, directory)
    program = Program(contender, directory, args.workers)
    blows: list[findings.Blow] = []
    is_refused = False
    try:
        program.start()
        streams = Streams(directory, args.streams, args.bulk)
        try:
            # Those before one that is refused stay.
            blows.extend(
                happen(event, program, streams, directory, number) for number in range(args.times)
            )
        except RefusedError as err:
            say(f"refused: {err}")
            is_refused = True
        finally:
            streams.end()
    finally:
        program.end()
    row = findings.row(event.what, blows, PATIENCE_S, leave_something=event.leave_something)
    row[1] += ", then refused" if is_refused else ""
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
