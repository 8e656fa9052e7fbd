"""What the sessions of one worker work with: set of sockets, wheel, buffers, pipes, rare warnings.

Knows no session and no rule.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

from forwarder.config.model import RelayMode
from forwarder.net import datagrams
from forwarder.net.datagrams import Batch
from forwarder.net.pipes import HAS_SPLICE, PipePool
from forwarder.net.plain_datagrams import PlainBatch
from forwarder.relay.poller import Poller
from forwarder.relay.wheel import TICK_S, Wheel
from forwarder.system.rarely import Rarely

if TYPE_CHECKING:
    from forwarder.relay.wheel import Timed
    from forwarder.system.loop import Loop

log = logging.getLogger(__name__)

# What one read of a quiet direction takes. Whatever fills it is bulk. Small enough to stay in the
# CPU's cache, and more than the largest record of TLS (16 KiB and 22 bytes, RFC 8446 5.1) or a
# message of 16 KiB: with 16 KiB each of these began bulk again, for 30% more CPU.
SMALL_BYTES: Final = 20 * 1024
# A tick that comes so much later than asked for: we were stopped (a paused container, a suspended
# machine) or starved, and events wait that are older than the deadlines that have passed since.
LATE_S: Final = 1.0
# The copying way reads this much of bulk at once.
BULK_BYTES: Final = 256 * 1024


class Workbench:
    """One for each worker. ``splices``: whether bulk goes through ``pipes``; ``has_pipes``: whether
    what could not be sent waits in one.

    ``small_view``, ``bulk_view`` and ``batch`` are scratch space, used within one call and never
    across.
    """

    __slots__ = (
        "_is_ticking",
        "_loop",
        "_rarely",
        "_tick_at",
        "batch",
        "bulk_view",
        "has_pipes",
        "pipes",
        "poller",
        "small_view",
        "splices",
        "wheel",
    )

    def __init__(self, loop: Loop, mode: RelayMode, pipe_budget_pages: int) -> None:
        """Join ``loop``. ``mode`` must not be SPLICE on a system without it."""
        self._loop = loop
        self._is_ticking = False
        self._tick_at = math.inf  # when the next tick is due; inf: however late it comes, it counts
        self._rarely = Rarely()
        self.poller = Poller(loop)
        self.wheel = Wheel(loop.time())
        self.has_pipes = HAS_SPLICE
        self.splices = HAS_SPLICE and mode is not RelayMode.COPY
        self.pipes = PipePool(pipe_budget_pages)
        self.bulk_view = memoryview(bytearray(BULK_BYTES))
        self.small_view = self.bulk_view[:SMALL_BYTES]
        self.batch: Batch | PlainBatch = (
            Batch() if mode is not RelayMode.COPY and datagrams.is_supported() else PlainBatch()
        )

    def arm(self, entry: Timed, limit_s: float) -> None:
        """Call ``entry.on_timer`` within ``limit_s``; an earlier call stays due."""
        self.wheel.add(entry, self.poller.now + limit_s)
        if not self._is_ticking:
            self._tick_soon()

    def warn_rarely(self, about: str, message: str) -> None:
        """Log a warning; further ones about the same only now and then, with a count."""
        more = self._rarely.note(about, self.poller.now)
        if more is not None:
            log.warning("%s%s", message, more)

    def close_idle_pipes(self) -> bool:
        """Close pipes that wait for a session; False if there was none."""
        has_idle = self.pipes.statistics().idle > 0
        if has_idle:
            self.pipes.close()
        return has_idle

    def close(self) -> None:
        """Leave the loop, and close the pipes that wait for a session."""
        self.poller.close()
        self.pipes.close()

    def _tick_soon(self) -> None:
        self._is_ticking = True
        self._tick_at = self.poller.now + TICK_S
        self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        """Turn the wheel, as long as something is on it.

        The loop's timers come before its events. So a tick that is late leaves what has happened
        meanwhile to be seen first: a connect that has worked is none that took too long.
        """
        self.poller.read_clock()
        if self.poller.now - self._tick_at > LATE_S:
            self._tick_soon()
            self._tick_at = math.inf  # once
            return
        try:
            self.wheel.advance(self.poller.now)
        except Exception:  # as in Poller: a bug must cost one session, not the worker
            log.exception("relay.bug in a timer")
        self._is_ticking = False
        if self.wheel:
            self._tick_soon()
