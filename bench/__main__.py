"""Measure the forwarder beside its peers: interleaved rounds, medians, ratios round by round.

Run from the project root as ``python -m bench``, ``make bench`` or ``bench/quick.sh --peers``; see
bench/README.md for what the figures mean. Standard library only, but for the pictures of --out.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench import page, parts, reload_under_load
from bench.calls import can_count
from bench.command_line import add_forwarder, exit_on_signal, positive
from bench.measures import BY_NAME, USUAL
from bench.peers import FD_LIMIT, all_peers, is_here, require_programs
from bench.procs import BenchError, set_fd_limit
from bench.reloads import Reloads
from bench.rounds import run_calls, run_rounds, say
from bench.run import Run, Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peers import Peer
    from bench.rounds import Part

RELOAD: Final = "reload"  # is named like a measure, and is a table of its own
# How many rounds of how many seconds. Below 4 rounds bench.compare cannot tell a change from noise.
DEFAULT: Final = (3, 5)
ALL: Final = (5, 3)
SHORT: Final = (2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and where the report goes. ``reload_rounds`` is 0 if nobody reloads."""

    parts: list[Part]
    absent: list[str]
    forwarder: list[str]
    reload_rounds: int
    counts_calls: bool
    out: Path | None
    json: Path | None

    @property
    def peers(self) -> list[Peer]:
        """Everyone that is measured, in the order of their first part."""
        return list({peer.name: peer for part in self.parts for peer in part.peers}.values())


def parse_args(argv: Sequence[str]) -> Plan:
    """Turn the command line into a plan; exits with status 2 on a mistake, as argparse does."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out and find_spec("matplotlib") is None:
        parser.error(
            "--out draws pictures and needs matplotlib: pip install 'splice-forwarder[bench]'"
        )
    everyone = all_peers(args.forwarder, args.oi)
    only = _names(parser, args.only, [*BY_NAME, RELOAD])
    named = _names(parser, args.peers, list(everyone))
    # Who was named has to be there, and so has the forwarder: that is found out before the start.
    absent = [
        name
        for name, peer in everyone.items()
        if name not in named and peer.program != args.forwarder[0] and not is_here(peer)
    ]
    here = {name: peer for name, peer in everyone.items() if name not in absent}
    found, default_rounds = _parts(args, here, only, named)
    is_reloading = RELOAD in only or (args.all and not only and not named)
    return Plan(
        parts=found,
        absent=[name for name in absent if not named],
        forwarder=args.forwarder,
        reload_rounds=(args.rounds or default_rounds) if is_reloading else 0,
        counts_calls=args.calls,
        out=args.out,
        json=args.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=positive, metavar="N")
    parser.add_argument("--seconds", type=positive, metavar="S", help="per load")
    parser.add_argument("--only", default="", metavar="MEASURE,...")
    # Without a value it means everyone: "bench/quick.sh --peers" alone is a fine command.
    parser.add_argument("--peers", nargs="?", const="", default="", metavar="PEER,...")
    parser.add_argument("--calls", action="store_true", help="count system calls, by perf")
    add_forwarder(parser)
    parser.add_argument("--oi", default="oi", metavar="PATH", help="the binary of oxidinetd")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--all", action="store_true", help="the whole procedure")
    extent.add_argument("--short", action="store_true", help="less than three minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report, pictures and JSON")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single figure")
    return parser


def _names(parser: argparse.ArgumentParser, text: str, known: Sequence[str]) -> list[str]:
    """The names in a list with commas, in the order of those that are known."""
    wanted = set(text.split(",")) if text else set()
    if unknown := wanted.difference(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return [name for name in known if name in wanted]


def _parts(
    args: argparse.Namespace, here: dict[str, Peer], only: list[str], named: list[str]
) -> tuple[list[Part], int]:
    """The parts of the run that was asked for, and how many rounds it has if nobody says."""
    default_rounds, default_seconds = ALL if args.all else SHORT if args.short else DEFAULT
    rounds, seconds = args.rounds or default_rounds, args.seconds or default_seconds
    if args.all:
        found = parts.whole(here, rounds, seconds)
        return [left for part in found if (left := _restricted(part, only, named))], default_rounds
    measures = [name for name in only if name != RELOAD]
    if args.short:
        measures, names = measures or [*parts.SHORT_MEASURES], named or [*parts.SHORT_PEERS]
    else:
        measures = measures or ([] if only else [measure.name for measure in USUAL])
        names = named or parts.usual_peers(here)
    part = parts.chosen(here, measures, names, rounds, seconds)
    return ([part] if measures else []), default_rounds


def _restricted(part: Part, only: list[str], named: list[str]) -> Part | None:
    """What is left of a part; None if that is nothing."""
    left = replace(
        part,
        measures=tuple(m for m in part.measures if not only or m.name in only),
        peers=tuple(p for p in part.peers if not named or p.name in named),
    )
    return left if left.measures and left.peers else None


def measure(plan: Plan, run: Run) -> None:
    """Measure everything; what is found is in ``run``, whatever happens. Raises BenchError."""
    for part in plan.parts:
        part.check_programs()
    if plan.reload_rounds:
        require_programs({"gcc", plan.forwarder[0]})
    counts_calls = plan.counts_calls and can_count()
    if plan.counts_calls and not counts_calls:
        run.machine["system calls"] = "not counted, for there is no perf (linux-perf) that may"
    set_fd_limit(FD_LIMIT)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        for part in plan.parts:
            section = Section.of(part)
            run.sections.append(section)
            say(f"== {part.title}")
            part.compile(directory)
            run_rounds(part, directory, section.results, run.failures)
            if counts_calls:
                run_calls(part, directory, section.results, run.failures)
        if plan.reload_rounds:
            _measure_reloads(plan, run, directory)


def _measure_reloads(plan: Plan, run: Run, directory: Path) -> None:
    everyone = [
        contender
        for contender in reload_under_load.contenders(plan.forwarder)
        if shutil.which(contender.program)
    ]
    run.reloads = Reloads(
        reload_under_load.REPEATS, reload_under_load.ROUND_S, reload_under_load.RATE
    )
    reload_under_load.run_rounds(everyone, plan.reload_rounds, run.reloads, directory)


def report(plan: Plan, run: Run) -> None:
    """Print the report, or write it where it was asked for."""
    if run.is_empty:
        return
    if plan.json:
        run.write(plan.json)
    if plan.out is None:
        print(page.markdown(run))
        return
    from bench.output import write  # noqa: PLC0415 - needs matplotlib, which is not always there

    write(run, plan.out)
    say(f"the report is in {plan.out}")


def main(argv: Sequence[str]) -> int:
    """Measure and report. Returns 1, after reporting what there is, when a run went wrong."""
    plan = parse_args(argv)
    signal.signal(signal.SIGTERM, exit_on_signal)
    run = Run.begin(plan.peers, plan.absent)
    status = 1
    try:
        measure(plan, run)
        status = 1 if run.failures else 0
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    finally:
        report(plan, run)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
