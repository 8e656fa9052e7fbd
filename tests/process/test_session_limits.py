"""Limits of sessions through the real command, under floods of clients."""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import procfs
from support.configured import IS_SOAK
from support.ends import Link, accept, carry, connect
from support.forwarder import Leaks
from support.limited import HOSTS, LIMIT
from support.processes import owner, queued, run_command
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.flood import Outcome

    from process.conftest import Limit


pytestmark = pytest.mark.process

WORKERS = pytest.mark.parametrize("workers", [1, 2, 8])
MODES = pytest.mark.parametrize("mode", ["reset", "queue"])


def refused_or_waiting(outcome: Outcome, mode: str, count: int) -> None:
    """In one mode everybody is served, in the other who is not is reset; nobody is cut."""
    assert outcome.cut == 0
    assert outcome.served + outcome.reset == count
    assert (outcome.reset == 0) is (mode == "queue")


# -- floods


@MODES
@WORKERS
def test_max_sessions_is_reached_and_never_exceeded(limit: Limit, workers: int, mode: str) -> None:
    it = limit(f'max_sessions = {LIMIT}\non_limit = "{mode}"', workers=workers)
    with it.flood() as flood:
        outcome = flood.run(300)
    refused_or_waiting(outcome, mode, 300)
    assert outcome.most == LIMIT
    it.assert_all_places_free()
    if mode == "reset":
        assert it.ends("us/limit") >= outcome.reset


@MODES
def test_max_sessions_of_all_rules_together(limit: Limit, mode: str) -> None:
    it = limit(f'on_limit = "{mode}"', workers=3, top=f"max_sessions = {LIMIT}")
    with it.flood() as flood:
        outcome = flood.run(200)
    refused_or_waiting(outcome, mode, 200)
    assert outcome.most == LIMIT


@MODES
@WORKERS
def test_max_sessions_per_client(limit: Limit, workers: int, mode: str) -> None:
    """Each of five clients may have three; with a queue for the rule, too.

    *Result*: who has too many is reset in both modes, for that is known after the accept only.
    """
    it = limit(
        f'max_sessions = 100\nmax_sessions_per_client = 3\non_limit = "{mode}"', workers=workers
    )
    with it.flood(hold=15) as flood:
        outcome = flood.run(500)
    assert outcome.cut == 0
    assert outcome.reset > 0
    assert max(outcome.most_by_host.values()) <= 3
    it.assert_all_places_free(15)


@WORKERS
def test_exactly_the_burst_passes_when_nothing_is_added(limit: Limit, workers: int) -> None:
    it = limit('rate = "1/h"\nburst = 37', workers=workers)
    with it.flood(hold=5) as flood:
        outcome = flood.run(300)
    assert (outcome.served, outcome.reset, outcome.cut) == (37, 263, 0)


@WORKERS
def test_exactly_the_burst_of_each_client_passes(limit: Limit, workers: int) -> None:
    it = limit('rate_per_client = "1/h"\nburst_per_client = 7', workers=workers)
    with it.flood(hold=5) as flood:
        outcome = flood.run(300)
    assert outcome.served_by_host == dict.fromkeys(HOSTS, 7)
    assert (outcome.reset, outcome.cut) == (300 - 5 * 7, 0)


def test_a_client_at_the_rate_of_the_rule_keeps_what_it_may_have_itself(limit: Limit) -> None:
    """Refused by the one limit, a client has not used up the other one.

    *Result*: when the first limit is gone, its own burst is whole.
    """
    it = limit('rate = "1/h"\nburst = 1\nrate_per_client = "1/h"\nburst_per_client = 3')
    with it.flood(hold=1) as flood:
        assert flood.run(50).served == 1
    it.reload('rate_per_client = "1/h"\nburst_per_client = 3')
    with it.flood(hold=1) as flood:
        assert flood.run(50).served == 5 * 3 - 1


def test_who_waits_for_the_rate_is_served_in_the_end(limit: Limit) -> None:
    """100 clients at 100 a second; none is reset, and the rate is kept."""
    it = limit('rate = 100\nburst = 20\non_limit = "queue"', workers=3)
    with it.flood(hold=1) as flood:
        outcome = flood.run(100)
    assert (outcome.served, outcome.reset, outcome.cut) == (100, 0, 0)


def test_an_empty_look_into_the_queue_costs_nothing_of_the_rate(limit: Limit) -> None:
    """Clients one after the other, each followed by a look for more; then those that are refused.

    *Result*: exactly the burst passes.
    """
    rate = 'rate = "1/h"\nburst = 30\non_limit = "queue"\n'
    it = limit(rate)
    for _ in range(15):
        it.link()
    it.close_links()
    eventually(lambda: it.status()["sessions"] == 0)
    it.reload(f"{rate}max_sessions_per_client = 1")
    first = it.link()
    for _ in range(10):
        it.refused()
    first.close()
    with it.flood(hold=1, hosts=tuple(f"127.0.2.{number}" for number in range(1, 15))) as flood:
        flood.fill(14)
        flood.release()
        assert flood.outcome.served == 14
    with connect(it.address) as client:
        eventually(lambda: queued(("0.0.0.0", it.address[1])) + queued(it.address) == 1)
        client.close()


# -- nothing leaks


@MODES
@pytest.mark.expects_log
def test_nothing_leaks_however_often_a_limit_is_hit(limit: Limit, mode: str) -> None:
    """100,000 times when asked for; here fewer. Result: no descriptor, no memory, no place."""
    count = 100_000 if IS_SOAK else 3_000
    it = limit(
        f'max_sessions = {LIMIT}\nmax_sessions_per_client = 3\non_limit = "{mode}"', workers=2
    )
    leaks = Leaks(it.it.forwarder)
    with it.flood(hold=15) as flood:
        flood.run(count // 10, 400)
    leaks.check()
    before = {pid: procfs.resident_kib(pid) for pid in it.it.forwarder.workers()}
    hits = it.ends("us/limit")
    while it.ends("us/limit") - hits < count:
        with it.flood(hold=15) as flood:
            flood.run(2000, 400)
    leaks.check()
    for pid, kib in before.items():
        assert procfs.resident_kib(pid) - kib < 1024
    it.assert_all_places_free(15)
    eventually(lambda: it.status()["sessions"] == 0)


def test_the_places_of_a_killed_worker_are_free_again(limit: Limit) -> None:
    it = limit(f"max_sessions = {LIMIT}\nmax_sessions_per_client = {LIMIT}", workers=2)
    for _ in range(LIMIT):
        it.link()
    it.refused()
    pids = it.it.forwarder.workers()
    lost = [link for link in it.links if owner(pids, link.client) == pids[0]]
    assert 0 < len(lost) < LIMIT, "all sessions are in one worker"
    os.kill(pids[0], signal.SIGKILL)
    it.it.forwarder.wait_logged("worker.died")
    for link in lost:
        link.close()
        it.links.remove(link)
    free = len(lost)

    for _ in range(free):
        eventually(it.link_if_there_is_room, "a place is not free")
    it.refused()
    it.close_links()
    it.assert_all_places_free()


def test_a_stopped_worker_keeps_no_client_of_the_others_waiting(limit: Limit) -> None:
    """One of four is stopped, perhaps with the lock: the others serve, and when it goes on, too."""
    it = limit(f"max_sessions = {LIMIT}", workers=4)
    with it.flood(hold=LIMIT) as flood:
        flood.run(200)
    for _ in range(3):
        victim = it.it.forwarder.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        served = 0
        while served < 10:
            try:
                client = connect(it.address)
            except ConnectionResetError:  # those that have just ended have places still
                continue
            it.upstream.settimeout(0.2)
            try:
                link = Link(client, accept(it.upstream))
            except TimeoutError:  # it is queued at the stopped one
                it.links.append(Link(client, client))
                continue
            link.close()
            served += 1
        try:
            os.kill(victim, signal.SIGCONT)
        except ProcessLookupError:  # it had the lock: all have waited until it was replaced
            it.it.forwarder.wait_logged(rf"worker\.hung .*pid={victim}:")
        it.close_links()
    with it.flood(hold=LIMIT) as flood:
        outcome = flood.run(200)
    assert outcome.most <= LIMIT
    it.assert_all_places_free()


@contextmanager
def held_lock(pid: int) -> Iterator[None]:
    """Have the lock of the limits, as a worker that hangs while it has it."""
    (fd,) = (fd for fd, what in procfs.descriptors(pid).items() if "forwarder-gate" in what)
    with Path(f"/proc/{pid}/fd/{fd}").open("r+b", buffering=0) as file:
        # Not to wait for: a worker may have it just now.
        while True:
            with suppress(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
        yield


@MODES
def test_no_loop_stands_still_while_the_lock_is_stuck(limit: Limit, mode: str) -> None:
    """Sessions go on, end, and are listed; new clients wait, and nobody is refused for it.

    *Result*: when the lock is free again they are served, and every place is counted.
    """
    it = limit(
        f'max_sessions = {LIMIT}\nmax_sessions_per_client = {LIMIT}\nbandwidth = "1Gbit"\n'
        f'on_limit = "{mode}"'
    )
    for _ in range(LIMIT):
        it.link()
    pid, *_ = it.it.forwarder.workers()
    with held_lock(pid):
        waiting = [connect(it.address) for _ in range(LIMIT // 2)]
        data = bytes(1 << 20)
        for link in it.links[LIMIT // 2 :]:
            carry(link.client, link.upstream, data)
        for link in it.links[: LIMIT // 2]:
            link.close()
        del it.links[: LIMIT // 2]
        eventually(lambda: it.status()["sessions"] == LIMIT // 2)
        listed = run_command("sessions", "--json", "--control", it.control)
        assert len(listed.stdout.splitlines()) == LIMIT // 2
        # Whether they were accepted or not: nobody is an end of file or a reset away.
        for client in waiting:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
    for client in waiting:
        client.settimeout(30)
        it.upstream.settimeout(30)
        it.links.append(Link(client, accept(it.upstream)))
    if mode == "reset":
        it.refused()
    it.close_links()
    it.assert_all_places_free()
