"""Many checks at once, of servers that do anything, some of them cancelled: each ends once."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
from support import procfs
from support.probing import BEGIN, check, target_of
from support.waiting import PATIENCE_S

from forwarder.checker.loop import Loop
from forwarder.checker.outcome import Aim
from forwarder.checker.probes.child import Child
from forwarder.net.options import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.outcome import Outcome, Probe
    from forwarder.config.model import Check

CHECKS: Final = 600
AT_ONCE: Final = 64
KINDS: Final = ("tcp", "tcp", "tls", "http", "agent", "udp", "command")
SCRIPTS: Final = (
    "exit 0",
    "sleep 600",
    "yes",
    "echo x; exit 1",
    "sleep 600 & exit 3",
    "kill -9 $$",
)
ANSWERS: Final = (
    b"",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"up 50%\n",
    b"+PONG",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    b"\x16\x03\x03\x00\x02xx",
    bytes(range(256)) * 100,
)


class Servers:
    """Servers of TCP and UDP that answer anything, in pieces, and go at any point."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.tcp = socket.create_server(("127.0.0.1", 0), backlog=AT_ONCE)
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self._threads = [
            threading.Thread(target=self._serve, args=(self.tcp, self._take_client)),
            threading.Thread(target=self._serve, args=(self.udp, self._answer_datagram)),
        ]
        self._is_over = threading.Event()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._is_over.set()
        while self._threads:
            self._threads.pop().join()
        self.tcp.close()
        self.udp.close()

    def _serve(self, sock: socket.socket, act: Callable[[], None]) -> None:
        sock.settimeout(0.05)
        while not self._is_over.is_set():
            with suppress(OSError):
                act()

    def _take_client(self) -> None:
        client, _ = self.tcp.accept()
        thread = threading.Thread(target=self._talk, args=(client, self._draw.random()))
        thread.start()
        self._threads.append(thread)

    def _talk(self, client: socket.socket, seed: float) -> None:
        draw = random.Random(seed)
        with client, suppress(OSError):
            client.settimeout(1.0)
            if draw.random() < 0.5:
                client.recv(draw.choice((1, 4000)))
            left = draw.choice(ANSWERS)
            while left:
                count = draw.choice((1, 7, 1000, len(left)))
                client.sendall(left[:count])
                left = left[count:] if draw.random() < 0.95 else b""
            if draw.random() < 0.5:
                client.recv(1)

    def _answer_datagram(self) -> None:
        _, client = self.udp.recvfrom(5000)
        for _ in range(self._draw.choice((0, 1, 3, 200))):
            self.udp.sendto(self._draw.choice(ANSWERS)[:1000], client)


def drawn(draw: random.Random) -> Check:
    """Any check."""
    return check(
        draw.choice(KINDS),
        timeout_s=draw.choice((0.05, 0.2, 0.5)),
        send=draw.choice((b"", b"PING\r\n", b"x" * 4000)),
        expect=draw.choice((b"", b"+PONG", b"never")),
        argv=("/bin/sh", "-c", draw.choice(SCRIPTS)),
    )


class Checker:
    """Begins so many checks, some of which it cancels, and counts how they end."""

    def __init__(self, servers: Servers, seed: int) -> None:
        self._draw = random.Random(seed)
        self._servers = servers
        self.loop = Loop()
        self.ends = [0] * CHECKS
        self._begun = 0
        self._probes: dict[int, Probe] = {}

    def begin(self) -> None:
        if self._begun == CHECKS:
            return
        number, given = self._begun, drawn(self._draw)
        self._begun += 1
        sock = self._servers.udp if given.kind.value == "udp" else self._servers.tcp
        aim = Aim(target_of(sock), PLAIN, None, "web.example:80")
        done = partial(self._on_end, number)
        self._probes[number] = BEGIN[given.kind](given, aim, self.loop, done)
        assert not self.ends[number]
        if self._draw.random() < 0.2:
            self.loop.call_at(
                self.loop.now + self._draw.choice((0.0, 0.01, 0.1)), partial(self._cancel, number)
            )

    def _on_end(self, number: int, outcome: Outcome) -> None:
        self.ends[number] += 1
        assert outcome.why.isprintable()
        assert len(outcome.why) < 200
        assert not outcome.is_ours
        del self._probes[number]
        self.begin()

    def _cancel(self, number: int) -> None:
        if number in self._probes:
            self._probes.pop(number).cancel()
            self.ends[number] += 1
            self.begin()


@pytest.mark.parametrize("seed", range(3))
def test_each_of_many_checks_ends_once_and_leaves_nothing(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        servers = Servers(seed)
        stack.callback(servers.close)
        checker = Checker(servers, seed)
        stack.callback(checker.loop.close)
        for _ in range(AT_ONCE):
            checker.begin()
        until = time.monotonic() + 2 * PATIENCE_S
        while not all(checker.ends) or checker.loop._watches or Child._stuck:
            assert time.monotonic() < until, checker.ends
            checker.loop.turn(0.1)
    assert checker.ends == [1] * CHECKS
    assert "checker.bug" not in caplog.text
    assert not procfs.children(os.getpid())
