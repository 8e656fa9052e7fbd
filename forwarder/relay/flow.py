"""A conversation with UDP on at least one side: its two ways, its timers, its end.

Moves no datagrams itself; its ways do. ``udp_flow`` and ``bridge`` add how the sides are opened.

Theory of operation
-------------------
::

    RESOLVING --> CONNECTING --> OPEN --> CLOSED
        |             |                     ^
        +-------------+---------------------+

UDP has no connections, so CONNECTING is passed at once where the upstream is spoken to by UDP. What
the client sends before OPEN waits in its way. A flow ends when nothing has moved in either
direction for a while, which only a timer can tell; when a stream on one side ends; or when it is
the one that has been silent longest and there are too many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.errors import CloseReason, Phase, Who
from forwarder.net import sockets
from forwarder.relay.conversation import Conversation, State
from forwarder.relay.poller import EDGE_IN, WRITABLE
from forwarder.relay.wheel import TICK_S

if TYPE_CHECKING:
    import socket

    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.datagram_ways import Way
    from forwarder.relay.relay import Relay
    from forwarder.upstream.pool import Pool


# As in ``conversation``: looking members up would cost.
_RESOLVING, _OPEN, _CLOSED = State.RESOLVING, State.OPEN, State.CLOSED


class Flow(Conversation):
    """One conversation. Owns its sockets from when they are set until it has ended.

    ``c2u`` and ``u2c`` are made by the subclass.
    """

    __slots__ = ("client", "has_waited")

    c2u: Way
    u2c: Way

    def __init__(self, relay: Relay, pool: Pool, client_address: SockAddr) -> None:
        super().__init__(relay, pool, client_address)
        self.client: socket.SocketType | None = None
        self.has_waited = False  # for a descriptor or a port
        relay.sessions[self] = None

    def join(self, c2u: Way, u2c: Way) -> None:
        """Set the two ways."""
        self.c2u, self.u2c = c2u, u2c
        c2u.reverse, u2c.reverse = u2c, c2u

    # -- opening

    def on_starved(self) -> None:
        """Descriptors come back: after this batch, if a flow has made room, else some time."""
        if self.relay.make_room(keep=self) and not self.has_waited:
            self.has_waited = True
            self.relay.poller.call_again(self)
        else:
            self.arm(TICK_S)

    def on_portless(self, target: Target) -> bool:
        """A flow makes room, once; its port is free after this batch."""
        if self.has_waited or not self.relay.flows.make_room_for_port(self.pool, target, self):
            return False
        self.has_waited = True
        self.relay.poller.call_again(self)
        return True

    def on_turn(self) -> None:
        """Go on after :meth:`on_starved` or :meth:`on_portless`."""
        if self.dialer is not None:
            self.dialer.on_turn()

    def on_open(self) -> None:
        """Both sides are there."""
        self.state = _OPEN
        self.relay.flows.ports.take(self.pool.rule)
        self.active_at = self.connected_at = self.relay.poller.now
        self.arm(self.silence_limit_s)
        self.relay.on_open(self)

    # -- what the ways tell

    def touch(self) -> None:
        """Something was heard just now."""
        self.active_at = self.relay.poller.now

    def on_blocked(self, way: Way) -> None:
        """``way``, to a UDP socket, waits until that takes more."""
        sock = self._end_of(way)
        if sock is not None:
            self.relay.poller.modify(sock.fileno(), EDGE_IN | WRITABLE)

    def on_stream_ended(self) -> None:
        """The stream on one side has ended, and everything from it is delivered."""

    def on_stream_broken(self, why: str) -> None:
        """The stream on one side was reset."""

    # -- timers

    @property
    def silence_limit_s(self) -> float:
        """How long nothing may move; 0 is no limit."""
        return self.pool.rule.udp_timeout_s

    @property
    def ends_by_silence(self) -> bool:
        """Whether nobody will say that it is over."""
        return True

    def on_timer(self, now: float) -> float:
        """Look whether this flow is overdue; returns its next deadline, 0 for none."""
        if self.dialer is not None:
            return self.dialer.on_timer(now)
        if self.state is _RESOLVING:
            if now < self.deadline:
                return self.deadline
            self.fail("no name server answered in time", Who.US)
        limit_s = self.silence_limit_s
        if self.state is not _OPEN or not limit_s:
            return 0.0
        if now < self.active_at + limit_s:
            return self.active_at + limit_s
        if self.c2u.held_up or self.u2c.held_up:
            return now + limit_s  # it is we who keep it waiting
        self.close(CloseReason(Who.US, Phase.IDLE))
        return 0.0

    def end_if_silent_for(self, limit_s: float) -> bool:
        """Whether nothing has moved for ``limit_s``; if so, it has ended."""
        is_silent = self.relay.poller.now - self.active_at >= limit_s
        if self.state is _CLOSED or not is_silent or not self.ends_by_silence:
            return False
        self.close(CloseReason(Who.US, Phase.DRAIN))
        return True

    # -- ending

    @property
    def to_stream(self) -> Way | None:
        """The way that leads to a stream; None where both sides are UDP."""
        return None

    def close(self, reason: CloseReason) -> None:
        """End; what the kernel has taken it will deliver. A stream that lacks a part is reset."""
        if self.state is _CLOSED:
            return
        if self.to_stream is not None and self.to_stream.holds_data:
            self._reset_stream(self.to_stream)
        if self.state is _OPEN:
            self.relay.flows.ports.give(self.pool.rule)
        self.state = _CLOSED
        if self.dialer is not None:
            self.dialer.close(is_abort=False)
            self.dialer = None
        relay = self.relay
        relay.on_end(self, reason)
        relay.wheel.discard(self)
        relay.sessions.pop(self, None)
        relay.drop_datagrams(self.pool, self.c2u.waiting + self.u2c.waiting)
        self.c2u.src = self.u2c.src = None
        for sock in (self.client, self.upstream):
            if sock is not None:
                relay.poller.release(sock)
        relay.poller.defer(self.unlink)

    def abort(self, reason: CloseReason) -> None:
        """End; a stream on one side is reset: no clean end for one that was cut."""
        if self.state is not _CLOSED and self.to_stream is not None:
            self._reset_stream(self.to_stream)
        self.close(reason)

    def _reset_stream(self, way: Way) -> None:
        sock = self._end_of(way)
        if sock is not None and sock.fileno() >= 0:
            sockets.set_abort_on_close(sock)

    def _end_of(self, way: Way) -> socket.SocketType | None:
        """Where a way leads to."""
        return self.upstream if way is self.c2u else self.client

    def unlink(self) -> None:
        """Break the reference cycles, so that the memory is free at once, without the collector.

        The place among the sessions is free only now: before, its sockets were open.
        """
        if self.held_as is not None:
            self.relay.let_go(self)
        del self.c2u.reverse, self.c2u.flow
        del self.u2c.reverse, self.u2c.flow
