"""The flows of one rule in one worker, in the order in which they were last active. Pure.

Knows of a flow no more than :class:`Evictable` says.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.net.sockets import Target
    from forwarder.stats.reasons import CloseReason
    from forwarder.upstream.pool import Pool


class Evictable(Protocol):
    """A flow, as far as it has to be known to choose one and to end it."""

    pool: Pool
    target: Target | None
    active_at: float

    def close(self, reason: CloseReason) -> None:
        """End; what the kernel has taken it will deliver."""

    def abort(self, reason: CloseReason) -> None:
        """End; a stream on one side is reset."""


class FlowTable:
    """Flows, the longest silent first. The caller that adds one keeps ``limit``."""

    __slots__ = ("_flows", "_is_mixed", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._flows: OrderedDict[Evictable, None] = OrderedDict()
        self._is_mixed = False  # sorted when it matters, not for each flow that comes

    def __len__(self) -> int:
        return len(self._flows)

    def add(self, flow: Evictable) -> None:
        """Add a flow that was active just now."""
        self._flows[flow] = None

    def mix(self) -> None:
        """One that was added just now has not been active since then, but before others here."""
        self._is_mixed = True

    def touch(self, flow: Evictable) -> None:
        """A flow that is here was active just now."""
        self._flows.move_to_end(flow)

    def __iter__(self) -> Iterator[Evictable]:
        if self._is_mixed:
            self._is_mixed = False
            self._flows = OrderedDict.fromkeys(sorted(self._flows, key=lambda one: one.active_at))
        return iter(self._flows)

    def discard(self, flow: Evictable) -> None:
        """Forget a flow, if it is here."""
        self._flows.pop(flow, None)

    def oldest(self, keep: Evictable | None = None) -> Evictable | None:
        """The flow that has been silent longest, of all but ``keep``."""
        return next((flow for flow in self if flow is not keep), None)


def share(limit: int, workers: int) -> int:
    """What one of ``workers`` may have, so that all together have at least ``limit``."""
    return -(-limit // workers)
