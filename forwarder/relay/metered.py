"""Directions whose rule has a bandwidth: as the others, but they ask a meter before they move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.relay.direction import Direction
from forwarder.relay.poller import READABLE
from forwarder.relay.splice import SpliceDirection
from forwarder.relay.unix import UnixDirection, UnixSpliceDirection

if TYPE_CHECKING:
    from forwarder.relay.meter import Meter


class Metered(Direction):
    """The part that is the same for all of them; its place is in front of the direction itself.

    Without slots: two bases that both have some cannot be joined, and these are few.
    """

    meter: Meter

    def pump(self, mask: int) -> None:
        """Move what ``src`` has, as far as the meter lets it, and go on when it lets it again."""
        room = self.meter.room(self)
        if not room:
            self.is_blocked = True
            self.missed |= mask | READABLE
            return
        self.budget_bytes = self.chunk_bytes = room
        before = self.moved
        super().pump(mask)
        self.meter.spend(self.moved - before)

    def go_on(self) -> None:
        """The meter lets it move again."""
        if not self.is_done:
            # It was we who kept it waiting: that is no silence of its ends.
            self.session.active_at = self.relay.poller.now
            self.resume()


class MeteredDirection(Metered):
    """By copying."""


class MeteredSpliceDirection(Metered, SpliceDirection):
    """Bulk without copies."""


class MeteredUnixDirection(Metered, UnixDirection):
    """By copying, with a unix socket on one side."""


class MeteredUnixSpliceDirection(Metered, UnixSpliceDirection):
    """Bulk without copies, with a unix socket on one side."""
