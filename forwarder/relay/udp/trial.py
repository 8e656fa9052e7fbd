"""An upstream reached by UDP that has not answered yet: what was sent to it, and what it does.

UDP reports a missing upstream by an ICMP error at most, and only after a datagram was sent. So
until an upstream has answered, the last datagrams of the client are kept, as far as there is room,
for the next one to try: then only time is lost. From the first answer on a flow costs what it did
without.
"""

from __future__ import annotations

import select
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.relay.poller import Handler

# What is kept for one flow: the first flight of QUIC has three datagrams of some 1,200 bytes.
KEPT: Final = 8
KEPT_BYTES: Final = 4096


class Tried(Protocol):
    """The flow whose upstream is on trial; ``u2c`` handles what comes from that."""

    @property
    def u2c(self) -> Handler:
        """The direction from the upstream."""

    def on_answer(self) -> None:
        """The upstream has answered."""

    def on_report(self, number: int) -> None:
        """The upstream refuses, with this errno."""

    def on_bug(self) -> None:
        """An event handler failed: end, the worker goes on."""


class Trial:
    """Handles the events of an upstream socket until its first answer; then the direction does."""

    __slots__ = ("_bytes", "_flow", "_kept")

    def __init__(self, flow: Tried) -> None:
        self._flow = flow
        self._kept: deque[bytes] = deque()
        self._bytes = 0

    def on_events(self, mask: int) -> None:
        """Let the direction handle them; its receive reports errors."""
        flow = self._flow
        if mask & select.EPOLLIN:
            flow.on_answer()
        flow.u2c.on_events(mask)

    def on_report(self, number: int) -> None:
        """The upstream refuses."""
        self._flow.on_report(number)

    def on_bug(self) -> None:
        """End the flow whose event handler failed."""
        self._flow.on_bug()

    def keep(self, contents: Iterable[bytes]) -> None:
        """Keep datagrams of the client that were sent; the oldest make room."""
        kept = self._kept
        for content in contents:
            kept.append(content)
            self._bytes += len(content)
        while kept and (len(kept) > KEPT or self._bytes > KEPT_BYTES):
            self._bytes -= len(kept.popleft())

    @property
    def kept(self) -> list[bytes]:
        """What was sent and not answered."""
        return [*self._kept]

    def take(self) -> deque[bytes]:
        """What was sent and not answered, from here on the caller's."""
        kept, self._kept = self._kept, deque()
        self._bytes = 0
        return kept
