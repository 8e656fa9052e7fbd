"""Directions of sessions that have a unix socket on one of their sides.

A unix stream keeps what was sent together with descriptors apart: a read stops behind it, short,
though more is there (unix(7)). No further edge would tell of the rest, so every read goes on until
the socket says that it is empty: one system call more than for TCP, for each message. The
descriptors themselves are dropped by the kernel, as nobody asks for them.
"""

from __future__ import annotations

import select
from typing import Final

from forwarder.relay.tcp.direction import Direction
from forwarder.relay.tcp.splice import SpliceDirection

# One of poller.READ_ON.
_MORE_MAY_WAIT: Final = select.EPOLLRDHUP


class UnixDirection(Direction):
    """By copying."""

    __slots__ = ()

    def pump(self, mask: int) -> None:
        """Move what ``src`` has until it is empty, within the budget."""
        super().pump(mask | _MORE_MAY_WAIT)


class UnixSpliceDirection(SpliceDirection):
    """Bulk without copies."""

    __slots__ = ()

    def pump(self, mask: int) -> None:
        """Move what ``src`` has until it is empty, within the budget."""
        super().pump(mask | _MORE_MAY_WAIT)
