"""Putting sessions into a consignment: which fit into it, and what is said of them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Final

from forwarder.ipc.consignment import MAX_SESSION_FDS, MAX_SESSIONS, Consignment
from forwarder.relay.moving.flows import Bridges, Flows
from forwarder.relay.moving.kinds import common
from forwarder.relay.moving.parcel import Parcel
from forwarder.relay.moving.streams import Streams
from forwarder.relay.moving.terms import size_of
from forwarder.relay.tcp.stream import Stream
from forwarder.relay.udp.answers import FLOW_CLASSES
from forwarder.relay.udp.bridge import Bridge
from forwarder.system.daemonlog import warn_rarely

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forwarder.relay.cuts import Cuts
    from forwarder.relay.moving.kinds import Kind
    from forwarder.relay.moving.parcel import Json
    from forwarder.relay.pools import Pools
    from forwarder.relay.session import Session
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

KINDS: Final[Mapping[type, Kind[Any]]] = {
    Stream: Streams(),
    Bridge: Bridges(),
    **dict.fromkeys(FLOW_CLASSES, Flows()),
}
"""By the class of a session. One that is not here ends where it is."""


# What is named in all terms of a consignment, so that its content is not more than a taker reads,
# however many upstreams and access rules there are. Arbitrary.
_MOST_TERMS: Final = 10_000


class Packing:
    """Sessions that are to go together. Nothing changes for them before they are let go.

    ``packed`` are those that fit, ``left`` counts those that do not, ``busy`` those that cannot be
    moved yet.
    """

    def __init__(self, pools: Pools, cuts: Cuts, limit: int) -> None:
        self._pools = pools
        self._cuts = cuts
        self._limit = min(limit, MAX_SESSIONS)
        self._terms: dict[Pool, int] = {}
        self._parcels: list[Json] = []
        self._fds: list[list[int]] = []
        self._made: list[int] = []
        self._room = MAX_SESSION_FDS
        self._size = 0
        self.packed: list[tuple[Session, Kind[Any]]] = []
        self.left = self.busy = 0

    def add(self, session: Session) -> None:
        """Pack a session, if it can be moved and there is room for it."""
        kind = KINDS.get(type(session))
        if kind is None:
            return
        if not kind.may_move(session):
            self.busy += 1
        elif len(self.packed) >= self._limit or not self._room or self._is_too_much(session):
            self.left += 1
        else:
            self._pack(session, kind)

    def _is_too_much(self, session: Session) -> bool:
        """Whether there is no room for the terms of a session's rule beside those of others."""
        origin = session.pool.origin
        if origin in self._terms:
            return False
        size = size_of(self._pools.terms(origin))
        if self._terms and self._size + size > _MOST_TERMS:
            self._room = 0  # as below
            return True
        self._size += size
        return False

    def _pack(self, session: Session, kind: Kind[Any]) -> None:
        try:
            load = kind.describe(session)
        except OSError:  # no descriptors, or no memory: later
            self.busy += 1
            return
        if len(load.fds) > self._room:
            for fd in load.made:
                os.close(fd)
            self.left += 1
            self._room = 0  # the next one would be out of turn
            return
        terms = self._terms.setdefault(session.pool.origin, len(self._terms))
        fields = common(session) | load.fields
        parcel = Parcel(kind=kind.name, terms=terms, cut_at=self._cuts.at(session), **fields)
        self._parcels.append(parcel.as_json())
        self._fds.append(load.fds)
        self._made += load.made
        self._room -= len(load.fds)
        self.packed.append((session, kind))

    def seal(self, number: int) -> Consignment:
        """The consignment of what is packed, which owns all descriptors of it.

        If there are no descriptors for it nothing is packed, and it is empty.
        """
        content: dict[str, object] = {
            "rows": [pool.row for pool in self._terms],
            "terms": [self._pools.terms(pool) for pool in self._terms],
            "sessions": self._parcels,
        }
        try:
            sealed = Consignment.of(number, content, self._fds)
        except OSError as err:
            what = "moves: cannot give sessions up"  # asked again in a moment
            warn_rarely(log, what, f"{what}: {err.strerror}")
            for fd in self._made:
                os.close(fd)
            self.busy += len(self.packed)
            self.packed.clear()
            sealed = Consignment(number)
        sealed.left, sealed.busy = self.left, self.busy
        return sealed
