"""The nested epoll set: all relay sockets of a worker behind one reader of the event loop.

Theory of operation
-------------------
uvloop's ``add_reader``/``add_writer`` cost a handle, a callback object and several epoll_ctl calls
per socket: 155 us of CPU per forwarded connection, against 92-96 us with this set (2 cores, one
HTTP request per connection). So a session socket is registered here once, edge-triggered for
everything, and never modified; closing it removes it (epoll(7)). uvloop sees one descriptor, level
triggered, that is readable while any event waits.

An edge is reported once. A handler that leaves data unread without having seen EAGAIN, or a short
read, must come back by itself: that is what :meth:`Poller.call_again` is for.

Nothing is closed while a batch of events is being handled. A closed descriptor's number could be
given to a new socket of the same batch, which would then be handed the old one's events; so closing
is deferred to the end of the batch (:meth:`Poller.defer`).
"""

from __future__ import annotations

import logging
import select
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net import sockets

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from forwarder.system.loop import Loop

log = logging.getLogger(__name__)

EDGE_ALL: Final = (
    select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
)
# For UDP sockets, which report every datagram that has left them as room for another: one needless
# event for each. A flow that waits for room asks for WRITABLE.
EDGE_IN: Final = select.EPOLLIN | select.EPOLLET
READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITABLE: Final = select.EPOLLOUT
BROKEN: Final = select.EPOLLERR
URGENT: Final = select.EPOLLPRI
# With one of these a short read does not mean "drained": an end of file or the part behind the
# urgent mark may wait behind it, and no further edge will come.
READ_ON: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
# In place of these: a short read never means "drained".
ALWAYS: Final = -1

_MAX_EVENTS: Final = 256  # bounds a batch; what does not fit is reported by the next poll


class Handler(Protocol):
    """Handles the events of a descriptor."""

    def on_events(self, mask: int) -> None:
        """Handle the epoll events in ``mask``. Must not block."""

    def on_bug(self) -> None:
        """A method of this handler raised, which is a bug: end what it stands for."""


class Resumable(Protocol):
    """Has used up its budget and goes on after the others."""

    def on_turn(self) -> None:
        """Go on, if there is still something to do. Must not block."""

    def on_bug(self) -> None:
        """As in :class:`Handler`."""


class Poller:
    """Dispatches epoll events to handlers. ``now`` is the loop's time, read once per wake-up."""

    __slots__ = ("_again", "_deferred", "_epoll", "_handlers", "_in_turn", "_loop", "now")

    def __init__(self, loop: Loop) -> None:
        """Join ``loop``. The poller owns the epoll descriptor until :meth:`close`."""
        self._loop = loop
        self._epoll = select.epoll()
        self._handlers: list[Handler | None] = []
        self._again: list[Resumable] = []
        self._deferred: list[Callable[[], None]] = []
        self._in_turn = False
        self.now = loop.time()
        loop.add_reader(self._epoll.fileno(), self.turn)

    def read_clock(self) -> None:
        """Bring ``now`` up to date, outside of a batch of events."""
        self.now = self._loop.time()

    def register(self, fd: int, handler: Handler, events: int = EDGE_ALL) -> None:
        """Report events of ``fd`` to ``handler``; what is ready already is reported at once.

        Raises OSError, ENOMEM and ENOSPC above all; then nothing has changed.
        """
        self._epoll.register(fd, events)
        handlers = self._handlers
        if fd >= len(handlers):
            handlers.extend([None] * (fd + 64 - len(handlers)))
        handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Report other events of a registered ``fd`` from now on."""
        self._epoll.modify(fd, events)

    def handler(self, fd: int) -> Handler | None:
        """The handler of the events of ``fd``."""
        return self._handlers[fd] if 0 <= fd < len(self._handlers) else None

    def hand_over(self, fd: int, handler: Handler) -> None:
        """Report further events of a registered ``fd`` to another handler."""
        self._handlers[fd] = handler

    def unregister(self, fd: int) -> None:
        """Take out an ``fd`` that stays open."""
        self._handlers[fd] = None
        self._epoll.unregister(fd)

    def defer(self, action: Callable[[], None]) -> None:
        """Do ``action`` (closing something) when the current batch is over."""
        if not (self._in_turn or self._deferred):
            self._loop.call_soon(self._do_deferred)
        self._deferred.append(action)

    def release(self, sock: socket.SocketType) -> None:
        """Close a socket when the batch is over, and report no more of it; harmless if closed."""
        fd = sock.fileno()
        if fd >= 0:
            if fd < len(self._handlers):
                self._handlers[fd] = None
            self.defer(sock.close)

    def release_shared(self, sock: socket.SocketType) -> None:
        """The same for a socket that another process may have, too: closing it would end nothing.

        Nor would epoll forget it before the last of its descriptors is closed (epoll(7)).
        """
        fd = sock.fileno()
        if fd >= 0:
            self.unregister(fd)
            self.defer(partial(sockets.end_for_all, sock))

    def call_again(self, direction: Resumable) -> None:
        """Resume ``direction`` after the others had their turn: its budget was used up."""
        if not (self._in_turn or self._again):
            self._loop.call_soon(self.turn)
        self._again.append(direction)

    def close(self) -> None:
        """Leave the loop and close the epoll descriptor, not the sockets in it."""
        self._do_deferred()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def turn(self) -> None:
        """Handle what is ready, without waiting. The loop calls it; a test does in its place."""
        if self._epoll.closed:
            return  # asked for by call_soon just before close()
        self.now = self._loop.time()
        self._in_turn = True
        if self._again:
            self._do_again()
        self._dispatch(self._epoll.poll(0, _MAX_EVENTS))
        if self._deferred:
            self._do_deferred()
        self._in_turn = False
        if self._again:
            self._loop.call_soon(self.turn)

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        handlers = self._handlers
        for fd, mask in events:
            handler = handlers[fd]
            if handler is not None:
                try:
                    handler.on_events(mask)
                except Exception:  # a bug must cost one session, not the worker
                    log.exception("relay.bug fd=%d events=%#x", fd, mask)
                    _end(handler)

    def _do_again(self) -> None:
        again = self._again
        self._again = []
        for direction in again:
            try:
                direction.on_turn()
            except Exception:  # as in _dispatch
                log.exception("relay.bug while resuming")
                _end(direction)

    def _do_deferred(self) -> None:
        while self._deferred:
            deferred = self._deferred
            self._deferred = []
            for action in deferred:
                try:
                    action()
                except Exception:  # what the others have to close must not stay open
                    log.exception("relay.bug at the end of a batch")


def _end(failed: Handler | Resumable) -> None:
    """End it. One that is half ended may fail in that, too; the others still have their turn."""
    try:
        failed.on_bug()
    except Exception:
        log.exception("relay.bug while ending for a bug")
