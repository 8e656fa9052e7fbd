"""One forwarder to do things to: started, asked over its control socket, and looked at in /proc.

Judges nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.peers import HOST
from bench.procs import PROC, TCP_LISTEN, BenchError, read_proc, tree, wait_until

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

ANSWER_S = 120.0  # the forwarder bounds a reload and an upgrade itself, by 60 s and a little
ESTABLISHED = "01"  # the state column of /proc/net/tcp


@dataclass(frozen=True, slots=True)
class Size:
    """What one process has: resident memory, and descriptors.

    Neither the pipes it may keep count nor the sockets of sessions, which come and go.
    """

    rss_kib: int
    fds: int


class Instance:
    """A forwarder with a configuration file and a control socket. Owns its process and its log."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.config = directory / "forwarder.toml"
        self.control = directory / "control.sock"
        self.log = directory / "forwarder.log"
        self._command = [*command, "-c", str(self.config)]
        self._output: IO[bytes] = self.log.open("wb")
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Execute the command and wait until it serves; a killed one may have left workers."""
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(process)

        def serves() -> bool:
            if process.poll() is not None:
                raise BenchError(f"the forwarder ended, exit status {process.returncode}")
            with suppress(OSError):
                return self.status()["pid"] == process.pid and self.is_ready()
            return False

        wait_until(serves, "the forwarder serves", ANSWER_S)

    def ask(self, op: str, **more: str) -> dict[str, object]:
        """Ask over the control socket and wait. Raises BenchError when the answer is no."""
        return ask(self.control, op, **more)

    def status(self) -> dict[str, object]:
        """What it says of itself."""
        return self.ask("status")

    @property
    def pid(self) -> int:
        """The master that has the control socket."""
        return int(str(self.status()["pid"]))

    def workers(self) -> dict[int, str]:
        """Process id to state of the workers in slots and of those that retire."""
        workers = self.status()["workers"]
        assert isinstance(workers, list)
        return {worker["pid"]: worker["state"] for worker in workers}

    def is_ready(self) -> bool:
        """Whether every worker serves."""
        states = self.workers().values()
        return bool(states) and all(state == "ready" for state in states)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        os.kill(self.pid, number)

    def sizes(self) -> dict[int, Size]:
        """Every process of it, those of earlier masters too."""
        pids = {proc.pid for process in self._started for proc in tree(process.pid)}
        return {pid: size for pid in sorted(pids) if (size := size_of(pid)) is not None}

    def kill_master(self) -> None:
        """Kill the master; its workers stay."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        for process in self._started:
            if process.pid == pid:
                process.wait()
        wait_until(lambda: read_proc(pid) is None, "the master is gone", ANSWER_S)

    def end(self) -> None:
        """End everything that is left of it, without mercy."""
        for process in self._started:
            for proc in tree(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(proc.pid, signal.SIGKILL)
            process.wait()
        self._output.close()


def ask(control: Path, op: str, **more: str) -> dict[str, object]:
    """Ask over a control socket and wait. Raises BenchError when the answer is no."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_S)
        sock.connect(str(control))
        sock.sendall(json.dumps({"op": op, **more}).encode() + b"\n")
        with sock.makefile("rb") as file:
            answer = json.loads(file.readline() or b"{}")
    if not isinstance(answer, dict) or answer.get("ok") is not True:
        raise BenchError(f"{op}: {answer}")
    return answer


def size_of(pid: int) -> Size | None:
    """Memory and descriptors of a process; None when it is gone."""
    try:
        status = (PROC / str(pid) / "status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line[:6] == "VmRSS:")
        own = descriptors(pid)
    except (OSError, StopIteration):
        return None
    sessions = {inode for _, state, inode in connections() if state != TCP_LISTEN}
    return Size(rss, sum(not name.startswith("pipe:") and name not in sessions for name in own))


def connections() -> list[tuple[str, str, str]]:
    """Local address, state, and what a descriptor of it is called, of all IPv4 sockets."""
    rows = map(str.split, (PROC / "net" / "tcp").read_text().splitlines()[1:])
    return [(row[1], row[3], f"socket:[{row[9]}]") for row in rows]


def descriptors(pid: int) -> list[str]:
    """What a process has open, such as ``socket:[123]``."""
    found = []
    for entry in (PROC / str(pid) / "fd").iterdir():
        with suppress(OSError):
            found.append(str(entry.readlink()))
    return found


def sessions_of(pid: int, port: int) -> int:
    """How many clients of a port a process has accepted that are still connected."""
    own = set(descriptors(pid))
    local = f"{socket.inet_aton(HOST)[::-1].hex().upper()}:{port:04X}"
    return sum(row[:2] == (local, ESTABLISHED) and row[2] in own for row in connections())


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has taken effect on a process."""
    text = (PROC / str(pid) / "stat").read_text()
    return text.rpartition(")")[2].split()[0] == "T"
