"""What an old master still does for the one that serves."""

from __future__ import annotations

import os
import selectors
import socket
from typing import TYPE_CHECKING, cast

from forwarder.ipc.questions import Questions
from forwarder.succession.handover import Handover
from forwarder.succession.lineage import Heir

if TYPE_CHECKING:
    import pytest

    from forwarder.control.requests import Requests
    from forwarder.serving.service import Service
    from forwarder.succession.handover import Incumbent
    from forwarder.succession.lineage import Elder
    from forwarder.upstream.known import KnownNames


def test_a_reload_is_passed_on_to_the_heir_as_long_as_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it has gone its number may be another's."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with selectors.DefaultSelector() as selector, theirs:
        requests = cast("Requests", None)
        handover = Handover(
            cast("Incumbent", None),
            cast("Service", None),
            cast("KnownNames", None),
            Questions(),
            selector,
            requests,
        )
        handover._heir = Heir(12345, ours, selector, cast("Elder", None))
        handover.note_reload()
        assert killed == [12345]
        theirs.close()
        for key, _ in selector.select(5):
            key.data()
        handover.note_reload()
        assert killed == [12345]
