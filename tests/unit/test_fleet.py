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
from forwarder.supervision.keeper import Keeper
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
    tables = WorkerTables(fleet.ledger.open(), Holdings(), fleet.keeper.open())
    process = WorkerProcess(0, os.getpid(), tables, ours, now)
    fleet._retiring.append(process)
    assert fleet.next_look() > now + 100
    process.deaf_until = now + RETRY_S
    assert fleet.next_look() == process.deaf_until
    process.retry_at = now + 30 * RETRY_S  # of an assignment that it refused before
    assert fleet.next_look() == process.deaf_until
    ours.close()
    theirs.close()


def test_what_is_held_is_counted_again_when_no_session_is_on_its_way(fleet: Fleet) -> None:
    """A worker dies while a session of another one is between two workers.

    *Result*: what the dead one held is free at once; what the session holds is not known then, but
    in the end. While sessions of a dead one look for a worker, nothing of it is free.
    """
    row, gate = fleet.ledger.row("a"), fleet._gate
    ours, theirs = channel_pair()
    tables = WorkerTables(fleet.ledger.open(), Holdings(), fleet.keeper.open())
    fleet._retiring.append(WorkerProcess(0, os.getpid(), tables, ours, 0.0))
    dead = Holdings()
    with gate:
        for mine in (tables.holdings, dead):
            gate.hold(mine, row, 0)
    fleet._must_recount = True
    fleet.is_adopting = lambda: True
    fleet._recount()
    assert gate.sessions(row) == 2
    fleet.is_adopting, fleet.is_amid_moves = lambda: False, lambda: True
    for place in (0, row):
        tables.holdings.rows[place] -= 1
    fleet._recount()
    assert (gate.sessions(row), fleet.must_recount) == (0, True)
    for place in (0, row):
        tables.holdings.rows[place] += 1
    fleet._recount()
    assert gate.sessions(row) == 0
    fleet.is_amid_moves = lambda: False
    fleet._recount()
    assert (gate.sessions(row), fleet.must_recount) == (1, False)
    ours.close()
    theirs.close()


def test_a_worker_that_is_told_again_what_it_refused_has_time_to_answer() -> None:
    """It may take long over thousands of rules, and the master has more turns meanwhile.

    *Result*: what is told at each turn would never be answered, as its answer would be to an
    earlier one.
    """
    ours, theirs = channel_pair()
    board = Board()
    tables = WorkerTables(board, Holdings(), Keeper(lambda _: None).open())
    process = WorkerProcess(0, os.getpid(), tables, ours, 0.0)
    wanted = (1, 1, (0,))
    refused: dict[str, object] = {"missing": [], "refusal": "RuntimeError: planted"}
    process.told, process.sent_serial = wanted, 1
    process.on_applied({"serial": 1, **refused}, 10.0)
    assert not process.must_be_told(wanted, process.retry_at - 0.01)
    assert process.must_be_told(wanted, process.retry_at)
    process.sent_serial = 2
    assert not process.must_be_told(wanted, process.retry_at + 0.01)
    process.on_applied({"serial": 2, **refused}, 20.0)
    assert process.refusals == 2
    assert process.must_be_told(wanted, process.retry_at)
    ours.close()
    theirs.close()
    board.close()
