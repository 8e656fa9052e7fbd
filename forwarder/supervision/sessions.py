"""All open sessions of this instance: its workers', and those of old masters that drain before it.

Sends messages to workers; decides nothing.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from forwarder.ipc import messages
from forwarder.ipc.channel import ChannelClosed
from forwarder.ipc.questions import ANSWER_WITHIN_S
from forwarder.stats.rows import SESSIONS, SESSIONS_CUT
from forwarder.succession.lineage import Left
from forwarder.supervision.slot import WorkerState

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.ipc.channel import Message
    from forwarder.ipc.messages import Op
    from forwarder.ipc.questions import Answered
    from forwarder.succession.lineage import Predecessor
    from forwarder.supervision.fleet import Fleet

log = logging.getLogger(__name__)


class Sessions:
    """What the master, or its heir, may ask about sessions: see ``lineage.Remains``."""

    def __init__(self, fleet: Fleet, predecessor: Callable[[], Predecessor | None]) -> None:
        self._fleet = fleet
        self._predecessor = predecessor

    @property
    def before(self) -> Predecessor | None:
        """The old master that has sessions left, or one before it, if there is one."""
        before = self._predecessor()
        return before if before is not None and before.drains else None

    def left(self) -> Left:
        """What we and old masters before us have left."""
        ledger, before = self._fleet.ledger, self._predecessor()
        older = Left() if before is None else before.left
        own = (os.getpid(), ledger.sum(SESSIONS))
        workers = [
            (process.pid, ledger.worker(process.tables.board)["sessions"])
            for process in self._fleet.processes()
            if process.state is WorkerState.DRAINING
        ]
        return Left(
            (own, *older.masters),
            ledger.sum(SESSIONS_CUT) + older.cut,
            (*workers, *older.workers),
        )

    def to_worker(self, pid: int, message: Message) -> None:
        """Pass MOVE or MOVED of an heir on to one of our workers, or to one of those before us."""
        for process in self._fleet.processes():
            if process.pid == pid:
                with suppress(ChannelClosed):  # it has died; SIGCHLD follows
                    process.channel.send(message)
                    self._fleet.telling.watch(process)
                return
        before = self._predecessor()
        if before is not None:
            before.to_worker(pid, message)

    def ask(
        self, op: Op, choice: Message, callback: Answered, within_s: float = ANSWER_WITHIN_S
    ) -> None:
        """List (LIST) or end (KILL) some of them.

        ``callback`` gets the answers, once, and the pids of workers that have not answered.
        """
        now, questions = time.monotonic(), self._fleet.questions
        asked, before = self._fleet.processes(), self.before
        pids = [process.pid for process in asked] + ([] if before is None else [before.pid])
        number = questions.note(pids, now, callback, within_s)
        if before is not None:
            before.ask(op, number, choice, within_s)
        for process in asked:
            try:
                process.channel.send({"op": op, "number": number, **choice})
                self._fleet.telling.watch(process)
            except ChannelClosed:
                continue  # it has died; SIGCHLD follows
        questions.expire(now)  # if there was no process to ask

    def cut_denied(self, rules_fd: int) -> None:
        """End sessions whose client the access rules of an heir deny, see ``messages.access_file``.

        The descriptor stays the caller's.
        """
        for process in self._fleet.processes():
            try:
                messages.send_access(process.channel, rules_fd)
                self._fleet.telling.watch(process)
            except ChannelClosed:
                continue  # it has died; SIGCHLD follows
            except OSError as err:
                log.error("upgrade: cannot send worker %d the access rules: %s", process.slot, err)
        before = self._predecessor()
        if before is not None:
            before.cut_denied(rules_fd)

    def reopen_logs(self) -> None:
        """Reopen the files of the connection log."""
        self._fleet.logs.reopen()
        before = self._predecessor()
        if before is not None:
            before.reopen_logs()
