"""What an old master still does for the one that serves."""

from __future__ import annotations

import os
import selectors
import socket
from typing import TYPE_CHECKING, cast

from forwarder.handover import Handover
from forwarder.upgrade import Successor

if TYPE_CHECKING:
    import pytest

    from forwarder.control.requests import Requests
    from forwarder.handover import Incumbent


def test_a_reload_is_passed_on_to_the_heir_as_long_as_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it has gone its number may be another's."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with selectors.DefaultSelector() as selector, ours, theirs:
        handover = Handover(cast("Incumbent", None), selector, cast("Requests", None))
        heir = Successor.__new__(Successor)
        heir.pid, heir.line, heir.end = 12345, ours, None
        heir._said_of_end = "without a word"
        handover._has_heir, handover._heir = True, heir
        selector.register(heir, selectors.EVENT_READ, handover._hear_heir)
        handover.note_reload()
        assert killed == [12345]
        theirs.close()
        for key, _ in selector.select(5):
            key.data()
        handover.note_reload()
        assert killed == [12345]
        assert handover.has_heir
