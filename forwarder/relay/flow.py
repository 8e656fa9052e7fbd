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

import os
from enum import Enum
from typing import TYPE_CHECKING

from forwarder.errors import CloseReason, Phase, Who
from forwarder.net import sockets
from forwarder.relay.poller import EDGE_IN, WRITABLE
from forwarder.relay.wheel import TICK_S
from forwarder.stats import connect_bucket

if TYPE_CHECKING:
    import socket

    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.datagram_ways import Way
    from forwarder.relay.relay import Relay
    from forwarder.upstream.pool import Pool


class FlowState(Enum):
    """See the picture above."""

    RESOLVING = "resolving"
    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


_RESOLVING, _CONNECTING, _OPEN, _CLOSED = FlowState


class Flow:
    """One conversation. Owns its sockets from when they are set until it has ended.

    ``c2u`` and ``u2c`` are made by the subclass. ``active_at``: when something was last heard, in
    the loop's time. ``tick`` is the wheel's.
    """

    __slots__ = (
        "active_at",
        "attempt",
        "c2u",
        "client",
        "client_address",
        "connected_at",
        "deadline",
        "has_waited",
        "held_as",
        "id",
        "pool",
        "relay",
        "started_at",
        "state",
        "targets",
        "tick",
        "u2c",
        "upstream",
    )

    c2u: Way
    u2c: Way

    def __init__(self, relay: Relay, pool: Pool, client_address: SockAddr) -> None:
        self.relay = relay
        self.id = relay.total
        self.pool = pool
        self.client_address = client_address
        self.client: socket.SocketType | None = None
        self.upstream: socket.SocketType | None = None
        self.state = _RESOLVING
        self.started_at = self.active_at = relay.poller.now
        self.connected_at = 0.0  # 0: not yet
        self.tick = -1
        self.deadline = 0.0  # before OPEN
        self.has_waited = False  # for a descriptor
        self.targets: tuple[Target, ...] = ()
        self.held_as: int | None = None  # by the gate; None: not at all
        self.attempt = -1  # index of the target being tried, then of the one connected
        relay.sessions.add(self)

    def join(self, c2u: Way, u2c: Way) -> None:
        """Set the two ways."""
        self.c2u, self.u2c = c2u, u2c
        c2u.reverse, u2c.reverse = u2c, c2u

    def local(self) -> Target:
        """The address of ours that the client speaks to. Raises OSError when it is closed."""
        raise NotImplementedError

    # -- opening

    def start(self) -> None:
        """Find an upstream and open it, now or when the name is resolved."""
        self.limit_attempt()
        targets = self.pool.targets()
        if targets is None:
            self.pool.wait_for_targets(self.on_targets)
        else:
            self.on_targets(targets)

    def on_targets(self, targets: tuple[Target, ...]) -> None:
        """Go on with the addresses of the upstream; none means that no name could be resolved."""
        if self.state is not _RESOLVING:
            return
        self.targets = targets
        if targets:
            self.state = _CONNECTING
            self.connect_next(0)
        else:
            self.fail("no upstream address could be resolved")

    def connect_next(self, error: int) -> None:
        """Try the targets that have not been tried; ``error`` is why the last one failed."""
        while self.attempt + 1 < len(self.targets):
            self.attempt += 1
            target = self.targets[self.attempt]
            try:
                source = self.pool.source(target.family, self.client_address)
                self.open_upstream(target, source)
            except OSError as err:
                error = err.errno or 0
                if error in sockets.OUT_OF_RESOURCES:
                    self.attempt -= 1
                    self._try_again()
                    return
                continue
            return
        self.fail(os.strerror(error))

    def _try_again(self) -> None:
        """Descriptors come back: after this batch, if a flow has made room, else some time."""
        if self.relay.make_room(keep=self) and not self.has_waited:
            self.has_waited = True
            self.relay.poller.call_again(self)
        else:
            self.arm(TICK_S)

    def on_turn(self) -> None:
        """Go on after :meth:`_try_again`."""
        if self.state is _CONNECTING and self.upstream is None:
            self.connect_next(0)

    def open_upstream(self, target: Target, source: SockAddr | None) -> None:
        """Begin to connect to ``target``, and call :meth:`on_open` when that is done.

        Raises OSError, to have the next target tried.
        """
        raise NotImplementedError

    def on_open(self) -> None:
        """Both sides are there."""
        self.state = _OPEN
        self.active_at = self.connected_at = self.relay.poller.now
        self.pool.counts[connect_bucket(self.connected_at - self.started_at)] += 1
        self.arm(self.silence_limit_s)
        self.relay.on_open(self)

    def fail(self, why: str, who: Who = Who.UPSTREAM) -> None:
        """No upstream could be opened."""
        self.relay.note_connect_failed(self, why)
        self.abort(CloseReason(who, Phase.CONNECT, why))

    def limit_attempt(self) -> None:
        """Bound the look-up or the attempt that begins now."""
        limit_s = self.pool.rule.connect_timeout_s
        self.deadline = self.relay.poller.now + limit_s if limit_s else float("inf")
        self.arm(limit_s)

    # -- what the ways tell

    def touch(self) -> None:
        """Something was heard just now."""
        self.active_at = self.relay.poller.now

    def on_blocked(self, way: Way) -> None:
        """``way``, to a UDP socket, waits until that takes more."""
        sock = self.upstream if way is self.c2u else self.client
        if sock is not None:
            self.relay.poller.modify(sock.fileno(), EDGE_IN | WRITABLE)

    def on_stream_ended(self) -> None:
        """The stream on one side has ended, and everything from it is delivered."""

    def on_stream_broken(self, why: str) -> None:
        """The stream on one side was reset."""

    def on_bug(self) -> None:
        """An event handler failed: end this flow, the worker goes on."""
        self.abort(CloseReason(Who.US, Phase.ERROR, "bug"))

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
        if self.state in (_RESOLVING, _CONNECTING):
            if now >= self.deadline:
                self.on_attempt_timeout()
            elif self.state is _CONNECTING and self.upstream is None:
                self.connect_next(0)
            is_waiting = self.state in (_RESOLVING, _CONNECTING)
            return self.deadline if is_waiting and self.deadline < float("inf") else 0.0
        limit_s = self.silence_limit_s
        if self.state is not _OPEN or not limit_s:
            return 0.0
        if now < self.active_at + limit_s:
            return self.active_at + limit_s
        if self.c2u.held_up or self.u2c.held_up:
            return now + limit_s  # it is we who keep it waiting
        self.close(CloseReason(Who.US, Phase.IDLE))
        return 0.0

    def on_attempt_timeout(self) -> None:
        """The look-up of a name has taken too long, or no descriptor was to be had."""
        self.fail("no descriptor or no name server answered in time", Who.US)

    def arm(self, limit_s: float) -> None:
        """Have :meth:`on_timer` called within ``limit_s``; 0 is never."""
        if limit_s > 0:
            self.relay.wheel.add(self, self.relay.poller.now + limit_s)
            self.relay.tick_soon()

    def end_if_silent_for(self, limit_s: float) -> bool:
        """Whether nothing has moved for ``limit_s``; if so, it has ended."""
        is_silent = self.relay.poller.now - self.active_at >= limit_s
        if self.state is _CLOSED or not is_silent or not self.ends_by_silence:
            return False
        self.close(CloseReason(Who.US, Phase.DRAIN))
        return True

    # -- ending

    def close(self, reason: CloseReason) -> None:
        """End; what the kernel has taken it will deliver."""
        if self.state is _CLOSED:
            return
        self.state = _CLOSED
        relay = self.relay
        relay.on_end(self, reason)
        relay.wheel.discard(self)
        relay.sessions.discard(self)
        relay.datagrams_dropped += self.c2u.waiting + self.u2c.waiting
        self.c2u.src = self.u2c.src = None
        for sock in (self.client, self.upstream):
            if sock is not None:
                relay.poller.release(sock)
        relay.poller.defer(self.unlink)

    def abort(self, reason: CloseReason) -> None:
        """End; a stream on one side is reset."""
        self.close(reason)

    def unlink(self) -> None:
        """Break the reference cycles, so that the memory is free at once, without the collector.

        The place among the sessions is free only now: before, its sockets were open.
        """
        if self.held_as is not None:
            self.relay.let_go(self)
        del self.c2u.reverse, self.c2u.flow
        del self.u2c.reverse, self.u2c.flow
