"""What the connection log and access rules cost: the same load with them and without.

Each round takes every setting, and starts with another one; the ratios are computed round by round.
Counters are always on.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.command_line import add_forwarder, exit_on_signal, positive
from bench.machine import machine
from bench.measures import BY_NAME
from bench.peers import FD_LIMIT, WORKERS, forwarder_conf, forwarder_peer
from bench.procs import BenchError, set_fd_limit
from bench.report import Results, spread
from bench.rounds import Part, run_rounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peers import Peer

RULES = 1000  # of access: networks, and some wildcards
WILDCARDS = 10
MEASURED = ("conn", "bulk1", "bulk8")


def access_rules(count: int) -> str:
    """Access rules that the clients of a bench pass, but only after all of them were looked at."""
    patterns = [f"10.{i // 250}.{i % 250}.0/24" for i in range(count - WILDCARDS)]
    patterns += [f"192.168.{i}.?" for i in range(WILDCARDS)]
    return "".join(
        f'[[global_rules]]\ntype = "deny"\npattern = "{pattern}"\n' for pattern in patterns
    )


def contenders(forwarder: list[str], directory: Path) -> tuple[Peer, ...]:
    """The forwarder in every setting; the first is what the others are compared with."""
    log = f'[[logs]]\nto = "{directory}/log.json"\n'
    access = access_rules(RULES)
    command = [*forwarder, "--workers", str(WORKERS)]
    return tuple(
        forwarder_peer(name, command, (), forwarder_conf() + more)
        for name, more in (
            ("off", ""),
            ("JSON log", log),
            (f"{RULES} access rules", access),
            ("both", log + access),
        )
    )


def print_report(part: Part, results: Results) -> None:
    """A table for each measure, with the ratio of each setting to the first."""
    for measure in part.measures:
        compared = [figure for figure in measure.columns if figure.has_ratio]
        first = part.peers[0].name
        heads = [f"{figure.heading} | against {first}" for figure in compared]
        print(f"### {measure.name}: {measure.title}\n\n| | {' | '.join(heads)} |")
        print("|---" * (1 + 2 * len(compared)) + "|")
        for peer in part.peers:
            cells = [peer.name]
            for figure in compared:
                values = results.values(measure.name, peer.name, figure.key)
                off = results.values(measure.name, first, figure.key)
                ratios = [value / off[number] for number, value in values.items()]
                cells += [spread(list(values.values()), figure.digits), f"{median(ratios):.3f}"]
            print(f"| {' | '.join(cells)} |")
        print()


def main(argv: Sequence[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--seconds", type=positive, default=3, metavar="S", help="per load")
    parser.add_argument("--only", default=",".join(MEASURED), metavar="MEASURE,...")
    add_forwarder(parser)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, exit_on_signal)
    if unknown := {*args.only.split(",")} - {*BY_NAME}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    measures = tuple(BY_NAME[name] for name in args.only.split(","))
    results = Results()
    failures: list[str] = []
    try:
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            peers = contenders(args.forwarder, Path(name))
            part = Part("features", measures, peers, args.rounds, args.seconds)
            part.check_programs()
            part.compile(Path(name))
            run_rounds(part, Path(name), results, failures)
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    print(f"{args.rounds} rounds, {args.seconds} s each: median (min-max). {machine()}\n")
    print_report(part, results)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
