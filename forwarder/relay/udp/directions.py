"""One direction of a flow: what arrives on ``src`` leaves on the other side. Four kinds of it.

============  =====================================  ======================================
              to datagrams                           to a stream
============  =====================================  ======================================
datagrams     :class:`DatagramDirection`             :class:`DatagramToStream`
a stream      :class:`StreamToDatagram`              (a stream's, see ``tcp.direction``)
============  =====================================  ======================================

What the other side does not take waits in ``pending``, and nothing more is read meanwhile: the
kernel's queue of ``src`` fills, and of datagrams that come then the kernel drops the newest. Opens
and closes nothing; the flow does.
"""

from __future__ import annotations

import select
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.net.datagrams import MAX_DATAGRAM, SLOTS, Destination
from forwarder.net.sockets import OUT_OF_RESOURCES
from forwarder.relay.poller import BROKEN, EDGE_IN, READABLE, WRITABLE
from forwarder.relay.udp import framing
from forwarder.relay.udp.trial import KEPT, Trial

if TYPE_CHECKING:
    import socket

    from forwarder.config.model import Framing
    from forwarder.limits.meter import Meter
    from forwarder.relay.workbench import Workbench

# Receives in a row before others get their turn: 256 datagrams, some 300 KB.
BATCHES_PER_TURN: Final = 4
# Datagrams kept that come through a listener while the direction is blocked; more are dropped.
MAX_PENDING: Final = 256
# The same for bytes that wait for a stream. Arbitrary; some four times what one read takes.
MAX_PENDING_BYTES: Final = 256 * 1024
# Reads of a stream in a row.
_READS_PER_TURN: Final = 16
UNLIMITED: Final = 1 << 62
# In place of an event, where a direction goes on by itself: nothing is known to be broken.
_MORE: Final = select.EPOLLIN


class Owner(Protocol):
    """The flow of two directions, which opens and closes what they move between."""

    @property
    def u2c(self) -> FlowDirection:
        """The direction from the upstream."""

    def touch(self) -> None:
        """Something arrived just now."""

    def drop(self, count: int) -> None:
        """``count`` datagrams are not passed on."""

    def on_blocked(self, direction: FlowDirection) -> None:
        """``direction``, to a UDP socket, waits: resume it when that takes more."""

    def on_report(self, number: int) -> None:
        """The upstream is not there, as this errno reports."""

    def on_stream_ended(self) -> None:
        """The stream on one side has ended, and everything from it is delivered."""

    def on_stream_broken(self, why: str) -> None:
        """The stream on one side was reset."""

    def on_bug(self) -> None:
        """An event handler failed: end, the worker goes on."""


class FlowDirection:
    """One way of a flow. ``moved`` counts bytes of payload, ``src`` is None while there is none.

    ``reverse`` is set by the flow before anything is registered. ``held_up``: the events that came
    while it waits for ``meter``, 0 if it does not. ``trial`` keeps what is sent to an upstream that
    has not answered yet; None if it has.
    """

    __slots__ = (
        "bench",
        "counted",
        "flow",
        "held_up",
        "is_queued",
        "meter",
        "moved",
        "reverse",
        "src",
        "trial",
    )

    reverse: FlowDirection
    spliced = 0  # datagrams pass through the process

    def __init__(self, bench: Workbench, flow: Owner) -> None:
        self.bench = bench
        self.flow = flow
        self.meter: Meter | None = None
        self.src: socket.SocketType | None = None
        self.moved = self.counted = 0
        self.held_up = 0
        self.is_queued = False
        self.trial: Trial | None = None

    def on_events(self, mask: int) -> None:
        """Handle events of ``src``: it feeds this direction and is fed by the reverse one."""
        self.flow.touch()
        if mask & WRITABLE:
            self.on_writable()
        if mask & READABLE and self.src is not None:
            self.pump(mask)

    def on_writable(self) -> None:
        """Let the reverse direction, which leads to ``src``, send what waits."""
        self.reverse.resume()

    def pump(self, mask: int) -> None:
        """Move what ``src`` has, if the meter of the rule lets it. ``mask``: the events seen."""
        meter = self.meter
        if meter is None:
            self.move(mask)
        elif room := meter.room(self):
            before = self.moved
            self.move(mask, room)
            meter.spend(self.moved - before)
        else:
            self.held_up |= mask

    def go_on(self, now: float) -> None:
        """The meter lets it move again."""
        mask, self.held_up = self.held_up, 0
        if self.src is not None:
            self.bench.poller.now = now
            self.flow.touch()
            self.pump(mask)

    def move(self, mask: int, room: int = UNLIMITED) -> None:
        """Move what ``src`` has, within the budget; nothing more when ``room`` bytes were moved."""
        raise NotImplementedError

    def resume(self) -> None:
        """Send what is pending, and go on reading when all of it is gone."""
        raise NotImplementedError

    @property
    def holds_data(self) -> bool:
        """Whether something was read that the other side has not taken yet."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """How many whole datagrams would be lost if the flow ended now."""
        return 0

    @property
    def held(self) -> list[bytes]:
        """What was read and not sent: datagrams, or the bytes for a stream in one piece."""
        raise NotImplementedError

    def hold(self, pieces: list[bytes]) -> None:
        """Have :attr:`held` of the same direction in another worker; it is sent when asked for."""
        raise NotImplementedError

    def yield_turn(self) -> None:
        """Let the others go on, then continue here."""
        if not self.is_queued:
            self.is_queued = True
            self.bench.poller.call_again(self)

    def on_turn(self) -> None:
        """Go on after :meth:`yield_turn`."""
        self.is_queued = False
        if self.src is not None:
            self.pump(_MORE)

    def on_report(self, number: int) -> None:
        """The peer of ``src`` is not there. For a client that does not matter."""
        if self is self.flow.u2c:
            self.flow.on_report(number)

    def on_bug(self) -> None:
        """End the flow whose event handler failed."""
        self.flow.on_bug()


class FromDatagrams(FlowDirection):
    """Directions whose ``src`` is a connected UDP socket, or that are fed by a listener."""

    __slots__ = ()

    def on_writable(self) -> None:
        """The same; then watch ``src`` for room no longer, see ``poller.EDGE_IN``."""
        self.reverse.resume()
        if self.src is not None and not self.reverse.holds_data:
            self.bench.poller.modify(self.src.fileno(), EDGE_IN)

    def take(self, first: int, last: int) -> None:
        """Send on what the listener has received for us; dropped where a meter has no room."""
        meter = self.meter
        if meter is None:
            self.deliver(first, last)
        elif meter.room_now():
            before = self.moved
            self.deliver(first, last)
            meter.spend_now(self.moved - before)
        else:
            self.flow.drop(last - first)

    def move(self, mask: int, room: int = UNLIMITED) -> None:  # noqa: ARG002 - see below
        """Move what ``src`` has: a batch at a time. The receive itself reports errors."""
        src = self.src
        if src is None or self.holds_data:
            return
        batch = self.bench.batch
        fd = src.fileno()
        enough = self.moved + room
        for _ in range(BATCHES_PER_TURN):
            count = batch.receive(fd)
            if count and not self.deliver(0, count):
                return
            if count < SLOTS:
                return
            if self.moved >= enough:
                break
        self.yield_turn()

    def deliver(self, first: int, last: int) -> bool:
        """Send slots of the worker's batch on; False if nothing more should be read now."""
        raise NotImplementedError


class DatagramDirection(FromDatagrams):
    """Datagrams to datagrams. ``to.fd`` is -1 until there is somewhere to send to."""

    __slots__ = ("pending", "to")

    def __init__(self, bench: Workbench, flow: Owner) -> None:
        super().__init__(bench, flow)
        self.to = Destination()
        self.pending: deque[bytes] | None = None

    def deliver(self, first: int, last: int) -> bool:
        """Send slots on, or keep copies while the direction is blocked."""
        batch = self.bench.batch
        self.moved += batch.total(first, last)
        if self.pending is None and self.to.fd >= 0:
            taken = batch.send(self.to, first, last)
            if self.trial is not None:
                self.trial.keep(batch.datagrams(max(first, taken - KEPT), taken))
            if taken == last:
                return True
            first = taken
        if self.pending is None:
            self.pending = deque()
            self.flow.on_blocked(self)
        found = batch.datagrams(first, last)
        if self.src is None:  # from the listener, which reads on for other flows
            room = max(0, MAX_PENDING - len(self.pending))
            self.flow.drop(len(found[room:]))
            del found[room:]
        self.pending += found
        return False

    def resume(self) -> None:
        """Send what is pending, and go on reading when all of it is gone."""
        pending = self.pending
        if pending is None or self.to.fd < 0:
            return
        if not _send_all(self, pending):
            return
        self.pending = None
        if self.src is not None:
            self.pump(_MORE)

    def detach(self, again: deque[bytes]) -> None:
        """Keep what is to be sent until there is somewhere to send it; ``again`` comes first."""
        self.to = Destination()
        if again or self.pending:
            self.pending = deque((*again, *(self.pending or ())))

    @property
    def holds_data(self) -> bool:
        """Whether datagrams wait."""
        return self.pending is not None

    @property
    def waiting(self) -> int:
        """How many datagrams would be lost if the flow ended now."""
        return len(self.pending or ())

    @property
    def held(self) -> list[bytes]:
        """As there."""
        return [*(self.pending or ())]

    def hold(self, pieces: list[bytes]) -> None:
        """As there."""
        self.pending = deque(pieces) if pieces else None


class Taker(Protocol):
    """A stream socket, as far as datagrams are written to it; never blocks."""

    def send(self, data: bytearray, /) -> int:
        """Take some bytes; returns how many. Raises OSError, BlockingIOError for none now."""


class DatagramToStream(FromDatagrams):
    """Datagrams to a stream: their bytes one after the other, framed or not."""

    __slots__ = ("_dst", "_framing", "_pending", "_unsent")

    def __init__(self, bench: Workbench, flow: Owner, how: Framing) -> None:
        super().__init__(bench, flow)
        self._framing = how
        self._dst: Taker | None = None
        self._pending = bytearray()
        self._unsent = 0  # datagrams that came before there was a destination

    def open(self, dst: Taker) -> None:
        """Send to ``dst`` from now on, what is pending first."""
        self.lead_to(dst)
        self.resume()

    def lead_to(self, dst: Taker) -> None:
        """The same, but what is pending is sent when ``dst`` is reported to take it."""
        self._dst = dst
        self._unsent = 0

    def deliver(self, first: int, last: int) -> bool:
        """Send slots on, or keep them while it is blocked; what is too much is dropped."""
        found = self.bench.batch.datagrams(first, last)
        dropped = 0
        for content in found:
            self.moved += len(content)
            if len(self._pending) + len(content) > MAX_PENDING_BYTES:
                self._send()
            if len(self._pending) + len(content) > MAX_PENDING_BYTES:
                dropped += 1
            else:
                self._pending += framing.encode(self._framing, content)
        if dropped:
            self.flow.drop(dropped)
        if self._dst is None:
            self._unsent += len(found) - dropped
        return self._send()

    def resume(self) -> None:
        """Send what is pending, and go on reading when all of it is gone."""
        if self._pending and self._send() and self.src is not None:
            self.pump(_MORE)

    def _send(self) -> bool:
        """Send as much as goes; True if nothing is left."""
        if self._dst is None or not self._pending:
            return not self._pending
        try:
            sent = self._dst.send(self._pending)
        except BlockingIOError:
            return False
        except OSError as err:
            if err.errno in OUT_OF_RESOURCES:
                return False  # with the next datagram, or event
            self._pending.clear()
            self._dst = None
            if self.reverse.src is not None:
                self.reverse.pump(_MORE)  # it may have sent something before it went
            self.flow.on_stream_broken(err.strerror or "reset")
            return False
        del self._pending[:sent]
        return not self._pending

    @property
    def holds_data(self) -> bool:
        """Whether bytes wait."""
        return bool(self._pending)

    @property
    def waiting(self) -> int:
        """As above; those that are in the stream in part are not counted."""
        return self._unsent

    @property
    def held(self) -> list[bytes]:
        """As there."""
        return [bytes(self._pending)] if self._pending else []

    def hold(self, pieces: list[bytes]) -> None:
        """As there."""
        self._pending += b"".join(pieces)


class StreamToDatagram(FlowDirection):
    """A stream to datagrams: each read is one, or each frame."""

    __slots__ = ("_pending", "decoder", "is_ended", "to")

    def __init__(self, bench: Workbench, flow: Owner, how: Framing) -> None:
        super().__init__(bench, flow)
        self.to = Destination()
        self.is_ended = False
        self.decoder = framing.decoder(how)
        self._pending: deque[bytes] = deque()

    def move(self, mask: int, room: int = UNLIMITED) -> None:
        """Read until dry, each time sending what is complete."""
        src = self.src
        if self.is_ended and mask & BROKEN:
            self.flow.on_stream_broken("reset")
        if src is None or self._pending or self.is_ended:
            return
        view = self.bench.bulk_view[:MAX_DATAGRAM]
        for _ in range(_READS_PER_TURN):
            try:
                count = src.recv_into(view)
            except BlockingIOError:
                return
            except OSError as err:
                self.flow.on_stream_broken(err.strerror or "reset")
                return
            if not count:
                self._end()
                return
            self.moved += count
            self._pending.extend(self.decoder.feed(view[:count]))
            if not self._send():
                return
            room -= count
            if room <= 0:
                break
        self.yield_turn()

    def resume(self) -> None:
        """Send what is pending, and go on reading when all of it is gone."""
        if not self._pending or not self._send():
            return
        if self.is_ended:
            self.flow.on_stream_ended()
        elif self.src is not None:
            self.pump(_MORE)

    def _end(self) -> None:
        """The stream has ended; a frame that was cut off goes with it."""
        self.is_ended = True
        if self.decoder.rest:
            self.flow.drop(1)
        if not self._pending:
            self.flow.on_stream_ended()

    def _send(self) -> bool:
        """Send as much as goes; True if nothing is left."""
        if self.to.fd >= 0:
            return _send_all(self, self._pending)
        if self._pending:
            self.flow.on_blocked(self)
        return not self._pending

    def detach(self, again: deque[bytes]) -> None:
        """Keep what is to be sent until there is somewhere to send it; ``again`` comes first."""
        self.to = Destination()
        self._pending.extendleft(reversed(again))

    @property
    def holds_data(self) -> bool:
        """Whether datagrams wait."""
        return bool(self._pending)

    @property
    def waiting(self) -> int:
        """How many datagrams would be lost if the flow ended now."""
        return len(self._pending)

    @property
    def held(self) -> list[bytes]:
        """As there."""
        return [*self._pending]

    def hold(self, pieces: list[bytes]) -> None:
        """As there."""
        self._pending.extend(pieces)


def _send_all(direction: DatagramDirection | StreamToDatagram, pending: deque[bytes]) -> bool:
    """Send what waits, in order. False if the socket of the other side is full: it is watched."""
    batch = direction.bench.batch
    while pending:
        if not batch.send_copy(direction.to, pending[0]):
            direction.flow.on_blocked(direction)
            return False
        sent = pending.popleft()
        if direction.trial is not None:
            direction.trial.keep([sent])
    return True
