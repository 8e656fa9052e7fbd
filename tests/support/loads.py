"""The loads of ``load`` and ``udp_load``, each as a child process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from support import load, udp_load

if TYPE_CHECKING:
    import socket

A = TypeVar("A")


class _Child(Generic[A]):
    """A load. Use as a context manager; :meth:`stop` gives the account.

    Its output is how often it has succeeded, again and again, and the account at the end.
    """

    stop_s = 60.0
    """How long what is under way may take."""

    def __init__(
        self,
        script: str,
        account: type[A],
        address: tuple[str, int],
        upstream: socket.socket,
        **options: int,
    ) -> None:
        self._account = account
        self._count = 0
        self._last = ""
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._process = subprocess.Popen(
            [
                *(sys.executable, script, "--host", address[0], "--port", str(address[1])),
                *("--upstream-fd", str(upstream.fileno()), *arguments),
            ],
            pass_fds=[upstream.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _wait(self, more: int, within_s: float) -> None:
        goal = self._count + more
        deadline = time.monotonic() + within_s
        while self._count < goal:
            assert self._process.poll() is None, "the load has ended"
            assert time.monotonic() < deadline, f"{self._count} of {goal}"
            time.sleep(0.005)

    def stop(self) -> A:
        """Begin nothing more, wait for what is under way, and say what became of all."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(self.stop_s) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        self._reader.join()
        return self._account(**json.loads(self._last))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for file in (self._process.stdin, self._process.stdout):
            assert file is not None
            file.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last = line
            if line.strip().isdigit():
                self._count = int(line)


class Load(_Child[load.Account]):
    """Connections at a steady rate, and streams."""

    stop_s = load.LIFE_S + 10

    def __init__(
        self,
        address: tuple[str, int],
        upstream: socket.socket,
        *,
        rate: int = 300,
        streams: int = 0,
        at_once: int = load.MOST_AT_ONCE,
    ) -> None:
        """``upstream`` listens; its connections are served by the load, and by nobody else."""
        script = str(Path(load.__file__))
        options = {"rate": rate, "streams": streams, "at_once": at_once}
        super().__init__(script, load.Account, address, upstream, **options)

    @property
    def served(self) -> int:
        """How many connections were served so far."""
        return self._count

    def wait_served(self, more: int, within_s: float = 60.0) -> None:
        """Wait until so many more connections were served."""
        self._wait(more, within_s)


class UdpLoad(_Child[udp_load.Account]):
    """Streams of numbered datagrams at a steady rate."""

    def __init__(
        self,
        address: tuple[str, int],
        upstream: socket.socket,
        *,
        flows: int = 10,
        rate: int = 2000,
    ) -> None:
        """``upstream`` is a UDP socket that the load alone answers at; ``rate`` is of all flows."""
        script = str(Path(udp_load.__file__))
        super().__init__(script, udp_load.Account, address, upstream, rate=rate, flows=flows)

    def wait_answered(self, more: int, within_s: float = 60.0) -> None:
        """Wait until so many more datagrams were answered."""
        self._wait(more, within_s)
