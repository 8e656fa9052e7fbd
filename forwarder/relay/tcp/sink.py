"""What becomes of a direction whose destination is gone: its source is read and ignored.

Delivers nothing and ends nothing; the session does. Without it a survivor that writes before it
reads would wait for room in our queue, and never come to read what is still there for it.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from forwarder.relay.poller import ALWAYS, READABLE, WRITABLE
from forwarder.relay.tcp.direction import Direction

if TYPE_CHECKING:
    from forwarder.relay.tcp.direction import Owner
    from forwarder.relay.workbench import Workbench


class Sink(Direction):
    """A direction that drops what it reads; ``moved`` is what was moved before it came to that."""

    __slots__ = ("spliced",)

    is_sink = True

    def __init__(self, bench: Workbench, session: Owner) -> None:
        # Right for every kind of socket; and here one more call does not matter.
        super().__init__(bench, session, ALWAYS)
        self.spliced = 0

    def on_events(self, mask: int) -> None:
        """As for others, but what is dropped does not keep the session alive."""
        active_at = self.session.active_at
        super().on_events(mask)
        if not mask & WRITABLE:
            self.session.active_at = active_at

    def resume(self) -> None:
        """Begin, or go on after a turn.

        A unix peer notices a cut stream only if something of its own was not read (ADR 0007), so
        that is left until it is known that nothing was cut.
        """
        if not self.is_done and (self.src.family != socket.AF_UNIX or self.reverse.is_done):
            super().resume()

    def deliver(self, view: memoryview, count: int) -> bool:  # noqa: ARG002 - it is dropped
        """Drop what was read."""
        return True


def in_place_of(direction: Direction) -> Direction:
    """Stop ``direction`` and put a sink in its place, which begins after the events at hand.

    The sink takes its place for the events of its source and for its reverse; the caller must do so
    for the session. A unix peer can be stopped: it gets EPIPE if it sends more (unix(7)).
    """
    was_done = direction.is_done
    direction.stop()
    sink = Sink(direction.bench, direction.session)
    sink.src, sink.dst = direction.src, direction.dst
    sink.moved, sink.counted, sink.spliced = direction.moved, direction.counted, direction.spliced
    sink.reverse = direction.reverse
    sink.reverse.reverse = sink
    sink.bench.poller.hand_over(sink.src.fileno(), sink)
    if was_done:
        sink.end()
        return sink
    if sink.src.family == socket.AF_UNIX:
        with suppress(OSError):  # it is gone, too
            sink.src.shutdown(socket.SHUT_RD)
    sink.yield_turn(READABLE)
    return sink
