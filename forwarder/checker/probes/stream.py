"""Checks over a stream socket: connecting, saying something, hearing what comes back."""

from __future__ import annotations

import errno
import os
import select
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from forwarder.checker.probes import why
from forwarder.checker.probes.attempt import SocketAttempt
from forwarder.checker.probes.readers import MOST_BYTES
from forwarder.net.owning import ClosedOnFailure
from forwarder.net.sockets import (
    NO_PORT,
    OUT_OF_RESOURCES,
    has_met_itself,
    set_abort_on_close,
    upstream_socket,
    why_no_address,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome
    from forwarder.checker.probes.readers import Reader
    from forwarder.config.model import Check

_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
# What connect(2) reports of a connection that is not there yet, and of one that is.
_CONNECTING: Final = frozenset({errno.EINPROGRESS, errno.EALREADY})
_CONNECTED: Final = frozenset({0, errno.EISCONN})
_TCP_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", 12)


class Connecting(SocketAttempt):
    """A check that is good once the kernel of the server's host has answered.

    The third segment of the handshake is held back, so the reset that ends the check comes in its
    place: the program is not bothered, its queue of connections stays as it is, and no error is
    logged there. Where the kernel sends it all the same, after 0.2 s, the program finds a
    connection that was reset; at a unix socket, one that was closed.
    """

    __slots__ = ("_aim",)

    def __init__(self, check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> None:
        """See :class:`~forwarder.checker.outcome.Begin`."""
        super().__init__(check, loop, done)
        self._aim = aim
        try:
            sock = self.make(aim)
        except OSError as err:
            self.end_soon(f"cannot make a socket: {why.of_error(err.strerror)}", is_ours=True)
            return
        code = sock.connect_ex(aim.target.sockaddr)
        if code in _CONNECTED or code in _CONNECTING:
            self.own(sock, _WRITE)
        else:
            reason, is_ours = self._why_not_connected(sock, code)
            sock.close()
            self.end_soon(reason, is_ours=is_ours)

    def make(self, aim: Aim) -> socket.SocketType:
        """Make the socket. Raises OSError."""
        # MPTCP can hold nothing back. A server of it takes TCP as well.
        how = replace(aim.how, protocol=0) if aim.how.protocol else aim.how
        sock = upstream_socket(aim.target, aim.source, how)
        if not aim.target.is_unix:
            with ClosedOnFailure(sock):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 0)
        return sock

    def on_events(self, events: int) -> None:
        """See :class:`SocketAttempt`."""
        del events  # an error is one of connecting, and so is a hang-up
        sock = self._sock
        if sock is None:
            return
        # Unlike SO_ERROR it cannot say 0 of a connection that is not there.
        code = sock.connect_ex(self._aim.target.sockaddr)
        if code in _CONNECTED and has_met_itself(sock, self._aim.target):
            code = errno.ECONNREFUSED
        if code in _CONNECTED:
            self.on_connected(sock)
        elif code not in _CONNECTING:
            reason, is_ours = self._why_not_connected(sock, code)
            self.end(reason, is_ours=is_ours)

    def on_connected(self, sock: socket.SocketType) -> None:
        """There is a connection."""
        set_abort_on_close(sock)
        self.end(is_good=True)

    def on_silence(self) -> None:
        """See :class:`Attempt`."""
        self.end(f"no connection {why.within(self._timeout_s)}")

    def _why_not_connected(self, sock: socket.SocketType, code: int) -> tuple[str, bool]:
        """What to say of an error of connect(2), and whether it is of this host."""
        target = self._aim.target
        if target.is_unix and code == errno.EAGAIN:  # connect(2)
            return "its queue of connections is full", False
        if code == errno.EADDRNOTAVAIL and why_no_address(sock, target) == NO_PORT:
            return "no local port is free", True
        return why.of_error(os.strerror(code)), code in OUT_OF_RESOURCES


class Asking(Connecting):
    """A check by what comes back on a connection, after ``text`` was sent, or without that.

    Sends as long as the server takes it, and reads meanwhile. A connection that did well ends by
    FIN, so that no server complains of it. ``remark``: what to say of a server that is well.
    """

    __slots__ = ("_has_connected", "_reader", "_unsent", "remark")

    def __init__(
        self,
        check: Check,
        aim: Aim,
        loop: Loop,
        done: Callable[[Outcome], None],
        text: bytes,
        reader: Reader,
    ) -> None:
        """``reader`` decides."""
        self._unsent = memoryview(text)
        self._reader = reader
        self._has_connected = False
        self.remark = ""
        super().__init__(check, aim, loop, done)

    def make(self, aim: Aim) -> socket.SocketType:
        """See :class:`Connecting`: the server has to see this one."""
        return upstream_socket(aim.target, aim.source, aim.how)

    def on_connected(self, sock: socket.SocketType) -> None:
        """See :class:`Connecting`."""
        self._has_connected = True
        self.send(sock)

    def on_events(self, events: int) -> None:
        """See :class:`SocketAttempt`."""
        sock = self._sock
        if not self._has_connected:
            super().on_events(events)
        elif sock is not None:
            if events & ~_WRITE:
                self.receive(sock)
            elif self._unsent:
                self.send(sock)

    def send(self, sock: socket.SocketType) -> None:
        """Send what is left, as far as the server takes it."""
        try:
            self._unsent = self._unsent[sock.send(self._unsent) :] if self._unsent else self._unsent
        except BlockingIOError:
            pass
        except OSError:  # the connection has ended; what came before that may be an answer
            self._unsent = self._unsent[:0]
        self._loop.change(sock.fileno(), _READ | _WRITE if self._unsent else _READ)

    def receive(self, sock: socket.SocketType) -> None:
        """Read a piece of the answer."""
        try:
            data = sock.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError as err:
            self.break_off(why.of_error(err.strerror))
            return
        if data:
            self.hear(data)
        else:
            self.break_off("closed")

    def hear(self, data: bytes) -> None:
        """Let the reader have a piece of the answer."""
        verdict = self._reader.read(data)
        if verdict is not None:
            reason = verdict.why or self.remark
            good, ours = verdict.is_good, verdict.is_ours
            self.end(reason, is_good=good, is_ours=ours, advice=verdict.advice)

    def break_off(self, how: str) -> None:
        """The connection has ended, without all of an answer."""
        heard = self._reader.heard
        if heard:
            self.end(f"{why.got(heard)}, then {how}")
        else:
            self.end(f"{how} without an answer")

    def on_silence(self) -> None:
        """See :class:`Attempt`."""
        heard = self._reader.heard
        if not self._has_connected:
            super().on_silence()
        elif heard:
            self.end(f"{why.got(heard)}, and no more {why.within(self._timeout_s)}")
        else:
            self.end(f"no answer {why.within(self._timeout_s)}")
