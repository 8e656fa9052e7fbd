"""What a long range of ports costs: time to be ready, memory per listening socket, a reload.

``python -m bench.many_ports --ports 9900`` starts the forwarder with one rule of one port, then
with one rule of many, both with a second rule that the reload changes. Memory is the difference of
the proportional set size (PSS) of master and workers, divided by the listening sockets. Linux only.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.instance import connections, descriptors
from bench.procs import TCP_LISTEN, BenchError, pss_kib, tree
from bench.report import spread

FIRST_PORT = 10_000
READY_S = 30.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one start: seconds from exec to READY=1, of a reload to its READY=1, and PSS in KiB.

    ``reloaded_kib`` is the PSS after the reload, ``sockets`` how many are listened on.
    """

    ready_s: float
    reload_s: float
    pss_kib: int
    reloaded_kib: int
    sockets: int


def wait_ready(notify: socket.socket, process: subprocess.Popen[bytes]) -> float:
    """Wait for READY=1; return when it came. Raises OSError when it does not."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until and process.poll() is None:
        with suppress(TimeoutError):
            if b"READY=1" in notify.recv(4096).split(b"\n"):
                return time.monotonic()
    raise OSError("the forwarder is not ready")


def listening(pid: int) -> set[str]:
    """Sockets of a process that are in the kernel's list of listening ones."""
    every = {name for _, state, name in connections() if state == TCP_LISTEN}
    return every.intersection(descriptors(pid))


def rules(ports: int, other_upstream: int) -> str:
    """The range, and another rule that a reload changes."""
    last = FIRST_PORT + ports - 1
    return (
        f'[[forwarding_rules]]\nname = "range"\nlisten = "127.0.0.1:{FIRST_PORT}-{last}"\n'
        f'upstream = "127.0.0.2:{FIRST_PORT}-{last}"\n'
        f'[[forwarding_rules]]\nname = "other"\nlisten = "127.0.0.1:9999"\n'
        f'upstream = "127.0.0.2:{other_upstream}"\n'
    )


def measure(command: list[str], ports: int, workers: int, directory: Path) -> Figures:
    """Start, look, reload, look, stop. Raises BenchError when a reload touches the range."""
    path = directory / "many.toml"
    path.write_text(rules(ports, 1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind("")
        notify.settimeout(0.2)
        name = notify.getsockname()
        environment = {**os.environ, "NOTIFY_SOCKET": "@" + name[1:].decode()}
        begin = time.monotonic()
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "-c", str(path), "--workers", str(workers)],
                env=environment,
                stderr=log,
                start_new_session=True,
            )
        try:
            ready_s = wait_ready(notify, process) - begin
            time.sleep(0.5)
            before, pss = listening(process.pid), pss_kib(process.pid)
            path.write_text(rules(ports, 2))
            begin = time.monotonic()
            process.send_signal(signal.SIGHUP)
            reload_s = wait_ready(notify, process) - begin
            time.sleep(0.5)
            reloaded = pss_kib(process.pid)
            if listening(process.pid) != before:
                raise BenchError("the reload has changed sockets of the range")
        except OSError as err:
            raise BenchError(f"{err}: {(directory / 'log').read_text()[-2000:]}") from err
        finally:
            for proc in tree(process.pid)[1:] if process.poll() is not None else ():
                os.kill(proc.pid, signal.SIGKILL)
            if process.poll() is None:
                process.terminate()
            process.wait(READY_S)
    return Figures(ready_s, reload_s, pss, reloaded, len(before))


def main() -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ports", type=int, default=9900)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forwarder", default=f"{sys.executable} -m forwarder")
    args = parser.parse_args()
    command = re.split(" +", args.forwarder)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rounds = [
            (
                measure(command, 1, args.workers, directory),
                measure(command, args.ports, args.workers, directory),
            )
            for _ in range(args.rounds)
        ]
    few, many = rounds[0]
    sockets = many.sockets - few.sockets
    print(f"{args.ports} ports, {args.workers} workers, {many.sockets} listening sockets;")
    print(f"median of {args.rounds} rounds, with the smallest and the largest\n")
    print("| measure | one port | the range |\n|---|---|---|")
    for title, attribute in (("exec to READY=1, s", "ready_s"), ("reload, s", "reload_s")):
        cells = [spread([getattr(it[i], attribute) for it in rounds], 2) for i in (0, 1)]
        print(f"| {title} | {cells[0]} | {cells[1]} |")
    for title, attribute in (("memory", "pss_kib"), ("memory after a reload", "reloaded_kib")):
        extra = [
            (getattr(many, attribute) - getattr(few, attribute)) * 1024 / sockets
            for few, many in rounds
        ]
        print(f"| {title} per socket, bytes | - | {spread(extra, 0)} |")


if __name__ == "__main__":
    try:
        main()
    except BenchError as err:
        sys.exit(f"many_ports: {err}")
