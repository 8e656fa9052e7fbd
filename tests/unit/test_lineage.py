"""What an old master answers to its heir."""

from __future__ import annotations

import selectors
import socket
from typing import TYPE_CHECKING

from support.elders import NoSessions, OldMaster

from forwarder.control.requests import CONDITIONS
from forwarder.ipc.channel import Channel
from forwarder.ipc.messages import Op, read_answer
from forwarder.relay.listing import Choice
from forwarder.succession.lineage import Heir

if TYPE_CHECKING:
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
