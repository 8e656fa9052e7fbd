"""Many clients at once that want more sessions than there may be, and the upstream that counts."""

from __future__ import annotations

import random
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from support.ends import family_of
from support.waiting import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Sequence

# How long nothing has to happen before the upstream lets all go that it holds.
_QUIET_S: Final = 0.05
_ESTABLISHED: Final = b"\x01"  # include/net/tcp_states.h
_GRACE: Final = 200  # clients at once beside those that are served, so that no queue overflows


@dataclass
class Outcome:
    """What became of the clients of a flood; ``most`` sessions were open at the same time.

    ``cut``: an end of file without an answer, in place of a reset.
    """

    served: int = 0
    reset: int = 0
    cut: int = 0
    most: int = 0
    served_by_host: dict[str, int] = field(default_factory=dict)
    most_by_host: dict[str, int] = field(default_factory=dict)


class _End(Protocol):
    sock: socket.socket

    def on_events(self, mask: int) -> None:
        """Do what the socket is ready for."""


class _Client:
    """Connects, says from which host it comes, wants an answer, closes."""

    def __init__(self, flood: Flood, host: str) -> None:
        self.flood, self.host = flood, host
        self.sock = socket.socket(family_of(flood.address), socket.SOCK_STREAM)
        self.sock.setblocking(False)
        if host != "unix":
            self.sock.bind((host, 0))
        self.is_sent = False
        # A reset that has come already shows by the first send, too.
        with suppress(BlockingIOError, ConnectionResetError):
            self.sock.connect(flood.address)
        flood.selector.register(self.sock, selectors.EVENT_WRITE, self)

    def on_events(self, mask: int) -> None:
        try:
            if not self.is_sent:
                self.sock.send(self.host.encode() + b"\n")
                self.is_sent = True
                self.flood.selector.modify(self.sock, selectors.EVENT_READ, self)
            elif mask & selectors.EVENT_READ:
                answer = self.sock.recv(100)
                self.flood.on_outcome(self, "served" if answer else "cut")
        except (ConnectionResetError, BrokenPipeError):
            self.flood.on_outcome(self, "reset")


class _Session:
    """What the upstream has accepted; held until the flood answers it."""

    def __init__(self, flood: Flood, sock: socket.socket) -> None:
        self.flood, self.sock, self.host = flood, sock, ""
        sock.setblocking(False)
        flood.selector.register(sock, selectors.EVENT_READ, self)

    def on_events(self, mask: int) -> None:
        del mask
        try:
            text = self.sock.recv(100)
        except ConnectionResetError:
            text = b""
        if text:
            self.host = text.decode().strip()
            self.flood.on_host(self)
        else:
            self.flood.forget(self)

    def answer(self) -> None:
        with suppress(ConnectionResetError, BrokenPipeError):
            self.sock.send(b"served")

    @property
    def is_open(self) -> bool:
        """Whether the forwarder has it open still, whatever we have read of its end."""
        if self.sock.family == socket.AF_UNIX:
            return True
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info == _ESTABLISHED


class Flood:
    """Clients of ``address`` from ``hosts`` in turn, and their upstream; a context manager.

    The upstream holds sessions until there are ``hold`` of them, or nothing happens any more.
    """

    def __init__(
        self,
        address: tuple[str, int] | str,
        upstream: socket.socket,
        hold: int,
        hosts: Sequence[str] = ("127.0.0.1",),
    ) -> None:
        self.address, self.upstream, self.hold, self.hosts = address, upstream, hold, hosts
        self.selector = selectors.DefaultSelector()
        self.outcome = Outcome()
        self._clients: set[_Client] = set()
        self._sessions: list[_Session] = []
        self._chance = random.Random(1)
        upstream.setblocking(False)
        self.sock = upstream
        self.selector.register(upstream, selectors.EVENT_READ, self)

    def run(self, count: int, at_once: int = _GRACE) -> Outcome:
        """Have so many clients come, ``at_once`` at a time; returns when all have ended."""
        self.outcome = Outcome()
        began = 0
        deadline = time.monotonic() + 4 * PATIENCE_S
        while began < count or self._clients:
            while began < count and len(self._clients) < at_once:
                self._clients.add(_Client(self, self.hosts[began % len(self.hosts)]))
                began += 1
            is_quiet = not self._turn(_QUIET_S)
            if is_quiet or len(self._sessions) >= self.hold:
                self._answer_some(all_of_them=is_quiet)
            assert time.monotonic() < deadline, (self.outcome, len(self._clients))
        while self._sessions:
            assert self._turn(PATIENCE_S), "sessions stay open"
        return self.outcome

    def fill(self, count: int) -> Outcome:
        """Have so many clients come that stay; returns when nothing happens any more."""
        self.outcome = Outcome()
        for number in range(count):
            self._clients.add(_Client(self, self.hosts[number % len(self.hosts)]))
        while self._turn(4 * _QUIET_S):
            pass
        return self.outcome

    @property
    def open(self) -> int:
        """How many sessions there are."""
        return len(self._sessions)

    def turn(self) -> None:
        """See what has happened."""
        self._turn(0.01)

    def release(self) -> Outcome:
        """Answer all that are held, and those that come then, until no client is left."""
        while self._clients:
            self._answer_some(all_of_them=True)
            assert self._turn(PATIENCE_S), "clients wait in vain"
        while self._sessions:
            assert self._turn(PATIENCE_S), "sessions stay open"
        return self.outcome

    # -- what the ends tell

    def on_events(self, mask: int) -> None:
        """Accept what is queued."""
        del mask
        with suppress(BlockingIOError):
            while True:
                self._sessions.append(_Session(self, self.upstream.accept()[0]))
                now_open = sum(session.is_open for session in self._sessions)
                self.outcome.most = max(self.outcome.most, now_open)

    def on_host(self, session: _Session) -> None:
        """A session has said whose it is."""
        host, most = session.host, self.outcome.most_by_host
        count = sum(other.host == host and other.is_open for other in self._sessions)
        most[host] = max(most.get(host, 0), count)

    def on_outcome(self, client: _Client, what: str) -> None:
        """A client has come to its end."""
        setattr(self.outcome, what, getattr(self.outcome, what) + 1)
        if what == "served":
            served = self.outcome.served_by_host
            served[client.host] = served.get(client.host, 0) + 1
        self.forget(client)

    def forget(self, end: _Client | _Session) -> None:
        """Close an end."""
        self.selector.unregister(end.sock)
        end.sock.close()
        if isinstance(end, _Client):
            self._clients.discard(end)
        else:
            self._sessions.remove(end)

    def _turn(self, timeout_s: float) -> bool:
        """Handle what happens; False if nothing did for so long."""
        ready = self.selector.select(timeout_s)
        for key, mask in ready:
            end: _End = key.data
            if end.sock.fileno() >= 0:
                end.on_events(mask)
        return bool(ready)

    def _answer_some(self, *, all_of_them: bool) -> None:
        for session in self._sessions:
            if session.host and (all_of_them or self._chance.random() < 0.5):
                session.answer()

    def __enter__(self) -> Flood:
        return self

    def __exit__(self, *_: object) -> None:
        for client in tuple(self._clients):
            self.forget(client)
        for session in tuple(self._sessions):
            self.forget(session)
        self.selector.close()
