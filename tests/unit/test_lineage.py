"""What an old master answers to its heir."""

from __future__ import annotations

import selectors
import socket
from typing import TYPE_CHECKING

from support.elders import NoSessions, OldMaster

from forwarder.ipc.channel import Channel
from forwarder.ipc.messages import Op, read_answer
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
