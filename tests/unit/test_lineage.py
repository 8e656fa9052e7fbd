"""What an old master answers to its heir."""

from __future__ import annotations

import os
import selectors
import socket
from typing import TYPE_CHECKING

import pytest
from support.elders import NoSessions, OldMaster

from forwarder.control.requests import CONDITIONS
from forwarder.ipc.channel import Channel, Received
from forwarder.ipc.messages import Op, read_answer
from forwarder.ipc.questions import Questions
from forwarder.relay.listing import Choice
from forwarder.succession.foreign import OldWorker
from forwarder.succession.lineage import Heir, Left, Predecessor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.ipc.channel import Message
    from forwarder.ipc.questions import Answered


class ThreeWorkers(NoSessions):
    """Three workers that answer, each with as many sessions as it was asked for."""

    def ask(self, op: Op, choice: Message, callback: Answered, within_s: float) -> None:
        """Answer at once."""
        del op, within_s
        limit = choice["limit"]
        assert isinstance(limit, int)
        callback([[{"id": f"{worker}.{i}"} for i in range(limit)] for worker in range(3)], [7])


def test_it_lists_no_more_sessions_than_it_was_asked_for() -> None:
    """However many workers it has: the heir takes in an answer up to a length only."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with selectors.DefaultSelector() as selector:
        heir = Heir(1, ours, selector, OldMaster(ThreeWorkers()))
        channel = Channel(theirs)
        channel.send({"op": Op.LIST, "number": 1, "within_s": 1.0, "limit": 4})
        for key, _ in selector.select(5):
            key.data()
        (received,) = channel.receive()
        assert received.message["number"] == 1
        answer = read_answer(received)
        assert answer == {"found": [[{"id": f"0.{i}"} for i in range(4)]], "silent": [7]}
        heir.close()
        channel.close()


class Noting(NoSessions):
    """Notes what it is asked about."""

    def __init__(self) -> None:
        self.asked: list[Message] = []

    def ask(self, op: Op, choice: Message, callback: Answered, within_s: float) -> None:
        """Answer at once."""
        del op, within_s
        self.asked.append(choice)
        callback([0], [])


def test_it_passes_on_every_condition_that_sessions_are_chosen_by() -> None:
    """Also one that only newer code knows: without it more sessions would end than were meant."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with selectors.DefaultSelector() as selector:
        sessions = Noting()
        heir = Heir(1, ours, selector, OldMaster(sessions))
        channel = Channel(theirs)
        conditions = {**dict.fromkeys(CONDITIONS), "server": "a", "colour": "red"}
        channel.send({"op": Op.KILL, "number": 1, "within_s": 1.0, **conditions})
        for key, _ in selector.select(5):
            key.data()
        assert sessions.asked == [conditions]
        heir.close()
        channel.close()


def test_a_worker_knows_every_condition_and_chooses_nothing_by_another_one() -> None:
    for condition in CONDITIONS:
        value = ["1.1"] if condition == "ids" else "a"
        choice = Choice.read({"op": "list", "number": 1, "limit": 5, condition: value})
        assert getattr(choice, condition) == (frozenset(value) if condition == "ids" else value)
    assert Choice.read({"op": "kill", "number": 1, "colour": None}) == Choice()
    nothing = Choice.read({"op": "kill", "number": 1, "server": "a", "colour": "red"})
    assert nothing == Choice(ids=frozenset())


class Workers(NoSessions):
    """Notes what is passed to workers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Message]] = []

    def to_worker(self, pid: int, message: Message) -> None:
        """Note it."""
        self.told.append((pid, message))


class Both:
    """Both ends of a line, the old master's and the heir's."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._selector = selector
        self.workers = Workers()
        self.came: list[tuple[int, Message, int]] = []
        self.heir = Heir(1, ours, selector, OldMaster(self.workers))
        self.before = Predecessor(theirs, selector, Questions(), self._on_parcels)
        self.worker = OldWorker(7, self.before)

    def _on_parcels(self, pid: int, received: Received) -> None:
        self.came.append((pid, received.message, len(received.fds)))

    def turn(self) -> None:
        """Let both hear what was said, until nobody says anything any more."""
        while events := self._selector.select(0):
            for key, _ in events:
                key.data()

    def close(self) -> None:
        """Close both ends."""
        self.heir.close()
        self.before.close()


@pytest.fixture
def both() -> Iterator[Both]:
    """See :class:`Both`."""
    with selectors.DefaultSelector() as selector:
        it = Both(selector)
        yield it
        it.close()


def parcels(number: int, sessions: int = 2) -> Received:
    """As a worker sends them: one descriptor each."""
    message: Message = {"op": Op.PARCELS, "number": number, "sessions": [[0, 1]] * sessions}
    return Received(message, [os.dup(0) for _ in range(sessions)])


MOVE = {"op": Op.MOVE, "number": 5, "limit": 100}
TAKE_BACK = {"op": Op.MOVED, "number": 5, "is_back": True}


def test_an_heir_asks_a_worker_of_the_old_one(both: Both) -> None:
    both.worker.ask(5, 100, None)
    both.turn()
    assert both.workers.told == [(7, MOVE)]
    assert both.heir.pass_on(7, parcels(5))
    both.turn()
    ((pid, message, fds),) = both.came
    assert (pid, message["number"], message["sessions"], fds) == (7, 5, [[0, 1]] * 2, 2)
    both.worker.settle(5, refused=[1])
    both.turn()
    moved = {"op": Op.MOVED, "number": 5, "is_back": False, "refused": [1]}
    assert both.workers.told[1:] == [(7, moved)]


def test_what_it_has_not_asked_for_is_not_passed_on(both: Both) -> None:
    given = parcels(5)
    assert not both.heir.pass_on(7, given)
    both.worker.ask(5, 100, None)
    both.turn()
    assert not both.heir.pass_on(8, given)
    assert not both.heir.pass_on(7, parcels(6, 0))
    assert len(given.fds) == 2
    given.close()
    both.turn()
    assert both.came == []


def test_sessions_that_are_out_when_the_heir_ends_are_claimed_by_their_worker(both: Both) -> None:
    both.worker.ask(5, 100, None)
    both.turn()
    both.heir.pass_on(7, parcels(5))
    both.before.close()
    both.turn()
    assert both.workers.told[1:] == [(7, TAKE_BACK)]


def test_sessions_that_come_when_the_heir_has_ended_go_back(both: Both) -> None:
    both.worker.ask(5, 100, None)
    both.turn()
    both.before.close()
    both.turn()
    assert both.heir.pass_on(7, parcels(5))
    assert both.workers.told[1:] == [(7, TAKE_BACK)]


def test_sessions_whose_descriptors_are_missing_go_back(both: Both) -> None:
    """And the heir is not left waiting for its answer."""
    both.worker.ask(5, 100, None)
    both.turn()
    given = parcels(5)
    given.is_truncated = True
    assert both.heir.pass_on(7, given)
    both.turn()
    assert both.workers.told[1:] == [(7, TAKE_BACK)]
    ((_, message, fds),) = both.came
    assert (message["sessions"], message["left"], message["busy"], fds) == ([], 0, 2, 0)


def test_a_worker_is_gone_when_the_old_one_does_not_name_it_any_more(both: Both) -> None:
    both.workers.remains = Left(((1, 9),), 0, ((7, 9),))
    both.heir.tell()
    both.turn()
    assert (both.worker.is_gone, both.worker.sessions()) == (False, 9)
    both.workers.remains = Left(((1, 0),), 0, ())
    both.heir.tell()
    both.turn()
    assert (both.worker.is_gone, both.worker.is_dead) == (True, True)
    both.heir.close()
    both.turn()
    assert (both.worker.is_gone, both.worker.is_dead) == (True, False)  # nobody can say
