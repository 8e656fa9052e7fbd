"""Making parcels sessions again, in the worker that they have come to."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from forwarder.balancing.server import Server
from forwarder.config.address import parse_upstream
from forwarder.config.model import Upstream
from forwarder.relay.moving.adopting import Kept
from forwarder.relay.moving.packing import KINDS
from forwarder.relay.moving.parcel import Parcel
from forwarder.stats.board import ROWS, SHARED_SERVER_ROW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from forwarder.relay.cuts import Cuts
    from forwarder.relay.moving.kinds import Kind
    from forwarder.relay.moving.parcel import Json, ServerShare
    from forwarder.relay.pools import Pools
    from forwarder.relay.relay import Relay
    from forwarder.relay.session import Session
    from forwarder.stats.rows import Row
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

_BY_NAME: Final[Mapping[str, Kind[Any]]] = {kind.name: kind for kind in (*KINDS.values(), Kept())}


class Unpacked(NamedTuple):
    """A session that was unpacked, and is not counted yet."""

    session: Session
    parcel: Parcel
    server: Server | None
    is_foreign: bool


class Unpacker:
    """Puts sessions into the relay of a worker, and what is counted and held of them with it."""

    def __init__(
        self, relay: Relay, pools: Pools, cuts: Cuts, row_of: Callable[[int], Row]
    ) -> None:
        """``row_of`` gives the row of a number on the worker's board."""
        self._relay = relay
        self._pools = pools
        self._cuts = cuts
        self._row_of = row_of

    def unpack(self, content: Json, place: int, fds: list[int], *, is_foreign: bool) -> Unpacked:
        """Make the session that is described at this place in the content of a consignment.

        It is counted nowhere before :meth:`count`. Takes the descriptors over, and the list is
        empty then; if it raises (OSError, ValueError) they stay the caller's. ``is_foreign``: it is
        another instance's, whose rows and holdings are not ours.
        """
        parcel = Parcel.from_json(_item(content, "sessions", place))
        kind = _BY_NAME.get(parcel.kind)
        if kind is None:
            raise ValueError(f"no kind of session: {parcel.kind}")
        row = None if is_foreign else _row(_item(content, "rows", parcel.terms), 1, ROWS)
        terms = _item(content, "terms", parcel.terms)
        if not isinstance(terms, dict):
            raise ValueError("not the terms of a rule")  # noqa: TRY004 - as all nonsense
        pool = self._pools.at(self._pools.by_terms(terms, row), parcel.offset)
        server = self._server(pool, parcel.server, is_foreign=is_foreign)
        session = kind.unpack(parcel, fds, pool, self._relay)
        fds.clear()
        return Unpacked(session, parcel, server, is_foreign)

    def count(self, came: Unpacked) -> None:
        """It is ours: count and hold it, and end it when it would have ended.

        If we are killed before, others go on with it, who count it.
        """
        try:
            self._count(came)
            self._time(came.session, came.parcel)
        except Exception:  # it is here by now: its giver must not go on with it as well
            log.exception("relay.bug with a session that has come")
            came.session.on_bug()

    def _count(self, came: Unpacked) -> None:
        session, parcel, server, is_foreign = came
        relay, share = self._relay, parcel.server
        held_as = held_in = None
        if not is_foreign:
            held_as = parcel.held_as if session.held_as is None else session.held_as
            held_in = share.row if share is not None and share.is_counted else None
        relay.books.on_moved_in(session)
        relay.servers.take_on(session, server, held_in)
        relay.restrictions.take_on(session, held_as, is_foreign=is_foreign)

    def _server(self, pool: Pool, share: ServerShare | None, *, is_foreign: bool) -> Server | None:
        """The server of a session: the group's, or what stands for one that is none any more."""
        if share is None:
            return None
        row = SHARED_SERVER_ROW if is_foreign else _row(share.row, ROWS + 1, 2 * ROWS)
        for server in pool.balancer.servers if pool.balancer is not None else ():
            if server.name == share.name and (is_foreign or server.row == row):
                return server
        upstream = Upstream(parse_upstream(share.name))
        is_counted = share.is_counted and not is_foreign
        return Server(upstream, 0, row, self._row_of(row), is_counted)

    def _time(self, session: Session, parcel: Parcel) -> None:
        """Let it be looked at when it would have been, and end when it would have had to."""
        if parcel.due_at:
            self._relay.bench.arm(session, max(parcel.due_at - self._relay.poller.now, 0.0))
        if parcel.cut_at:
            self._cuts.resume(session, parcel.cut_at)
        elif self._pools.is_gone(session.pool.origin):
            self._cuts.begin((session,))


def _item(content: Json, key: str, index: int) -> object:
    """One of a list in the content. Raises ValueError if there is none."""
    items = content.get(key)
    if not isinstance(items, list) or not 0 <= index < len(items):
        raise ValueError(f"{key} {index} is missing")
    return items[index]


def _row(value: object, first: int, end: int) -> int:
    """The number of a row. Raises ValueError."""
    if type(value) is not int or not first <= value < end:
        raise ValueError("not a row")
    return value
