"""What each kind of session has to have so that it can move; and what all of them have in common.

``streams`` has it for streams, ``flows`` for those with UDP on a side.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from forwarder.net.sockets import Target
from forwarder.relay.moving.parcel import ServerShare
from forwarder.relay.session import SessionState
from forwarder.relay.wheel import TICK_S

if TYPE_CHECKING:
    from forwarder.relay.moving.parcel import Parcel
    from forwarder.relay.relay import Relay
    from forwarder.relay.session import Session
    from forwarder.upstream.pool import Pool

_Session_contra = TypeVar("_Session_contra", bound="Session", contravariant=True)


class Load(NamedTuple):
    """What a session takes along: ``fields`` of its parcel, and its descriptors.

    ``made``: those of them that are not the session's own.
    """

    fields: dict[str, Any]
    fds: list[int]
    made: list[int]


class Kind(Protocol[_Session_contra]):
    """How sessions of one kind are taken out of a relay and put into one. Between two batches."""

    name: str

    def may_move(self, session: _Session_contra) -> bool:
        """Whether it can be moved now; False: later."""

    def describe(self, session: _Session_contra) -> Load:
        """What it takes along, beside what all have. Changes nothing. Raises OSError."""

    def let_go(self, session: _Session_contra) -> None:
        """Take it out of everything but what all have in common; nothing here touches it again.

        The descriptors that :meth:`describe` gave stay open, and are the caller's.
        """

    def unpack(self, parcel: Parcel, fds: list[int], pool: Pool, relay: Relay) -> Session:
        """Make it a session of this relay, which handles no event before the caller has returned.

        Takes the descriptors over; if it raises (OSError, ValueError) they stay the caller's. Calls
        :func:`restore`. What is counted or held of it the caller sees to.
        """


def common(session: Session) -> dict[str, Any]:
    """The fields of its parcel that all sessions have."""
    target, server = session.target, session.server
    return {
        "id": session.id,
        "offset": session.pool.offset,
        "client": session.client_address,
        "family": 0 if target is None else target.family,
        "target": None if target is None else target.sockaddr,
        "started_at": session.started_at,
        "connected_at": session.connected_at,
        "active_at": session.active_at,
        "state": session.state.value,
        "deadline": session.deadline,
        # Any time within a tick is looked at in the next one: with its end it would be put off.
        "due_at": (session.tick - 0.5) * TICK_S if session.tick >= 0 else 0.0,
        "held_as": session.held_as,
        "server": server
        and ServerShare(name=server.name, row=server.row, is_counted=server.is_counted),
    }


def restore(session: Session, parcel: Parcel) -> None:
    """Give a session that was made just now what all sessions have. Raises ValueError."""
    session.id = parcel.id
    session.state = SessionState(parcel.state)
    if parcel.target is not None:
        session.target = Target(parcel.family, parcel.target)
    session.started_at = parcel.started_at
    session.connected_at = parcel.connected_at
    session.active_at = parcel.active_at
    session.deadline = parcel.deadline


def socket_of(fd: int, kind: int) -> socket.SocketType:
    """A socket of a descriptor, which it owns. Raises OSError, or ValueError for another kind."""
    sock = socket.SocketType(fileno=fd)
    if sock.type != kind:
        sock.detach()
        raise ValueError("not a socket of this kind")
    sock.setblocking(False)
    return sock
