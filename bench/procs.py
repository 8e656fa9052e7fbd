"""The processes of a measurement: start, find the whole tree, read its CPU and memory, end it.

Knows nothing about what is measured. Linux only: everything is read from /proc.
Ends only processes it has started, each by its pid and start time, never by a name.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

PROC = Path("/proc")
SOURCES = Path(__file__).parent
TCP_LISTEN = "0A"  # the state column of /proc/net/tcp, include/net/tcp_states.h

END_S = 10.0  # SIGTERM to SIGKILL: far above what an idle server needs, arbitrary
READY_S = 10.0  # start to listening, arbitrary
POLL_S = 0.02

# "Quiet" is less than 1 ms of CPU in 100 ms: start-up of late workers is over.
QUIET_WINDOW_S = 0.1
QUIET_CPU_NS = 1_000_000


class BenchError(Exception):
    """A measurement that must not be trusted, or that could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Child:
    """A server that was started: its process, and the file that has its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid


class Proc(NamedTuple):
    """One process; pid and start time (clock ticks since boot) together are never reused."""

    pid: int
    start: int
    ppid: int
    session: int


def read_proc(pid: int) -> Proc | None:
    """Read one process; None when it is gone, or a zombie with no thread left.

    While other threads of a zombie are on their way out, its sockets are still open.
    """
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, so count from the last one. proc(5).
    fields = text.rpartition(")")[2].split()
    state, ppid, session, threads, start = (fields[i] for i in (0, 1, 3, 17, 19))
    if state in "ZX" and int(threads) <= 1:
        return None
    return Proc(pid, int(start), int(ppid), int(session))


def tree(root: int) -> list[Proc]:
    """Every live process that descends from ``root`` or is in the session that it leads."""
    pids = (int(path.name) for path in PROC.iterdir() if path.name.isdigit())
    procs = [proc for pid in pids if (proc := read_proc(pid)) is not None]
    family = {root} | {proc.pid for proc in procs if proc.session == root}
    while more := {proc.pid for proc in procs if proc.ppid in family} - family:
        family |= more
    return [proc for proc in procs if proc.pid in family]


class Usage(NamedTuple):
    """What a tree of processes has used: CPU time, and how often a thread gave way to another.

    A process or thread that has ended is not in the sums: servers measured here keep theirs, but
    for those that fork for each client.
    """

    cpu_ns: int
    switches: int


class Thread(NamedTuple):
    """A thread, by the name that it has given itself."""

    tid: int
    name: str
    usage: Usage


def threads(root: int) -> list[Thread]:
    """Every thread of a tree of processes, with what it has used so far.

    The first field of schedstat is exact to the last switch or tick, where utime counts ticks.
    """
    found = []
    for proc in tree(root):
        for task in (PROC / str(proc.pid) / "task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                used_ns = int((task / "schedstat").read_text().split()[0])
                status = (task / "status").read_text().splitlines()
                # voluntary_ and nonvoluntary_
                switches = sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
                name = (task / "comm").read_text().strip()
                found.append(Thread(int(task.name), name, Usage(used_ns, switches)))
    return found


def usage(root: int) -> Usage:
    """What a tree of processes has used so far, over all threads."""
    every = [thread.usage for thread in threads(root)]
    return Usage(sum(one.cpu_ns for one in every), sum(one.switches for one in every))


def machine_ticks() -> tuple[int, int]:
    """Of all processors since boot: the ticks that they were busy, and all ticks. proc(5)."""
    line = (PROC / "stat").read_text().partition("\n")[0]
    ticks = [int(word) for word in line.split()[1:9]]  # guests are in user already
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def cpu_ns(root: int) -> int:
    """CPU time of the tree so far, in ns."""
    return usage(root).cpu_ns


def pss_kib(root: int) -> int:
    """Proportional set size of the tree in KiB: a page shared by n processes counts once."""
    total = 0
    for proc in tree(root):
        text = (PROC / str(proc.pid) / "smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def wait_until(is_true: Callable[[], bool], what: str, within_s: float) -> None:
    """Poll until ``is_true``. Raises BenchError naming ``what`` when that takes too long."""
    deadline = time.monotonic() + within_s
    while not is_true():
        if time.monotonic() > deadline:
            raise BenchError(f"not within {within_s:g} s: {what}")
        time.sleep(POLL_S)


def is_listening(port: int) -> bool:
    """Whether any socket listens on the TCP port, on any address of either family."""
    for name in ("tcp", "tcp6"):
        with (PROC / "net" / name).open() as rows:
            next(rows)
            for row in rows:
                fields = row.split()
                if fields[3] == TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    return True
    return False


def is_free(port: int) -> bool:
    """Whether nobody listens on the port and it can be bound, TCP and UDP.

    Without SO_REUSEPORT, so that a stale listener of a reuseport group cannot be joined unseen;
    with SO_REUSEADDR, so that TIME_WAIT of the last run does not matter.
    """
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(type=kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                return False
    return not is_listening(port)


def require_free(ports: Iterable[int]) -> None:
    """Raise BenchError when one of the ports is taken."""
    if taken := [str(port) for port in ports if not is_free(port)]:
        raise BenchError(
            f"port {', '.join(taken)} is taken: see ss -ltnp, and ss -tan for the rest"
        )


@contextmanager
def running(name: str, command: Sequence[str], directory: Path) -> Iterator[Child]:
    """Run a server for the length of the block; afterwards nothing of it is left.

    The server leads a session of its own, so Ctrl-C reaches only the caller, who ends it.
    Raises BenchError when it ended by itself meanwhile, or would not end on SIGTERM.
    """
    log = directory / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    child = Child(name, process, log)
    try:
        yield child
        require_alive(child)
    except BenchError as err:
        raise BenchError(f"{err}\n{name} said: {tail(log)}") from err
    finally:
        end(child)


def require_alive(child: Child) -> None:
    """Raise BenchError when a server has ended by itself."""
    if (status := child.process.poll()) is not None:
        raise BenchError(f"{child.name} ended by itself, exit status {status}")


def wait_ready(child: Child, port: int) -> None:
    """Wait until the server listens on the port and its start-up work is done.

    Looks for the LISTEN state rather than connecting: it is when a connect succeeds, but a probe
    would reach the upstream, and iperf3 takes it for a failed test and may drop the real one.
    """

    def is_ready() -> bool:
        require_alive(child)
        return is_listening(port)

    wait_until(is_ready, f"{child.name} listening on {port}", READY_S)
    wait_until(lambda: is_quiet(child.pid), f"{child.name} at rest after its start", READY_S)


def is_quiet(root: int) -> bool:
    """Whether the tree used next to no CPU in a short window. Blocks for that window."""
    before = cpu_ns(root)
    time.sleep(QUIET_WINDOW_S)
    return cpu_ns(root) - before < QUIET_CPU_NS


def end(child: Child) -> None:
    """End the server and all it started: SIGTERM, then SIGKILL, which is reported as an error."""
    family = tree(child.pid)

    def left() -> list[Proc]:
        child.process.poll()  # reaps the first of them
        known = [proc for old in family if (proc := read_proc(old.pid)) and proc.start == old.start]
        return list({*known, *(proc for proc in tree(child.pid) if proc.session == child.pid)})

    if child.process.poll() is None:
        child.process.terminate()
    try:
        wait_until(lambda: not left(), f"end of {child.name} after SIGTERM", END_S)
    except BenchError:
        for proc in left():
            with suppress(ProcessLookupError):
                os.kill(proc.pid, signal.SIGKILL)
        wait_until(lambda: not left(), f"end of {child.name} after SIGKILL", END_S)
        raise


def set_fd_limit(limit: int) -> None:
    """Give this process, and so all that it starts, exactly ``limit`` file descriptors."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(hard, limit)))
    except (ValueError, PermissionError) as err:
        raise BenchError(f"ulimit -Hn is {hard}, {limit} are needed") from err


def compiled(directory: Path, tool: str) -> str:
    """Compile one of the C programs beside this file into a directory; returns where it is."""
    target = str(directory / tool)
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-o", target]
    subprocess.run(["gcc", *flags, str(SOURCES / f"{tool}.c")], check=True)
    return target


def run_client(command: Sequence[str], within_s: float) -> str:
    """Run a load generator to its end and return its output. Raises BenchError when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise BenchError(f"not done within {within_s:g} s: {' '.join(command)}") from err
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-2000:]
        raise BenchError(f"exit status {done.returncode}: {' '.join(command)}\n{output}")
    return done.stdout


def tail(log: Path) -> str:
    """Return the end of a log file, for an error message."""
    return log.read_text(errors="replace")[-2000:].strip() or "nothing"
