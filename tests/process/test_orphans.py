"""A master that is killed: its workers serve on until a new one takes their sockets over."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from support.ends import carry, receive_to_reset
from support.forwarder import reserve_port
from support.loads import Load
from support.processes import listeners, members
from support.waiting import eventually

from process.conftest import as_pairs

if TYPE_CHECKING:
    from process.conftest import Launch, Serve, Service

pytestmark = pytest.mark.process


def kill_master(service: Service) -> list[int]:
    """Kill the master; returns its workers, which now know that they are alone."""
    workers = service.forwarder.workers()
    os.kill(service.forwarder.pid, signal.SIGKILL)
    service.forwarder.process.wait()
    eventually(
        lambda: sum("worker.orphaned" in line for line in service.forwarder.lines) == len(workers),
        lambda: "\n".join(service.forwarder.lines),
    )
    return workers


@pytest.mark.parametrize("workers", [1, 4])
def test_a_killed_master_costs_nobody_anything(serve: Serve, launch: Launch, workers: int) -> None:
    """Killed under load, and a new one started with another number of workers.

    Result: nobody is refused or reset, and the orphans leave though the streams go on.
    """
    old = serve(workers=3)
    with Load(old.address, old.upstream, rate=300, streams=6) as load:
        load.wait_served(100)
        orphans = kill_master(old)
        load.wait_served(200)
        new = launch(*old.pairs, "--workers", str(workers))
        new.wait_logged("took over 3 sockets")
        assert set(members(old.forwarder.pid)) <= set(orphans)
        eventually(lambda: not members(old.forwarder.pid), "orphans stay")
        load.wait_served(300)
        account = load.stop()
    assert account.dropped == 0, account.problems
    assert listeners(old.address) == max(3, workers)
    assert new.stop() == 0
    assert listeners(old.address) == 0


def test_masters_killed_one_after_the_other(serve: Serve, launch: Launch) -> None:
    """Each new one takes over from the last. Result: nobody is dropped, nothing piles up."""
    first = serve(workers=2)
    last = first.forwarder
    with Load(first.address, first.upstream, rate=200) as load:
        for _ in range(3):
            load.wait_served(50)
            last.process.kill()
            last.process.wait()
            before, last = last, launch(*first.pairs, "--workers", "2")
            pid = before.pid
            eventually(lambda pid=pid: not members(pid), "orphans stay")  # type: ignore[misc]  # its default is the type
        account = load.stop()
    assert account.dropped == 0, account.problems
    assert listeners(first.address) == 2
    assert last.stop() == 0


def test_another_instance_does_not_take_them(serve: Serve, launch: Launch) -> None:
    """Started meanwhile on another port. Result: the orphans serve on and wait for their own."""
    old = serve(workers=2)
    link = old.link()
    orphans = kill_master(old)
    with reserve_port() as holder, ExitStack() as stack:
        load = stack.enter_context(Load(old.address, old.upstream, rate=200))
        other = launch(*as_pairs(holder.getsockname(), old.upstream), "--workers", "2")
        assert not any("took over" in line for line in other.lines)
        load.wait_served(100)
        assert members(old.forwarder.pid) == orphans
        new = launch(*old.pairs, "--workers", "2")
        new.wait_logged("took over 2 sockets")
        load.wait_served(100)
        account = load.stop()
        assert account.dropped == 0, account.problems
        assert other.stop() == 0
    carry(link.client, link.upstream, b"still here")
    link.close()
    eventually(lambda: not members(old.forwarder.pid), "orphans stay")
    assert new.stop() == 0


def test_an_orphan_that_is_told_to_leave_does(serve: Serve) -> None:
    """By SIGTERM, as an administrator does who wants no new master."""
    old = serve(workers=2)
    for pid in kill_master(old):
        os.kill(pid, signal.SIGTERM)
    old.assert_nothing_left()


def test_workers_that_drain_are_bounded_by_drain_timeout_also_without_their_master(
    serve: Serve,
) -> None:
    """It is killed during a stop, and would have reset what is left."""
    service = serve("--drain-timeout", "1", workers=1)
    link = service.link()
    os.kill(service.forwarder.pid, signal.SIGTERM)
    eventually(lambda: listeners(service.address) == 0)
    os.kill(service.forwarder.pid, signal.SIGKILL)
    service.forwarder.process.wait()
    assert receive_to_reset(link.client) == b""
    eventually(lambda: not members(service.forwarder.pid), "a worker stays")
