"""Holds many dialogues at the same time, over plain sockets and one epoll set."""

from __future__ import annotations

import errno
import fcntl
import heapq
import itertools
import random
import select
import socket
import struct
import termios
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from support.dialogues import (
    MAX_BYTES,
    Buffers,
    Close,
    Dialogue,
    HalfClose,
    Linger,
    Meet,
    Op,
    Outcome,
    Pause,
    Read,
    ReadAll,
    Reset,
    Seen,
    Send,
)
from support.ends import family_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from support.dialogues import Carrier

_EVENTS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_LINGER_LOOK_S: Final = 0.002
_LINGER_STALLS_S: Final = 0.06
_RECEIVE_BYTES: Final = 1 << 18
_STREAMS: Final = tuple(
    memoryview(random.Random(seed).randbytes(MAX_BYTES + _RECEIVE_BYTES)) for seed in (1, 2)
)
"""What the client and the upstream say, from the first byte on: nothing in it comes twice."""


def _asked(sock: socket.socket, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, request, b"\0\0\0\0"))[0])


@dataclass(eq=False)
class Route:
    """A way from clients to a listener. ``address`` is where clients connect."""

    carrier: Carrier
    address: tuple[str, int] | str
    listener: socket.socket
    waiting: deque[Conversation] = field(default_factory=deque)
    opening: Conversation | None = None

    def is_opening(self) -> bool:
        """Whether a client of a dialogue has not been accepted yet."""
        return self.opening is not None or bool(self.waiting)

    def upstream(self) -> tuple[str, int] | str:
        """Where the listener is."""
        found = self.listener.getsockname()
        return found if isinstance(found, str) else (found[0], found[1])


class Conversation:
    """A dialogue that is being held over a route."""

    def __init__(self, dialogue: Dialogue, route: Route) -> None:
        self.dialogue = dialogue
        self.route = route
        self.outcome = Outcome()
        self.ends: list[End] = []
        self.began_s = 0.0
        self.met = [0, 0]
        self.meetings = [
            sum(isinstance(op, Meet) for op in dialogue.script(index)) for index in (0, 1)
        ]

    def is_over(self) -> bool:
        """Both ends have closed."""
        return len(self.ends) == 2 and all(end.is_over for end in self.ends)


class End:
    """One end of a dialogue: goes through its script as far as its socket lets it."""

    def __init__(self, conversation: Conversation, side: int, sock: socket.socket) -> None:
        self.conversation = conversation
        self.side = side
        self.sock = sock
        self.fd = sock.fileno()
        self.seen: Seen = conversation.outcome.pair(side)[0]
        self.script = conversation.dialogue.script(side)
        self.at = 0
        self.is_over = False
        self.wake_s = 0.0
        self.scheduled_s = 0.0
        self._is_unix = sock.family == socket.AF_UNIX
        self._out, self._in = _STREAMS[side], _STREAMS[1 - side]
        self._to_say: deque[tuple[int, int]] = deque()  # (up to where, in which pieces)
        self._said_at = 0
        self._ends_after = False
        self._is_shut = False
        self._goal = -1
        self._until_s = 0.0
        self._linger: tuple[int, float] | None = None

    # -- the script

    def advance(self, now_s: float) -> None:
        """Do what can be done now; sets ``wake_s`` if time has to pass first."""
        self.wake_s = 0.0
        self._say()
        while not self.is_over and self._step(self.script[self.at], now_s):
            self.at += 1
            self._goal, self._until_s, self._linger = -1, 0.0, None

    def _step(self, op: Op, now_s: float) -> bool:
        match op:
            case Send():
                self._said_at += op.count
                self._to_say.append((self._said_at, op.piece))
                self._say()
                return True
            case HalfClose():
                self._ends_after = True
                self._say()
                return True
            case Read() | ReadAll():
                return self._read(op, now_s)
            case Pause():
                return self._wait(now_s, op.ms / 1000)
            case Linger():
                return self._lingered(now_s)
            case Meet():
                return self._meet()
            case Close() | Reset():
                if len(self.conversation.ends) == 2:  # else nobody knows who is accepted later
                    self._go(by_reset=isinstance(op, Reset))
                return False

    def _wait(self, now_s: float, for_s: float) -> bool:
        if not self._until_s:
            self._until_s = now_s + for_s
        self.wake_s = self._until_s
        return now_s >= self._until_s

    def _meet(self) -> bool:
        it = self.conversation
        if self._goal < 0:
            it.met[self.side] += 1
            self._goal = it.met[self.side]
        other = 1 - self.side
        return it.met[other] >= self._goal or it.meetings[other] < self._goal

    # -- saying

    def _say(self) -> None:
        seen = self.seen
        while self._to_say and not seen.write_end:
            up_to, piece = self._to_say[0]
            if seen.sent == up_to:
                self._to_say.popleft()
                continue
            try:
                seen.sent += self.sock.send(self._out[seen.sent : min(up_to, seen.sent + piece)])
            except BlockingIOError:
                return
            except OSError as error:
                self._broken(error)
        if self._ends_after and not self._is_shut and not seen.write_end:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._broken(error)
            else:
                self._is_shut = seen.fin = True

    def _broken(self, error: OSError) -> None:
        self.seen.write_end = errno.errorcode.get(error.errno or 0, "?")
        self._to_say.clear()
        if error.errno == errno.ECONNRESET:
            self.seen.read_end = self.seen.read_end or "told"  # the kernel tells it once

    # -- reading

    def _read(self, op: Read | ReadAll, now_s: float) -> bool:
        seen = self.seen
        if self._goal < 0:
            self._goal = seen.received + op.count if isinstance(op, Read) else MAX_BYTES * 2
        while seen.read_end in {"", "told"} and seen.received < self._goal:
            if self._until_s > now_s:
                self.wake_s = self._until_s
                return False
            try:
                data = self.sock.recv(min(op.piece, self._goal - seen.received, _RECEIVE_BYTES))
            except BlockingIOError:
                return False
            except OSError as error:
                seen.read_end = "reset" if error.errno == errno.ECONNRESET else str(error)
                return True
            if not data:
                seen.read_end = "reset" if seen.read_end == "told" else "eof"
                return True
            self._take(data)
            self._until_s = now_s + op.pause_ms / 1000 if op.pause_ms else 0.0
        return True

    def _take(self, data: bytes) -> None:
        seen = self.seen
        at = seen.received
        if seen.wrong_at < 0 and self._in[at : at + len(data)] != data:
            seen.wrong_at = at
        seen.received += len(data)

    # -- going

    def _lingered(self, now_s: float) -> bool:
        seen = self.seen
        if seen.write_end:
            return True
        waiting = self._said_at - seen.sent + self._unacked()
        if not waiting:
            return True
        if self._linger is None or waiting < self._linger[0]:
            self._linger = (waiting, now_s)
        self.wake_s = now_s + _LINGER_LOOK_S
        return now_s - self._linger[1] > _LINGER_STALLS_S

    def _unacked(self) -> int:
        """Bytes, and a FIN, that the other side's system has not acknowledged.

        A unix socket's are in the reader's queue at once, and stay there when we close.
        """
        return 0 if self._is_unix else _asked(self.sock, termios.TIOCOUTQ)

    def _go(self, *, by_reset: bool) -> None:
        seen = self.seen
        seen.acked = not self._unacked()
        seen.fin_acked = seen.fin and seen.acked
        seen.closed = seen.read_end in {"", "told"}
        if by_reset and not self._is_unix:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            seen.cut = True
        elif self._has_unread():
            seen.cut = True
        elif not seen.write_end:
            seen.fin = True
        self._leave()

    def _has_unread(self) -> bool:
        """Whether closing cuts. What came to a unix socket between the two would, too: so none."""
        if self._is_unix:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RD)
        return _asked(self.sock, termios.FIONREAD) > 0

    def give_up(self) -> None:
        """Say where it stands, and close."""
        self.seen.stuck = f"{self.script[self.at]} (operation {self.at})"
        self._leave()

    def _leave(self) -> None:
        self.seen.gone = True
        self.is_over = True
        self.sock.close()


class Driver:
    """Holds dialogues, ``at_once`` of them at the same time.

    Each may take ``limit_s`` in addition to its pauses and what the kernel makes of them.
    """

    def __init__(self, at_once: int = 200, limit_s: float = 20.0) -> None:
        self._at_once = at_once
        self._limit_s = limit_s
        self._epoll = select.epoll()
        self._by_fd: dict[int, End | Route] = {}
        self._timers: list[tuple[float, int, End]] = []
        self._limits: list[tuple[float, int, Conversation]] = []
        self._tick = itertools.count()
        self._open: set[Conversation] = set()
        self._are_waiting = False

    def hold(
        self,
        dialogues: Iterable[tuple[Dialogue, Route]],
        when_open: Callable[[], object] | None = None,
    ) -> list[Outcome]:
        """Hold all of them; the outcomes are in the order of the dialogues.

        With ``when_open`` all of them are connected first, then it is called, then they begin.
        """
        everything = [Conversation(*pair) for pair in dialogues]
        self._are_waiting = when_open is not None
        todo = deque(everything)
        routes = list({id(it.route): it.route for it in todo}.values())
        for route in routes:
            route.listener.setblocking(False)
            self._by_fd[route.listener.fileno()] = route
            self._epoll.register(route.listener, select.EPOLLIN)
        try:
            while todo or self._open:
                while todo and len(self._open) < self._at_once:
                    it = todo.popleft()
                    self._open.add(it)
                    it.route.waiting.append(it)
                    self._open_next(it.route)
                self._turn()
                if self._are_waiting and not todo and not any(map(Route.is_opening, routes)):
                    self._let_begin(when_open)
        finally:
            for route in routes:
                self._epoll.unregister(route.listener)
                del self._by_fd[route.listener.fileno()]
        return [it.outcome for it in everything]

    def close(self) -> None:
        """Close the epoll set."""
        self._epoll.close()

    # -- opening: one at a time on each route, so that it is known who is accepted

    def _open_next(self, route: Route) -> None:
        if route.opening is not None or not route.waiting:
            return
        it = route.opening = route.waiting.popleft()
        sock = socket.socket(family_of(route.address), socket.SOCK_STREAM)
        _set_buffers(sock, it.dialogue.buffers(0))
        sock.settimeout(self._limit_s)
        sock.connect(route.address)
        it.began_s = time.monotonic()
        silent_s = it.dialogue.pauses_s() + it.dialogue.kernel_delays_s()
        heapq.heappush(self._limits, (it.began_s + self._limit_s + silent_s, next(self._tick), it))
        self._begin(it, sock)

    def _accept(self, route: Route) -> None:
        try:
            sock, _ = route.listener.accept()
        except BlockingIOError:
            return
        it = route.opening
        assert it is not None, "a connection that nobody has asked for"
        route.opening = None
        _set_buffers(sock, it.dialogue.buffers(1))
        self._begin(it, sock)
        self._open_next(route)

    def _begin(self, it: Conversation, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = End(it, len(it.ends), sock)
        it.ends.append(end)
        self._by_fd[end.fd] = end
        self._epoll.register(sock, _EVENTS)
        self._advance(it)

    # -- a turn

    def _turn(self) -> None:
        wait_s = 0.5
        if self._timers:
            wait_s = min(wait_s, max(0.0, self._timers[0][0] - time.monotonic()))
        touched: dict[Conversation, None] = {}
        for fd, _ in self._epoll.poll(wait_s):
            found = self._by_fd.get(fd)
            if isinstance(found, Route):
                self._accept(found)
            elif found is not None:
                touched[found.conversation] = None
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            touched[heapq.heappop(self._timers)[2].conversation] = None
        for it in touched:
            self._advance(it)
        while self._limits and self._limits[0][0] <= now_s:
            self._give_up(heapq.heappop(self._limits)[2])

    def _let_begin(self, first: Callable[[], object] | None) -> None:
        if first is not None:
            first()
        self._are_waiting = False
        for it in list(self._open):
            self._advance(it)

    def _advance(self, it: Conversation) -> None:
        if self._are_waiting:
            return
        met = [-1, -1]
        while met != it.met:  # who comes to a meeting lets the other one go on
            met = list(it.met)
            for end in it.ends:
                if not end.is_over:
                    self._advance_end(end)
        if it.is_over():
            it.outcome.took_s = time.monotonic() - it.began_s
            self._open.discard(it)

    def _advance_end(self, end: End) -> None:
        end.advance(time.monotonic())
        if end.is_over:
            del self._by_fd[end.fd]
        elif end.wake_s and end.wake_s != end.scheduled_s:
            end.scheduled_s = end.wake_s
            heapq.heappush(self._timers, (end.wake_s, next(self._tick), end))

    def _give_up(self, it: Conversation) -> None:
        if it not in self._open:
            return
        if it.route.opening is it:
            it.route.opening = None
            self._open_next(it.route)
        for end in it.ends:
            if not end.is_over:
                del self._by_fd[end.fd]
                end.give_up()
        it.outcome.took_s = time.monotonic() - it.began_s
        self._open.discard(it)


def _set_buffers(sock: socket.socket, buffers: Buffers) -> None:
    if buffers.receive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers.receive)
    if buffers.send:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers.send)
