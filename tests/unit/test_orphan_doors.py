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
    from collections.abc import Iterable, Iterator

    from forwarder.ipc.channel import Channel, Message, Received

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


def wants_nothing(_: Iterable[str]) -> bool:
    return False


def keeps_nothing(_: socket.socket) -> None:
    raise AssertionError("nobody has given anything")


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
            select.select([last], [], {}, PATIENCE_S)
            last.close()

        ending = threading.Thread(target=end)
        ending.start()
        assert orphans.from_orphans(UID, wants_nothing, keeps_nothing) == []
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
    assert orphans.from_orphans(UID, wants_nothing, keeps_nothing) == []
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
        door = orphans.OrphanDoor(asyncio.get_running_loop(), [], {}, lambda *_: None)
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


def test_a_master_that_takes_the_sockets_stays_connected() -> None:
    """What it says at once, before the orphan has read that, is for whoever goes on with it."""

    async def take() -> tuple[list[Message], bool]:
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[list[Received]] = loop.create_future()
        channels: list[Channel] = []

        def on_taken(channel: Channel, more: list[Received]) -> None:
            channels.append(channel)
            taken.set_result(more)

        door = orphans.OrphanDoor(loop, [], {}, on_taken)
        master = orphans.door_of(os.getpid(), os.geteuid())
        assert master is not None
        with master:
            master.send(orphans.TAKEN)
            master.send(b'{"op": "move"}')
            more = await asyncio.wait_for(taken, PATIENCE_S)
            assert orphans.door_of(os.getpid(), os.geteuid()) is None  # it is closed
            channels[0].send({"op": "parcels"})
            _, answer = master.recv(100), master.recv(100)
            channels[0].close()
            door.close()
        return [one.message for one in more], answer == b'{"op": "parcels"}'

    assert asyncio.run(take()) == ([{"op": "move"}], True)


def test_a_master_that_does_not_take_them_leaves_the_door_open() -> None:
    async def refuse() -> None:
        loop = asyncio.get_running_loop()
        door = orphans.OrphanDoor(loop, [], {}, lambda *_: None)
        try:
            for said in (b"", b"nonsense", b"1", b""):
                # Until it has let the last one go.
                while (master := orphans.door_of(os.getpid(), os.geteuid())) is None:  # noqa: ASYNC110 - it knows no event
                    await asyncio.sleep(0)
                with master:
                    if said:
                        master.send(said)
        finally:
            door.close()

    asyncio.run(asyncio.wait_for(refuse(), PATIENCE_S))
