"""Sessions that are reset at a time of their own, if they are still open: their rule is gone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forwarder.relay.session import Session
    from forwarder.system.loop import Clock


class Cuts:
    """Which session is reset when; times are those of the loop.

    ``limit_s``: how long sessions may go on without their rule; 0 or None is no limit.
    """

    __slots__ = ("_at", "_cut", "_loop", "_times", "limit_s")

    def __init__(self, loop: Clock, cut: Callable[[Iterable[Session]], None]) -> None:
        """``cut`` resets sessions; those that have ended it skips."""
        self.limit_s: float | None = None
        self._loop = loop
        self._cut = cut
        self._at: dict[Session, float] = {}
        self._times: set[float] = set()  # for which there is a timer

    def begin(self, sessions: Iterable[Session]) -> None:
        """The rules of these sessions are gone. Of two limits of a session the first one holds."""
        if self.limit_s:
            self._await(self._loop.time() + self.limit_s, sessions)

    def resume(self, session: Session, at: float) -> None:
        """Reset a session that has come from another worker when that would have done so."""
        self._await(at, (session,))

    def at(self, session: Session) -> float:
        """When a session will be reset; 0: not by this."""
        return self._at.get(session, 0.0)

    def _await(self, at: float, sessions: Iterable[Session]) -> None:
        for session in sessions:
            if self._at.setdefault(session, at) == at and at not in self._times:
                self._times.add(at)
                delay = max(at - self._loop.time(), 0.0)
                self._loop.call_later(delay, partial(self._on_time, at))

    def _on_time(self, time: float) -> None:
        self._times.discard(time)
        due = [session for session, at in self._at.items() if at <= time]
        for session in due:
            del self._at[session]
        self._cut(due)
