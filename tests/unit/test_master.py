"""What a master does with its undertakings, whatever they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from forwarder.config.model import Config
from forwarder.master import Master
from forwarder.supervision.spec import MasterSpec, MasterState
from forwarder.system import surviving

if TYPE_CHECKING:
    from collections.abc import Iterator


class Part:
    """An undertaking that notes what it is told, in a list for all."""

    def __init__(self, name: str, told: list[str], deadline: float | None = 0.0) -> None:
        self._name = name
        self._told = told
        self.deadline = deadline

    def turn(self, now: float) -> None:
        assert now > 0
        self._told.append(f"{self._name} turn")

    def cancel(self) -> None:
        self._told.append(f"{self._name} cancel")

    def close(self) -> None:
        self._told.append(f"{self._name} close")


class Broken(Part):
    """One whose turn has a bug."""

    def turn(self, now: float) -> None:
        super().turn(now)
        raise ZeroDivisionError


@pytest.fixture
def master(monkeypatch: pytest.MonkeyPatch) -> Iterator[Master]:
    """One that runs without workers, rules and signals."""
    monkeypatch.setattr(surviving, "BUG_PAUSE_S", 0.0)
    it = Master(MasterSpec(config=Config(rules=()), title="test"))
    own = it._undertakings
    it._state = MasterState.RUNNING
    yield it
    it._undertakings = own
    it._close()


def test_each_has_its_turn_though_one_before_it_has_a_bug(
    master: Master, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    master._undertakings = (Part("one", told), Broken("two", told), Part("three", told))
    master.turn()
    assert told == ["one turn", "two turn", "three turn"]
    assert "ZeroDivisionError" in caplog.text


def test_it_waits_until_the_first_deadline(master: Master) -> None:
    for deadlines, is_waiting in (
        ([None, math.inf], None),
        ([None, 0.0, math.inf], False),
        ([1e12, None], True),
    ):
        master._undertakings = tuple(Part("part", [], deadline) for deadline in deadlines)
        patience = master._patience()
        assert is_waiting is (None if patience is None else patience > 0)


def test_all_hear_of_a_stop_in_their_order_and_of_one_that_is_hurried(master: Master) -> None:
    told: list[str] = []
    master._undertakings = (Part("one", told), Part("two", told))
    for _ in range(3):  # the third changes nothing
        master.stop()
    assert told == ["one cancel", "two cancel"] * 2
