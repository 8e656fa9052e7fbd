"""Giving sessions up and taking them in: a worker's side of ``ipc.consignment``.

Owns what it has given up until that is settled. Knows no session's insides: each kind of session
has a :class:`Kind`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from forwarder.ipc.channel import Channel, Received
    from forwarder.relay.moving.parcel import Parcel
    from forwarder.relay.relay import Relay
    from forwarder.relay.session import Session
    from forwarder.upstream.pool import Pool


class Kind(Protocol):
    """How sessions of one kind are taken out of a relay and put into one."""

    def may_move(self, session: Session) -> bool:
        """Whether it can be moved now; False: later."""

    def descriptors(self, session: Session) -> int:
        """How many it would have in a consignment."""

    def pack(self, session: Session, parcel: Parcel) -> tuple[Parcel, list[int]]:
        """Take it out: nothing here touches it again. ``parcel`` has what all kinds have.

        Its descriptors become the caller's, out of the poller. Raises OSError; then it stays.
        """

    def unpack(self, parcel: Parcel, fds: list[int], relay: Relay, pool: Pool) -> Session:
        """Make it a session of this relay, which handles no event before all are taken.

        Takes over the descriptors. Raises OSError or ValueError; they then stay the caller's.
        """


class Mover:
    """Gives sessions of a worker up, and takes others in."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    @property
    def is_out(self) -> bool:
        """Whether sessions are on their way that may come back: the worker must not leave."""
        return False

    def on_message(self, received: Received, channel: Channel) -> None:
        """Handle MOVE, PARCELS or MOVED, and answer over the channel that it came by."""

    def on_hang_up(self, channel: Channel) -> None:
        """Who has asked over a channel is gone: take back what is out and nobody has claimed."""
