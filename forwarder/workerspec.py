"""What the master gives a worker at its birth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forwarder.board import Board
    from forwarder.config.model import RelayMode
    from forwarder.gate import Gate, Holdings
    from forwarder.heartbeat import Heartbeats
    from forwarder.net.channel import Channel
    from forwarder.privileges import Identity


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
    relay: RelayMode
    identity: Identity | None
    capabilities: int  # that it keeps
