"""Count who is dropped while the forwarder and its peers reload, under steady new connections.

Run from the project root as ``python -m bench.reload_under_load``. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.command_line import exit_on_signal, positive
from bench.machine import machine
from bench.peers import (
    FD_LIMIT,
    HAPROXY_CONF,
    HOST,
    LISTEN_PORT,
    NGINX_HEAD,
    NGINX_STREAM_CONF,
    UPSTREAM_PORT,
    WORKERS,
    nginx_stream_module,
    require_programs,
)
from bench.procs import (
    BenchError,
    compiled,
    require_free,
    running,
    set_fd_limit,
    tree,
    wait_ready,
)
from bench.quick import PORTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OUTCOMES: Final = ("served", "refused", "reset", "cut", "wrong", "late")
_LATE_S: Final = 15  # storm.c gives up on a connection after this long


@dataclass(frozen=True, slots=True)
class Contender:
    """A program and a way to reload it.

    ``config`` is what its file says with so many workers, ``workers`` what the reloads go through.
    """

    name: str
    program: str
    number: signal.Signals
    file: str
    config: Callable[[int, Path], str]
    command: Callable[[Path], list[str]]
    workers: tuple[int, ...] = (WORKERS,)


def forwarder_config(workers: int, _directory: Path) -> str:
    """One rule."""
    return (
        f"workers = {workers}\n[[forwarding_rules]]\n"
        f'listen = "{HOST}:{LISTEN_PORT}"\nupstream = "{HOST}:{UPSTREAM_PORT}"\n'
    )


def nginx_config(workers: int, directory: Path) -> str:
    """The configuration of quick.py, with another number of workers."""
    text = NGINX_STREAM_CONF.replace(f"worker_processes {WORKERS};", f"worker_processes {workers};")
    return nginx_stream_module() + NGINX_HEAD.format(directory=directory) + text


def haproxy_config(workers: int, directory: Path) -> str:
    """The configuration of quick.py, and a socket over which listeners are handed on."""
    text = HAPROXY_CONF.replace(f"nbthread {WORKERS}", f"nbthread {workers}")
    socket = f"    stats socket {directory}/haproxy.sock mode 600 level admin expose-fd listeners\n"
    return text.replace("global\n", "global\n" + socket, 1)


def contenders(forwarder: list[str]) -> tuple[Contender, ...]:
    """Everyone, in report order."""
    ours = ("forwarder.toml", forwarder_config, lambda d: [*forwarder, "-c", f"{d}/forwarder.toml"])
    nginx = (
        "nginx.conf",
        nginx_config,
        lambda d: ["nginx", "-p", str(d), "-e", "stderr", "-c", f"{d}/nginx.conf"],
    )
    haproxy = (
        "haproxy.cfg",
        haproxy_config,
        lambda d: ["haproxy", "-W", "-db", "-f", f"{d}/haproxy.cfg"],
    )
    resized = (WORKERS + 2, WORKERS)
    hup, usr2 = signal.SIGHUP, signal.SIGUSR2
    return (
        Contender("forwarder", forwarder[0], hup, *ours),
        Contender("forwarder, 2-4 workers", forwarder[0], hup, *ours, resized),
        Contender("nginx", "nginx", hup, *nginx),
        Contender("nginx, 2-4 workers", "nginx", hup, *nginx, resized),
        Contender("haproxy", "haproxy", usr2, *haproxy),
    )


def run_once(contender: Contender, args: argparse.Namespace, directory: Path) -> Counter[str]:
    """Reload at even intervals under load; returns the outcomes and the processes left."""
    require_free(PORTS)
    path = directory / contender.file
    path.write_text(contender.config(WORKERS, directory))
    with ExitStack() as stack:
        echo = [str(directory / "echo"), HOST, str(UPSTREAM_PORT)]
        wait_ready(stack.enter_context(running("upstream", echo, directory)), UPSTREAM_PORT)
        child = stack.enter_context(
            running(contender.program.rpartition("/")[2], contender.command(directory), directory)
        )
        wait_ready(child, LISTEN_PORT)
        before = len(tree(child.pid))
        storm = [str(directory / "storm"), HOST, str(LISTEN_PORT), str(args.rate)]
        load = stack.enter_context(
            subprocess.Popen([*storm, str(args.seconds)], stdout=subprocess.PIPE, text=True)
        )
        began = time.monotonic()
        for i in range(args.reloads):
            time.sleep(max(0.0, began + (i + 0.5) * args.seconds / args.reloads - time.monotonic()))
            workers = contender.workers[i % len(contender.workers)]
            path.write_text(contender.config(workers, directory))
            child.process.send_signal(contender.number)
        output, _ = load.communicate(timeout=args.seconds + 3 * _LATE_S)
        if load.returncode != 0:
            raise BenchError(f"storm: exit status {load.returncode}")
        found = Counter(dict(zip(OUTCOMES, map(int, output.split()), strict=True)))
        found["seconds"] = round(time.monotonic() - began)
        # What is still there when nobody is served any more and all had a second to leave.
        time.sleep(1.0)
        found["left"] = len(tree(child.pid)) - before
        found["workers"] = before
    require_free(PORTS)
    return found


def print_table(args: argparse.Namespace, results: dict[str, list[Counter[str]]]) -> None:
    """Print the sums over all rounds; processes left are those of the worst round."""
    print(
        f"{args.rounds} rounds of {args.reloads} reloads in {args.seconds} s, "
        f"{args.rate} new connections a second. {machine()}\n"
    )
    columns = ("connections", "refused", "reset", "cut", "wrong", f"over {_LATE_S} s")
    print(f"| | {' | '.join(columns)} | processes more than before | seconds |")
    print("|---|" + "---:|" * (len(columns) + 2))
    for name, rounds in results.items():
        if not rounds:
            continue
        total = sum(rounds, Counter())
        counts = [sum(total[outcome] for outcome in OUTCOMES), *(total[o] for o in OUTCOMES[1:])]
        left = max(found["left"] for found in rounds)
        cells = [*counts, left, total["seconds"]]
        print(f"| {name} | {' | '.join(map(str, cells))} |")


def main(argv: Sequence[str]) -> int:
    """Measure and report. Returns 1, after reporting what there is, when a run went wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.reload_under_load", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--reloads", type=positive, default=50, metavar="N", help="in each round")
    parser.add_argument("--seconds", type=positive, default=10, metavar="S", help="of each round")
    parser.add_argument("--rate", type=positive, default=1000, metavar="N", help="connections/s")
    parser.add_argument(
        "--forwarder", default=os.environ.get("FORWARDER", "forwarder"), metavar="CMD"
    )
    args = parser.parse_args(argv)
    everyone = contenders(shlex.split(args.forwarder) or parser.error("--forwarder is empty"))
    signal.signal(signal.SIGTERM, exit_on_signal)
    results: dict[str, list[Counter[str]]] = {contender.name: [] for contender in everyone}
    try:
        require_programs({"gcc", *(contender.program for contender in everyone)})
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            for tool in ("storm", "echo"):
                compiled(Path(name), tool)
            for number in range(args.rounds):
                turn = number % len(everyone)
                for contender in everyone[turn:] + everyone[:turn]:
                    print(f"round {number + 1}: {contender.name}", file=sys.stderr)
                    results[contender.name].append(run_once(contender, args, Path(name)))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        print_table(args, results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
