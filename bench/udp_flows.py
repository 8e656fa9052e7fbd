"""Measure many UDP clients at once: a flood of new ones, and thousands that go on.

Run from the project root as ``python -m bench.udp_flows``; see bench/README.md. The forwarder and
nginx take turns in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.command_line import exit_on_signal, positive
from bench.loads import Figures, wait_pss_stable
from bench.machine import machine
from bench.measures import Figure, Measure
from bench.peers import (
    FD_LIMIT,
    HOST,
    LISTEN_PORT,
    UPSTREAM_PORT,
    Peer,
    all_peers,
    require_programs,
    version_of,
)
from bench.procs import (
    BenchError,
    compiled,
    cpu_ns,
    require_free,
    running,
    set_fd_limit,
    wait_ready,
)
from bench.quick import PORTS
from bench.report import Results, table

if TYPE_CHECKING:
    from collections.abc import Sequence

FLOOD_CLIENTS: Final = 10_000
LIVE_CLIENTS: Final = 5_000

_COMMON: Final = (
    Figure("cpu_us", "CPU us/datagram", 2, has_ratio=True),
    Figure("lost_percent", "lost %", 2),
    Figure("flows", "upstream-side ports", 0),
    Figure("settled", "sockets of their own", 0),
    Figure("kib", "PSS KiB/flow", 2, has_ratio=True),
    Figure("base_mib", "PSS before, MiB", 1),
)


def _no_load(*_: object) -> Figures:
    raise NotImplementedError


def _no_upstream(_directory: Path) -> list[str]:
    return []


# The load is the upstream, too, so what these say of both is not used.
MEASURES: Final = tuple(
    Measure(
        name=name,
        title=title,
        figures=(Figure("per_s", per_s, 0, has_ratio=True), *_COMMON),
        upstream=_no_upstream,
        load=_no_load,
        is_udp=True,
    )
    for name, title, per_s in (
        ("flood", f"{FLOOD_CLIENTS:,} clients with one datagram each", "new flows/s"),
        ("live", f"{LIVE_CLIENTS:,} clients in turn ask and are answered", "answers/s"),
    )
)


def flow_sockets(port: int) -> int:
    """How many connected UDP sockets have a local port: 01 in the tables of proc(5)."""
    rows = [
        line.split()
        for name in ("udp", "udp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def run_once(measure: Measure, peer: Peer, seconds: int, directory: Path) -> Figures:
    """Start a peer, load it, weigh it while all flows are there, end it."""
    require_free(PORTS)
    if peer.command is None:
        raise BenchError(f"{peer.name} is no forwarder")
    clients = FLOOD_CLIENTS if measure.name == "flood" else LIVE_CLIENTS
    command = [str(directory / "udp_flows"), HOST, str(LISTEN_PORT), str(UPSTREAM_PORT)]
    command += [measure.name, str(clients), str(seconds)]
    with running(peer.name, peer.command(directory), directory) as child:
        wait_ready(child, LISTEN_PORT)
        before_kib, before_ns = wait_pss_stable(child.pid), cpu_ns(child.pid)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as load:
            try:
                found = _read_line(load)
                used_us = (cpu_ns(child.pid) - before_ns) / 1e3
                settled = flow_sockets(LISTEN_PORT)
                with_kib = wait_pss_stable(child.pid)
            finally:
                load.kill()
    is_flood = measure.name == "flood"
    served = found["arrived"] if is_flood else found["answered"]
    datagrams = found["arrived"] + found["answered"]
    return {
        "per_s": served / found["seconds"],
        "cpu_us": used_us / max(datagrams, 1),
        "lost_percent": 100 * (1 - served / found["sent"]),
        "flows": found["flows"],
        "settled": settled,
        "kib": (with_kib - before_kib) / max(found["flows"], 1),
        "base_mib": before_kib / 1024,
    }


def _read_line(load: subprocess.Popen[str]) -> Figures:
    if load.stdout is None:
        raise BenchError("the load has no output")
    line = load.stdout.readline()
    if not line:
        raise BenchError("the load has failed")
    found: Figures = json.loads(line)
    return found


def main(argv: Sequence[str]) -> int:
    """Measure and report. Returns 1, after reporting what there is, when a run went wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.udp_flows", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--seconds", type=positive, default=3, metavar="S", help="of live flows")
    parser.add_argument("--peers", default="forwarder,forwarder-copy,nginx", metavar="PEER,...")
    parser.add_argument(
        "--forwarder", default=os.environ.get("FORWARDER", "forwarder"), metavar="CMD"
    )
    args = parser.parse_args(argv)
    everyone = all_peers(shlex.split(args.forwarder) or parser.error("--forwarder is empty"))
    peers = [peer for name, peer in everyone.items() if name in args.peers.split(",")]
    signal.signal(signal.SIGTERM, exit_on_signal)
    results = Results()
    try:
        require_programs({"gcc", *(peer.program for peer in peers)})
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            compiled(Path(name), "udp_flows")
            for number in range(args.rounds):
                turn = number % len(peers)
                for measure in MEASURES:
                    for peer in peers[turn:] + peers[:turn]:
                        print(f"round {number + 1}: {measure.name} {peer.name}", file=sys.stderr)
                        figures = run_once(measure, peer, args.seconds, Path(name))
                        results.add(measure.name, peer.name, number, figures)
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"{args.rounds} rounds, {args.seconds} s each: median (min-max). {machine()}\n")
        for measure in MEASURES:
            print(table(measure, [peer.name for peer in peers], results))
        for peer in peers:
            print(f"{peer.name} {version_of(peer)}".strip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
