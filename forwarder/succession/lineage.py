"""The messages between a master that drains and the one that has taken its place.

The line is a pair of sockets that the old master has made for its successor (see ``upgrade``); the
kernel closes it when either of them ends. Through it the heir lists, ends and waits for sessions
that it does not have itself. Each master knows only the one before and the one after it and passes
on what is for others, so an old master stays as long as one before it drains.

::

    heir to old:  LIST, KILL (answered by ANSWER), ACCESS (end those of denied clients), LOGS
                  (reopen them), DRAIN (no master serves after us), STOP (reset all); MOVE and MOVED
                  for a worker
    old to heir:  DRAINS (masters and workers that are left, with their sessions; no master: not
                  draining for us), ANSWER; PARCELS of a worker

Decides nothing: the master does. Never blocks.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import selectors
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from forwarder.ipc import messages
from forwarder.ipc.channel import Channel, ChannelClosed
from forwarder.ipc.messages import Op
from forwarder.net.sockets import peer_credentials
from forwarder.stats.reasons import Phase
from forwarder.system.daemonlog import warn_rarely

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from forwarder.ipc.channel import Message, Received
    from forwarder.ipc.questions import Answered, Questions

log = logging.getLogger(__name__)

# How often an old master reports the number of its sessions, if that has changed. As old as counts
# in the status are.
TELL_S: Final = 1.0
# The part of a question's time that the master before gets: its own workers may be silent.
_SHARE: Final = 2 / 3
# Reports of what is left are not further apart while sessions leave us. Arbitrary.
_TELL_SOON_S: Final = 0.05
# A line that waits for memory of the kernel, or for descriptors in flight, is tried again so often.
_SHORT_S: Final = 0.1
# What a question has beside its conditions.
_OF_A_QUESTION: Final = frozenset({"op", "number", "within_s"})


@dataclass(frozen=True, slots=True)
class Left:
    """What old masters have left: process id and open sessions of each, the youngest first.

    ``cut`` counts sessions that they have reset because of a stop or a limit, since their start.
    ``workers``: process id and open sessions of each that drains, and gives them to who asks.
    """

    masters: tuple[tuple[int, int], ...] = ()
    cut: int = 0
    workers: tuple[tuple[int, int], ...] = ()

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

    def to_worker(self, pid: int, message: Message) -> None:
        """Pass MOVE or MOVED on to one of the workers that are left, if it is still there."""


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


class Line:
    """One end. Owns the socket, and its place in the selector."""

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector) -> None:
        self._flush_at: float | None = None  # when to try again, if no event will say so
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
        self._send({"op": op, **fields})

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, with descriptors that are closed then, also if the line has ended."""
        if not self.is_open:
            for fd in fds:
                os.close(fd)
            return
        with suppress(ChannelClosed):  # the end is reported as an event
            self._channel.send(message, fds, gives=True)
            self._watch()

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        return self._flush_at

    def turn(self, now: float) -> None:
        """Send what waits because memory had run out, if it is time."""
        if self._flush_at is not None and now >= self._flush_at:
            self._flush_at = None
            self._on_event()

    def _watch(self) -> None:
        """Ask for writability exactly while something waits to be sent."""
        if not self.is_open:
            return  # a message was the last word
        events = selectors.EVENT_READ
        if self._channel.is_short:
            self._flush_at = time.monotonic() + _SHORT_S
        elif self._channel.has_outbox:
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


class Heir(Line):
    """The old master's end: the line to the master that serves now.

    That takes sessions from each worker of ours, and of masters before us, as from its own (see
    ``consignment``). We pass messages on, and keep in mind which consignments are out: if the heir
    ends, their workers are told to go on with what nobody has claimed.
    """

    def __init__(
        self, pid: int, sock: socket.socket, selector: selectors.BaseSelector, master: Elder
    ) -> None:
        """``sock`` becomes ours."""
        super().__init__(sock, selector)
        self.pid = pid
        self._tell_at = 0.0
        self._master = master
        self._told: Left | None = None
        # By worker, the number of what it was asked for, and whether sessions are on their way.
        self._asked: dict[int, tuple[object, bool]] = {}

    def turn(self, now: float) -> None:
        """Report what is left, now and then, if it has changed."""
        super().turn(now)
        if self.is_open and now >= self._tell_at:
            self._tell_at = now + TELL_S
            self.tell()

    @property
    def deadline(self) -> float | None:
        """When :meth:`turn` has something to do without an event; None for never."""
        dates = (self._tell_at if self.is_open else None, super().deadline)
        return min((at for at in dates if at is not None), default=None)

    def tell(self) -> None:
        """Report what is left, if it has changed."""
        left = self._master.sessions.left()
        if left != self._told:
            self._told = left
            self._say(Op.DRAINS, masters=left.masters, cut=left.cut, workers=left.workers)

    def pass_on(self, pid: int, received: Received) -> bool:
        """Pass PARCELS of a worker on, if the heir has asked for them; returns whether it has.

        Raises TypeError for nonsense.
        """
        message = {**received.message, "worker": pid}
        number, sessions = message["number"], message["sessions"]
        if not isinstance(sessions, list):
            raise TypeError("not a consignment")
        if self._asked.get(pid) != (number, False):
            return False
        self._asked[pid] = number, bool(sessions)
        if received.is_truncated:
            what = "upgrade: no descriptors left to hand sessions over; the old one keeps them"
            warn_rarely(log, what, what, logging.ERROR)
            message |= {"sessions": [], "left": 0, "busy": len(sessions)}
            received.close()
        fds, received.fds = received.fds, []
        if not (self.is_open and fds):
            self._take_back(pid)
        self._send(message, fds)
        return True

    def _take_back(self, pid: int) -> None:
        """Let a worker go on with what it has on its way, unless somebody has claimed that."""
        number, is_out = self._asked.pop(pid)
        if is_out:
            message = {"op": Op.MOVED, "number": number, "is_back": True}
            self._master.sessions.to_worker(pid, message)

    def reload(self) -> None:
        """Make the heir reload, if it lives; else its pid may be another process's."""
        if self.is_open:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGHUP)

    def _on_end(self) -> None:
        what = f"pid={self.pid}, has ended; the next one takes the sessions of our workers"
        log.warning("upgrade: the new one, %s", what)
        for pid, (_, is_out) in tuple(self._asked.items()):
            if is_out:  # others are when they come, and nobody is there to pass them on to
                self._take_back(pid)

    def _handle(self, received: Received) -> None:
        message = received.message
        op = message["op"]
        if op in (Op.LIST, Op.KILL):
            self._answer(message)
        elif op in (Op.MOVE, Op.MOVED):
            self._to_worker(message)
        elif op == Op.ACCESS and received.fds:
            self._master.sessions.cut_denied(received.fds[0])
        elif op == Op.LOGS:
            self._master.sessions.reopen_logs()
        elif op == Op.DRAIN:
            self._master.drain_as_last()
        elif op == Op.STOP:
            self._master.end_sessions(Phase(message["phase"]))

    def _to_worker(self, message: Message) -> None:
        pid = message["worker"]
        if not isinstance(pid, int):
            raise TypeError("for no worker")
        # To it this would be a condition that it does not know.
        message = {key: it for key, it in message.items() if key != "worker"}
        if message["op"] == Op.MOVE:
            self._asked[pid] = message["number"], False
        else:
            self._asked.pop(pid, None)
            self._tell_at = min(self._tell_at, time.monotonic() + _TELL_SOON_S)
        self._master.sessions.to_worker(pid, message)

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


class Predecessor(Line):
    """The heir's end: the line to the master before, and through that to those before it."""

    def __init__(
        self,
        sock: socket.socket,
        selector: selectors.BaseSelector,
        questions: Questions,
        on_parcels: Callable[[int, Received], None],
    ) -> None:
        """``sock`` becomes ours. Answers go to ``questions``, as a worker's do.

        ``on_parcels`` is called with PARCELS, and the worker that sends them.
        """
        super().__init__(sock, selector)
        self._on_parcels = on_parcels
        self.pid, _ = peer_credentials(sock)
        self.first: Left | None = None  # its first report
        self.left = Left()
        self.orphaned: list[int] = []  # its workers, if it was killed
        self._questions = questions
        self._is_killed = False

    @property
    def is_lost(self) -> bool:
        """Whether it has ended without a word of what it has left: it was killed."""
        return not self.is_open and self.first is None

    @property
    def drains(self) -> bool:
        """Whether it is there and lets its sessions end, or has not reported yet."""
        return self.is_open and (self.first is None or bool(self.left.masters))

    def to_worker(self, pid: int, message: Message) -> None:
        """Send MOVE or MOVED to one of the workers that are left there."""
        self._send({**message, "worker": pid})

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
            self.orphaned = [pid for pid, _ in self.left.workers]
            log.warning(
                "upgrade: the old one, pid=%d, was killed; its workers go on with %d sessions, "
                "until they give them to us",
                self.pid,
                sessions,
            )
        self.left = Left(cut=self.left.cut + sessions)
        self._questions.on_exit(self.pid)

    def _handle(self, received: Received) -> None:
        message = received.message
        if message["op"] == Op.DRAINS:
            masters, cut = message["masters"], message["cut"]
            workers = message.get("workers", [])  # older code has none that can be asked
            if not (
                isinstance(masters, list) and isinstance(cut, int) and isinstance(workers, list)
            ):
                raise TypeError("not what is left")
            self.left = Left(_counts(masters), cut, _counts(workers))
            self.first = self.first or self.left
        elif message["op"] == Op.PARCELS:
            worker = message["worker"]
            if not isinstance(worker, int):
                raise TypeError("not of a worker")
            self._on_parcels(worker, received)
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


def _counts(pairs: list[object]) -> tuple[tuple[int, int], ...]:
    """Pairs of a process id and a number of sessions. Raises TypeError or ValueError."""
    found = []
    for pair in pairs:
        if not isinstance(pair, list):
            raise TypeError("not a pair")
        pid, sessions = pair
        found.append((int(pid), int(sessions)))
    return tuple(found)


def _children_of(parent: int) -> list[int]:
    """Process ids, from proc(5)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):  # of */stat it fails where one has just gone
        with suppress(OSError):  # it has gone
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(process.name))
    return found
