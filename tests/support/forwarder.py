"""The real command as a child process, ready when it says so."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from support import procfs, sockdiag
from support.processes import state
from support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

# Titles of the children that serve nobody.
_HELPERS = ("forwarder: checker",)
_TROUBLE = re.compile(r"WARNING|ERROR|CRITICAL|Traceback|relay\.bug|Exception|never retrieved")


def reserve_port(host: str = "127.0.0.1") -> socket.socket:
    """Bind a TCP port without listening: nobody else gets it, SO_REUSEPORT sockets share it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    holder.bind((host, 0))
    return holder


class Forwarder:
    """A running ``python -m forwarder``. Owns the process, its stderr and the notify socket."""

    def __init__(
        self, arguments: Sequence[str], *, expect_ready: bool = True, prefix: Sequence[str] = ()
    ) -> None:
        """Start, and wait for READY=1 unless the command is expected to end by itself.

        ``prefix`` is a command line that executes the one given to it, such as ``setsid``.
        """
        self.lines: list[str] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind("")  # autobind: an abstract name chosen by the kernel, unix(7)
        self._notify.settimeout(PATIENCE_S)
        name = self._notify.getsockname()
        assert isinstance(name, bytes)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "forwarder", *arguments],
            env={**os.environ, "NOTIFY_SOCKET": "@" + name[1:].decode()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        self._stderr = self.process.stderr.fileno()
        self._reading = threading.Lock()
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()
        if expect_ready:
            try:
                self.wait_notified("READY=1")
                self._wait_for_the_lines_before()
            except BaseException:
                self.kill()
                raise

    @property
    def pid(self) -> int:
        """The master's process id."""
        return self.process.pid

    def workers(self) -> list[int]:
        """Process ids of the workers.

        Also of one that is dead and not reaped yet. Not of a child that has the title of the master
        still: it reads a configuration, or is just born.
        """
        others = {procfs.title(self.pid), *_HELPERS}
        return [pid for pid, title in self._titles().items() if title not in others]

    def helpers(self) -> list[int]:
        """Process ids of children that serve nobody: the checker."""
        return [pid for pid, title in self._titles().items() if title in _HELPERS]

    def _titles(self) -> dict[int, str]:
        """Of the master's children; each is read once, since a child changes it when it begins."""
        return {pid: procfs.title(pid) for pid in procfs.children(self.pid)}

    def wait_notified(self, assignment: str) -> list[str]:
        """Wait for a notification that contains ``assignment``; returns all that came up to it."""
        said: list[str] = []
        while True:
            try:
                datagram = self._notify.recv(4096).decode()
            except TimeoutError:
                raise AssertionError(f"no {assignment}; stderr: {self.lines}") from None
            said += datagram.splitlines()
            if assignment in datagram.splitlines():
                return said

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the master."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end; returns the exit code. The lines of stderr are complete then."""
        try:
            code = self.process.wait(PATIENCE_S + 30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"does not end; stderr: {self.lines}") from None
        self._clean_up()
        return code

    def stop(self) -> int:
        """End it by SIGTERM, if it runs; returns the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End the master and its children without mercy."""
        children = []
        if self.process.poll() is None:
            self.signal(signal.SIGSTOP)  # or it could have one more meanwhile
            eventually(lambda: state(self.pid) in "TZ")
            children = procfs.children(self.pid)
        self.process.kill()
        self.process.wait()
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._clean_up()

    def trouble(self) -> list[str]:
        """Lines of stderr that tell of something wrong."""
        return [line for line in self.lines if _TROUBLE.search(line)]

    def wait_logged(self, pattern: str) -> None:
        """Wait for a line of stderr that ``pattern`` is found in."""
        eventually(
            lambda: any(re.search(pattern, line) for line in self.lines),
            lambda: f"no {pattern!r} in {self.lines}",
        )

    def _wait_for_the_lines_before(self) -> None:
        """Wait until ``lines`` has all that led to READY=1, unless they go elsewhere.

        Else a test that counts lines would take one for the answer to what it does next.
        """
        eventually(
            lambda: (
                any("master.ready" in line for line in self.lines) or not self._reader.is_alive()
            ),
            lambda: f"ready, but not in the log: {self.lines}",
        )

    def lines_so_far(self) -> list[str]:
        """All lines of stderr that have been written by now, for who counts them."""
        eventually(self._has_read_all)
        return self.lines

    def _has_read_all(self) -> bool:
        if not self._reader.is_alive():
            return True
        with self._reading:
            return procfs.waiting_in(self._stderr) == 0

    def _read_stderr(self) -> None:
        rest = b""
        while True:
            select.select([self._stderr], [], [])
            with self._reading:
                data = os.read(self._stderr, 65536)
                if not data:
                    self.lines += [rest.decode(errors="replace")] if rest else []
                    return
                *lines, rest = (rest + data).split(b"\n")
                self.lines += [line.decode(errors="replace") for line in lines]

    def _clean_up(self) -> None:
        self._notify.close()
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), f"stderr is open in {procfs.holders(self._stderr)}"
        assert self.process.stderr is not None
        self.process.stderr.close()


class Leaks:
    """What the workers had open when idle, to compare with later."""

    def __init__(self, forwarder: Forwarder) -> None:
        """Note what is open once every worker has its own slot's sockets and no other's."""
        self._forwarder = forwarder
        pids = forwarder.workers()
        eventually(
            lambda: len({tuple(procfs.without_pipes(pid)) for pid in pids}) == 1,
            lambda: f"workers differ: {[procfs.without_pipes(pid) for pid in pids]}",
        )
        self._before = {pid: procfs.without_pipes(pid) for pid in pids}
        # libuv keeps a byte in a pipe of its own, as a lock.
        self._in_pipes = {pid: procfs.bytes_in_pipes(pid) for pid in pids}

    def is_idle(self) -> bool:
        """Whether the workers have as many sockets open as before, and no other descriptors."""
        return all(procfs.without_pipes(pid) == found for pid, found in self._before.items())

    def check(self) -> None:
        """Wait until the workers have as much open as before, and nothing more in a pipe.

        Pipes themselves may be left: a worker keeps empty ones for the next session.
        """
        assert sorted(self._before) == self._forwarder.workers(), "a worker was replaced"
        for pid in self._before:
            self._check_worker(pid)

    def _check_worker(self, pid: int) -> None:
        before = self._before[pid]
        eventually(
            lambda: procfs.without_pipes(pid) == before,
            lambda: f"descriptors of worker {pid}: {procfs.without_pipes(pid)}, were {before}",
        )
        assert sockdiag.CLOSE_WAIT not in sockdiag.states(pid)
        assert procfs.bytes_in_pipes(pid) == self._in_pipes[pid]
