"""Where a run happens: the program with its files and processes, and the upstreams.

In namespaces of its own, so that all ports are free and every process that is seen is of this run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from support import procfs, sockdiag
from support.processes import members, state

from chaos import config
from chaos.model import Ability
from chaos.wire import PORTS, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE_S: Final = 60.0
ASK_S: Final = 30.0
_DISK_BYTES: Final = 1 << 30  # as far as it is used
_EXITS_OF_A_LOSER: Final = (69,)  # another instance has the addresses: the one that was upgraded to


class ChaosError(Exception):
    """Something did not happen that had to."""


def wait_until(is_so: Callable[[], bool], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait for it. Raises ChaosError."""
    until = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > until:
            raise ChaosError(f"not within {within_s:.0f} s: {what}")
        time.sleep(0.02)


class Child:
    """A process of the load: what it is asked goes to its input, what it says comes back."""

    def __init__(self, module: str, *arguments: str, directory: Path) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._read()  # it says that it has begun

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChaosError(f"a process of the load has ended: {self.process.wait()}")
        return line

    def count(self) -> int:
        """How many connections an upstream has open."""
        assert self.process.stdin is not None
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return int(self._read())

    def finish(self, within_s: float = PATIENCE_S) -> str:
        """Let it come to its end. Returns what it has said last."""
        try:
            found, _ = self.process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ChaosError("a process of the load does not end") from None
        if self.process.returncode != 0:
            raise ChaosError(f"a process of the load has failed: {self.process.returncode}")
        return found

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            if file is not None:
                with suppress(OSError):
                    file.close()


class Place:
    """The program, its directory, and what it talks to. Owns all processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self._pid_file = directory / "forwarder.pid"
        self.disk = directory / "disk"
        self.log = self.disk / "sessions.json"
        self.errors = directory / "errors"
        self._started: list[subprocess.Popen[bytes]] = []
        self._errors: IO[bytes]
        self._upstream: Child
        self.victim: Child
        self._taken = socket.socket()

    # -- beginning

    def prepare(self) -> None:
        """A network, a disk for the log, upstreams, and the configuration."""
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "chaos", str(self.disk)], check=True)
        self.set_disk(_DISK_BYTES)
        self._taken.bind(("127.0.0.1", PORTS.taken))
        self._taken.listen()
        self._errors = self.errors.open("ab")
        self._upstream = Child("chaos.upstream", directory=self.directory)
        self.start_victim()
        self.write(config.valid(self.directory, self.log))

    def write(self, text: str) -> None:
        """Another configuration, as a whole."""
        fresh = self.config.with_suffix(".new.toml")
        fresh.write_text(text)
        fresh.rename(self.config)

    def text(self, variant: int = config.BASE, workers: int = config.WORKERS) -> str:
        """A configuration."""
        return config.valid(self.directory, self.log, variant, workers)

    def start_victim(self) -> None:
        """The upstream that is killed now and then."""
        self.victim = Child("chaos.upstream", str(PORTS.victim), directory=self.directory)

    def set_disk(self, size: int) -> None:
        """How much the disk of the log can hold, in bytes; less than a page more than now: full."""
        options = f"remount,size={size}"
        subprocess.run(["mount", "-o", options, "chaos", str(self.disk)], check=True)

    def fill_disk(self) -> None:
        """No more fits."""
        found = os.statvfs(self.disk)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        with suppress(subprocess.CalledProcessError):  # more has been written meanwhile
            self.set_disk(used + found.f_frsize)

    def empty_disk(self) -> None:
        """There is room again."""
        self.set_disk(_DISK_BYTES)

    # -- the program

    def serve(self) -> int:
        """See to it that a master serves, and start one if need be. Returns its pid."""
        until = time.monotonic() + PATIENCE_S
        mine: subprocess.Popen[bytes] | None = None
        while time.monotonic() < until:
            if master := self.serving():
                return master
            if mine is not None and mine.poll() not in (None, *_EXITS_OF_A_LOSER):
                raise ChaosError(f"the program does not start: {mine.returncode}")
            if mine is None or mine.poll() is not None:
                # Refused while a successor has the pid file: that one will serve.
                mine = self._start()
            time.sleep(0.1)
        raise ChaosError(f"no master serves: {self.describe()}")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "forwarder", "-c", str(self.config)]
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        self._started.append(started)
        return started

    def serving(self) -> int:
        """The pid of the master that answers, and whose workers serve; 0 if there is none."""
        with suppress(OSError, ValueError, KeyError):
            found = self.ask("status", within_s=2.0)
            workers = found["workers"]
            assert isinstance(workers, list)
            states = [worker["state"] for worker in workers]
            if found["state"] == "running" and "ready" in states and "starting" not in states:
                return int(str(found["pid"]))
        return 0

    def ask(self, op: str, within_s: float = ASK_S, **more: object) -> dict[str, object]:
        """The answer to a request. Raises OSError, or ValueError where there is none."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(within_s)
            sock.connect(str(self.control))
            sock.sendall(json.dumps({"op": op, **more}).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer = json.loads(file.readline())
        if not isinstance(answer, dict):
            raise ValueError(f"an answer of {answer!r}")  # noqa: TRY004 - as json says it
        return answer

    def fill_slots(self) -> None:
        """Have had as many workers as a run may have, and then those of the configuration.

        Sockets of a slot are never closed: so the instance has as many as at any time.
        """
        for count in (config.MOST_WORKERS, config.WORKERS):
            wait_until(lambda: self._has_resized(count), f"there are {count} workers")  # noqa: B023 - used at once

    def _has_resized(self, count: int) -> bool:
        return self.ask("workers", count=str(count))["ok"] is True

    def abilities(self) -> frozenset[Ability]:
        """What the instance can do for its sessions: by what it counts, and what it understands."""
        totals = self.ask("status")["totals"]
        assert isinstance(totals, dict)
        asked = self.directory / "asked.toml"
        asked.write_text(f'deposit_after = "1s"\n{self.text()}')
        command = [sys.executable, "-m", "forwarder", "check", str(asked)]
        checked = subprocess.run(command, capture_output=True, check=False)
        found = {
            Ability.MOVES: "moved_in" in totals,
            Ability.DEPOSIT: checked.returncode == 0,
        }
        return frozenset(ability for ability, is_there in found.items() if is_there)

    def pids(self) -> list[int]:
        """All processes of the program that live."""
        self._reap()
        return sorted({pid for one in self._started for pid in members(one.pid)})

    def _titled(self, beginning: str) -> list[int]:
        return [pid for pid in self.pids() if procfs.title(pid).startswith(beginning)]

    def masters(self) -> list[int]:
        """All masters, those that are about to serve as well."""
        others = ("forwarder: worker", "forwarder: checker")
        return [pid for pid in self.pids() if not procfs.title(pid).startswith(others)]

    def workers(self) -> list[int]:
        """All workers, orphans and those that drain as well."""
        return self._titled("forwarder: worker")

    def checkers(self) -> list[int]:
        """All helpers."""
        return self._titled("forwarder: checker")

    def _reap(self) -> None:
        for one in self._started:
            one.poll()

    def describe(self) -> list[str]:
        """Each process, what it waits for in the kernel, and where it has how many clients."""
        found = []
        for pid in self.pids():
            with suppress(OSError):
                wait = Path(f"/proc/{pid}/wchan").read_text()
                who = f"{pid} {procfs.title(pid)!r} {state(pid)} {wait}"
                found.append(f"{who} {self.ports_of(pid)}")
        return found

    def held_by(self, pid: int) -> frozenset[int]:
        """The numbers of the clients whose sockets a process has."""
        with suppress(OSError):
            hosts = (sock.peer[0] for sock in sockdiag.owned(pid))
            return frozenset(number for host in hosts if (number := number_of(host)))
        return frozenset()

    def ports_of(self, pid: int) -> dict[str, int]:
        """How many clients a process has at each port, and sockets to each upstream."""
        with suppress(OSError):
            each = (
                f"at {sock.local[1]}" if number_of(sock.peer[0]) else f"to {sock.peer[1]}"
                for sock in sockdiag.owned(pid)
                if sock.peer[1]
            )
            return dict(Counter(each))
        return {}

    def said(self) -> list[str]:
        """The program's own log."""
        return self.errors.read_text(errors="replace").splitlines()

    def upstream_connections(self) -> int:
        """How many the upstreams have open."""
        return self._upstream.count() + self.victim.count()

    # -- the end

    def stop(self) -> list[str]:
        """Stop the program; says what is wrong with that."""
        problems = []
        with suppress(OSError, ValueError):
            self.ask("stop", within_s=PATIENCE_S)
        try:
            wait_until(lambda: not self.pids(), "the program ends")
        except ChaosError:
            left = {pid: procfs.title(pid) for pid in self.pids()}
            problems.append(f"left after the stop: {left}")
        for child in (self._upstream, self.victim):
            account = json.loads(child.finish().splitlines()[-1])
            problems += [f"an upstream got other bytes: {one}" for one in account["wrong"]]
        return problems

    def end(self) -> None:
        """Leave nothing, whatever has happened."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for one in self._started:
            one.wait()
        for name in ("_upstream", "victim"):
            if child := getattr(self, name, None):
                child.kill()
        self._taken.close()
        if self.disk.is_mount():
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)
        if hasattr(self, "_errors"):
            self._errors.close()


def is_alive(pid: int) -> bool:
    """Whether it runs, or could."""
    with suppress(OSError):
        return state(pid) not in "ZX"
    return False


def limit_descriptors(pids: Sequence[int], soft: int) -> None:
    """Lower, or raise, the limit of some processes; those that have gone do not matter."""
    for pid in pids:
        with suppress(OSError, ValueError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, hard), hard))
