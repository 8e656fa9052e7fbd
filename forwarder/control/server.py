"""The control socket: JSON requests line by line, one answer each. Never blocks the master.

Knows no request's meaning; the handler it is given does.

Theory of operation
-------------------
Each client has at most one request at work or one answer waiting to be sent; it is read from again
only afterwards. So a client can make us keep a line and an answer at most, whatever it sends and
whether or not it reads. One request is handled per turn of the master, of the client that has
waited longest: a flood delays other clients a little and the master hardly. When there are too many
clients, those that ask for nothing are dropped.

A client that goes away while its request is at work is noticed when the answer is sent.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from forwarder.control.protocol import MAX_ANSWER_BYTES, MAX_LINE_BYTES
from forwarder.net.sockets import peer_credentials
from forwarder.system.daemonlog import warn_rarely

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from forwarder.control.path import ControlListener

log = logging.getLogger(__name__)

MAX_CLIENTS: Final = 16  # arbitrary, as is the next one
IDLE_S: Final = 30.0
PAUSE_S: Final = 1.0  # without accepting, when descriptors have run out

DENIED: Final = "permission denied: only root and the user of the forwarder may"

Message: TypeAlias = dict[str, object]
Reply: TypeAlias = "Callable[[Message], None]"
Handler: TypeAlias = "Callable[[Message, Reply, int], None]"


class RequestError(Exception):
    """What a client sent is no request."""


def parse(line: bytes) -> Message:
    """The request in a line. Raises RequestError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise RequestError("not a line of JSON") from err
    if not isinstance(message, dict):
        raise RequestError('a request is an object such as {"op": "status"}')
    return message


def refusal(error: str, **more: object) -> Message:
    """An answer that says no, and why."""
    return {"ok": False, "error": error, **more}


def encode(message: Message) -> bytes:
    """An answer as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


@dataclass(slots=True, eq=False)
class _Client:
    sock: socket.socket
    uid: int  # of the user at the other end
    active_at: float
    received: bytearray = field(default_factory=bytearray)
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    is_busy: bool = False  # its request is at work
    is_last: bool = False  # nothing more is read: its input has ended, or is not worth more
    events: int = 0

    @property
    def has_request(self) -> bool:
        return not self.is_busy and not self.unsent and b"\n" in self.received


class ControlServer:
    """All clients of one control socket. Owns them and the listener."""

    def __init__(
        self,
        listener: ControlListener,
        selector: selectors.BaseSelector,
        handler: Handler,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Accept from now on.

        ``handler`` gets each request, a function that answers it once, and the user that asks.
        """
        self._listener = listener
        self._selector = selector
        self._handler = handler
        self._clock = clock
        self._clients: deque[_Client] = deque()
        self._paused_until: float | None = None
        selector.register(listener.sock, selectors.EVENT_READ, self._on_connect)

    @property
    def path(self) -> str:
        """Where clients connect."""
        return self._listener.path

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        if any(client.has_request for client in self._clients):
            return 0.0
        deadlines = [client.active_at + IDLE_S for client in self._clients if not client.is_busy]
        if self._paused_until is not None:
            deadlines.append(self._paused_until)
        return min(deadlines, default=None)

    def turn(self) -> None:
        """Handle one request, if there is one, and drop idle clients."""
        now = self._clock()
        if self._paused_until is not None and now >= self._paused_until:
            try:
                self._selector.register(self._listener.sock, selectors.EVENT_READ, self._on_connect)
                self._paused_until = None
            except OSError:
                self._paused_until = now + PAUSE_S
        for client in tuple(self._clients):
            if not client.is_busy and now - client.active_at >= IDLE_S:
                self._drop(client)
        for client in self._clients:
            if client.has_request:
                self._clients.remove(client)  # to the end of the queue
                self._clients.append(client)
                self._handle(client)
                return

    def move(self, listener: ControlListener) -> None:
        """Listen there from now on, and no longer at the old place; clients stay."""
        if self._paused_until is None:
            self._selector.unregister(self._listener.sock)
        self._listener.remove_file()
        self._listener.sock.close()
        self._listener, self._paused_until = listener, None
        self._selector.register(listener.sock, selectors.EVENT_READ, self._on_connect)

    def renew(self) -> bool:
        """Listen at our path again if it no longer leads to us. Returns whether it does now."""
        if not self._listener.is_there:
            listener = self._listener.renewed()
            if listener is None:
                return False
            self.move(listener)
        return True

    def close(self) -> None:
        """Close all sockets; the file stays, and so do the selector's entries."""
        for client in self._clients:
            client.sock.close()
        self._listener.sock.close()

    def remove_file(self) -> None:
        """Remove the socket's file, if it is still ours."""
        self._listener.remove_file()

    # -- clients come and go

    def _on_connect(self) -> None:
        try:
            sock, _ = self._listener.sock.accept()
        except BlockingIOError:
            return
        except OSError as err:
            warn_rarely(log, "control", f"control: cannot accept: {err.strerror}")
            self._selector.unregister(self._listener.sock)
            self._paused_until = self._clock() + PAUSE_S
            return
        sock.setblocking(False)
        uid = _user_of(sock)
        client = _Client(sock, uid, self._clock())
        if uid not in (0, os.geteuid()):
            _turn_away(sock, refusal(DENIED, denied=True))
        elif len(self._clients) >= MAX_CLIENTS and not self._make_room():
            _turn_away(sock, _CROWDED)
        else:
            self._clients.append(client)
            self._watch(client)

    def _make_room(self) -> bool:
        """Drop the client that has asked for nothing for longest; it may be gone already."""
        silent = [client for client in self._clients if client.events == selectors.EVENT_READ]
        if not silent:
            return False
        oldest = min(silent, key=lambda client: client.active_at)
        self._selector.unregister(oldest.sock)
        self._clients.remove(oldest)
        _turn_away(oldest.sock, _CROWDED)
        return True

    def _drop(self, client: _Client) -> None:
        if client.events:
            self._selector.unregister(client.sock)
            client.events = 0
        client.sock.close()
        self._clients.remove(client)

    def _watch(self, client: _Client) -> None:
        """Wait for what this client may do next; drop it if that is nothing."""
        wanted = 0
        if client.unsent:
            wanted = selectors.EVENT_WRITE
        elif not client.is_busy and not client.has_request:
            if client.is_last:
                self._drop(client)
                return
            wanted = selectors.EVENT_READ
        if wanted == client.events:
            return
        if client.events:
            self._selector.unregister(client.sock)
        client.events = 0
        if wanted:
            try:
                self._selector.register(client.sock, wanted, lambda: self._on_ready(client))
            except OSError as err:  # ENOMEM, ENOSPC: epoll_ctl(2)
                log.warning("control: a client is dropped: %s", err.strerror)
                self._drop(client)
                return
        client.events = wanted

    # -- requests and answers

    def _on_ready(self, client: _Client) -> None:
        if client.sock.fileno() < 0:
            return  # dropped earlier in this turn
        client.active_at = self._clock()
        if client.unsent:
            self._send(client)
            return
        try:
            data = client.sock.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if data:
            client.received += data
        else:
            client.is_last = True
        if len(client.received) > MAX_LINE_BYTES and not client.has_request:
            client.received.clear()
            self._refuse(client, f"a request has at most {MAX_LINE_BYTES} bytes")
        else:
            self._watch(client)

    def _handle(self, client: _Client) -> None:
        line, _, rest = client.received.partition(b"\n")
        client.received = rest
        if len(line) > MAX_LINE_BYTES:
            self._refuse(client, f"a request has at most {MAX_LINE_BYTES} bytes")
            return
        try:
            message = parse(bytes(line))
        except RequestError as err:
            self._refuse(client, str(err))
            return
        client.is_busy = True
        try:
            self._handler(message, lambda answer: self._answer(client, answer), client.uid)
        except Exception:  # a bug in a request must not end the master
            log.exception("control: internal error")
            self._answer(client, refusal("internal error; see the log of the forwarder"))
        if client.sock.fileno() >= 0:
            self._watch(client)

    def _refuse(self, client: _Client, why: str) -> None:
        """Answer something that is no request, and read no more from this client."""
        client.is_last = True
        client.received.clear()
        client.is_busy = True
        self._answer(client, refusal(why))

    def _answer(self, client: _Client, answer: Message) -> None:
        if client.sock.fileno() < 0 or not client.is_busy:
            return
        line = encode(answer)
        if len(line) > MAX_ANSWER_BYTES:
            line = encode(refusal(f"the answer would have more than {MAX_ANSWER_BYTES} bytes"))
        client.is_busy = False
        client.active_at = self._clock()
        client.unsent = memoryview(line)
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            client.unsent = client.unsent[client.sock.send(client.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        self._watch(client)


_CROWDED: Final = refusal("too many clients at once; try again")


def _turn_away(sock: socket.socket, answer: Message) -> None:
    """Answer as far as the socket takes it at once, and close it."""
    with suppress(OSError):
        sock.send(encode(answer))
    sock.close()


def _user_of(sock: socket.socket) -> int:
    """The user at the other end; -1 if that is not known."""
    try:
        _, uid = peer_credentials(sock)
    except OSError:
        return -1
    return uid
