"""What all kinds of checks have in common: one end, in time, and nothing left open."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from forwarder.checker.outcome import Outcome
from forwarder.checker.probes import why
from forwarder.net.sockets import set_abort_on_close

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import SocketType

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Advice
    from forwarder.config.model import Check


class Attempt:
    """A check under way: a :class:`~forwarder.checker.outcome.Probe`.

    Ends once: by :meth:`end`, by its timeout, or by :meth:`cancel`.
    """

    __slots__ = ("_began_at", "_done", "_loop", "_timeout_s", "_timer")

    def __init__(self, check: Check, loop: Loop, done: Callable[[Outcome], None]) -> None:
        """See :class:`~forwarder.checker.outcome.Begin`."""
        self._done: Callable[[Outcome], None] | None = done
        self._loop = loop
        self._timeout_s = check.timeout_s
        self._began_at = time.monotonic()
        self._timer = loop.call_at(loop.now + check.timeout_s, self._on_timeout)

    def cancel(self) -> None:
        """See :class:`~forwarder.checker.outcome.Probe`."""
        if self._done is not None:
            self._done = None
            self._timer.cancel()
            self.close(is_orderly=False)

    def end(
        self,
        reason: str = "",
        *,
        is_good: bool = False,
        is_ours: bool = False,
        advice: Advice | None = None,
    ) -> None:
        """Close everything, and report. Without effect after the end."""
        done, self._done = self._done, None
        if done is None:
            return
        self._timer.cancel()
        self.close(is_orderly=is_good)
        took_s = time.monotonic() - self._began_at
        done(Outcome(is_good, reason, took_s, advice, is_ours))

    def end_soon(self, reason: str, *, is_ours: bool = False) -> None:
        """The same as :meth:`end`, when whoever has begun the check has got it."""
        self._timer.cancel()
        end = partial(self.end, reason, is_ours=is_ours)
        self._timer = self._loop.call_at(self._loop.now, end)

    def close(self, *, is_orderly: bool) -> None:
        """Close everything. ``is_orderly``: a server that did well shall not find an error."""
        raise NotImplementedError

    def on_silence(self) -> None:
        """The time is over: :meth:`end` it."""
        raise NotImplementedError

    def _on_timeout(self) -> None:
        if self._loop.stopped_s:
            # What has come meanwhile is only read now, and what follows from it takes its time.
            again_at = self._loop.now + self._timeout_s
            self._timer = self._loop.call_at(again_at, self._on_timeout)
        else:
            self.on_silence()


class SocketAttempt(Attempt):
    """A check by one socket, which it owns. Its events come to :meth:`on_events`."""

    __slots__ = ("_sock",)

    def __init__(self, check: Check, loop: Loop, done: Callable[[Outcome], None]) -> None:
        """See :class:`~forwarder.checker.outcome.Begin`."""
        super().__init__(check, loop, done)
        self._sock: SocketType | None = None

    def on_events(self, events: int) -> None:
        """Something has happened on the socket."""
        raise NotImplementedError

    def own(self, sock: SocketType, events: int) -> None:
        """Own a socket, and watch it. Fails soon if it cannot be watched."""
        self._sock = sock
        try:
            self._loop.watch(sock.fileno(), events, self.on_events)
        except OSError as err:
            self.end_soon(f"cannot watch a socket: {why.of_error(err.strerror)}", is_ours=True)

    def close(self, *, is_orderly: bool) -> None:
        """See :class:`Attempt`. Where it is not orderly, neither end remembers the connection."""
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.unwatch(sock.fileno())
            if not is_orderly:
                set_abort_on_close(sock)
            sock.close()
