"""What checks of servers cost the checker, in CPU, beside the bare system calls of as many checks.

The servers are loopback addresses, 127.1.0.1 and on, that all lead to one listener, so each check
is a handshake with an address of its own. "bare" makes a socket, connects, waits in epoll, and
resets, as many times a second; less is not possible for checks by TCP. Those by HTTP are answered
with a status and a close.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.command_line import positive
from bench.machine import machine
from bench.report import spread
from forwarder.balancing.table import CHECKS_FAILED, CHECKS_PASSED, ServerTable
from forwarder.checker.messages import CHECKS, Checked, checks_file
from forwarder.checker.process import CheckerProcess
from forwarder.config.address import Address
from forwarder.config.model import Check, CheckKind, Group, SocketOptions, Upstream
from forwarder.ipc.channel import channel_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_RESET: Final = struct.pack("ii", 1, 0)
# Bare checks that are begun together, as the checker does within 10 ms.
_BATCH: Final = 5


def cpu_s(pid: int) -> float:
    """The CPU that a process has used: proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def host(number: int) -> str:
    """The nth address."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


class Child:
    """A process that does something until :meth:`end`."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            work()
            os._exit(0)

    def end(self) -> None:
        """Kill and reap it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def accept(listener: socket.socket) -> None:
    """Take what comes, if the checks let it come so far; answer if it asks for something."""
    while True:
        with listener.accept()[0] as sock, suppress(OSError):
            if sock.recv(4096):
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def bare(port: int, servers: int, every_s: float) -> None:
    """Make checks without anything that is not a system call of one."""
    epoll, number = select.epoll(), 0
    while True:
        for _ in range(_BATCH):
            address = (host(number), port)
            number = (number + 1) % servers
            sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.connect_ex(address)
            epoll.register(sock.fileno(), select.EPOLLOUT)
            epoll.poll(1)
            sock.connect_ex(address)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            epoll.unregister(sock.fileno())
            sock.close()
        time.sleep(_BATCH * every_s / servers)


def measure_bare(port: int, servers: int, every_s: float, seconds: float) -> float:
    """Per cent of a CPU."""
    child = Child(lambda: bare(port, servers, every_s))
    try:
        time.sleep(every_s)
        before, began = cpu_s(child.pid), time.monotonic()
        time.sleep(seconds)
        return 100 * (cpu_s(child.pid) - before) / (time.monotonic() - began)
    finally:
        child.end()


def measure(
    kind: CheckKind, port: int, servers: int, every_s: float, seconds: float
) -> tuple[float, float]:
    """Per cent of a CPU, and checks per second. Raises RuntimeError if a check fails."""
    check = Check(kind=kind, every_s=every_s, timeout_s=every_s)
    upstreams = [Upstream(Address(host=host(number), port=port)) for number in range(servers)]
    seats = range(1, servers + 1)
    group = Checked(
        name="bench",
        group=Group(check=check),
        servers=tuple(zip(upstreams, seats, strict=True)),
        options=SocketOptions(),
        source=None,
        is_udp=False,
    )
    ours, theirs = channel_pair()
    with closing(ServerTable()) as table, closing(ours):
        child = Child(lambda: CheckerProcess(theirs, lambda _: None, table).run())
        theirs.close()

        def count(which: int) -> int:
            return sum(table.word(seat, which) for seat in seats)

        try:
            ours.send({"op": CHECKS, "serial": 1}, [checks_file((group,))], gives=True)
            time.sleep(2 * every_s)
            before, checks, began = cpu_s(child.pid), count(CHECKS_PASSED), time.monotonic()
            time.sleep(seconds)
            passed_s = time.monotonic() - began
            if count(CHECKS_FAILED):
                raise RuntimeError(f"{count(CHECKS_FAILED)} checks failed")
            used_s = cpu_s(child.pid) - before
            return 100 * used_s / passed_s, (count(CHECKS_PASSED) - checks) / passed_s
        finally:
            child.end()


def main(argv: Sequence[str]) -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.checking", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, metavar="N")
    parser.add_argument("--seconds", type=positive, default=10, metavar="S", help="of each round")
    parser.add_argument("--servers", type=positive, default=1000, metavar="N")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="between two checks")
    parser.add_argument("--kind", choices=("tcp", "http"), default="tcp", help="of the checks")
    args = parser.parse_args(argv)
    print(f"{args.rounds} rounds: median (min-max). {machine()}\n")
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as listener:
        port = listener.getsockname()[1]
        server = Child(lambda: accept(listener))
        try:
            rounds = [
                (
                    measure(CheckKind(args.kind), port, args.servers, args.every, args.seconds),
                    measure_bare(port, args.servers, args.every, args.seconds),
                )
                for _ in range(args.rounds)
            ]
        finally:
            server.end()
    rate = spread([checks for (_, checks), _ in rounds], 0)
    print(f"{args.servers} servers, one check each {args.every:g} s: {rate} a second\n")
    print("| | % of a CPU | us a check |\n|---|---|---|")
    for name, shares in (
        ("checker", [share for (share, _), _ in rounds]),
        ("bare", [share for _, share in rounds]),
    ):
        costs = [share * 1e4 * args.every / args.servers for share in shares]
        print(f"| {name} | {spread(shares, 2)} | {spread(costs, 0)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
