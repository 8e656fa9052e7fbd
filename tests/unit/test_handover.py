"""What an old master still does for the one that serves."""

from __future__ import annotations

import errno
import os
import selectors
import socket
from typing import TYPE_CHECKING

from support.elders import OldMaster

from forwarder.config.model import Config
from forwarder.ipc.questions import Questions
from forwarder.serving.service import Service
from forwarder.succession.handover import Handover
from forwarder.succession.lineage import Heir
from forwarder.succession.upgrade import Estate

if TYPE_CHECKING:
    import pytest

    from forwarder.ipc.channel import Received


class Replaced:
    """A master whose heir serves already."""

    is_running = is_reloading = False

    def __init__(self) -> None:
        self.elder = OldMaster()

    def reload(self) -> str:
        """It is the heir's."""
        return ""

    def stop(self) -> None:
        """It has stopped."""


class Nobody:
    """Who has asked for an upgrade, and the control socket of ours: the heir has that."""

    def take_back(self) -> None:
        """The heir has not failed."""

    def on_upgraded(self, report: str, *, is_done: bool) -> None:
        """Nobody has asked."""


class TakesNothing:
    """It has no predecessor, and there are no orphans."""

    def add(self, giver: object) -> None:
        """There is none."""

    def on_message(self, pid: int, received: Received) -> None:
        """Nobody says anything."""


def estate() -> Estate:
    """Nothing."""
    return Estate(control=None, names=b"{}", servers=b"{}", table=-1)


class Running(Replaced):
    """A master that may be upgraded."""

    is_running = True


class Unwatched(selectors.DefaultSelector):
    """At the limit of fs.epoll.max_user_watches."""

    def register(self, *_: object) -> selectors.SelectorKey:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Started:
    """A successor that has been executed."""

    pid = 12345
    was_killed = False

    def kill(self) -> None:
        """It is no use where nobody hears it."""
        self.was_killed = True


def test_a_successor_that_cannot_be_watched_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would serve beside a master that waits for it for ever, and reloads no more."""
    successor = Started()
    monkeypatch.setattr("forwarder.succession.handover.Successor", lambda *_: successor)
    with Unwatched() as selector:
        service = Service(Config(rules=()), lambda: None)
        handover = Handover(
            Running(), service, estate, Questions(), selector, Nobody(), TakesNothing()
        )
        assert "No space left on device" in handover.start()
        assert successor.was_killed
        assert not handover.is_under_way


def test_a_reload_is_passed_on_to_the_heir_as_long_as_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once it has gone its number may be another's."""
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: killed.append(pid))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with selectors.DefaultSelector() as selector, theirs:
        service = Service(Config(rules=()), lambda: None)
        master = Replaced()
        handover = Handover(
            master, service, estate, Questions(), selector, Nobody(), TakesNothing()
        )
        handover._heir = Heir(12345, ours, selector, master.elder)
        handover.note_reload()
        assert killed == [12345]
        theirs.close()
        for key, _ in selector.select(5):
            key.data()
        handover.note_reload()
        assert killed == [12345]
