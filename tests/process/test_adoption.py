"""Sessions outlive their worker: it is killed or stands still, and others go on with them."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from support.ends import Link, carry, receive_to_end
from support.fatal import Fatal
from support.logged import Logged, places
from support.processes import suspend
from support.waiting import eventually

from forwarder.net.sockets import set_abort_on_close

if TYPE_CHECKING:
    from pathlib import Path

    from process.conftest import Logging

pytestmark = pytest.mark.process

# Soon, so that nobody has to wait for it.
SOON = "deposit_after = 0.1"


def await_deposit(it: Logged, count: int) -> None:
    eventually(lambda: it.total("deposited") == count, lambda: it.total("deposited"))


def kill_all(it: Logged) -> None:
    """Kill the workers one after the other, each when all serve."""
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGKILL)
        eventually(lambda pid=pid: is_complete(it, pid))  # type: ignore[misc]


def is_complete(it: Logged, killed: int) -> bool:
    """Whether two workers serve, and this is none of them."""
    found = it.ask("status")["workers"]
    assert isinstance(found, list)
    ready = [one["pid"] for one in found if one["state"] == "ready"]
    return len(ready) == 2 and killed not in ready


def ids(it: Logged) -> list[str]:
    found = it.ask("sessions", limit=100)["sessions"]
    assert isinstance(found, list)
    return sorted(one["id"] for one in found)


def fill(sock: socket.socket) -> bytes:
    """Send until nothing is taken any more, not by the forwarder either."""
    sock.settimeout(1)
    sent = bytearray()
    while True:
        part = os.urandom(100_000)
        try:
            sent += part[: sock.send(part)]
        except TimeoutError:
            return bytes(sent)


def test_sessions_go_on_when_their_workers_are_killed_one_after_the_other(
    logged: Logging, tmp_path: Path, links: list[Link]
) -> None:
    """Quiet ones, half-closed ones, and one whose upstream takes nothing.

    *Result*: every byte arrives, each session is counted, listed and logged once, under one id.
    """
    log = tmp_path / "log"
    it = logged(places((log, "json")), top=SOON)
    links += [it.link() for _ in range(12)]
    for link in links:
        carry(link.client, link.upstream, b"hello" * 300)
    links[0].client.shutdown(socket.SHUT_WR)
    assert receive_to_end(links[0].upstream) == b""
    links[1].upstream.shutdown(socket.SHUT_WR)
    assert receive_to_end(links[1].client) == b""
    waiting = fill(links[2].client)
    await_deposit(it, len(links))
    before = ids(it)
    kill_all(it)
    await_deposit(it, len(links))
    assert ids(it) == before
    carry(links[0].upstream, links[0].client, b"x" * 100_000)
    carry(links[1].client, links[1].upstream, b"x" * 100_000)
    links[2].client.setblocking(True)
    links[2].client.shutdown(socket.SHUT_WR)
    assert receive_to_end(links[2].upstream) == waiting
    for link in links[3:]:
        carry(link.client, link.upstream, b"x" * 100_000)
        carry(link.upstream, link.client, b"y" * 100_000)
    for link in links:
        link.close()
    it.wait_lines(log, it.used)
    eventually(lambda: it.rule()["sessions"] == 0)
    assert sum(it.ends().values()) == it.rule()["sessions_total"] == len(links)
    await_deposit(it, 0)


def test_the_replacement_of_the_only_worker_goes_on_with_its_sessions(
    logged: Logging, links: list[Link]
) -> None:
    it = logged("", top=SOON, workers=1)
    links += [it.link() for _ in range(3)]
    await_deposit(it, 3)
    (pid,) = it.forwarder.workers()
    os.kill(pid, signal.SIGKILL)
    for link in links:
        carry(link.client, link.upstream, b"x" * 1000)
        carry(link.upstream, link.client, b"y" * 1000)


def test_sessions_of_a_worker_that_fails_go_on(
    logged: Logging, links: list[Link], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fatal = Fatal(tmp_path / "fatal", monkeypatch)
    fatal.set("before", "forwarder.worker", "Worker._handle_about_sessions", fails=True)
    it = logged("", top=SOON)
    links += [it.link() for _ in range(6)]
    await_deposit(it, 6)
    it.ask("sessions", limit=1)
    eventually(lambda: any("worker.bug" in line for line in it.forwarder.lines))
    for link in links:
        carry(link.client, link.upstream, b"x" * 1000)
        carry(link.upstream, link.client, b"y" * 1000)
    it.forwarder.kill()
    it.forwarder.lines.clear()  # the bug's


def test_sessions_of_a_worker_that_stands_still_go_on_when_it_is_killed_for_that(
    logged: Logging, links: list[Link]
) -> None:
    it = logged("", top=f"{SOON}\nhang_timeout = 3")
    links += [it.link() for _ in range(6)]
    await_deposit(it, 6)
    os.kill(it.forwarder.workers()[0], signal.SIGSTOP)
    for link in links:
        carry(link.client, link.upstream, b"x" * 1000)
        carry(link.upstream, link.client, b"y" * 1000)


def test_a_session_that_ends_is_ended_at_once_though_the_master_has_its_sockets(
    logged: Logging, links: list[Link]
) -> None:
    """The master is stopped, so it closes nothing."""
    it = logged("", top=SOON)
    links += [it.link() for _ in range(2)]
    await_deposit(it, 2)
    master = it.forwarder.process.pid
    suspend(master)
    try:
        links[0].client.shutdown(socket.SHUT_WR)
        assert receive_to_end(links[0].upstream) == b""
        links[0].upstream.shutdown(socket.SHUT_WR)
        assert receive_to_end(links[0].client) == b""
        set_abort_on_close(links[1].client)
        links[1].client.close()
        with pytest.raises(ConnectionResetError):
            receive_to_end(links[1].upstream)
    finally:
        os.kill(master, signal.SIGCONT)


def test_without_deposits_sessions_end_with_their_worker(
    logged: Logging, links: list[Link]
) -> None:
    it = logged("", top="deposit_after = 0", workers=1)
    links.append(it.link())
    carry(links[0].client, links[0].upstream, b"x")
    assert it.total("deposited") == 0
    (pid,) = it.forwarder.workers()
    os.kill(pid, signal.SIGKILL)
    assert receive_to_end(links[0].client) == b""
