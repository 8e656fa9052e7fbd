"""The flows of all rules in one worker: which has to make room for another one."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Final

from forwarder.net import udp
from forwarder.relay.ports import SETTING, Ports
from forwarder.relay.udp.flow_table import FlowTable, share
from forwarder.stats.reasons import CloseReason, Phase, Who

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.net.sockets import Target
    from forwarder.relay.udp.flow_table import Evictable
    from forwarder.upstream.pool import Pool

NO_PORT: Final = f"local ports are used up ({SETTING})"
# Flows with sockets of their own per UDP listening address, in all workers together, where each
# costs the datagrams of others something: see ``client_flow``. Before Linux 6.13 every datagram
# pays.
MAX_SETTLED: Final = 1024 if udp.FINDS_FLOWS_BY_HASH else 256


class FlowTables:
    """``workers`` is how many share what a rule may have; ``evicted`` counts flows that made room.

    ``ports``: local ports towards UDP upstreams.
    """

    __slots__ = ("_fd_limit", "_on_limit", "_tables", "evicted", "ports", "workers")

    def __init__(self, on_limit: Callable[[Pool, str], None]) -> None:
        """``on_limit`` gets the pool of a flow that ends because ports ran out, and why."""
        self._on_limit = on_limit
        limit = os.sysconf("SC_OPEN_MAX")
        self._fd_limit = limit if limit > 0 else 1 << 20  # -1: unlimited
        self.workers = 1
        self.evicted = 0
        self.ports = Ports()
        self._tables: dict[Pool, FlowTable] = {}

    def __bool__(self) -> bool:
        """Whether there is a flow."""
        return any(self._tables.values())

    def of(self, pool: Pool) -> FlowTable:
        """The flows of a rule, of all its ports; those of former rules go once they are empty."""
        origin = pool.origin
        table = self._tables.get(origin)
        if table is None:
            self._tables = {old: table for old, table in self._tables.items() if table}
            table = FlowTable(share(pool.rule.max_flows, self.workers))
            self._tables[origin] = table
        return table

    def settled_limit(self, *, is_flat: bool) -> int:
        """How many flows of a listener may have sockets of their own in this worker.

        ``is_flat``: they cost others nothing but descriptors, of which a part is left for flows
        that do without.
        """
        return self._fd_limit // 4 if is_flat else share(MAX_SETTLED, self.workers)

    def make_room_in(self, pool: Pool) -> None:
        """End the longest silent flow of a rule that has as many as it, or its ports, may have."""
        table, rule = self.of(pool), pool.rule
        table.limit = share(rule.max_flows, self.workers)  # there may be more workers by now
        while len(table) >= table.limit and (flow := table.oldest()):
            self._evict(flow, "too many flows")
        most = share(self.ports.limit, self.workers)
        if pool.takes_ports:
            if self.ports.used(rule) >= most:
                self._make_room_for_ports(pool, most)
        elif not rule.protocol.connects_by_udp:  # a port for each upstream
            most *= len(rule.upstreams)
            while len(table) >= most and (flow := table.oldest()):
                self._evict(flow, NO_PORT)

    def _make_room_for_ports(self, pool: Pool, most: int) -> None:
        """End the longest silent flows until less than ``most`` ports such as this are in use.

        TCP clients of UDP upstreams, which have ports, too, do not end for others: flows may have
        half of the ports whatever those have.
        """
        same = [
            table
            for other, table in self._tables.items()
            if other.takes_ports and other.rule.source == pool.rule.source
        ]
        for _ in range(sum(map(len, same)) - (most + 1) // 2 + 1):
            if self.ports.used(pool.rule) < most or not self.make_room_for_port(pool, None):
                return

    def make_room_for_port(
        self, pool: Pool, target: Target | None, keep: Evictable | None = None
    ) -> bool:
        """End the longest silent flow but ``keep`` that has a port such as ``pool`` wants.

        ``target``: where a TCP connection is to lead; a port is taken towards that alone. False if
        there is none. The port is free when the batch of events at hand is over.
        """
        found: list[Evictable] = []
        for other, table in self._tables.items():
            if pool.rule.protocol.connects_by_udp:
                if other.takes_ports and other.rule.source == pool.rule.source:
                    found += [flow] if (flow := table.oldest(keep)) else []
            elif not other.rule.protocol.connects_by_udp:
                fits = (flow for flow in table if flow.target == target and flow is not keep)
                found += islice(fits, 1)
        if not found:
            return False
        self._evict(min(found, key=lambda flow: flow.active_at), NO_PORT)
        return True

    def make_room(self, keep: Evictable | None = None) -> bool:
        """End the longest silent flow of all but ``keep``, for its descriptors; False: none."""
        tables = self._tables.values()
        oldest = [flow for table in tables if (flow := table.oldest(keep))]
        if not oldest:
            return False
        self._evict(min(oldest, key=lambda flow: flow.active_at), "a descriptor was needed")
        return True

    def _evict(self, flow: Evictable, why: str) -> None:
        self.evicted += 1
        reason = CloseReason(Who.US, Phase.LIMIT, why)
        if why is NO_PORT:
            self._on_limit(flow.pool, f"{why}: the longest silent flows make room")
            flow.abort(reason)  # after a FIN a TCP port would be in use for a minute, tcp(7)
        else:
            flow.close(reason)
