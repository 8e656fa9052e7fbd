"""Which server of which group has which seat of the table, and what a successor must know of that.

A seat is given when somebody has to be told of a server, and kept while the server is in force, has
sessions, or may still be written about. Decides nothing about servers.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from forwarder.balancing.table import LAYOUT, SEATS, SHARED, ServerTable
from forwarder.control.orders import Orders, read_json
from forwarder.stats.board import ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from forwarder.config.model import Rule
    from forwarder.control.orders import Order
    from forwarder.stats.ledger import Ledger, Server

log = logging.getLogger(__name__)


class Servers:
    """The master's side of the table of servers, which it owns; see also ``stats.ledger.Server``.

    Orders of an operator belong here as well: they are kept by the name of a server, which outlives
    its seat, and travel with :meth:`as_text`.
    """

    def __init__(self, ledger: Ledger) -> None:
        """The rows of servers are those of ``ledger``. Raises OSError."""
        self.table = ServerTable()
        self.orders = Orders()
        # Those of which the checker may still write: a part of the master that tells it says so,
        # and takes a name back when the checker has confirmed that it knows it no more.
        self.watched: Collection[Server] = ()
        self._ledger = ledger
        self._leaving: set[Server] = set()  # not in force any more when that was last looked at

    def close(self) -> None:
        """Close the file of the table; its memory stays for who has mapped it."""
        self.table.close()

    # -- seats

    def rows(self, rule: Rule, group: str) -> tuple[int, ...]:
        """The rows of the upstreams of a rule, in their order, and last that of the group.

        Nothing for a rule that has nothing to choose. What has no row yet gets one.
        """
        return tuple(self._row(*one) for one in _servers_of(rule, group))

    def seat(self, group: str, server: str) -> int | None:
        """The seat of a server. None: it has none, or one that it shares and cannot be used."""
        row = self._ledger.find_server(group, server)
        return None if row is None or not self._ledger.has_own_row(row) else row - ROWS

    def forget(
        self, in_force: Iterable[tuple[Rule, str]], is_free: Callable[[int], bool]
    ) -> list[Server]:
        """Give up seats of servers that are not in force any more; ``is_free`` says which rows are.

        ``in_force`` are rules with the names of their groups. Called at each reload: a server has
        to be gone for a whole one, so that nobody has it from an assignment that he has not heard
        of yet. Returns what was forgotten.
        """
        known = {one for rule, group in in_force for one in _servers_of(rule, group)}
        gone = {one for one, _ in self._ledger.servers()} - known
        kept = known | set(self.watched) | (gone - self._leaving)
        forgotten = self._ledger.forget_servers(kept, is_free)
        for row in forgotten.values():
            if self._ledger.has_own_row(row):
                self.table.clear(row - ROWS)
        self._leaving = gone - forgotten.keys()
        return list(forgotten)

    def _row(self, group: str, server: str) -> int:
        row = self._ledger.find_server(group, server)
        if row is None:
            row = self._ledger.server_row(group, server)
            if self._ledger.has_own_row(row):
                # A successor that failed may have used it: we share the table with it.
                self.table.clear(row - ROWS)
                self.table.order(row - ROWS, self.orders.word((group, server)))
        return row

    # -- orders

    def order(self, server: Server, order: Order) -> bool:
        """Put an order in force, or an empty one in its place. Returns whether that is a change."""
        if not self.orders.put(server, order):
            return False
        seat = self.seat(*server)
        if seat is not None:
            self.table.order(seat, order.word)
        return True

    def take_orders(self, given: Mapping[Server, Order]) -> None:
        """Put orders of a former master in force, before any worker starts."""
        self.orders.take(given)

    # -- from one master to the next

    def as_text(self) -> bytes:
        """Who has which seat, and all orders, for a successor that gets the table as well."""
        seats = [[*names, row - ROWS] for names, row in self._ledger.servers()]
        content = {"layout": LAYOUT, "seats": seats, "orders": self.orders.as_json()}
        return json.dumps(content).encode()

    def inherit(self, given: tuple[int, bytes] | None) -> None:
        """Use the table of a predecessor, whose workers go on reading it; before any worker starts.

        ``given``: its file, which becomes ours, and a text of :meth:`as_text`. If that makes no
        sense, or there is none, the table stays a new one, in which nothing is said of any server
        but what was ordered.
        """
        if given is None:
            return
        fd, text = given
        try:
            self.orders.take(read_json(json.loads(text).get("orders", [])))
        except (ValueError, AttributeError, RecursionError) as err:
            log.warning("servers: cannot read the orders of the predecessor: %s", err)
        try:
            table = ServerTable(fd)
        except (OSError, ValueError) as err:
            log.warning("servers: cannot map the table of the predecessor: %s", err)
            return
        try:
            seats = _read(text)
        except (ValueError, TypeError, KeyError, RecursionError) as err:
            log.warning("servers: cannot read the seats of the predecessor: %s", err)
            table.close()
            return
        self.table.close()
        self.table = table
        for (group, server), seat in seats.items():
            self._ledger.adopt_server(group, server, ROWS + seat)


def _servers_of(rule: Rule, group: str) -> list[Server]:
    """The servers of a rule, and the group itself; nothing if there is nothing to choose."""
    if not rule.is_balanced:
        return []
    return [*((group, str(upstream)) for upstream in rule.upstreams), (group, "")]


def _read(text: bytes) -> dict[Server, int]:
    """The seats in a text of :meth:`Servers.as_text`. Raises ValueError, TypeError, KeyError."""
    content = json.loads(text)
    if content["layout"] != LAYOUT:
        raise ValueError(f"its layout is {content['layout']!r}, ours {LAYOUT}")
    found: dict[Server, int] = {}
    taken = {0}
    for group, server, seat in content["seats"]:
        is_right = isinstance(group, str) and isinstance(server, str) and type(seat) is int
        if not (is_right and 0 < seat < SEATS) or seat in taken or (group, server) in found:
            raise ValueError(f"no seat of a server: {[group, server, seat]!r:.200}")
        found[group, server] = seat
        if seat != SHARED:
            taken.add(seat)
    return found
