"""Flows in the order in which they were last heard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from forwarder.relay.udp.flow_table import FlowTable, share

if TYPE_CHECKING:
    from forwarder.net.sockets import Target
    from forwarder.relay.udp.flow_table import Evictable
    from forwarder.stats.reasons import CloseReason
    from forwarder.upstream.pool import Pool


class Fake:
    """Something to be in a table, which asks nothing of it."""

    pool: Pool
    target: Target | None
    active_at: float

    def close(self, reason: CloseReason) -> None:
        """Nothing is open."""

    def abort(self, reason: CloseReason) -> None:
        """Nothing is open."""


steps = st.lists(st.tuples(st.sampled_from(["add", "touch", "discard"]), st.integers(0, 5)))


@given(steps)
def test_the_longest_silent_comes_first(taken: list[tuple[str, int]]) -> None:
    """Against a plain list."""
    flows: list[Evictable] = [Fake() for _ in range(6)]
    table = FlowTable(3)
    model: list[Evictable] = []
    for what, number in taken:
        flow = flows[number]
        if what == "discard":
            table.discard(flow)
        elif what == "add" and flow not in model:
            table.add(flow)
        elif what == "touch" and flow in model:
            table.touch(flow)
        else:
            continue
        if flow in model:
            model.remove(flow)
        if what != "discard":
            model.append(flow)
        assert len(table) == len(model)
        assert table.oldest() is (model[0] if model else None)
        for keep in flows:
            others = [flow for flow in model if flow is not keep]
            assert table.oldest(keep) is (others[0] if others else None)


@given(st.integers(1, 70_000), st.integers(1, 64))
def test_shares_add_up_to_the_limit_and_little_more(limit: int, workers: int) -> None:
    one = share(limit, workers)
    assert one >= 1
    assert limit <= one * workers < limit + workers
