"""Names of orphans are in an abstract namespace, where everybody may take every name."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.processes import NOBODY
from support.waiting import PATIENCE_S

from forwarder.ipc.channel import channel_kind
from forwarder.succession import orphans

if TYPE_CHECKING:
    from collections.abc import Iterator

UID = 0xFFFF_FF00  # nobody else's orphans meet us
NAME = f"\0forwarder-orphan/{UID}/"

SQUAT = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
held = []
for name in sys.argv[2:]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind("\\0" + name)
    sock.listen(0)
    held.append(sock)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if name.endswith("9"):  # its queue is full
        client.connect("\\0" + name)
        held.append(client)
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the user whose orphans are looked for."""
    monkeypatch.setattr(orphans, "_is_trusted", lambda *_: True)


def wants_nothing(_: socket.socket) -> bool:
    return False


@pytest.mark.usefixtures("ours")
def test_an_orphan_that_ends_while_it_is_asked_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has been seen, and is on its way out: refused before, or reset after the connect."""
    caplog.set_level(logging.DEBUG)
    kind = channel_kind()
    with socket.socket(socket.AF_UNIX, kind) as deaf, socket.socket(socket.AF_UNIX, kind) as last:
        deaf.bind(f"{NAME}1")  # bound, and listens no more
        last.bind(f"{NAME}2")
        last.listen(1)

        def end() -> None:
            select.select([last], [], [], PATIENCE_S)
            last.close()

        ending = threading.Thread(target=end)
        ending.start()
        assert orphans.from_orphans(UID, wants_nothing) == []
        ending.join()
    assert "/1 has gone" in caplog.text
    assert "/2 gives no sockets" in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text


@pytest.fixture
def squatters() -> Iterator[list[str]]:
    """Another user has taken these names and lets us in or, those that end in 9, does not."""
    names = [f"{NAME[1:]}{number}" for number in (101, 102, 109, 119, 129, 139)]
    with subprocess.Popen(
        [sys.executable, "-c", SQUAT, str(NOBODY), *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        yield names
        process.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_names_that_another_user_has_taken_hold_up_nobody(
    squatters: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """However many they are, and whether or not they answer: one line, and one wait for all."""
    assert len(squatters) == 6
    assert orphans.from_orphans(UID, wants_nothing) == []
    (open_ones,) = (r for r in caplog.records if "of other users" in r.message)
    (full_ones,) = (r for r in caplog.records if "let no master in" in r.message)
    assert "2 sockets" in open_ones.message
    assert "4 orphans" in full_ones.message


@pytest.mark.usefixtures("ours")
def test_an_orphan_is_found_though_somebody_has_taken_its_name() -> None:
    """Whoever knows the process id of a worker can have the name before it needs that."""
    uid, pid = os.geteuid(), os.getpid()

    async def open_door() -> tuple[set[str], list[str]]:
        before = set(orphans._doors(uid))
        door = orphans.OrphanDoor(asyncio.get_running_loop(), [], lambda: None)
        try:
            return set(orphans._doors(uid)) - before, [*before]
        finally:
            door.close()

    with ExitStack() as stack:
        squatter = stack.enter_context(socket.socket(socket.AF_UNIX, channel_kind()))
        squatter.bind(f"\0forwarder-orphan/{uid}/{pid}")
        found, before = asyncio.run(open_door())
    assert f"forwarder-orphan/{uid}/{pid}" in before
    (name,) = (name for name in found if f"/{pid}-" in name)
    assert name.startswith(f"forwarder-orphan/{uid}/{pid}-")
