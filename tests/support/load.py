"""A steady load of connections through a forwarder, with an account of everyone who was dropped.

Runs as a process of its own, so that a busy test does not slow it down: one epoll loop is clients
and upstream at once. Standard library only.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import select
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Final, TypeAlias

# How long one connection may take, a SYN that is sent again twice included.
LIFE_S: Final = 60.0
_TURN_S: Final = 0.005
_PART: Final = 1 << 16
MOST_AT_ONCE: Final = 300  # a slow machine gets fewer connections, not a longer and longer queue
_LONGEST: Final = 20_000  # bytes that a short connection sends
_TEXT: Final = random.Random(7).randbytes(1 << 20)


@dataclass
class Account:
    """What became of the connections.

    ``served``: all bytes came back, then the end. ``cut``: the end came too early. ``wrong``: other
    bytes came back than were sent. ``timed_out``: neither in LIFE_S. The rest is what errors say.
    """

    served: int = 0
    refused: int = 0
    reset: int = 0
    cut: int = 0
    wrong: int = 0
    timed_out: int = 0
    stream_bytes: int = 0
    slowest_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, problem: str) -> None:
        """Count a connection that was dropped."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.problems) < 20:
            self.problems.append(problem)

    @property
    def dropped(self) -> int:
        """How many were not served as they should."""
        return self.refused + self.reset + self.cut + self.wrong + self.timed_out


class Client:
    """One connection that sends, compares what comes back, and wants a clean end.

    ``length`` None is a stream: it goes on until :meth:`finish`.
    """

    def __init__(self, loop: Loop, length: int | None) -> None:
        self._loop = loop
        self._length = length
        self._is_stream = length is None
        self._offset = random.randrange(len(_TEXT) // 2)
        self._sent = 0
        self._received = 0
        self._is_shut = False
        self.began = time.monotonic()
        self.deadline = self.began + LIFE_S if length is not None else float("inf")
        self.sock = socket.socket(socket.AF_INET6 if ":" in loop.address[0] else socket.AF_INET)
        self.sock.setblocking(False)
        self._is_connected = False
        number = self.sock.connect_ex(loop.address)
        if number not in (0, errno.EINPROGRESS):
            raise OSError(number, os.strerror(number))
        loop.watch(self, select.EPOLLOUT | select.EPOLLIN)

    def finish(self) -> None:
        """Send no more than what is sent; only for streams."""
        self._length = self._sent
        self.deadline = time.monotonic() + LIFE_S
        self._send()

    def on_events(self, mask: int) -> None:
        """Connect, send, receive."""
        try:
            if not self._is_connected:
                number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    raise OSError(number, os.strerror(number))  # noqa: TRY301 - as connect does
                self._is_connected = True
            if mask & select.EPOLLOUT:
                self._send()
            if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._receive()
        except OSError as err:
            self._end("refused" if err.errno == errno.ECONNREFUSED else "reset", str(err))

    def on_time(self) -> None:
        """It has taken too long."""
        self._end("timed_out", "no end in time" if self._is_connected else "no connection in time")

    def _send(self) -> None:
        if self._is_shut or not self._is_connected:
            return
        if self._length is None:
            # A stream keeps a little on the way and adds to it as that comes back.
            self._sent += self.sock.send(self._text_at(self._sent, 1000))
            self._loop.watch(self, select.EPOLLIN)
            return
        while self._sent < self._length:
            part = self._text_at(self._sent, min(_PART, self._length - self._sent))
            try:
                self._sent += self.sock.send(part)
            except BlockingIOError:
                self._loop.watch(self, select.EPOLLIN | select.EPOLLOUT)
                return
        self._is_shut = True
        self.sock.shutdown(socket.SHUT_WR)
        self._loop.watch(self, select.EPOLLIN)

    def _text_at(self, start: int, count: int) -> bytes:
        at = (self._offset + start) % len(_TEXT)
        return _TEXT[at : at + count]

    def _receive(self) -> None:
        try:
            part = self.sock.recv(_PART)
        except BlockingIOError:
            return
        if not part:
            is_whole = self._is_shut and self._received == self._length
            self._end("" if is_whole else "cut", "the end came early")
            return
        start = 0
        while start < len(part):
            expected = self._text_at(self._received, len(part) - start)
            if part[start : start + len(expected)] != expected:
                self._end("wrong", "bytes differ")
                return
            start += len(expected)
            self._received += len(expected)
        if self._length is None:
            self._loop.account.stream_bytes += len(part)
            if self._received == self._sent:
                self._loop.later(self)

    def go_on(self) -> None:
        """Everything a stream had on the way has come back: send more."""
        try:
            self._send()
        except OSError as err:
            self._end("reset", str(err))

    def _end(self, kind: str, problem: str) -> None:
        now = time.monotonic()
        self._loop.forget(self)
        account = self._loop.account
        if kind:
            what = "stream" if self._is_stream else "connection"
            account.note(
                kind,
                f"{kind}: {what}, age {now - self.began:.3f} s, at {now:.3f}, sent {self._sent}, "
                f"received {self._received} of {self._length}: {problem}",
            )
        else:
            account.served += 1
            if not self._is_stream:
                account.slowest_s = max(account.slowest_s, now - self.began)


class Echo:
    """One accepted connection of the upstream: sends back what it receives, then its end."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = loop
        self._waiting = b""
        loop.watch(self, select.EPOLLIN)

    def on_events(self, mask: int) -> None:
        """Receive and send."""
        try:
            if self._waiting:
                self._send(self._waiting)
            elif mask & ~select.EPOLLOUT:
                part = self.sock.recv(_PART)
                if part:
                    self._send(part)
                else:
                    self._loop.forget(self)
        except BlockingIOError:
            return
        except OSError:  # our client, or the forwarder, has reset: that is counted at the client
            self._loop.forget(self)

    def _send(self, data: bytes) -> None:
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        self._waiting = data[sent:]
        self._loop.watch(self, select.EPOLLOUT if self._waiting else select.EPOLLIN)


class Acceptor:
    """The listening socket of the upstream."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = loop
        loop.watch(self, select.EPOLLIN)

    def on_events(self, mask: int) -> None:  # noqa: ARG002 - only one kind of event is asked for
        """Accept what is queued."""
        with suppress(BlockingIOError):
            for _ in range(32):
                Echo(self._loop, self.sock.accept()[0])


Watched: TypeAlias = "Client | Echo | Acceptor"


class Loop:
    """Clients at a steady rate, and the upstream they get to."""

    def __init__(self, address: tuple[str, int], upstream: socket.socket) -> None:
        self.address = address
        self.account = Account()
        self._epoll = select.epoll()
        self._watched: dict[int, Watched] = {}
        self._masks: dict[int, int] = {}
        self._clients: set[Client] = set()
        self._idle: deque[tuple[float, Client]] = deque()
        Acceptor(self, upstream)

    def watch(self, watched: Watched, mask: int) -> None:
        """Ask for these events."""
        fd = watched.sock.fileno()
        old = self._masks.get(fd)
        if old is None:
            self._epoll.register(fd, mask)
        elif old != mask:
            self._epoll.modify(fd, mask)
        self._masks[fd] = mask
        self._watched[fd] = watched

    def forget(self, watched: Watched) -> None:
        """Close it."""
        fd = watched.sock.fileno()
        self._epoll.unregister(fd)
        del self._watched[fd], self._masks[fd]
        watched.sock.close()
        if isinstance(watched, Client):
            self._clients.discard(watched)

    def later(self, client: Client) -> None:
        """Let a stream rest a little."""
        self._idle.append((time.monotonic() + 0.01, client))

    def open(self, length: int | None) -> None:
        """Start one connection."""
        try:
            self._clients.add(Client(self, length))
        except OSError as err:
            self.account.note("refused", f"connect: {err}")

    def run(self, rate: int, streams: int, at_once: int) -> None:
        """Go on until the standard input ends, and then until every connection has ended."""
        for _ in range(streams):
            self.open(None)
        due, last_report, is_ending = 0.0, 0.0, False
        now = time.monotonic()
        while self._clients or not is_ending:
            before, now = now, time.monotonic()
            if not is_ending:
                due = min(due + (now - before) * rate, 50.0)
                while due >= 1 and len(self._clients) < at_once + streams:
                    self.open(int(_LONGEST * random.random() ** 4) + 1)
                    due -= 1
                is_ending = self._is_told_to_end()
            self._turn()
            self._look_at_clock(now)
            if now - last_report > 0.05:
                last_report = now
                print(self.account.served, flush=True)  # noqa: T201 - read by Load
        print(json.dumps(asdict(self.account)), flush=True)  # noqa: T201 - read by Load

    def _turn(self) -> None:
        for fd, mask in self._epoll.poll(_TURN_S):
            watched = self._watched.get(fd)
            if watched is not None:
                watched.on_events(mask)

    def _look_at_clock(self, now: float) -> None:
        while self._idle and self._idle[0][0] <= now:
            _, client = self._idle.popleft()
            if client in self._clients:
                client.go_on()
        for client in [client for client in self._clients if client.deadline <= now]:
            client.on_time()

    def _is_told_to_end(self) -> bool:
        if not select.select([0], [], [], 0)[0]:
            return False
        for client in tuple(self._clients):
            if client.deadline == float("inf"):
                client.finish()
        return True


def main() -> None:
    """Run the load that the command line describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-fd", type=int, required=True)
    parser.add_argument("--rate", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--at_once", type=int, required=True)
    args = parser.parse_args()
    upstream = socket.socket(fileno=args.upstream_fd)
    Loop((args.host, args.port), upstream).run(args.rate, args.streams, args.at_once)


if __name__ == "__main__":
    main()
