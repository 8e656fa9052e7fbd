"""An old master without workers or sessions, for its heir to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.succession.lineage import Left

if TYPE_CHECKING:
    from forwarder.ipc.channel import Message
    from forwarder.ipc.messages import Op
    from forwarder.ipc.questions import Answered
    from forwarder.stats.reasons import Phase


class NoSessions:
    """What such a master has left."""

    remains = Left()

    def ask(self, op: Op, choice: Message, callback: Answered, within_s: float) -> None:
        """No worker is there to answer."""
        del op, choice, within_s
        callback([], [])

    def cut_denied(self, rules_fd: int) -> None:
        """There is none to end."""

    def reopen_logs(self) -> None:
        """Nothing is logged."""

    def left(self) -> Left:
        """Nothing, unless a test says so."""
        return self.remains

    def to_worker(self, pid: int, message: Message) -> None:
        """There is none to pass it to."""


class OldMaster:
    """One that does nothing by itself, and has ``sessions`` left."""

    def __init__(self, sessions: NoSessions | None = None) -> None:
        self.sessions = sessions or NoSessions()

    def drain_as_last(self) -> None:
        """There is nothing to drain."""

    def end_sessions(self, phase: Phase) -> None:
        """There is none to end."""
