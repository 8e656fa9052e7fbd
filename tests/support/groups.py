"""What tests say and ask of a group of servers, whose relay they turn by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.balancing.table import FULL, Standing
from forwarder.stats.board import ROWS
from forwarder.stats.rows import CONNECTS_FAILED
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.balancing.server import Server
    from support.by_hand import Bench, GroupPool, UdpBench


def servers_of(pool: GroupPool) -> tuple[Server, ...]:
    """The servers of a group, in order."""
    assert pool.balancer is not None
    return pool.balancer.servers


def failed(pool: GroupPool) -> list[int]:
    """How often connecting to each server has failed."""
    return [server.counts[CONNECTS_FAILED] for server in servers_of(pool)]


def find(bench: Bench | UdpBench, pool: GroupPool, index: int, standing: Standing) -> None:
    """The checker has found out about a server."""
    share = FULL if standing is Standing.UP else 0
    seat = servers_of(pool)[index].row - ROWS
    bench.shared.table.find(seat, standing, share, int(bench.loop.now * 1e9))


def order(bench: Bench | UdpBench, pool: GroupPool, index: int, wanted: int) -> None:
    """An operator wants something of a server."""
    bench.shared.table.order(servers_of(pool)[index].row - ROWS, wanted)


def look(bench: Bench | UdpBench, pool: GroupPool) -> None:
    """What a worker does at each beat."""
    assert pool.balancer is not None
    bench.relay.look_at_servers([pool.balancer], bench.shared.table.revision)
    bench.loop.pass_time(0)


def turning(bench: Bench | UdpBench, condition: Callable[[], bool]) -> None:
    """Turn the relay until something has come of that."""

    def is_so() -> bool:
        bench.relay.poller.turn()
        bench.loop.pass_time(0)
        return condition()

    eventually(is_so)
