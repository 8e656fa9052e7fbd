"""Workers in this process that give sessions up and take some, by real consignments; and kills.

Sessions are numbers, with no descriptors of their own. What becomes of each is known, so that a
test can say that it has one owner at any time, and where it ended.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from typing import TYPE_CHECKING, cast

from forwarder.ipc import claim, consignment
from forwarder.ipc.channel import Received
from forwarder.ipc.consignment import Consignment, Refusal, answer_taken
from forwarder.ipc.messages import Op
from forwarder.supervision.move_plan import Taker
from forwarder.supervision.moves import Moves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.ipc.channel import Channel, Message
    from forwarder.supervision.givers import Giver, OnTheirWay

RULE = "web"


class Wire:
    """One way of a channel: what was sent, until it is read."""

    def __init__(self) -> None:
        self.waiting: deque[Received] = deque()

    def send(self, message: Message, fds: Sequence[int] = (), *, gives: bool = False) -> None:
        """Send, with duplicates of the descriptors."""
        assert not gives
        self.waiting.append(Received(json.loads(json.dumps(message)), [os.dup(fd) for fd in fds]))

    def as_channel(self) -> Channel:
        """As what sends consignments."""
        return cast("Channel", self)

    def close(self) -> None:
        """Nobody will read what waits."""
        while self.waiting:
            self.waiting.popleft().close()


class Process:
    """A worker, or an old master that stands for its workers; it has some sessions.

    ``busy`` cannot be moved. ``refuses``: how many of each consignment it does not take, and why.
    ``dies_claiming``: it is killed between its claim and its answer.
    """

    is_foreign = False

    def __init__(self, world: World, pid: int, slot: int, sessions: Sequence[int]) -> None:
        self.pid = pid
        self.slot = slot
        self.name = f"worker slot={slot} pid={pid}"
        self.has = set(sessions)
        self.busy: set[int] = set()
        self.out: dict[int, tuple[int, list[int]]] = {}  # by number: its token, the sessions
        self.inbox, self.outbox = Wire(), Wire()
        self.refuses, self.why = 0, Refusal.DESCRIPTORS
        self.dies_claiming = False
        self.drains = self.is_killed = self.is_reaped = self.is_stopped = self.is_cut_off = False
        self.is_truncated = False  # what it sends, at the master
        self._world = world

    # -- as the master sees it

    @property
    def is_gone(self) -> bool:
        """Whether it cannot be told anything."""
        return self.is_reaped or self.is_cut_off

    @property
    def is_dead(self) -> bool:
        """Whether it was reaped."""
        return self.is_reaped

    def sessions(self) -> int:
        """How many it has."""
        return len(self.has)

    def ask(self, number: int, limit: int, choice: Message | None) -> None:
        """Send MOVE."""
        self.inbox.send(consignment.move(number, limit, choice or {}))

    def settle(self, number: int, refused: Sequence[int] = ()) -> None:
        """Send MOVED."""
        self.inbox.send(consignment.moved(number, refused=refused))

    # -- what it does

    @property
    def can_act(self) -> bool:
        """Whether it runs and has something to read."""
        return bool(self.inbox.waiting) and not (self.is_killed or self.is_stopped)

    def act(self) -> None:
        """Handle one message."""
        received = self.inbox.waiting.popleft()
        op = received.message["op"]
        if op == Op.MOVE:
            self._give(received.message)
        elif op == Op.MOVED:
            self.act_on(received.message)
        else:
            self._take(Consignment.read(received))

    def _give(self, message: Message) -> None:
        number, limit, ids = message["number"], message["limit"], message.get("ids")
        assert isinstance(number, int)
        assert isinstance(limit, int)
        chosen = self.has if ids is None else self.has & {*cast("list[int]", ids)}
        movable = sorted(chosen - self.busy)
        given = movable[:limit]
        parcels = [{"terms": 0, "id": one} for one in given]
        made = Consignment.of(
            number, {"terms": [{"name": RULE}], "sessions": parcels}, [[] for _ in given]
        )
        made.left, made.busy = len(movable) - len(given), len(chosen & self.busy)
        made.send(self.outbox.as_channel())
        self.outbox.waiting[-1].is_truncated = self.is_truncated
        if given:
            self.out[number] = os.dup(made.token), given
        self.has -= {*given}
        made.close()

    def act_on(self, message: Message) -> None:
        """Go on with what is refused of its consignment."""
        number = cast("int", message["number"])
        token, given = self.out.pop(number)
        if refused := cast("list[int]", message["refused"]):
            self._own([given[i] for i in refused])
            answer_taken(self.outbox.as_channel(), number)
        os.close(token)

    def _take(self, came: Consignment) -> None:
        count = len(came)
        channel, number = self.outbox.as_channel(), came.number
        if self.refuses >= count:
            answer_taken(channel, number, range(count), self.why)
        elif not came.claim():
            answer_taken(channel, number, range(count), Refusal.CLAIMED)
        elif self.dies_claiming:
            self._world.kill(self)
        else:
            content = cast("list[dict[str, int]]", came.read_content()["sessions"])
            ids = [content[at]["id"] for at, _ in came.sessions]
            self._own(ids[self.refuses :])
            answer_taken(channel, number, range(self.refuses), self.why)
        came.close()

    def lose_master(self) -> None:
        """Its channel, or line, has ended: what is out is its own again, unless it was claimed."""
        self.is_cut_off = True
        for token, given in self.out.values():
            if claim.claim(token, claim.Claimant.GIVER):
                self._own(given)
        self.close()

    def _own(self, sessions: Sequence[int]) -> None:
        for process in self._world.processes:
            assert not process.has & {*sessions}, f"two have them: {self.pid}, {process.pid}"
        self.has |= {*sessions}

    def close(self) -> None:
        """Close all that it has open."""
        self.inbox.close()
        self.outbox.close()
        for token, _ in self.out.values():
            os.close(token)
        self.out.clear()


class World:
    """A master's moves, its workers, and a clock. As ``givers.Workforce``."""

    def __init__(self, workers: int = 0, sessions: int = 0) -> None:
        self.now = 1000.0
        self.processes: list[Process] = []
        self.killed: set[int] = set()  # sessions of processes that were killed
        self.lost: Counter[str] = Counter()
        self.must_recount = False
        self.moves = Moves(self)
        self.sessions = 0
        for _ in range(workers):
            self.start(sessions)

    def monotonic(self) -> float:
        """The time, in place of the module's."""
        return self.now

    # -- what happens

    def start(self, sessions: int = 0, slot: int | None = None) -> Process:
        """A worker gets ready."""
        pid, first = 100 + len(self.processes), self.sessions
        self.sessions += sessions
        slot = len(self.processes) if slot is None else slot
        process = Process(self, pid, slot, range(first, self.sessions))
        self.processes.append(process)
        return process

    def kill(self, process: Process) -> None:
        """It is dead; the master has still to notice."""
        process.is_killed = True
        self.killed |= process.has
        process.has.clear()

    def reap(self, process: Process) -> None:
        """The master hears its last words, and that it has ended."""
        while process.outbox.waiting:
            self.hear(process)
        process.is_reaped = True
        process.close()

    def hear(self, process: Process) -> None:
        """The master reads one message of it."""
        received = process.outbox.waiting.popleft()
        try:
            self.moves.on_message(process.pid, received)
        finally:
            received.close()

    def turn(self) -> None:
        """The master has a turn."""
        self.moves.turn(self.now)

    def settle(self, rounds: int = 500) -> None:
        """Go on until nothing happens any more."""
        for _ in range(rounds):
            self.turn()
            for process in self.processes:
                if process.is_killed and not process.is_reaped:
                    self.reap(process)
                while process.can_act:
                    process.act()
                while process.outbox.waiting and not process.is_gone:
                    self.hear(process)
            self.turn()
            if any(it.can_act or it.is_killed > it.is_reaped for it in self.processes):
                continue
            at = self.moves.deadline
            if at is None:
                return
            self.now = max(self.now, at)

    def owners(self) -> dict[int, int]:
        """Who has each session: its pid."""
        return {one: process.pid for process in self.processes for one in process.has}

    def close(self) -> None:
        """Close what is open."""
        self.moves.close()
        for process in self.processes:
            process.close()

    # -- as a workforce

    def _living(self) -> list[Process]:
        return [it for it in self.processes if not (it.is_reaped or it.is_foreign)]

    def takers(self, now: float) -> list[Taker]:  # noqa: ARG002 - all seem well
        """Those that do not drain."""
        return [Taker(it.pid, it.slot, len(it.has)) for it in self._living() if not it.drains]

    def reachable(self) -> list[Taker]:
        """All that live."""
        return [Taker(it.pid, it.slot, len(it.has)) for it in self._living()]

    def is_alive(self, pid: int) -> bool:
        """Whether it was not reaped."""
        return pid in [it.pid for it in self._living()]

    def leaving(self) -> list[Giver]:
        """Those that drain."""
        return [it for it in self._living() if it.drains]

    def serving(self) -> list[Giver]:
        """Those that do not."""
        return [it for it in self._living() if not it.drains]

    def carry(self, pid: int, consignment: Consignment) -> None:
        """Send PARCELS."""
        (process,) = [it for it in self._living() if it.pid == pid]
        consignment.send(process.inbox.as_channel())

    def holds_back(self, pid: int) -> bool:  # noqa: ARG002 - wires have room
        """Never."""
        return False

    def lose(self, rule: str, sessions: int) -> None:
        """Count them."""
        self.lost[rule] += sessions

    def report_to(self, moves: OnTheirWay) -> None:
        """Nothing: it is known."""
