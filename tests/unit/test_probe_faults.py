"""Checks while something is missing on this host: no word about a server, and no leak."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
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
    asked.outcome()
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


def test_a_check_loads_no_module() -> None:
    """The user of the workers may not read where Python is: it may be in the home of root."""
    code = """
import socket, sys
from support.probing import BEGIN, Asking, check, target, target_of
answers = [b"\\x1b[2J\\xff\\n", b"HTTP/1.1 503 X\\n", b"down #x\\n", b"\\x15\\3\\3\\0\\2\\2F"]
known = set(sys.modules)
with socket.create_server(("127.0.0.1", 0)) as listener:
    for kind in BEGIN:
        for answer in answers:
            argv = ("/bin/sh", "-c", "printf '\\\\033x'; exit 1")
            given = check(kind.value, host="web.example", argv=argv, expect=b"y")
            asked = Asking(given, target_of(listener))
            if kind.value not in ("udp", "command"):
                peer = listener.accept()[0]
                peer.sendall(answer)
                peer.close()
            outcome = asked.outcome()
            asked.loop.close()
            print(kind.value, outcome.why)
print("loaded", sorted(set(sys.modules) - known))
"""
    here = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": here},
    )
    assert done.stdout.endswith("loaded []\n"), (done.stdout, done.stderr)
