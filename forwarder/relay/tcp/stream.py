"""A session over TCP or unix sockets: connecting, timing, half-closing, ending.

Moves no bytes itself; its two directions do.

Theory of operation
-------------------
::

    RESOLVING --> CONNECTING --> RELAYING --> HALF_CLOSED ----------+
        |             |             |              |                v
        +-------------+-------------+--------------+-----------> CLOSED
                                    |              |                ^
                                    +--------------+-> LINGERING ---+
                                    |              |                |
                                    +--------------+-> ABORTING ----+

* CONNECTING is the dialer's; client bytes stay in the kernel meanwhile.
* HALF_CLOSED: one side sent FIN, it was passed on after the last byte (RFC 9293 section 3.6), and
  the other direction lives on, bounded by ``half_close_timeout_s`` without a byte.
* A side that was reset gets nothing any more: what the other one, the survivor, still sends is read
  and dropped (``sink``), so that the survivor comes to read. What the side had sent before is
  delivered, and ends as the side itself had ended it:

  - by FIN, before the reset: nothing was cut, so the survivor gets all of it and its FIN. While it
    has not acknowledged both, the session is LINGERING, for as long as something moves;
  - by nothing but the reset: the stream is cut, and the survivor must not take it for whole. It is
    reset, but an RST overtakes what is still in our send queue: ABORTING waits until that has been
    acknowledged, for as long as something moves.

  A unix socket has no reset, see ADR 0007, and its peer has everything at once.
"""

from __future__ import annotations

import logging
import math
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net import sockets
from forwarder.relay.poller import ALWAYS, BROKEN, READ_ON, READABLE
from forwarder.relay.session import Home, Session, SessionState
from forwarder.relay.tcp import fast_open, sink
from forwarder.relay.tcp.direction import ALWAYS_COPIES, READS_ON, Direction
from forwarder.relay.tcp.splice import SpliceDirection
from forwarder.relay.wheel import TICK_S
from forwarder.stats.reasons import CLIENT_HAD_ENDED, UPSTREAM_HAD_ENDED, CloseReason, Phase, Who

if TYPE_CHECKING:
    from forwarder.limits.meter import Meter
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.descriptors import Descriptors
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

# How long the survivor of a cut stream may take nothing of what our send queue holds. A reader of
# 5 KB/s is seen to move: its window opens again when half of a queue of 128 KiB is free.
ABORT_GRACE_S: Final = 20.0
# How often a LINGERING session checks whether it is done. Its survivor has its FIN and waits for
# nothing, so only a stop of the worker may have to wait for that.
_LINGER_LOOK_S: Final = 1.0

# Both sides have ended; the one that ended first is the cause.
_BY_CLIENT: Final = CloseReason(Who.CLIENT, Phase.DATA)
_BY_UPSTREAM: Final = CloseReason(Who.UPSTREAM, Phase.DATA)
_NOT_TAKEN: Final = CloseReason(Who.US, Phase.HALF_CLOSE, "the rest of the stream was not taken")
# As in ``session``: looking members up would cost.
_RESOLVING, _CONNECTING = SessionState.RESOLVING, SessionState.CONNECTING
_RELAYING, _HALF_CLOSED = SessionState.RELAYING, SessionState.HALF_CLOSED
_LINGERING, _ABORTING = SessionState.LINGERING, SessionState.ABORTING
_CLOSED = SessionState.CLOSED


class Depositary(Protocol):
    """See ``moving.deposits``. ``after_s``: how long a session relays before it is offered; 0: it
    is not.
    """

    after_s: float

    def offer(self, session: Stream, adoptions: int = 0, adopted_at: float = 0.0) -> None:
        """Deposit a session, if it can be; it was adopted so often, the last time then."""

    def withdraw(self, session: Stream) -> None:
        """It ends, or cannot go on elsewhere any more."""


class TcpHome(Home, Protocol):
    """A home for sessions with TCP on both sides."""

    descriptors: Descriptors

    @property
    def deposits(self) -> Depositary:
        """Who lets sessions outlive this process."""


class Stream(Session):
    """A client and its upstream. Owns both sockets from the constructor on.

    ``ending``: one side is gone by RST, and this will be the reason when all is delivered.
    ``is_shared``: the master may have its descriptors, too (see ``moving.deposits``).
    """

    __slots__ = ("client", "ending", "is_shared", "is_short", "unsent")

    relay: TcpHome
    c2u: Direction
    u2c: Direction
    takes_resets = True

    def __init__(
        self, relay: TcpHome, pool: Pool, client: socket.SocketType, client_address: SockAddr
    ) -> None:
        super().__init__(relay, pool, client_address)
        self.client = client
        self.ending: CloseReason | None = None
        self.is_short = False  # a direction waits for memory of the kernel
        self.is_shared = False
        self.unsent = 0  # in our send queues when a timeout was last looked at
        bench = relay.bench
        make = SpliceDirection if bench.has_pipes else Direction
        if bench.splices:
            read_on = ALWAYS if pool.has_unix else READS_ON
        else:
            read_on = ALWAYS_COPIES if pool.has_unix else READ_ON
        c2u = self.c2u = make(bench, self, read_on)
        u2c = self.u2c = make(bench, self, read_on)
        c2u.reverse = u2c
        u2c.reverse = c2u
        c2u.src = u2c.dst = client
        meters = relay.restrictions.meters
        if meters and pool.row in meters:
            self.put_under(meters[pool.row])
        relay.sessions[self] = None

    def local(self) -> Target:
        """The address of ours that the client is connected to. Raises OSError if it is closed."""
        return self.pool.local or sockets.bound_to(self.client)

    # -- connecting

    def make_socket(
        self, target: Target, source: SockAddr | None, *, is_rival: bool
    ) -> socket.SocketType:
        """Make a socket for ``target``, if need be of the spare descriptor."""
        make = sockets.upstream_socket if is_rival else self.relay.descriptors.upstream_socket
        return make(target, source, self.pool.how[target.family])

    def connect(self, upstream: socket.SocketType, target: Target) -> int:
        """Begin to connect, with the client's first bytes in the SYN if they may go there."""
        dialer = self.dialer
        is_fast = self.pool.opens_fast and not target.is_unix
        if not is_fast or dialer is None or not dialer.may_send_early:
            return upstream.connect_ex(target.sockaddr)
        view = self.relay.bench.bulk_view
        error, dialer.early = fast_open.connect(self.client, upstream, target.sockaddr, view)
        return error

    def on_dialing(self) -> None:
        """Watch the client, which may go while it waits."""
        self.relay.poller.register(self.client.fileno(), self.c2u)

    def on_connected(self, upstream: socket.SocketType, mask: int) -> None:
        """Relay from now on; what went with the SYN has been sent."""
        early = self.dialer.early if self.dialer is not None else 0
        self.dialer = None
        self.upstream = self.c2u.dst = self.u2c.src = upstream
        if mask & BROKEN:
            self.lose(self.c2u, "reset")
        if early:
            self.c2u.moved += early
            if self.c2u.meter is not None:
                self.c2u.meter.spend(early)
            if not fast_open.take_out(self.client, early, self.relay.bench.bulk_view):
                self.abort(CloseReason(Who.CLIENT, Phase.CONNECT, is_reset=True))
                return
        self.state = _RELAYING
        self.active_at = self.connected_at = self.relay.poller.now
        self.deadline = 0.0  # unused from here on, and a number of its own if it was used
        self.relay.books.on_open(self)
        self.relay.poller.hand_over(upstream.fileno(), self.u2c)
        self.arm(self.relay.deposits.after_s or self.pool.rule.idle_timeout_s)
        self.u2c.is_blocked = False
        self.c2u.resume()
        if mask & READABLE and not self.u2c.is_blocked:
            self.u2c.pump(mask)

    def _reset_by(self, source_of: Direction, detail: str) -> CloseReason:
        """That the source of a direction has reset its connection, now."""
        who = Who.CLIENT if source_of is self.c2u else Who.UPSTREAM
        is_half = self.state in (_HALF_CLOSED, _LINGERING)
        phase = Phase.HALF_CLOSE if is_half else Phase.DATA
        return CloseReason(who, phase, detail, is_reset=True)

    # -- limits

    def put_under(self, meters: tuple[Meter, Meter]) -> None:
        """Let both directions ask the meters of the rule. Not while an event is handled."""
        for direction, meter in zip((self.c2u, self.u2c), meters, strict=True):
            if not direction.is_sink:  # what goes nowhere uses no bandwidth
                direction.meter = meter

    # -- what the directions report

    def on_eof(self, direction: Direction) -> None:
        """``direction`` has delivered everything up to the FIN of its source."""
        reverse = direction.reverse
        if direction.is_sink:
            if reverse.is_done and self.state is not _ABORTING:
                self.close(self._ending)
            return  # else the survivor has ended, and still gets what is there
        if reverse.is_sink and not sockets.has_ended(direction.src, direction.moved):
            self._cut(direction, "reset")
            return
        if reverse.is_done:
            self.close(self.ending or (_BY_UPSTREAM if direction is self.c2u else _BY_CLIENT))
            return
        with suppress(OSError):  # ENOTCONN: reset meanwhile, which an event will report
            direction.dst.shutdown(socket.SHUT_WR)
        if reverse.is_sink:
            self._linger(direction)
        else:
            self.state = _HALF_CLOSED
            self.arm(self.pool.rule.half_close_timeout_s)

    def on_reset(self, direction: Direction, err: OSError) -> None:
        """The source of ``direction`` is gone: everything it had sent is read, nothing follows."""
        detail = err.strerror or "reset"
        if self.can_rest(err):
            direction.block()
        elif err.errno not in sockets.PEER_GONE:
            self._give_up(err)
        elif direction.is_sink:
            self._end_without_sides(direction, detail)
        else:
            self._cut(direction, detail)

    def on_undeliverable(self, direction: Direction, err: OSError) -> None:
        """The destination of ``direction`` is gone, but may have sent something before that."""
        reverse = direction.reverse
        if err.errno not in sockets.PEER_GONE:
            self._give_up(err)
            return
        if reverse.is_sink:  # it was the survivor
            self._end_without_sides(reverse, err.strerror or "reset")
            return
        self.lose(direction, err.strerror or "reset")
        if reverse.is_done:
            self._linger(reverse)
        elif reverse.is_blocked:
            reverse.missed |= READABLE
        else:
            reverse.pump(READABLE)

    def can_rest(self, err: OSError) -> bool:
        """Whether it was a lack of memory, which passes: then both directions go on a moment later.

        No event reports when it is over.
        """
        if err.errno not in sockets.OUT_OF_RESOURCES:
            return False
        self.is_short = True
        self.arm(TICK_S)
        return True

    def _give_up(self, err: OSError) -> None:
        """A socket fails though its peer is there, which must not take the stream for whole."""
        if self.state is _ABORTING:
            self.abort(self._ending)
        else:
            self.abort(CloseReason(Who.US, Phase.ERROR, err.strerror or str(err)))

    def on_broken_while_blocked(self, direction: Direction) -> None:
        """The source of ``direction`` is gone while nothing may be read from it."""
        if self.state is _CONNECTING:
            # What it has sent before that is acknowledged, and so ours to deliver; but not for the
            # price of a place in the queue, and then at a server, that another client may have.
            is_free = not sockets.received_bytes(direction.src)
            if is_free or self.relay.servers.has_in_queue(self.dialer):
                self.abort(CloseReason(Who.CLIENT, Phase.CONNECT, is_reset=True))
        elif direction.is_sink:
            self._end_without_sides(direction, "reset")
        elif self.ending is None and self.state in (_RELAYING, _HALF_CLOSED):
            self.lose(direction.reverse, "reset")
            if direction.is_done:
                self._linger(direction)
            # else it delivers what that side had sent first, if the survivor takes it

    # -- when one side is gone

    def lose(self, direction: Direction, detail: str) -> None:
        """The destination of ``direction`` is gone by RST: what its source sends is dropped."""
        if self.is_shared:
            self.relay.deposits.withdraw(self)
        self.ending = self._reset_by(direction.reverse, detail)
        dropping = sink.in_place_of(direction)
        if direction is self.c2u:
            self.c2u = dropping
        else:
            self.u2c = dropping
        self.arm(self.pool.rule.half_close_timeout_s)

    def _cut(self, direction: Direction, detail: str) -> None:
        """All is read that the source of ``direction`` had sent before its reset, and no FIN."""
        if self.ending is None:
            self.lose(direction.reverse, detail)
        direction.stop()
        survivor = direction.dst
        sockets.set_abort_on_close(survivor)
        # The peer of a unix socket has all in its own queue, and no reset overtakes that. An MPTCP
        # socket whose peer knows TCP only counts a byte too many until something is sent.
        is_sent = survivor.family == socket.AF_UNIX or not direction.moved
        self.unsent = 0 if is_sent else sockets.unsent_bytes(survivor)
        if self.unsent:
            self._wait_for_survivor(_ABORTING, ABORT_GRACE_S)
        else:
            self.close(self._ending)

    def _linger(self, direction: Direction) -> None:
        """``direction`` is done up to the FIN that its source had sent before it was reset.

        A survivor that has acknowledged all, FIN included, gets the reset as it would directly. One
        that has not is slow: a reset right after the last byte would take from it, on systems other
        than Linux, what its program has not read yet. It is spared, and gets the reset when it
        sends something more.
        """
        survivor = direction.dst
        if survivor.family == socket.AF_UNIX:
            # It has all in its own queue, and would find an error in place of the end of file
            # behind it if we closed with something unread; so the sink reads to an end.
            self.state = _LINGERING
            direction.reverse.pump(READABLE)
            return
        self.unsent = sockets.unsent_bytes(survivor)
        if self.unsent:
            self._wait_for_survivor(_LINGERING, self.pool.rule.half_close_timeout_s or math.inf)
        else:
            sockets.set_abort_on_close(survivor)
            self.close(self._ending)

    def _wait_for_survivor(self, state: SessionState, limit_s: float) -> None:
        self.state = state
        self.deadline = self.relay.poller.now + limit_s
        self.arm(TICK_S)

    def _end_without_sides(self, survivors: Direction, detail: str) -> None:
        """The survivor is gone, too, the source of the sink ``survivors``."""
        if self.state is _LINGERING:  # only it has cut anything
            self.ending = self._reset_by(survivors, detail)
        self.abort(self._ending)

    @property
    def _ending(self) -> CloseReason:
        assert self.ending is not None  # noqa: S101 - used only when one side is gone
        return self.ending

    # -- timers

    def on_timer(self, now: float) -> float:
        """End this session if it is overdue; returns its next deadline, 0 for none."""
        rule = self.pool.rule
        if not self.is_shared:
            self.relay.deposits.offer(self)
        if self.is_short:
            self.is_short = False
            self.c2u.resume()
            self.u2c.resume()
        if self.state is _RELAYING and self.ending is None:
            return self._check_silence(now, rule.idle_timeout_s, Phase.IDLE)
        if self.state in (_RELAYING, _HALF_CLOSED):
            return self._check_silence(now, rule.half_close_timeout_s, Phase.HALF_CLOSE)
        if self.state is _ABORTING:
            return self._check_survivor(now, ABORT_GRACE_S, TICK_S)
        if self.state is _LINGERING:
            return self._check_survivor(now, rule.half_close_timeout_s or math.inf, _LINGER_LOOK_S)
        if self.dialer is not None:
            return self.dialer.on_timer(now)
        return self.check_resolving(now) if self.state is _RESOLVING else 0.0

    def _check_silence(self, now: float, limit_s: float, phase: Phase) -> float:
        """End a session in which nothing has moved for ``limit_s``; 0 is no limit.

        Data that leaves our send queue moves too, though it causes no event. A FIN would make a
        stream look whole of which we still hold a part, so it is aborted then.
        """
        deadline = self.active_at + limit_s
        if not limit_s:
            return 0.0
        if now < deadline:
            return deadline
        if self.c2u.is_held_up or self.u2c.is_held_up:
            return now + limit_s  # we keep it waiting
        unsent = self._unsent()
        if unsent and unsent != self.unsent:
            self.unsent = unsent
            return now + limit_s
        if phase is Phase.IDLE and not (self.c2u.holds_data or self.u2c.holds_data):
            self.close(CloseReason(Who.US, phase))
        elif self.state is _HALF_CLOSED and self.ending is None:
            self.abort(CLIENT_HAD_ENDED if self.c2u.is_done else UPSTREAM_HAD_ENDED)
        else:
            self.abort(CloseReason(Who.US, phase))
        return 0.0

    def _check_survivor(self, now: float, limit_s: float, look_s: float) -> float:
        """Whether the survivor has all; it may take nothing for ``limit_s`` at most."""
        unsent = self._unsent()
        if not unsent:
            self.close(self._ending)
            return 0.0
        if unsent != self.unsent:
            self.unsent = unsent
            self.deadline = now + limit_s
        elif now >= self.deadline:
            self.abort(_NOT_TAKEN if self.state is _LINGERING else self._ending)
            return 0.0
        return now + look_s

    def _unsent(self) -> int:
        """What is still in our send queues; nothing in that of a socket that is closed."""
        socks = (self.client, self.upstream)
        return sum(sockets.unsent_bytes(sock) for sock in socks if sock and sock.fileno() >= 0)

    # -- ending

    def close(self, reason: CloseReason) -> None:
        """End by FIN on both sides; all bytes are delivered, or the kernel will deliver them."""
        self._end(reason)
        self._finish()

    def abort(self, reason: CloseReason) -> None:
        """End by RST on both sides, now."""
        if self.state is _CLOSED:
            return
        for sock in (self.client, self.upstream):
            if sock is not None and sock.fileno() >= 0:
                sockets.set_abort_on_close(sock)
        self._end(reason)
        self._finish()

    def _end(self, reason: CloseReason) -> None:
        """Stop both directions and report the end."""
        if self.is_shared:  # first: it must not go on elsewhere if we are killed from here on
            self.relay.deposits.withdraw(self)
        self.c2u.stop()
        self.u2c.stop()
        self.relay.books.on_end(self, reason)

    def _finish(self) -> None:
        """Give everything back. After this batch nothing refers to the session any more."""
        self.state = _CLOSED
        if self.dialer is not None:
            self.dialer.close(is_abort=True)
            self.dialer = None
        relay = self.relay
        relay.bench.wheel.discard(self)
        relay.sessions.pop(self, None)
        release = relay.poller.release_shared if self.is_shared else relay.poller.release
        release(self.client)
        if self.upstream is not None:
            release(self.upstream)
        relay.poller.defer(self.unlink)

    def unlink(self) -> None:
        """As there; the two directions are its cycles."""
        super().unlink()
        del self.c2u.reverse, self.c2u.session
        del self.u2c.reverse, self.u2c.session
