"""Directions whose rule has a bandwidth: as the others, but they ask a meter before they move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.relay.poller import READABLE
from forwarder.relay.tcp.direction import Direction
from forwarder.relay.tcp.splice import SpliceDirection
from forwarder.relay.tcp.unix import UnixDirection, UnixSpliceDirection
from forwarder.relay.workbench import SMALL_BYTES

if TYPE_CHECKING:
    from forwarder.limits.meter import Meter


class Metered(Direction):
    """The part that is the same for all of them; its place is in front of the direction itself.

    ``paid`` is up to which byte the meter was told of. Without slots: two bases that both have some
    cannot be joined, and these are few.
    """

    meter: Meter
    paid: int = 0

    def pump(self, mask: int) -> None:
        """Move what ``src`` has, as far as the meter lets it, and go on when it lets it again."""
        room = self.meter.room(self)
        if not room:
            self.is_blocked = self.is_held_up = True
            self.missed |= mask | READABLE
            return
        self.budget_bytes = self.chunk_bytes = room
        if room < SMALL_BYTES:
            self.is_bulk = True  # a read of what is quiet takes more than that
        super().pump(mask)
        self._pay()

    def resume(self) -> None:
        """As for the others, but nobody else ends the wait for the meter."""
        if not self.is_held_up:
            super().resume()

    def go_on(self, now: float) -> None:
        """The meter lets it move again."""
        self.is_held_up = False
        # It was we who kept it waiting: that is no silence of its ends.
        self.session.active_at = self.bench.poller.now = now
        self.resume()

    def stop(self) -> None:
        """Never read again, nor wait for the meter."""
        self.meter.forget(self)
        self.is_held_up = False
        super().stop()

    def _pay(self) -> None:
        unpaid = self.moved - self.paid
        if unpaid > 0:
            self.paid = self.moved
            self.meter.spend(unpaid)


class MeteredDirection(Metered):
    """By copying."""


class MeteredSpliceDirection(Metered, SpliceDirection):
    """Bulk without copies."""


class MeteredUnixDirection(Metered, UnixDirection):
    """By copying, with a unix socket on one side."""


class MeteredUnixSpliceDirection(Metered, UnixSpliceDirection):
    """Bulk without copies, with a unix socket on one side."""


_KINDS: Final[dict[type[Direction], type[Metered]]] = {
    Direction: MeteredDirection,
    SpliceDirection: MeteredSpliceDirection,
    UnixDirection: MeteredUnixDirection,
    UnixSpliceDirection: MeteredUnixSpliceDirection,
}


def metered(direction: Direction, meter: Meter) -> Direction:
    """A direction in place of ``direction``, in the same state, that asks ``meter``."""
    if isinstance(direction, Metered):
        direction.meter = meter
        return direction
    if direction.is_sink:
        return direction  # what goes nowhere uses no bandwidth
    kind = _KINDS[type(direction)]
    new = kind.__new__(kind)
    for base in type(direction).__mro__:
        for name in getattr(base, "__slots__", ()):
            if hasattr(direction, name):
                setattr(new, name, getattr(direction, name))
    new.meter = meter
    new.paid = direction.moved
    return new
