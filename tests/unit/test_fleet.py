"""The fleet where a worker cannot be forked, or not be told what to do."""

from __future__ import annotations

import errno
import os
import selectors
import time
from typing import TYPE_CHECKING

import pytest

from forwarder.config.model import Config, Settings
from forwarder.ipc.channel import channel_pair
from forwarder.limits.gate import Holdings
from forwarder.serving.generation import Serving
from forwarder.serving.listeners import ListenerTable
from forwarder.stats.board import Board
from forwarder.supervision.fleet import Fleet
from forwarder.supervision.slot import RETRY_S, Slot, WorkerProcess, WorkerTables

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """One without sockets to share out."""
    with selectors.DefaultSelector() as selector:
        fleet = Fleet(ListenerTable(), selector)
        yield fleet
        fleet.close()


def test_a_worker_that_cannot_be_forked_leaves_no_board(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    slot = Slot(0)
    for _ in range(3):
        fleet._start(slot, time.monotonic())
    assert slot.process is None
    assert slot.backoff.quick_deaths == 3
    assert fleet.ledger._boards == []


def test_who_could_not_be_told_is_told_again_in_time_however_long_a_worker_may_hang(
    fleet: Fleet,
) -> None:
    config = Config(rules=(), settings=Settings(hang_timeout_s=3600.0))
    fleet.serving = Serving(revision=1, generation=1, config=config, binds={}, counted_as={})
    ours, theirs = channel_pair()
    now = time.monotonic()
    process = WorkerProcess(0, os.getpid(), WorkerTables(Board(), Holdings()), ours, now)
    fleet._retiring.append(process)
    assert fleet.next_look() > now + 100
    process.deaf_until = now + RETRY_S
    assert fleet.next_look() == process.deaf_until
    ours.close()
    theirs.close()
