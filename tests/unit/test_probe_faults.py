"""Checks while something is missing on this host: no word about a server, and no leak."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.probing import BEGIN, SHORT_S, Asking, ask, check, target_of

from forwarder.checker.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.config.model import Check

KINDS = [kind.value for kind in BEGIN]


def check_of(kind: str, **fields: object) -> Check:
    """A check of a kind, of a server that says nothing."""
    given = {"argv": ("/bin/true",)} if kind == "command" else {}
    return check(kind, **given, **fields)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A server of TCP that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """So many descriptors can be opened, and no more."""
    me = os.getpid()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(procfs.descriptors(me))
    free = [number for number in range(max(taken) + count + 2) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [0, 1, 2])
def test_without_descriptors_nothing_is_said_of_a_server(
    kind: str, left: int, server: socket.socket
) -> None:
    """Whichever of its descriptors it is that a check does not get."""
    asked = Asking(check_of(kind, timeout_s=SHORT_S), target_of(server))
    asked.outcome()  # Python loads a module for the first one by TLS
    asked.until(lambda: not asked.loop._watches)
    with descriptors_left(left):
        asked.begin()
        asked.until(lambda: asked.outcomes)
    outcome = asked.outcomes[0]
    asked.until(lambda: not asked.loop._watches)
    asked.loop.close()
    needed = 2 if kind == "command" else 1  # its pipe; it can do without a third
    assert outcome.is_ours is (left < needed)
    if outcome.is_ours:
        assert outcome.why.endswith("too many open files")


@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor_that_cannot_be_watched_says_nothing_of_a_server(
    kind: str, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's limit of what epoll watches is reached: epoll_ctl(2)."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Loop, "watch", refuse)
    outcome = ask(check_of(kind), target_of(server))
    assert (outcome.is_good, outcome.is_ours) == (False, True)
    assert outcome.why.endswith("no space left on device")
