"""Whom an outage of the world outside costs something, and whom it must not.

Run from the project root, as root, as ``python -m bench.outages --minutes 60``: name servers that
go and hang, an interface that is deleted and made again, upstreams that refuse in turn, a name that
moves, reloads and resizes, all under load. Nobody may fail but the clients of a listening address
that is not there. Everything is in namespaces of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.command_line import add_forwarder, positive
from bench.procs import BenchError, running, tree, wait_ready
from bench.world import ALWAYS, DEVICE, LINK_LOCAL, REFUSING, TCP_PORT, UDP_PORT, World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HOST: Final = "127.0.0.1"
PATIENCE_S: Final = 20.0  # a client that has waited for so long has failed
PAUSE_S: Final = 0.25  # of a client between two of its requests
STREAMS: Final = 3  # of each rule, that live from the beginning to the end
CLIENTS: Final = 4  # of each rule
UDP_TRIES: Final = 4  # of one request: a datagram may be lost with the upstream that it went to
# By rule: port, upstreams, and whatever else it says.
TCP_RULES: Final = {
    "literal": (7001, f'"{ALWAYS}:{TCP_PORT}"', ""),
    "named": (7002, f'"stays.test:{TCP_PORT}"', ""),
    "moving": (7003, f'"moves.test:{TCP_PORT}"', ""),
    "refusing": (7004, f'["{REFUSING[0]}:{TCP_PORT}", "{REFUSING[1]}:{TCP_PORT}"]', ""),
    "dead name": (7005, f'["dead.test:{TCP_PORT}", "{ALWAYS}:{TCP_PORT}"]', ""),
    "zone": (7006, f'["[{LINK_LOCAL}%{DEVICE}]:9", "{ALWAYS}:{TCP_PORT}"]', ""),
    "link-local": (7007, f'"{ALWAYS}:{TCP_PORT}"', 'bind = "retry"'),
}
UDP_RULES: Final = {
    "udp named": (7011, f'"stays.test:{UDP_PORT}"', ""),
    "udp moving": (7012, f'"moves.test:{UDP_PORT}"', ""),
    "udp refusing": (7013, f'["{REFUSING[0]}:{UDP_PORT}", "{REFUSING[1]}:{UDP_PORT}"]', ""),
}


def configuration(number: int) -> str:
    """The rules, and one that each reload changes."""
    text = 'workers = 2\nconnect_timeout = "5s"\ndrain_timeout = 0\n'
    rules = {**TCP_RULES, **UDP_RULES, "changing": (7020 + number % 2, f'"{ALWAYS}:9000"', "")}
    for name, (port, upstream, more) in rules.items():
        host = f"[{LINK_LOCAL}%{DEVICE}]" if name == "link-local" else HOST
        protocol = 'protocol = "udp"\ntimeout = "10s"\n' if name in UDP_RULES else ""
        text += f'[[forwarding_rules]]\nname = "{name}"\nlisten = "{host}:{port}"\n'
        text += f"upstream = {upstream}\n{protocol}{more}\n"
    return text


@dataclass
class Load:
    """Clients of all rules. ``served`` and ``failed`` by rule, ``excused`` as the world allows."""

    world: World
    served: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    slowest_s: dict[str, float] = field(default_factory=dict)
    is_over: bool = False

    def start(self) -> list[asyncio.Task[None]]:
        """All clients, each a task."""
        tasks = [
            asyncio.create_task(self._repeat(rule, ask))
            for rules, ask in ((TCP_RULES, self._connect), (UDP_RULES, self._ask_by_udp))
            for rule in rules
            for _ in range(CLIENTS)
        ]
        tasks += [
            asyncio.create_task(self._stream(rule))
            for rule in TCP_RULES
            if rule != "link-local"
            for _ in range(STREAMS)
        ]
        return tasks

    async def _repeat(self, rule: str, ask: Callable[[str], object]) -> None:
        while not self.is_over:
            began = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await ask(rule)  # type: ignore[misc]  # both are coroutines
            except (OSError, EOFError, TimeoutError) as err:
                self._note_failed(rule, err, may_fail=self.world.may_fail(rule, began))
            else:
                self.served[rule] += 1
                took_s = time.monotonic() - began
                self.slowest_s[rule] = max(took_s, self.slowest_s.get(rule, 0.0))
            await asyncio.sleep(PAUSE_S)

    def _note_failed(self, rule: str, err: Exception, *, may_fail: bool) -> None:
        if may_fail:
            self.excused[rule] += 1
            return
        self.failed[rule] += 1
        print(f"{time.strftime('%H:%M:%S')} {rule}: {err!r}", flush=True)

    async def _connect(self, rule: str) -> None:
        """One connection with one request, checked to its end."""
        reader, writer = await asyncio.open_connection(*_address(rule))
        try:
            request = random.randbytes(random.choice((1, 500, 60_000)))
            writer.write(request)
            writer.write_eof()
            _check(await reader.read(-1), request)
        finally:
            writer.close()

    async def _stream(self, rule: str) -> None:
        """One connection for the whole time."""
        try:
            reader, writer = await asyncio.open_connection(*_address(rule))
            while not self.is_over:
                request = random.randbytes(1000)
                writer.write(request)
                async with asyncio.timeout(PATIENCE_S):
                    answer = await reader.readexactly(len(request))
                _check(answer, request)
                await asyncio.sleep(PAUSE_S)
            self.served[f"{rule}, streams"] += 1
            writer.close()
        except (OSError, EOFError, TimeoutError) as err:
            self._note_failed(f"{rule}, streams", err, may_fail=False)

    async def _ask_by_udp(self, rule: str) -> None:
        """One flow with a few requests."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(_address(rule))
            for _ in range(4):
                request = random.randbytes(100)
                for _ in range(UDP_TRIES):
                    await loop.sock_sendall(sock, request)
                    try:
                        async with asyncio.timeout(1.0):
                            while await loop.sock_recv(sock, 2000) != request:
                                pass
                    except TimeoutError:
                        continue
                    break
                else:
                    raise TimeoutError
                await asyncio.sleep(PAUSE_S)


def _check(answer: bytes, request: bytes) -> None:
    if answer != request:
        raise EOFError(f"{len(answer)} bytes that are not the {len(request)} of the request")


def _address(rule: str) -> tuple[str, int]:
    port = (TCP_RULES | UDP_RULES)[rule][0]
    return (f"{LINK_LOCAL}%{DEVICE}" if rule == "link-local" else HOST), port


def figures_of(pids: Sequence[int]) -> tuple[int, int, int]:
    """How many processes there are, and their descriptors and resident KiB together."""
    descriptors = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return len(pids), descriptors, pages * os.sysconf("SC_PAGE_SIZE") // 1024


async def run(forwarder: list[str], seconds: float, seed: int, directory: Path) -> int:
    """One run; returns how many failed who should not have."""
    path = directory / "forwarder.toml"
    number = 0
    path.write_text(configuration(number))
    control = str(directory / "control.sock")
    command = [*forwarder, "-c", str(path), "--control", control]

    async def reload() -> None:
        nonlocal number
        number += 1
        path.write_text(configuration(number))
        os.kill(child.pid, 1)

    world = World(directory, lambda: child.pid, reload)
    await world.begin()
    try:
        with running("forwarder", command, directory) as child:
            await asyncio.to_thread(wait_ready, child, 7001)
            load = Load(world)
            tasks = load.start()
            await asyncio.sleep(5)
            before = figures_of([one.pid for one in tree(child.pid)])
            await world.live(seconds, random.Random(seed))
            await asyncio.sleep(15)
            load.is_over = True
            await asyncio.gather(*tasks)
            after = figures_of([one.pid for one in tree(child.pid)])
            log = child.log.read_text()
            report(load, world, log, before, after)
            # Of a device that was deleted nobody hears that its connections are over.
            kill = (*forwarder, "--control", control, "kill", "--rule", "link-local", "--yes")
            await (await asyncio.create_subprocess_exec(*kill)).wait()
        deaths = log.count("worker.died") + log.count("worker.hung")
        return load.failed.total() + deaths
    finally:
        world.end()


def report(
    load: Load,
    world: World,
    log: str,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
) -> None:
    """Print what was found."""
    print(f"events: {', '.join(f'{name} {count}' for name, count in world.events.items())}")
    print("\n| rule | served | failed | excused | slowest s |\n|---|---|---|---|---|")
    for rule in sorted(load.served.keys() | load.failed.keys() | load.excused.keys()):
        print(
            f"| {rule} | {load.served[rule]} | {load.failed[rule]} | {load.excused[rule]} | "
            f"{load.slowest_s.get(rule, 0.0):.1f} |"
        )
    # Workers that a resize retired are among them for as long as their streams last.
    changes = zip(("processes", "descriptors", "resident KiB"), before, after, strict=True)
    print("\n" + ", ".join(f"{what} {was} -> {now}" for what, was, now in changes))
    said = Counter(_event(line) for line in log.splitlines())
    print(f"log: {', '.join(f'{event} {count}' for event, count in said.most_common())}")


def _event(line: str) -> str:
    words = line.split()
    return " ".join(words[3:5]) if len(words) > 4 else "another line"


def main(argv: Sequence[str]) -> int:
    """Run in namespaces of its own. Returns 1 if anybody failed who should not have."""
    parser = argparse.ArgumentParser(prog="python -m bench.outages", description=__doc__)
    parser.add_argument("--minutes", type=positive, default=60, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of what happens when")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    add_forwarder(parser)
    args = parser.parse_args(argv)
    if not args.inside:
        spaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return subprocess.run(
            [*spaces, sys.executable, "-m", "bench.outages", *argv, "--inside"], check=False
        ).returncode
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            failed = asyncio.run(run(args.forwarder, args.minutes * 60, args.seed, Path(name)))
    except BenchError as err:
        print(f"bench: {err}", file=sys.stderr)
        return 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
