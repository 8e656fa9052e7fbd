"""A relay in this process, whose clock and loop the test turns by hand."""

from __future__ import annotations

import heapq
import itertools
import socket
from typing import TYPE_CHECKING, cast

from forwarder.addr import Address
from forwarder.config.model import RelayMode, Rule
from forwarder.errors import Place
from forwarder.relay.relay import Relay
from forwarder.stats import new_row
from support.ends import connect

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable

    from forwarder.net.sockets import Target
    from forwarder.upstream.pool import Pool


class HandLoop:
    """What a relay uses of an event loop."""

    def __init__(self) -> None:
        self.now = 5000.0
        self._order = itertools.count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """The test turns the relay itself."""

    def remove_reader(self, fd: int) -> None:
        """See :meth:`add_reader`."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_later(0, callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + delay, next(self._order), callback))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, calling what is due on the way."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            at, _, callback = heapq.heappop(self._timers)
            self.now = max(self.now, at)
            callback()
        self.now = end


class StubPool:
    """A pool whose names are resolved when the test says so."""

    def __init__(self, targets: tuple[Target, ...] | None, connect_timeout_s: float) -> None:
        self.rule = Rule(
            name="test",
            listen=Address("127.0.0.1", 1),
            upstreams=(Address("127.0.0.1", 2),),
            connect_timeout_s=connect_timeout_s,
            place=Place("test"),
        )
        self.row, self.counts = 1, new_row()
        self.has_unix = False
        self.local: Target | None = None
        self.listen_host, self.upstream_text = "127.0.0.1", ("127.0.0.1", 2)
        self._targets = targets
        self.waiting: list[Callable[[tuple[Target, ...]], None]] = []

    def targets(self) -> tuple[Target, ...] | None:
        return self._targets

    def wait_for_targets(self, callback: Callable[[tuple[Target, ...]], None]) -> None:
        self.waiting.append(callback)

    def source(self, family: int) -> None:
        """None: the kernel chooses."""

    def on_failure(self) -> None:
        """Nothing to look up again."""


class Bench:
    """A relay, its loop, and the clients given to it."""

    def __init__(self) -> None:
        self.loop = HandLoop()
        self.relay = Relay(cast("AbstractEventLoop", self.loop), RelayMode.AUTO, 1024)

    def open(self, pool: StubPool) -> socket.socket:
        """Give the relay a new client; returns the client's end."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client = connect(listener.getsockname())
            fd, address = listener._accept()  # type: ignore[attr-defined]
        accepted = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
        accepted.setblocking(False)
        self.relay.poller._turn()
        self.relay.open_session(cast("Pool", pool), accepted, address)
        return client
