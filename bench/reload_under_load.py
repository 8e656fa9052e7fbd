"""Count who is dropped while the forwarder and its peers reload, under steady new connections.

Run from the project root as ``python -m bench.reload_under_load``. Standard library only.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.command_line import add_forwarder, exit_on_signal, positive
from bench.groups.contenders import haproxy_command
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
from bench.reloads import LATE_S, OUTCOMES, Reloads
from bench.rounds import PORTS, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REPEATS: Final = 50  # reloads in each round
ROUND_S: Final = 10
RATE: Final = 1000  # new connections a second


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
    """The configuration of peers.py, with another number of workers."""
    text = NGINX_STREAM_CONF.replace(f"worker_processes {WORKERS};", f"worker_processes {workers};")
    return nginx_stream_module() + NGINX_HEAD.format(directory=directory) + text


def haproxy_config(workers: int, directory: Path) -> str:
    """The configuration of peers.py, and a socket over which listeners are handed on."""
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
        haproxy_command,
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


def run_once(contender: Contender, plan: Reloads, directory: Path) -> dict[str, int]:
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
        storm = [str(directory / "storm"), HOST, str(LISTEN_PORT), str(plan.rate)]
        load = stack.enter_context(
            subprocess.Popen([*storm, str(plan.seconds)], stdout=subprocess.PIPE, text=True)
        )
        began = time.monotonic()
        for i in range(plan.reloads):
            time.sleep(max(0.0, began + (i + 0.5) * plan.seconds / plan.reloads - time.monotonic()))
            workers = contender.workers[i % len(contender.workers)]
            path.write_text(contender.config(workers, directory))
            child.process.send_signal(contender.number)
        output, _ = load.communicate(timeout=plan.seconds + 3 * LATE_S)
        if load.returncode != 0:
            raise BenchError(f"storm: exit status {load.returncode}")
        found = dict(zip(OUTCOMES, map(int, output.split()), strict=True))
        found["seconds"] = round(time.monotonic() - began)
        # What is still there when nobody is served any more and all had a second to leave.
        time.sleep(1.0)
        found["left"] = len(tree(child.pid)) - before
    require_free(PORTS)
    return found


def run_rounds(everyone: Sequence[Contender], rounds: int, plan: Reloads, directory: Path) -> None:
    """Each contender in turn, each round starts with another; what is found goes to ``plan``."""
    for tool in ("storm", "echo"):
        compiled(directory, tool)
    for number in range(rounds):
        turn = number % len(everyone)
        for contender in (*everyone[turn:], *everyone[:turn]):
            say(f"round {number + 1}: reload {contender.name}")
            plan.add(contender.name, run_once(contender, plan, directory))


def main(argv: Sequence[str]) -> int:
    """Measure and report. Returns 1, after reporting what there is, when a run went wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.reload_under_load", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument(
        "--reloads", type=positive, default=REPEATS, metavar="N", help="in each round"
    )
    parser.add_argument(
        "--seconds", type=positive, default=ROUND_S, metavar="S", help="of each round"
    )
    parser.add_argument("--rate", type=positive, default=RATE, metavar="N", help="connections/s")
    add_forwarder(parser)
    args = parser.parse_args(argv)
    everyone = contenders(args.forwarder)
    signal.signal(signal.SIGTERM, exit_on_signal)
    plan = Reloads(args.reloads, args.seconds, args.rate)
    try:
        require_programs({"gcc", *(contender.program for contender in everyone)})
        set_fd_limit(FD_LIMIT)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            run_rounds(everyone, args.rounds, plan, Path(name))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        print(f"{machine()}\n\n{plan.table().as_markdown()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
