"""The messages between a master that drains and the one that has taken its place.

The line is a pair of sockets that the old master has made for its successor (see ``upgrade``); the
kernel closes it when either of them ends. Through it the heir lists, ends and waits for sessions
that it does not have itself. Each master knows only the one before and the one after it and passes
on what is for others, so an old master stays as long as one before it drains.

::

    heir to old:  LIST, KILL (answered by ANSWER), ACCESS (end those of denied clients), LOGS
                  (reopen them), DRAIN (no master serves after us), STOP (reset all)
    old to heir:  DRAINS (masters that are left, with their sessions; none: not draining for us),
                  ANSWER

Decides nothing: the master does. Never blocks.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import selectors
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.ipc import messages
from forwarder.ipc.channel import Channel, ChannelClosed
from forwarder.ipc.messages import Op
from forwarder.net.sockets import peer_credentials
from forwarder.stats.reasons import Phase

if TYPE_CHECKING:
    import socket

    from forwarder.ipc.channel import Message, Received
    from forwarder.ipc.questions import Answered, Questions

log = logging.getLogger(__name__)

# How often an old master reports the number of its sessions, if that has changed. As old as counts
# in the status are.
TELL_S: Final = 1.0
# The part of a question's time that the master before gets: its own workers may be silent.
_SHARE: Final = 2 / 3
# What a question has beside its conditions.
_OF_A_QUESTION: Final = frozenset({"op", "number", "within_s"})


@dataclass(frozen=True, slots=True)
class Left:
    """What old masters have left: process id and open sessions of each, the youngest first.

    ``cut`` counts sessions that they have reset because of a stop or a limit, since their start.
    """

    masters: tuple[tuple[int, int], ...] = ()
    cut: int = 0

    @property
    def sessions(self) -> int:
        """Open sessions of all of them."""
        return sum(sessions for _, sessions in self.masters)

    def describe(self) -> list[dict[str, object]]:
        """As in the status."""
        return [{"pid": pid, "sessions": sessions} for pid, sessions in self.masters]


class Remains(Protocol):
    """Sessions of an old master and of those before it, as far as its heir can ask about them."""

    def ask(self, op: Op, choice: Message, callback: Answered, within_s: float) -> None:
        """List (LIST) or end (KILL) some of the sessions that are left."""

    def cut_denied(self, rules_fd: int) -> None:
        """End those whose client may no longer use its rule; the descriptor stays the caller's.

        Its content: see ``messages.access_file``.
        """

    def reopen_logs(self) -> None:
        """Reopen the files of the connection log."""

    def left(self) -> Left:
        """What this one and those before it have left."""


class Elder(Protocol):
    """An old master, as far as its heir can ask something of it."""

    @property
    def sessions(self) -> Remains:
        """Its sessions."""

    def drain_as_last(self) -> None:
        """The heir is stopping: no master serves after us."""

    def end_sessions(self, phase: Phase) -> None:
        """Reset the sessions that are left."""


def decline(line: socket.socket) -> None:
    """Report over a line that we end, not for that successor: there is nothing to wait for."""
    with suppress(OSError):  # it has gone
        line.send(json.dumps({"op": Op.DRAINS, "masters": [], "cut": 0}).encode())


class _Line:
    """One end. Owns the socket, and its place in the selector."""

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector) -> None:
        self._channel = Channel(sock)
        self._selector = selector
        selector.register(self._channel, selectors.EVENT_READ, self._on_event)

    @property
    def is_open(self) -> bool:
        """Whether the other end is open."""
        return self._channel.fileno() >= 0

    def close(self) -> None:
        """Close the socket; its place in the selector goes with it."""
        self._channel.close()

    def _handle(self, received: Received) -> None:
        raise NotImplementedError

    def _on_end(self) -> None:
        raise NotImplementedError

    def _say(self, op: Op, **fields: object) -> None:
        if self.is_open:
            with suppress(ChannelClosed):  # the end is reported as an event
                self._channel.send({"op": op, **fields})
                self._watch()

    def _watch(self) -> None:
        """Ask for writability exactly while something waits to be sent."""
        events = selectors.EVENT_READ
        if self._channel.has_outbox:
            events |= selectors.EVENT_WRITE
        if self._selector.get_key(self._channel).events != events:
            self._selector.modify(self._channel, events, self._on_event)

    def _on_event(self) -> None:
        if not self.is_open:
            return  # closed earlier in this turn
        try:
            self._channel.flush()
            for received in self._channel.receive():
                try:
                    self._handle(received)
                finally:
                    received.close()
            self._watch()
        except ChannelClosed:
            self._end()
        except (KeyError, TypeError, ValueError, RecursionError):
            # Other code, older or newer, that means something else: it has to drain by itself.
            log.exception("upgrade: the line to another master makes no sense; closing it")
            self._end()

    def _end(self) -> None:
        self._selector.unregister(self._channel)
        self._channel.close()
        self._on_end()


class Heir(_Line):
    """The old master's end: the line to the master that serves now."""

    def __init__(
        self, pid: int, sock: socket.socket, selector: selectors.BaseSelector, master: Elder
    ) -> None:
        """``sock`` becomes ours."""
        super().__init__(sock, selector)
        self.pid = pid
        self._tell_at: float | None = 0.0
        self._master = master
        self._told: Left | None = None

    def turn(self, now: float) -> None:
        """Report what is left, now and then, if it has changed."""
        if self._tell_at is not None and now >= self._tell_at:
            self._tell_at = now + TELL_S
            self.tell()

    def next_deadline(self, other: float | None) -> float | None:
        """When :meth:`turn` has something to do, or ``other`` if that is earlier."""
        return min((at for at in (self._tell_at, other) if at is not None), default=None)

    def tell(self) -> None:
        """Report what is left, if it has changed."""
        left = self._master.sessions.left()
        if left != self._told:
            self._told = left
            self._say(Op.DRAINS, masters=left.masters, cut=left.cut)

    def reload(self) -> None:
        """Make the heir reload, if it lives; else its pid may be another process's."""
        if self.is_open:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGHUP)

    def _on_end(self) -> None:
        self._tell_at = None

    def _handle(self, received: Received) -> None:
        message = received.message
        op = message["op"]
        if op in (Op.LIST, Op.KILL):
            self._answer(message)
        elif op == Op.ACCESS and received.fds:
            self._master.sessions.cut_denied(received.fds[0])
        elif op == Op.LOGS:
            self._master.sessions.reopen_logs()
        elif op == Op.DRAIN:
            self._master.drain_as_last()
        elif op == Op.STOP:
            self._master.end_sessions(Phase(message["phase"]))

    def _answer(self, question: Message) -> None:
        number, within_s = question["number"], question["within_s"]
        # All conditions, those of newer code as well: without one more sessions would be meant.
        choice = {key: it for key, it in question.items() if key not in _OF_A_QUESTION}
        limit = question.get("limit")

        def answer(found: list[object], silent: list[int]) -> None:
            if not self.is_open:
                return
            if isinstance(limit, int):  # of all together: an answer must not grow with the workers
                parts = [part for part in found if isinstance(part, list)]
                found = [list(itertools.islice(itertools.chain(*parts), limit))]
            with suppress(ChannelClosed):
                messages.send_answer(self._channel, number, {"found": found, "silent": silent})
                self._watch()

        if not isinstance(within_s, int | float):
            raise TypeError("within_s is a number of seconds")
        op = Op.LIST if question["op"] == Op.LIST else Op.KILL
        self._master.sessions.ask(op, choice, answer, within_s)


class Predecessor(_Line):
    """The heir's end: the line to the master before, and through that to those before it."""

    def __init__(
        self, sock: socket.socket, selector: selectors.BaseSelector, questions: Questions
    ) -> None:
        """``sock`` becomes ours. Answers go to ``questions``, as a worker's do."""
        super().__init__(sock, selector)
        self.pid, _ = peer_credentials(sock)
        self.first: Left | None = None  # its first report
        self.left = Left()
        self._questions = questions
        self._is_killed = False

    @property
    def drains(self) -> bool:
        """Whether it is there and lets its sessions end, or has not reported yet."""
        return self.is_open and (self.first is None or bool(self.left.masters))

    def ask(self, op: Op, number: int, choice: Message, within_s: float) -> None:
        """Ask about some of the sessions that are left."""
        self._say(op, number=number, within_s=within_s * _SHARE, **choice)

    def cut_denied(self, rules_fd: int) -> None:
        """End sessions whose client is denied by these rules, see ``messages.access_file``."""
        if self.is_open:
            with suppress(ChannelClosed):
                messages.send_access(self._channel, rules_fd)
                self._watch()

    def reopen_logs(self) -> None:
        """Make it reopen the files of the connection log."""
        self._say(Op.LOGS)

    def drain_as_last(self) -> None:
        """Report that we are stopping, so that no master serves after it."""
        self._say(Op.DRAIN)

    def end_sessions(self, phase: Phase) -> None:
        """Make it reset the sessions that are left."""
        self._say(Op.STOP, phase=phase.value)

    def kill(self) -> None:
        """Kill it and its workers, which would go on by themselves."""
        if self.is_open:
            log.error("master: the old one, pid=%d, does not stop, killing it", self.pid)
            self._is_killed = True
            for pid in (self.pid, *_children_of(self.pid)):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _on_end(self) -> None:
        # It has reported how many it has cut; if it had sessions, it was killed.
        sessions = self.left.sessions
        if sessions and not self._is_killed:
            log.warning(
                "upgrade: the old one, pid=%d, was killed; its workers go on with %d sessions, "
                "which no master sees any more",
                self.pid,
                sessions,
            )
        self.left = Left(cut=self.left.cut + sessions)
        self._questions.on_exit(self.pid)

    def _handle(self, received: Received) -> None:
        message = received.message
        if message["op"] == Op.DRAINS:
            masters, cut = message["masters"], message["cut"]
            if not (isinstance(masters, list) and isinstance(cut, int)):
                raise TypeError("not what is left")
            self.left = Left(tuple((int(pid), int(count)) for pid, count in masters), cut)
            self.first = self.first or self.left
        elif message["op"] == Op.ANSWER:
            number = message["number"]
            if self._questions.is_awaited(number, self.pid):
                self._take_answer(number, messages.read_answer(received))

    def _take_answer(self, number: object, answer: object) -> None:
        if not isinstance(answer, dict):
            self._questions.on_answer(number, self.pid, None)  # too long, or no descriptor for it
            return
        found, silent = answer["found"], answer["silent"]
        if not (isinstance(found, list) and isinstance(silent, list)):
            raise TypeError("not an answer")
        self._questions.on_answers(number, self.pid, found, map(int, silent))


def _children_of(parent: int) -> list[int]:
    """Process ids, from proc(5)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):  # of */stat it fails where one has just gone
        with suppress(OSError):  # it has gone
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(process.name))
    return found
