"""A session with UDP on at least one side: its two directions, its timers, its end.

Moves no datagrams itself; its directions do. ``client_flow`` and ``bridge`` add how the sides are
opened.

Theory of operation
-------------------
::

    RESOLVING --> CONNECTING <-> OPEN --> CLOSED
        |             |                     ^
        +-------------+---------------------+

UDP has no connections, so where the upstream is reached by UDP CONNECTING is passed at once, and
again when it is left for another one. What the client sends before OPEN waits in its direction. A
flow ends when nothing has moved in either direction for a while, which only a timer notices; when a
stream on one side ends; or when it is the one that has been silent longest and there are too many.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net import sockets, udp
from forwarder.relay.poller import EDGE_IN, WRITABLE
from forwarder.relay.session import Home, Session, SessionState
from forwarder.relay.udp.directions import DatagramDirection, StreamToDatagram
from forwarder.relay.udp.trial import Trial
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import CloseReason, Phase, Who
from forwarder.stats.rows import connect_bucket

if TYPE_CHECKING:
    import socket

    from forwarder.limits.meter import Meter
    from forwarder.net.datagrams import Destination
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.descriptors import Descriptors
    from forwarder.relay.udp.directions import FlowDirection
    from forwarder.relay.udp.flow_tables import FlowTables
    from forwarder.upstream.pool import Pool


# As in ``session``: looking members up would cost.
_RESOLVING, _OPEN, _CLOSED = SessionState.RESOLVING, SessionState.OPEN, SessionState.CLOSED
# Not joined by |, which would make a type each time.
_BY_UDP: Final = (DatagramDirection, StreamToDatagram)


class UdpHome(Home, Protocol):
    """A home for flows."""

    descriptors: Descriptors
    flows: FlowTables


class Flow(Session):
    """One flow. Owns its sockets from when they are set until it has ended.

    ``c2u`` and ``u2c`` are made by the subclass. ``is_shared``: another process may have the
    sockets, too, as this has come from there.
    """

    __slots__ = ("client", "has_waited", "is_shared", "refusal")

    is_answered = False
    relay: UdpHome
    c2u: FlowDirection
    u2c: FlowDirection

    def __init__(self, relay: UdpHome, pool: Pool, client_address: SockAddr) -> None:
        super().__init__(relay, pool, client_address)
        self.client: socket.SocketType | None = None
        self.has_waited = False  # for a descriptor or a port, since it began to connect
        self.refusal = 0  # errno reported of the upstream, until it is handled
        self.is_shared = False
        relay.sessions[self] = None

    def join(self, c2u: FlowDirection, u2c: FlowDirection) -> None:
        """Set the two directions."""
        self.c2u, self.u2c = c2u, u2c
        c2u.reverse, u2c.reverse = u2c, c2u
        meters = self.relay.restrictions.meters
        if meters and self.pool.row in meters:
            self.put_under(meters[self.pool.row])

    def put_under(self, meters: tuple[Meter, Meter]) -> None:
        """Let both directions ask the meters of the rule."""
        self.c2u.meter, self.u2c.meter = meters

    # -- opening

    def on_starved(self) -> None:
        """Descriptors come back: after this batch, if a flow has made room, else some time."""
        if self.relay.descriptors.make_room(keep=self) and not self.has_waited:
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
        """Go on after one of the above, a report, or with what has nowhere to go to."""
        if self.dialer is not None:
            self.dialer.on_turn()
        elif self.state is _OPEN and self.refusal:
            self._on_refused()
        elif self.state is _OPEN and self.is_detached and self.c2u.holds_data:
            self._go_elsewhere()

    def on_open(self) -> None:
        """Both sides are there, for the first time or with another upstream."""
        self.state = _OPEN
        self.has_waited = False
        self.relay.flows.ports.take(self.pool)
        self.active_at = self.relay.poller.now
        self.arm(self.silence_limit_s)
        if not self.connected_at:
            self.connected_at = self.active_at
            self.relay.books.on_open(self)
        if self.server is not None and not self.is_answered and self.c2u.trial is None:
            self.server.counts[connect_bucket(0.0)] += 1

    # -- an upstream that is reached by UDP, as all are unless a subclass says otherwise

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """Make a socket that is connected to ``target``; nothing is sent by that."""
        del is_rival  # nothing is raced where nothing answers
        sock = udp.upstream_socket(target, source, self.pool.how[target.family])
        if sockets.has_met_itself(sock, target):
            sock.close()
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return sock

    def connect(self, upstream: socket.SocketType, target: Target) -> int:
        """It is connected; watch it."""
        del target
        self.relay.poller.register(upstream.fileno(), self.u2c, EDGE_IN)
        return 0

    def join_upstream(
        self, upstream: socket.SocketType, to: Destination, *, gathers: bool = True
    ) -> None:
        """Use ``upstream``, which is watched, by UDP from now on.

        It is on trial if there are others, or some have failed.

        ``gathers``: the kernel may hand over several datagrams as one.
        """
        c2u = self.c2u
        assert isinstance(c2u, _BY_UDP)  # noqa: S101 - by UDP
        has_others = self.dialer is not None and self.dialer.has_others
        self.dialer = None
        self.upstream = self.u2c.src = upstream
        if gathers:
            self.relay.bench.batch.prepare(upstream)
        c2u.to = to
        c2u.trial = Trial(self) if has_others or self.pool.failures.known else None
        if c2u.trial is not None:
            self.relay.poller.hand_over(upstream.fileno(), c2u.trial)

    def on_answer(self) -> None:
        """The upstream, which was on trial, has answered."""
        upstream = self.upstream
        self.c2u.trial = None
        if upstream is not None and self.target is not None:
            relay = self.relay
            relay.poller.hand_over(upstream.fileno(), self.u2c)
            relay.outages.on_attempt_worked(self.pool, self.target)
            if self.server is not None:
                took_s = relay.poller.now - self.active_at
                self.server.counts[connect_bucket(took_s)] += 1

    def on_report(self, number: int) -> None:
        """The upstream refuses; reported within a send or a receive."""
        if self.state is _OPEN and not self.refusal:
            self.refusal = number
            self.relay.poller.call_again(self)

    def _on_refused(self) -> None:
        """Leave an upstream that refuses: at once with what it has not answered, else later.

        If there is no other one, or all have refused just now, it stays. What it has not answered
        is kept if a name may still bring another one: see :meth:`follow`.

        A socket whose interface was removed says nothing of the upstream: it is left for a new one
        as soon as the interface is there again, until when it drops what it gets.
        """
        number, self.refusal = self.refusal, 0
        target, upstream, relay = self.target, self.upstream, self.relay
        if target is None or upstream is None:
            return
        again = self.c2u.trial.take() if self.c2u.trial is not None else deque()
        if sockets.has_lost_interface(upstream):
            may_leave = self.pool.has_own_interfaces and bool(self.pool.targets())
        else:
            why = os.strerror(number)
            relay.outages.on_attempt_failed(self.pool, target, why, has_others=True)
            if self.server is not None and self._spent(relay.servers.choosing(self.pool)):
                relay.servers.on_failed(self.server)
            may_leave = self._has_other_than(target)
        if may_leave:
            self.move_on(again)
            return
        if self.c2u.trial is None:
            self.c2u.trial = Trial(self)
            relay.poller.hand_over(upstream.fileno(), self.c2u.trial)
        if self.pool.has_unanswered:
            self.c2u.trial.keep(again)

    def _has_other_than(self, target: Target) -> bool:
        """Whether there is another upstream that has not failed just now."""
        now = self.relay.poller.now
        pool = self.relay.servers.choosing(self.pool)
        return any(
            other != target and self.pool.failures.is_worth_a_try(other, now)
            for other in pool.choosable()
        )

    def move_on(self, again: deque[bytes]) -> None:
        """Take another upstream as soon as there is something to send to it, perhaps ``again``.

        What the old one still sends until then is passed on.
        """
        c2u = self.c2u
        assert isinstance(c2u, _BY_UDP)  # noqa: S101 - by UDP
        c2u.detach(again)
        if c2u.holds_data:
            self._go_elsewhere()

    def follow(self) -> None:
        """Names have other addresses: leave one that is none of them, at the next datagram.

        And one that refuses, if there is another one now, with what it has not answered.
        """
        target = self.target
        if self.state is not _OPEN or target is None or self.is_detached:
            return
        pool, trial = self.pool, self.c2u.trial
        if not pool.rule.protocol.connects_by_udp:
            return
        if not self.relay.servers.choosing(pool).leads_to(target):
            self.move_on(deque())
        elif trial is not None and target in pool.failures.known and self._has_other_than(target):
            self.move_on(trial.take())

    def leave_if_down(self) -> None:
        """Take another server at the next datagram if this one is down, and others are used."""
        server = self.server
        if server is None or self.state is not _OPEN:
            return
        pool = self.relay.servers.in_force(self.pool)
        balancer = None if pool is None else pool.balancer
        if balancer is None or not balancer.is_down(server):
            return
        usable = balancer.usable
        is_used = server in balancer.servers and usable >> server.index & 1
        if not usable or is_used:  # the latter: there are too few others
            return
        if self.pool.rule.protocol.connects_by_udp and not self.is_detached:
            self.move_on(deque())

    def _go_elsewhere(self) -> None:
        upstream = self.upstream
        now = self.relay.poller.now
        server, pool = self.server, self.relay.servers.choosing(self.pool)
        targets = sorted(  # stable, so that they still have their turns
            pool.targets() or (),
            key=lambda target: (
                target == self.target,
                not self.pool.failures.is_worth_a_try(target, now),
            ),
        )
        if not targets or upstream is None:
            self.fail("there is no other upstream address")
            return
        self.refusal = 0  # it is not that of the next one
        self.relay.flows.ports.give(self.pool)
        self._release(upstream)
        self.upstream = self.u2c.src = None
        spent = self._spent(pool)
        if server is not None:
            self.server = None
            self.relay.servers.give_back(self.pool, server)
        if pool.balancer is None:
            self.dial(tuple(targets))
        else:
            self.choose(spent, pool)

    def _spent(self, pool: Pool) -> int:
        """Its server, as a set of bits, unless that has another address to try.

        ``pool`` is where it will choose.
        """
        server, failures, now = self.server, self.pool.failures, self.relay.poller.now
        if server is None or pool.balancer is None or server not in pool.balancer.servers:
            return 0
        own = pool.addresses[server.index] or ()
        others = [one for one in own if one != self.target]
        if len(others) == len(own) or any(failures.is_worth_a_try(one, now) for one in others):
            return 0
        return 1 << server.index

    @property
    def is_detached(self) -> bool:
        """Whether it takes another upstream as soon as there is something to send to it."""
        c2u = self.c2u
        return isinstance(c2u, _BY_UDP) and c2u.to.fd < 0

    # -- what the directions report

    def touch(self) -> None:
        """Something arrived just now."""
        self.active_at = self.relay.poller.now

    def drop(self, count: int) -> None:
        """Count datagrams that are not passed on."""
        self.relay.books.drop_datagrams(self.pool, count)

    def on_blocked(self, direction: FlowDirection) -> None:
        """``direction``, to a UDP socket, waits until that takes more or there is another one."""
        if direction is self.c2u and self.is_detached:
            if self.state is _OPEN:
                self.relay.poller.call_again(self)
            return
        sock = self._end_of(direction)
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
        """Whether no side will report the end."""
        return True

    def on_timer(self, now: float) -> float:
        """End this flow if it is overdue; returns its next deadline, 0 for none."""
        if self.dialer is not None:
            return self.dialer.on_timer(now)
        if self.state is _RESOLVING:
            return self.check_resolving(now)
        limit_s = self.silence_limit_s
        if self.state is not _OPEN or not limit_s:
            return 0.0
        if now < self.active_at + limit_s:
            return self.active_at + limit_s
        if self.c2u.held_up or self.u2c.held_up:
            return now + limit_s  # we keep it waiting
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
    def to_stream(self) -> FlowDirection | None:
        """The direction that leads to a stream; None where both sides are UDP."""
        return None

    def close(self, reason: CloseReason) -> None:
        """End; what the kernel has taken it will deliver. A stream that lacks a part is reset."""
        if self.state is _CLOSED:
            return
        if self.to_stream is not None and self.to_stream.holds_data:
            self._reset_stream(self.to_stream)
        if self.state is _OPEN:
            self.relay.flows.ports.give(self.pool)
        self.state = _CLOSED
        relay = self.relay
        relay.books.on_end(self, reason)
        if self.dialer is not None:
            self.dialer.close(is_abort=False)
            self.dialer = None
        relay.bench.wheel.discard(self)
        relay.sessions.pop(self, None)
        self.drop(self.c2u.waiting + self.u2c.waiting)
        self.c2u.src = self.u2c.src = None
        for sock in (self.client, self.upstream):
            if sock is not None:
                self._release(sock)
        relay.poller.defer(self.unlink)

    def _release(self, sock: socket.SocketType) -> None:
        poller = self.relay.poller
        (poller.release_shared if self.is_shared else poller.release)(sock)

    def abort(self, reason: CloseReason) -> None:
        """End; a stream on one side is reset: no clean end for one that was cut."""
        if self.state is not _CLOSED and self.to_stream is not None:
            self._reset_stream(self.to_stream)
        self.close(reason)

    def _reset_stream(self, direction: FlowDirection) -> None:
        sock = self._end_of(direction)
        if sock is not None and sock.fileno() >= 0:
            sockets.set_abort_on_close(sock)

    def _end_of(self, direction: FlowDirection) -> socket.SocketType | None:
        """Where a direction leads to."""
        return self.upstream if direction is self.c2u else self.client

    def unlink(self) -> None:
        """As there; the two directions are its cycles."""
        super().unlink()
        self.c2u.trial = None
        del self.c2u.reverse, self.c2u.flow
        del self.u2c.reverse, self.u2c.flow
