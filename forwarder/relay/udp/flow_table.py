"""The flows of one rule in one worker, in the order in which they were last heard. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.relay.udp.flow import Flow


class FlowTable:
    """Flows, the longest silent first. ``limit`` is for whoever adds to it to keep."""

    __slots__ = ("_flows", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._flows: OrderedDict[Flow, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._flows)

    def add(self, flow: Flow) -> None:
        """Take in a flow that was heard just now."""
        self._flows[flow] = None

    def touch(self, flow: Flow) -> None:
        """A flow that is here was heard just now."""
        self._flows.move_to_end(flow)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self._flows)

    def discard(self, flow: Flow) -> None:
        """Forget a flow, if it is here."""
        self._flows.pop(flow, None)

    def oldest(self, keep: Flow | None = None) -> Flow | None:
        """The flow that has been silent longest, of all but ``keep``."""
        return next((flow for flow in self._flows if flow is not keep), None)


def share(limit: int, workers: int) -> int:
    """What one of ``workers`` may have, so that all together have at least ``limit``."""
    return -(-limit // workers)
