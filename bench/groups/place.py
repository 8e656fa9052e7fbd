"""Where a scenario happens: servers, clients, the firewall, and the program in the middle.

In a network namespace of its own, which the caller has made. Judges nothing.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import PORT, SERVER_PORT
from bench.groups.findings import Knock, Seen, knocks, seen
from bench.peers import HOST
from bench.procs import PROC, BenchError, is_listening, running, wait_ready, wait_until
from bench.world import ip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from bench.groups.contenders import Contender, Group
    from bench.procs import Child

WITHIN_S: Final = 60.0  # for what takes no time on an idle machine; arbitrary
LATE_S: Final = 15  # knock.c gives up on a connection after this long


def ready_namespace() -> None:
    """Bring loopback up, and leave our own ports out of those that clients get.

    With loopback alone, resolvers that go by the system's addresses (AI_ADDRCONFIG) ask nobody.
    """
    for line in (
        "link set lo up",
        "link add bench0 type veth peer name bench1",
        "address add 192.0.2.1/24 dev bench0",
        "link set bench0 up",
        "link set bench1 up",
    ):
        ip(line)
    (PROC / "sys/net/ipv4/ip_local_port_range").write_text("10000 65000")


def refuse(host: str, how: str = "reject with tcp reset") -> None:
    """Have a server refuse new connections, or ``drop`` them: it is silent. Open ones go on."""
    rules = (
        "add table inet bench; flush table inet bench;"
        "add chain inet bench in { type filter hook input priority 0; };"
        f"add rule inet bench in ip daddr {host} tcp flags & (syn | ack) == syn {how};"
    )
    subprocess.run(["nft", rules], check=True)


def allow() -> None:
    """Undo :func:`refuse`."""
    subprocess.run(["nft", "add table inet bench; delete table inet bench;"], check=True)


@dataclass
class Servers:
    """Processes of ``greet.c``, by address. Owns them."""

    directory: Path
    _running: dict[tuple[str, int], subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, host: str, port: int = SERVER_PORT) -> None:
        """Start one and wait until it listens. 0.0.0.0 is all that are not started alone."""
        command = [str(self.directory / "greet"), host, str(port)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._running[host, port] = process
        self.seen(host, port)

    def seen(self, host: str, port: int = SERVER_PORT) -> dict[str, Seen]:
        """What one process has had, by address. Raises BenchError when it has ended."""
        process = self._running[host, port]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("?\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(f"the server at {host}:{port} has ended") from None
        lines = []
        while (line := process.stdout.readline()) != "\n":
            if not line:
                raise BenchError(f"the server at {host}:{port} has ended")
            lines.append(line)
        return seen("".join(lines))

    def kill(self, host: str, port: int = SERVER_PORT) -> None:
        """Kill one, and wait until its sockets are closed."""
        _end(self._running.pop((host, port)))

    def end(self) -> None:
        """End all."""
        while self._running:
            _end(self._running.popitem()[1])


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(WITHIN_S)
    for file in (process.stdin, process.stdout):
        if file is not None:
            file.close()


@dataclass
class Clients:
    """A process of ``knock.c``. Owns it and its output."""

    process: subprocess.Popen[bytes]
    output: Path
    seconds: float
    began_s: float

    def sleep_until(self, after_s: float) -> float:
        """Sleep until so long after the start; returns what time it is."""
        time.sleep(max(0.0, self.began_s + after_s - time.monotonic()))
        return time.monotonic()

    def stop(self) -> list[Knock]:
        """Start no more; all clients, when the last one has ended."""
        self.process.terminate()
        self.seconds = 0
        return self.wait()

    def wait(self) -> list[Knock]:
        """All clients, when the last one has ended."""
        if self.process.wait(self.seconds + LATE_S + WITHIN_S) != 0:
            raise BenchError(f"knock: exit status {self.process.returncode}")
        return knocks(self.output.read_text())


@dataclass(frozen=True, slots=True)
class Place:
    """One run's directory, which has the compiled tools, and the scale of the run."""

    directory: Path
    rate: int
    seconds: int
    reloads: int

    @contextmanager
    def servers(self, *each: str) -> Iterator[Servers]:
        """Servers at these addresses for the length of the block; then the firewall is open."""
        servers = Servers(self.directory)
        try:
            for host in each:
                servers.start(host)
            yield servers
        finally:
            allow()
            servers.end()

    @contextmanager
    def serving(self, contender: Contender, group: Group, *, rests: bool = True) -> Iterator[Child]:
        """The program in the middle, from ready to ended; ``rests``: it has nothing to do then."""
        contender.write(group, self.directory)
        with running(contender.name, contender.command(self.directory), self.directory) as child:
            if rests:
                wait_ready(child, PORT)
            else:
                wait_until(lambda: is_listening(PORT), f"{contender.name} on {PORT}", WITHIN_S)
            yield child

    @contextmanager
    def clients(
        self, rate: int, seconds: float, *, hold_ms: int = 0, total: int = -1
    ) -> Iterator[Clients]:
        """New connections at a steady rate."""
        output = self.directory / "knocks"
        numbers = (PORT, rate, seconds, hold_ms, total)
        command = [str(self.directory / "knock"), HOST, *map(str, numbers)]
        with ExitStack() as stack:
            file = stack.enter_context(output.open("wb"))
            began_s = time.monotonic()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file)
            stack.callback(process.wait)
            stack.callback(process.kill)
            yield Clients(process, output, seconds, began_s)


def settle(servers: Servers, each: Sequence[str], at_least: int) -> None:
    """Wait until servers have so many open sessions together."""

    def have_come() -> bool:
        return sum(seen.open for one in each for seen in servers.seen(one).values()) >= at_least

    wait_until(have_come, f"{at_least} sessions", WITHIN_S)
