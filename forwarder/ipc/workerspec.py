"""What the master gives a worker at its birth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forwarder.balancing.table import ServerTable
    from forwarder.config.model import RelayMode
    from forwarder.ipc.channel import Channel
    from forwarder.ipc.heartbeat import Heartbeats
    from forwarder.limits.gate import Gate, Holdings
    from forwarder.stats.board import Board
    from forwarder.system.privileges import Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker is born with. Rules and sockets come over the channel, which it owns."""

    slot: int
    cell: int  # of the heartbeats
    channel: Channel
    heartbeats: Heartbeats
    board: Board
    gate: Gate
    holdings: Holdings
    table: ServerTable
    relay: RelayMode
    identity: Identity | None
    capabilities: int  # kept by the worker

    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that it inherits, beside the standard ones."""
        return self.channel.fileno(), self.gate.fileno()
