"""The flows of all rules in one worker: which has to make room for another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.errors import CloseReason, Phase, Who
from forwarder.relay.flow_table import FlowTable, share

if TYPE_CHECKING:
    from forwarder.relay.flow import Flow
    from forwarder.upstream.pool import Pool


class FlowTables:
    """``workers`` is how many share what a rule may have; ``evicted`` counts who made room."""

    __slots__ = ("_tables", "evicted", "workers")

    def __init__(self) -> None:
        self.workers = 1
        self.evicted = 0
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

    def make_room_in(self, pool: Pool) -> None:
        """End the longest silent flow of a rule that has as many as it may have."""
        table = self.of(pool)
        table.limit = share(pool.rule.max_flows, self.workers)  # there may be more workers by now
        while len(table) >= table.limit and (flow := table.oldest()):
            self._evict(flow)

    def make_room(self, keep: Flow | None = None) -> bool:
        """End the longest silent flow of all but ``keep``, for its descriptors; False: none."""
        tables = self._tables.values()
        oldest = [flow for table in tables if (flow := table.oldest()) and flow is not keep]
        if not oldest:
            return False
        self._evict(min(oldest, key=lambda flow: flow.active_at))
        return True

    def _evict(self, flow: Flow) -> None:
        self.evicted += 1
        flow.close(CloseReason(Who.US, Phase.LIMIT, "too many flows"))
