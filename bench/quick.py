"""Measure the forwarder beside its peers: interleaved rounds, medians, ratios round by round.

Run from the project root as ``python -m bench.quick`` or by ``bench/quick.sh --peers``.
Standard library only; see bench/README.md for what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.command_line import exit_on_signal, positive
from bench.loads import Figures, Target
from bench.machine import machine
from bench.measures import MEASURES, Measure
from bench.peers import (
    FD_LIMIT,
    LISTEN_PORT,
    ON_REQUEST,
    UPSTREAM_PORT,
    Peer,
    all_peers,
    require_programs,
    version_of,
)
from bench.procs import BenchError, compiled, require_free, running, set_fd_limit, wait_ready
from bench.report import Results, table

if TYPE_CHECKING:
    from collections.abc import Sequence
PORTS = (LISTEN_PORT, UPSTREAM_PORT)
NEEDS = {
    "bulk1": "iperf3",
    "bulk8": "iperf3",
    "conn": "ab nginx",
    "rr": "gcc",
    "udp300": "iperf3",
    "udp": "iperf3",
    "idle": "gcc",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: every measure for every peer, ``rounds`` times."""

    measures: tuple[Measure, ...]
    peers: tuple[Peer, ...]
    rounds: int
    seconds: int
    json_path: Path | None


def parse_args(argv: Sequence[str]) -> Plan:
    """Turn the command line into a plan; exits with status 2 on a mistake, as argparse does."""
    measure_names = [measure.name for measure in MEASURES]
    peer_names = list(all_peers(["forwarder"]))
    parser = argparse.ArgumentParser(prog="python -m bench.quick", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--seconds", type=positive, default=5, metavar="S", help="per load")
    parser.add_argument("--only", default=",".join(measure_names), metavar="MEASURE,...")
    everyone = ",".join(name for name in peer_names if name not in ON_REQUEST)
    # Without a value it means everyone: "bench/quick.sh --peers" alone is a fine command.
    parser.add_argument("--peers", nargs="?", const=everyone, default=everyone, metavar="PEER,...")
    parser.add_argument(
        "--forwarder", default=os.environ.get("FORWARDER", "forwarder"), metavar="CMD"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single figure")
    args = parser.parse_args(argv)
    only, wanted = args.only.split(","), args.peers.split(",")
    if unknown := [*({*only} - {*measure_names}), *({*wanted} - {*peer_names})]:
        parser.error(f"unknown: {', '.join(unknown)}")
    peers = all_peers(shlex.split(args.forwarder) or parser.error("--forwarder is empty"))
    return Plan(
        tuple(measure for measure in MEASURES if measure.name in only),
        tuple(peer for peer in peers.values() if peer.name in wanted),
        args.rounds,
        args.seconds,
        args.json,
    )


def check_programs(plan: Plan) -> None:
    """Raise BenchError when something the plan needs is not installed."""
    tools = {tool for measure in plan.measures for tool in NEEDS[measure.name].split()}
    require_programs(tools | {peer.program for peer in plan.peers if peer.program})


def run_once(measure: Measure, peer: Peer, seconds: int, directory: Path) -> Figures:
    """Start upstream and peer, load them, end them; the ports are free before and after."""
    require_free(PORTS)
    with ExitStack() as stack:
        upstream = stack.enter_context(running("upstream", measure.upstream(directory), directory))
        wait_ready(upstream, UPSTREAM_PORT)
        port, pid = UPSTREAM_PORT, None
        if peer.command is not None:
            child = stack.enter_context(running(peer.name, peer.command(directory), directory))
            wait_ready(child, LISTEN_PORT)
            port, pid = LISTEN_PORT, child.pid
        figures = measure.load(Target(port, pid, seconds, directory))
    require_free(PORTS)
    return figures


def run_rounds(plan: Plan, directory: Path, results: Results) -> None:
    """Run every round; each starts with another peer, so that none always goes first."""
    for number in range(plan.rounds):
        turn = number % len(plan.peers)
        order = plan.peers[turn:] + plan.peers[:turn]
        for measure in plan.measures:
            for peer in order:
                if measure.needs_peer and peer.command is None:
                    continue
                if measure.is_udp and not peer.has_udp:
                    continue
                print(f"round {number + 1}: {measure.name} {peer.name}", file=sys.stderr)
                try:
                    figures = run_once(measure, peer, plan.seconds, directory)
                except BenchError as err:
                    raise BenchError(f"{measure.name} {peer.name}: {err}") from err
                results.add(measure.name, peer.name, number, figures)


def print_report(plan: Plan, results: Results) -> None:
    """Print the settings, then a table for each measure."""
    print(f"{plan.rounds} rounds, {plan.seconds} s each: median (min-max). {machine()}\n")
    for measure in plan.measures:
        print(table(measure, [peer.name for peer in plan.peers], results))
    print("### Settings\n")
    for peer in plan.peers:
        print(f"{peer.name} {version_of(peer)}".strip())
        print(f"\n```\n{peer.settings.strip()}\n```\n")


def write_json(plan: Plan, results: Results) -> None:
    """Write every single figure, for whoever wants other statistics than ours."""
    if plan.json_path is None:
        return
    content = {
        "machine": machine(),
        "seconds": plan.seconds,
        "peers": {peer.name: [version_of(peer), peer.settings] for peer in plan.peers},
        "rounds": results.rounds,
    }
    plan.json_path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str]) -> int:
    """Measure and report. Returns 1, after reporting what there is, when a run went wrong."""
    plan = parse_args(argv)
    signal.signal(signal.SIGTERM, exit_on_signal)
    results = Results()
    try:
        check_programs(plan)
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            for tool in ("rr", "echo"):
                compiled(Path(name), tool)
            run_rounds(plan, Path(name), results)
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if results.rounds:
            print_report(plan, results)
            write_json(plan, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
