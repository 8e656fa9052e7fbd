"""The fleet where no worker comes to be."""

from __future__ import annotations

import errno
import os
import selectors
import time
from typing import TYPE_CHECKING, cast

import pytest

from forwarder.fleet import Fleet
from forwarder.slot import Slot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forwarder.listeners import ListenerTable


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """One without sockets to share out."""
    with selectors.DefaultSelector() as selector:
        fleet = Fleet(cast("ListenerTable", None), selector, lambda: None)
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
