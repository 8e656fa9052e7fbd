"""What the connection log and access rules cost: the same load with them and without.

Each round takes every setting, and starts with another one; the ratios are computed round by round.
Counters are always on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.measures import MEASURES, Target
from bench.peers import FD_LIMIT, FORWARDER_CONF, LISTEN_PORT, UPSTREAM_PORT, WORKERS
from bench.procs import BenchError, require_free, running, set_fd_limit, wait_ready
from bench.quick import exit_on_signal, machine, positive
from bench.report import spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.measures import Figures, Measure

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


def settings(directory: Path) -> dict[str, str]:
    """Configurations by name; the first is what the others are compared with."""
    log = f'[[logs]]\nto = "{directory}/log.json"\n'
    access = access_rules(RULES)
    return {
        "off": FORWARDER_CONF,
        "JSON log": FORWARDER_CONF + log,
        f"{RULES} access rules": FORWARDER_CONF + access,
        "both": FORWARDER_CONF + log + access,
    }


def run_once(measure: Measure, command: Sequence[str], seconds: int, directory: Path) -> Figures:
    """Start upstream and forwarder, load them, end them; the ports are free before and after."""
    require_free((LISTEN_PORT, UPSTREAM_PORT))
    with ExitStack() as stack:
        upstream = stack.enter_context(running("upstream", measure.upstream(directory), directory))
        wait_ready(upstream, UPSTREAM_PORT)
        child = stack.enter_context(running("forwarder", command, directory))
        wait_ready(child, LISTEN_PORT)
        return measure.load(Target(LISTEN_PORT, child.pid, seconds, directory))


def run_rounds(args: argparse.Namespace, directory: Path) -> dict[str, dict[str, list[Figures]]]:
    """All figures: by measure, then setting, in the order of the rounds."""
    every = settings(directory)
    names = list(every)
    forwarder = [*shlex.split(args.forwarder), "--workers", str(WORKERS)]
    only = args.only.split(",")
    chosen = [measure for measure in MEASURES if measure.name in only]
    found: dict[str, dict[str, list[Figures]]] = {m.name: {n: [] for n in names} for m in chosen}
    for number in range(args.rounds):
        turn = number % len(names)
        for measure in chosen:
            for name in names[turn:] + names[:turn]:
                print(f"round {number + 1}: {measure.name}, {name}", file=sys.stderr)
                conf = directory / "forwarder.toml"
                conf.write_text(every[name])
                command = [*forwarder, "-c", str(conf)]
                found[measure.name][name].append(
                    run_once(measure, command, args.seconds, directory)
                )
    return found


def print_report(found: dict[str, dict[str, list[Figures]]]) -> None:
    """A table for each measure, with the ratio of each setting to the first."""
    for measure in MEASURES:
        by_setting = found.get(measure.name)
        if not by_setting:
            continue
        compared = [figure for figure in measure.figures if figure.has_ratio]
        heads = [f"{figure.heading} | against off" for figure in compared]
        print(f"### {measure.name}: {measure.title}\n\n| | {' | '.join(heads)} |")
        print("|---" * (1 + 2 * len(compared)) + "|")
        off = next(iter(by_setting.values()))
        for name, rounds in by_setting.items():
            cells = [name]
            for figure in compared:
                values = [figures[figure.key] for figures in rounds]
                ratios = [v / o[figure.key] for v, o in zip(values, off, strict=True)]
                cells += [spread(values, figure.digits), f"{median(ratios):.3f}"]
            print(f"| {' | '.join(cells)} |")
        print()


def main(argv: Sequence[str]) -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--seconds", type=positive, default=3, metavar="S", help="per load")
    parser.add_argument("--only", default=",".join(MEASURED), metavar="MEASURE,...")
    parser.add_argument(
        "--forwarder", default=os.environ.get("FORWARDER", "forwarder"), metavar="CMD"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            found = run_rounds(args, Path(name))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    print(f"{args.rounds} rounds, {args.seconds} s each: median (min-max). {machine()}\n")
    print_report(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
