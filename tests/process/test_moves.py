"""Sessions go on in another worker: when theirs leaves, and when somebody says so."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from support.ends import Link, be_reset, carry
from support.loads import Load
from support.logged import Logged, places, read_json
from support.processes import run_command, state
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from process.conftest import Logging

pytestmark = pytest.mark.process

STREAMS = 200


def assert_alive(links: list[Link]) -> None:
    for link in links:
        carry(link.client, link.upstream, b"x" * 1000)
        carry(link.upstream, link.client, b"y" * 1000)


def resize(it: Logged, count: int) -> None:
    """Change the number of workers; those that are too many are gone with it."""
    assert it.ask("workers", count=str(count))["ok"] is True
    eventually(
        lambda: len(it.forwarder.workers()) == count,
        lambda: f"{it.forwarder.workers()} of {count}: {it.forwarder.lines[-20:]}",
    )


def ids(it: Logged) -> list[str]:
    """Those of all open sessions."""
    sessions = it.ask("sessions", limit=10_000)["sessions"]
    assert isinstance(sessions, list)
    return sorted(one["id"] for one in sessions)


def by_slot(it: Logged) -> dict[int, int]:
    """How many sessions each worker has; at most a beat old."""
    workers = it.ask("status")["workers"]
    assert isinstance(workers, list)
    return {one["slot"]: one["sessions"] for one in workers}


def test_sessions_do_not_notice_how_many_workers_there_are(logged: Logging, tmp_path: Path) -> None:
    """Up and down, with every byte compared, at a limit that all of them together have reached.

    *Result*: nobody is cut, those that retire are gone, a session is the same one all the time, is
    counted and held once, and has one line in the log.
    """
    log = tmp_path / "sessions"
    it = logged(places((log, "json")), rule=f"max_sessions_per_client = {STREAMS}", workers=2)
    refused = 0
    with Load(it.address, it.upstream, rate=0, streams=STREAMS) as load:
        eventually(lambda: it.total("sessions") == STREAMS)
        before = ids(it)
        for count in (8, 1, 5, 2):
            resize(it, count)
            assert it.ask("move", rule="one", slot=count - 1)["back"] == 0
            be_reset(it.address)
            refused += 1
            assert ids(it) == before
            assert it.rule()["sessions"] == it.total("sessions") == STREAMS
        account = load.stop()
    assert (account.dropped, account.served) == (0, STREAMS), account
    assert account.stream_bytes
    eventually(lambda: it.rule()["sessions"] == 0)
    assert it.rule()["sessions_total"] == STREAMS
    assert it.rule()["refused"] == refused
    moved = it.rule()["moved_in"]
    assert moved == it.rule()["moved_out"] == it.total("moved_in")
    assert isinstance(moved, int)
    assert moved > 3 * STREAMS
    assert it.forwarder.stop() == 0
    ended = [line for line in read_json(log) if line["event"] == "ended"]
    assert sorted(str(line["id"]) for line in ended) == before
    assert {line["end"] for line in ended} == {"client/data"}
    assert all("limit.reached" in line for line in it.forwarder.trouble())


def test_a_worker_that_is_told_to_leave_leaves_its_sessions_to_the_next(
    logged: Logging, links: list[Link]
) -> None:
    """It is the only one: its sessions wait for the one that follows."""
    it = logged("", workers=1)
    links += [it.link() for _ in range(5)]
    (old,) = it.forwarder.workers()
    os.kill(old, signal.SIGTERM)
    eventually(lambda: old not in it.forwarder.workers() and bool(it.forwarder.workers()))
    assert_alive(links)
    assert it.ends() == {}


def test_a_worker_that_is_stopped_keeps_no_session_waiting(
    logged: Logging, links: list[Link]
) -> None:
    """One of two that could take them, and the one with the fewest."""
    it = logged("", workers=1)
    links += [it.link() for _ in range(10)]
    resize(it, 3)
    pids = {int(str(one["slot"])): int(str(one["pid"])) for one in workers(it)}
    os.kill(pids[1], signal.SIGSTOP)
    eventually(lambda: state(pids[1]) == "T")
    try:
        os.kill(pids[0], signal.SIGTERM)
        eventually(lambda: pids[0] not in it.forwarder.workers())
        assert_alive(links)
    finally:
        os.kill(pids[1], signal.SIGCONT)
    assert_alive(links)
    assert it.total("sessions") == 10


def workers(it: Logged) -> list[dict[str, object]]:
    """All workers in the status."""
    found = it.ask("status")["workers"]
    assert isinstance(found, list)
    return found


def test_an_operator_moves_sessions_to_a_worker(logged: Logging, links: list[Link]) -> None:
    it = logged("", workers=2)
    links += [it.link() for _ in range(6)]

    def move(*arguments: str) -> tuple[int, str, str]:
        done = run_command("move", *arguments, "--control", str(it.control))
        return done.returncode, done.stdout, done.stderr

    eventually(lambda: sum(by_slot(it).values()) == 6)
    elsewhere = by_slot(it)[0]
    code, out, _ = move("--rule", "one", "--to", "1")
    assert code == 0
    assert out.startswith(f"{elsewhere} session")
    assert out.endswith(" moved to the worker in slot 1\n")
    one = ids(it)[0]
    code, out, _ = move(one, "--to", "0")
    assert (code, out) == (0, "1 session moved to the worker in slot 0\n")
    eventually(lambda: by_slot(it) == {0: 1, 1: 5})
    assert_alive(links)
    code, _, error = move(one, "--to", "7")
    assert code == 1
    assert "no worker is ready in slot 7; slots with one that is: 0, 1" in error
    code, _, error = move("1.1", "--to", "0")
    assert code == 1
    assert "no open session is called 1.1" in error


def test_a_stop_amid_a_move_ends_all_sessions(logged: Logging, links: list[Link]) -> None:
    """At once, while a worker that is to take some is stopped. Result: each is counted as cut."""
    it = logged("", workers=2)
    links += [it.link() for _ in range(10)]
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGSTOP)
    it.forwarder.signal(signal.SIGTTOU)
    it.forwarder.signal(signal.SIGINT)
    it.forwarder.wait_logged("master.stopping how=stop")
    for pid in it.forwarder.workers():
        os.kill(pid, signal.SIGCONT)
    assert it.forwarder.wait() == 0
    assert any("master.stopped ended=0 cut=10" in line for line in it.forwarder.lines)
