"""One way of a session: bytes that arrive on ``src`` leave on ``dst``, by copying.

Does not connect, has no timers and does not close sockets; that is the session's. ``splice`` adds
the way without copies for bulk.

Theory of operation
-------------------
A direction is *open* or *blocked*::

              src readable: read, send
             +----+
             v    |          dst took less than was read, or the budget is used up
           +--------+ ------------------------------------------------------> +---------+
           |  open  |                                                         | blocked |
           +--------+ <------------------------------------------------------ +---------+
                |             dst writable again and nothing left to send          ^
                | end of file on src: half-close dst                               |
                +------------------------------------------------------------------+
                                          (for good: ``is_done``)

It also starts blocked, until the upstream is connected; and it is blocked while it waits for the
meter of a rule with a bandwidth. Meanwhile nothing is read, so the kernel's window closes and the
sender waits: that is the backpressure, and the bound on memory. The events that arrive are kept in
``missed``, because an edge is reported only once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from forwarder.relay.poller import ALWAYS, BROKEN, READ_ON, READABLE, URGENT, WRITABLE
from forwarder.relay.workbench import SMALL_BYTES

if TYPE_CHECKING:
    import socket

    from forwarder.limits.meter import Meter
    from forwarder.relay.workbench import Workbench

# What a direction may move before the others of this worker get their turn.
BUDGET_BYTES: Final = 1024 * 1024
# Bits that no event has (epoll_ctl(2) ends at bit 31). Each saves every direction a slot, and an
# open session 16 bytes. In ``read_on``: splice(2) may be tried.
SPLICES: Final = 1 << 40
# One number for all directions of TCP: computed for each it would take 32 bytes in each.
READS_ON: Final = READ_ON | SPLICES
ALWAYS_COPIES: Final = ALWAYS & ~SPLICES
# In place of ``missed``: nothing follows. It has all bits, so no event that is added changes it.
_DONE: Final = -1


class Owner(Protocol):
    """The session of two directions. ``active_at``: when something last arrived."""

    active_at: float

    def on_eof(self, direction: Direction) -> None:
        """``direction`` has delivered everything up to the FIN of its source."""

    def on_reset(self, direction: Direction, err: OSError) -> None:
        """The source of ``direction`` fails; everything it had sent before is read."""

    def on_undeliverable(self, direction: Direction, err: OSError) -> None:
        """The destination of ``direction`` fails, with something that it has not taken."""

    def can_rest(self, err: OSError) -> bool:
        """Whether an error passes by itself; then both directions are resumed a moment later."""

    def on_broken_while_blocked(self, direction: Direction) -> None:
        """The source of ``direction`` is gone while nothing may be read from it."""

    def on_bug(self) -> None:
        """An event handler failed: end, the worker goes on."""


class Direction:
    """One way of a session. ``moved`` counts bytes read from ``src``; ``counted`` is the books'.

    The session owns both sockets and sets ``src``, ``dst`` and ``reverse``, the last two before the
    direction is first unblocked. ``meter`` is None where the rule has no bandwidth.

    ``read_on`` are the events with which a short read does not mean that ``src`` is dry. A unix
    stream keeps what was sent together with descriptors apart: a read stops behind it, short,
    though more is there (unix(7)). No further edge would report the rest, so where a side is a unix
    socket every read goes on until the socket says that it is empty: one system call more than for
    TCP, for each message. The kernel drops the descriptors, as the relay does not ask for them.
    It also has SPLICES until splice(2) is found not to do here.
    """

    __slots__ = (
        "bench",
        "counted",
        "dst",
        "is_blocked",
        "is_bulk",
        "is_queued",
        "meter",
        "missed",
        "moved",
        "pending",
        "read_on",
        "reverse",
        "session",
        "src",
    )

    src: socket.SocketType
    dst: socket.SocketType
    reverse: Direction
    budget_bytes: int = BUDGET_BYTES
    """What it may move before it yields; a meter lets it move less."""
    spliced: int = 0
    """The bytes moved that never entered the process and are not in the books yet."""
    is_sink: bool = False
    """Whether it drops what it reads: see ``sink``."""

    def __init__(self, bench: Workbench, session: Owner, read_on: int = READS_ON) -> None:
        self.bench = bench
        self.session = session
        self.read_on = read_on
        self.meter: Meter | None = None
        self.is_blocked = True
        self.is_bulk = False
        self.is_queued = False
        self.missed = 0
        self.moved = self.counted = 0
        self.pending: memoryview | None = None

    def on_events(self, mask: int) -> None:
        """Handle events of ``src``: it feeds this direction and is fed by the reverse one."""
        self.session.active_at = self.bench.poller.now
        reverse = self.reverse
        if mask & WRITABLE and reverse.is_blocked:
            reverse.resume()
        if mask & URGENT:
            self.read_on &= ~SPLICES  # splice stops in front of an urgent byte
        if self.is_blocked:
            self.missed |= mask
            if mask & BROKEN:
                self.session.on_broken_while_blocked(self)
        elif mask & READABLE:
            self.pump(mask)

    def resume(self) -> None:
        """Send what is left and go on reading, if ``dst`` takes it."""
        if not self.is_blocked or self.missed == _DONE:
            return
        if (self.meter is not None and self.is_held_up) or not self.flush():
            return
        self.is_blocked = False
        mask = self.missed
        if mask & READABLE:
            self.missed = 0
            self.pump(mask)

    def pump(self, mask: int, room: int = 0) -> None:
        """Move what ``src`` has, small or bulk, within the budget. ``mask``: the events seen.

        ``room`` is what the meter lets it move; 0: there is no meter, or it has to be asked.
        """
        if self.meter is not None and not room:
            self._ask(self.meter, mask)
            return
        if self.is_bulk:
            self.pump_bulk(mask, room)
            return
        view = self.bench.small_view
        while True:
            try:
                count = self.src.recv_into(view)
            except BlockingIOError:
                return
            except OSError as err:
                self.session.on_reset(self, err)
                return
            if not count:
                self.on_eof()
                return
            if not self.deliver(view, count):
                return
            if count == SMALL_BYTES:
                self.is_bulk = True
                self.pump_bulk(mask, room)
                return
            if not mask & self.read_on:
                return

    def pump_bulk(self, mask: int, room: int) -> None:
        """Move bulk until ``src`` runs dry, ``dst`` is full or the budget is used up."""
        view = self.bench.bulk_view
        budget = whole = self.budget_bytes
        if room:
            view = view[:room]
            budget = whole = room
        while budget > 0:
            try:
                count = self.src.recv_into(view)
            except BlockingIOError:
                self.is_bulk = budget < whole - SMALL_BYTES
                return
            except OSError as err:
                self.session.on_reset(self, err)
                return
            if not count:
                self.on_eof()
                return
            if not self.deliver(view, count):
                return
            if count < len(view) and not mask & self.read_on:
                self.is_bulk = count >= SMALL_BYTES or budget < whole
                return
            budget -= count
        self.yield_turn(mask)

    def deliver(self, view: memoryview, count: int) -> bool:
        """Send the first ``count`` bytes of ``view``; False if the direction has to stop here."""
        self.moved += count
        try:
            sent = self.dst.send(view[:count])
        except BlockingIOError:
            sent = 0
        except OSError as err:
            if not self.session.can_rest(err):
                self.session.on_undeliverable(self, err)
                return False
            sent = 0
        if sent == count:
            return True
        self.keep(view[sent:count])
        self.block()
        return False

    def keep(self, rest: memoryview) -> None:
        """Keep what ``dst`` did not take; ``rest`` is scratch space."""
        self.pending = memoryview(bytes(rest))

    def flush(self) -> bool:
        """Send what a short send left behind; False if some of it is still left."""
        pending = self.pending
        if pending is None:
            return True
        try:
            sent = self.dst.send(pending)
        except BlockingIOError:
            return False
        except OSError as err:
            if not self.session.can_rest(err):
                self.session.on_undeliverable(self, err)
            return False
        if sent < len(pending):
            self.pending = pending[sent:]
            return False
        self.pending = None
        return True

    def _ask(self, meter: Meter, mask: int) -> None:
        """Pump as far as the meter lets it, and go on when it lets it again."""
        room = meter.room(self)
        if not room:
            self.is_blocked = True
            self.missed |= mask | READABLE
            return
        if room < SMALL_BYTES:
            self.is_bulk = True  # a read of what is quiet takes more than that
        before = self.moved
        self.pump(mask, room)
        meter.spend(self.moved - before)

    @property
    def is_held_up(self) -> bool:
        """Whether it waits for its meter; only the meter ends that."""
        return self.meter is not None and self.meter.holds_up(self)

    def go_on(self, now: float) -> None:
        """The meter lets it move again."""
        # We kept it waiting: that is no silence of its ends.
        self.session.active_at = self.bench.poller.now = now
        self.resume()

    @property
    def is_done(self) -> bool:
        """Whether it is blocked for good: it has delivered everything, or was stopped."""
        return self.missed == _DONE

    def end(self) -> None:
        """Block it for good."""
        self.is_blocked = True
        self.missed = _DONE

    @property
    def holds_data(self) -> bool:
        """Whether something was read that ``dst`` has not taken yet."""
        return self.pending is not None

    def block(self) -> None:
        """Stop reading until ``dst`` is writable. ``src`` may hold more, so look at it then."""
        self.is_blocked = True
        self.missed |= READABLE

    def yield_turn(self, mask: int) -> None:
        """Let the others go on, then continue here."""
        self.is_blocked = True
        self.missed |= mask | READABLE
        if not self.is_queued:  # an event may have resumed it since it was queued
            self.is_queued = True
            self.bench.poller.call_again(self)

    def on_turn(self) -> None:
        """Go on after :meth:`yield_turn`."""
        self.is_queued = False
        self.resume()

    def on_eof(self) -> None:
        """``src`` has sent its FIN and everything is delivered: pass the half-close on."""
        self.end()
        self.session.on_eof(self)

    def stop(self) -> None:
        """Never read again, nor wait for the meter; drop what could not be sent."""
        if self.meter is not None:
            self.meter.forget(self)
        self.end()
        self.pending = None

    def on_bug(self) -> None:
        """End the session whose event handler failed."""
        self.session.on_bug()
