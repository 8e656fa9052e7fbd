"""Descriptors when they run out: the spare one, and what is closed to make room."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from forwarder.net import sockets

if TYPE_CHECKING:
    import socket

    from forwarder.net.options import How
    from forwarder.net.sockets import SockAddr, Target
    from forwarder.relay.udp.flow_table import Evictable
    from forwarder.relay.udp.flow_tables import FlowTables
    from forwarder.relay.workbench import Workbench
    from forwarder.system.loop import Clock

# When to try to reserve the spare descriptor again, if no client does before. Arbitrary.
RESERVE_AFTER_S: Final = 0.5


class Descriptors:
    """The spare descriptor is for the upstream of a client that has been accepted already.

    ``shortage`` is the errno of the last shortage.
    """

    __slots__ = ("_bench", "_flows", "_is_closed", "_loop", "_spare_fd", "shortage")

    def __init__(self, loop: Clock, bench: Workbench, flows: FlowTables) -> None:
        self._loop = loop
        self._bench = bench
        self._flows = flows
        self._is_closed = False
        self._spare_fd = _reserve()
        self.shortage = errno.EMFILE

    @property
    def has_spare(self) -> bool:
        """Whether an accepted client is sure to get an upstream socket; if not, do not accept."""
        return self._spare_fd >= 0

    def upstream_socket(
        self, target: Target, source: SockAddr | None, how: How
    ) -> socket.SocketType:
        """Make an upstream socket, from the spare descriptor when it is the last one.

        So a client that was accepted at the descriptor limit is served, and no further one is
        accepted until the spare is back. Raises OSError.
        """
        try:
            return sockets.upstream_socket(target, source, how)
        except OSError as err:
            if err.errno not in sockets.OUT_OF_RESOURCES or not self.has_spare:
                raise
            self.shortage = err.errno
        os.close(self._spare_fd)
        self._spare_fd = -1
        self._loop.call_later(RESERVE_AFTER_S, self._reserve_again)
        return sockets.upstream_socket(target, source, how)

    def recover_spare(self) -> bool:
        """Try to reserve the spare descriptor again; True if it is there, else see ``shortage``."""
        if not self.has_spare:
            self.make_room()
            try:
                self._spare_fd = _reserve()
            except OSError as err:
                self.shortage = err.errno or 0
        return self.has_spare

    def make_room(self, keep: Evictable | None = None) -> bool:
        """Close idle pipes, or else the longest silent flow; False if there was nothing to close.

        The descriptors of a flow come back when the batch of events at hand is over. ``keep`` is
        not closed, being the one that room is made for.
        """
        return self._bench.close_idle_pipes() or self._flows.make_room(keep)

    def close(self) -> None:
        """Give back the spare one, for good."""
        self._is_closed = True
        if self.has_spare:
            os.close(self._spare_fd)
            self._spare_fd = -1

    def _reserve_again(self) -> None:
        if not (self._is_closed or self.recover_spare()):
            self._loop.call_later(RESERVE_AFTER_S, self._reserve_again)


def _reserve() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
