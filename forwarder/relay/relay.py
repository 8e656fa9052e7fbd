"""What all sessions of one worker share: poller, buffers, pipes, timers, the spare descriptor.

Opens no listener and speaks to no master; the worker does.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from forwarder.config.model import RelayMode
from forwarder.errors import CloseReason, Phase, Who
from forwarder.net import sockets
from forwarder.net.pipes import PipePool
from forwarder.relay.direction import BULK_BYTES, SMALL_BYTES, Direction
from forwarder.relay.poller import Poller
from forwarder.relay.session import Session
from forwarder.relay.splice import HAS_SPLICE, SpliceDirection
from forwarder.relay.unix import UnixDirection, UnixSpliceDirection
from forwarder.relay.wheel import TICK_S, Wheel

if TYPE_CHECKING:
    import socket
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Iterable

    from forwarder.net.sockets import SockAddr, Target
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

# A failing upstream of a busy rule fails thousands of times a second; say so this often at most.
WARN_INTERVAL_S: Final = 10.0
# When to look whether the spare descriptor can be had again, if no client asks before. Arbitrary.
RESERVE_AFTER_S: Final = 0.5


class Relay:
    """The relay of one worker. ``failed`` counts sessions that found no upstream.

    ``bytes_c2u`` and ``bytes_u2c`` are of sessions that have ended.

    ``small_view`` and ``bulk_view`` are scratch space, used within one call and never across.
    """

    def __init__(
        self, loop: AbstractEventLoop, mode: RelayMode, pipe_budget_pages: int = 0
    ) -> None:
        """Join ``loop``. ``mode`` must not be SPLICE on a system without it."""
        self.poller = Poller(loop)
        self.wheel = Wheel(loop.time())
        self.sessions: set[Session] = set()
        self.pipes = PipePool(pipe_budget_pages)
        self.make_direction: Callable[[Relay, Session], Direction] = Direction
        self.make_unix_direction: Callable[[Relay, Session], Direction] = UnixDirection
        if HAS_SPLICE and mode is not RelayMode.COPY:
            self.make_direction = SpliceDirection
            self.make_unix_direction = UnixSpliceDirection
        bulk = bytearray(BULK_BYTES)
        self.bulk_view = memoryview(bulk)
        self.small_view = self.bulk_view[:SMALL_BYTES]
        self.total = 0
        self.failed = 0
        self.bytes_c2u = 0
        self.bytes_u2c = 0
        self.bytes_spliced = 0
        self._loop = loop
        self._is_ticking = False
        self._is_closed = False
        self._spare_fd = _reserve_fd()
        self.logs_sessions = log.isEnabledFor(logging.DEBUG)
        self._warn_after: dict[str, float] = {}
        self._unreported: dict[str, int] = {}

    # -- sessions

    def open_session(self, pool: Pool, client: socket.SocketType, address: SockAddr) -> None:
        """Forward an accepted client; the session owns ``client`` from here on."""
        self.total += 1
        pool.counts.opened += 1
        pool.counts.sessions += 1
        session = Session(self, pool, client, address)
        try:
            session.start()
        except Exception:  # as in Poller: a bug must cost one session, not the worker
            log.exception("relay.bug while connecting rule=%s", pool.rule.name)
            session.on_bug()

    def counters(self) -> dict[str, int]:
        """What was done so far, by the names of ``stats.COUNTERS``. Walks over all sessions."""
        bytes_c2u, bytes_u2c = self.bytes_c2u, self.bytes_u2c
        for session in self.sessions:
            bytes_c2u += session.c2u.moved
            bytes_u2c += session.u2c.moved
        return {
            "sessions": len(self.sessions),
            "sessions_total": self.total,
            "connects_failed": self.failed,
            "bytes_c2u": bytes_c2u,
            "bytes_u2c": bytes_u2c,
            "bytes_spliced": self.bytes_spliced,
            "pipes_refused": self.pipes.statistics().refused,
        }

    def abort_sessions(self, why: str, sessions: Iterable[Session] | None = None) -> None:
        """End sessions by RST, all or some; one that has ended is passed over."""
        for session in tuple(self.sessions if sessions is None else sessions):
            session.abort(CloseReason(Who.US, Phase.DRAIN, why))

    def log_session(self, session: Session, reason: CloseReason) -> None:
        """Log the end of a session; asked for only if ``logs_sessions``."""
        target = session.targets[session.attempt] if session.attempt >= 0 else "-"
        log.debug(
            "session.closed rule=%s client=%s upstream=%s end=%s c2u=%d u2c=%d total_s=%.3f",
            session.pool.rule.name,
            sockets.client_text(session.client_address),
            target,
            reason,
            session.c2u.moved,
            session.u2c.moved,
            self.poller.now - session.started_at,
        )

    def warn_connect_failed(self, rule: str, upstream: str, why: str) -> None:
        """Log a failed connect; repeats of a rule every WARN_INTERVAL_S, with their count."""
        now = self.poller.now
        if now < self._warn_after.get(rule, 0.0):
            self._unreported[rule] = self._unreported.get(rule, 0) + 1
            return
        self._warn_after[rule] = now + WARN_INTERVAL_S
        repeats = self._unreported.pop(rule, 0)
        more = f" ({repeats} more since the last report)" if repeats else ""
        log.warning("connect.failed rule=%s: cannot connect%s: %s%s", rule, upstream, why, more)

    # -- timers

    def tick_soon(self) -> None:
        """Make sure that the wheel turns while something is on it."""
        if not self._is_ticking:
            self._is_ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self.poller.now = self._loop.time()
        try:
            self.wheel.advance(self.poller.now)
        except Exception:  # as in Poller
            log.exception("relay.bug in a timer")
        self._is_ticking = False
        if self.wheel:
            self.tick_soon()

    # -- descriptors

    @property
    def has_spare_fd(self) -> bool:
        """Whether an accepted client is sure to get an upstream socket; if not, do not accept."""
        return self._spare_fd >= 0

    def upstream_socket(self, target: Target, source: SockAddr | None) -> socket.SocketType:
        """Make an upstream socket, from the spare descriptor when it is the last one.

        So a client that was accepted at the descriptor limit is served, and no further one is
        accepted until the spare is back. Raises OSError.
        """
        try:
            return sockets.upstream_socket(target, source)
        except OSError as err:
            if err.errno not in sockets.OUT_OF_RESOURCES or not self.has_spare_fd:
                raise
        os.close(self._spare_fd)
        self._spare_fd = -1
        self._loop.call_later(RESERVE_AFTER_S, self._reserve_again)
        return sockets.upstream_socket(target, source)

    def _reserve_again(self) -> None:
        if not (self._is_closed or self.recover_spare_fd()):
            self._loop.call_later(RESERVE_AFTER_S, self._reserve_again)

    def make_room(self) -> bool:
        """Close idle pipes, which have two descriptors each; False if there were none."""
        had_any = self.pipes.statistics().idle > 0
        self.pipes.close()
        return had_any

    def recover_spare_fd(self) -> bool:
        """Try to reserve the spare descriptor again; True if it is there."""
        if not self.has_spare_fd:
            self.make_room()
            with suppress(OSError):
                self._spare_fd = _reserve_fd()
        return self.has_spare_fd

    def close(self) -> None:
        """Give back everything but the sessions, which must have ended."""
        self._is_closed = True
        self.poller.close()
        self.pipes.close()
        if self.has_spare_fd:
            os.close(self._spare_fd)
            self._spare_fd = -1


def _reserve_fd() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
