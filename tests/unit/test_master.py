"""What a master does with its undertakings, whatever they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from forwarder.config.model import Config, Settings
from forwarder.master import Master
from forwarder.serving.loader import Candidate, Rejected
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


@pytest.fixture
def answers() -> dict[str, object]:
    """To clients that ask for a reload with :func:`read`, by client."""
    return {}


def read(master: Master, client: str, answers: dict[str, object]) -> None:
    """A configuration begins to be read for this client."""
    master._requests._asked.append(lambda answer: answers.update({client: answer["ok"]}))
    master._requests.on_loading()


def found(master: Master, hang_timeout_s: float) -> None:
    """A configuration has been read."""
    config = Config(rules=(), settings=Settings(hang_timeout_s=hang_timeout_s))
    master._reloading._end(Candidate(config, {}))


def test_a_reload_that_workers_refuse_is_no_answer_to_the_next_which_is_being_read(
    master: Master, answers: dict[str, object]
) -> None:
    """*Result*: who asked for the next hears what becomes of that one."""
    read(master, "first", answers)
    found(master, 20.0)
    read(master, "second", answers)
    master._reloading.on_refused("planted")
    master._requests.on_settled()
    assert answers == {"first": False}
    master._reloading._end(Rejected(("bad",)))
    assert answers == {"first": False, "second": False}


def test_workers_that_refuse_a_second_reload_get_what_they_have_served_before_the_first(
    master: Master, answers: dict[str, object]
) -> None:
    """The first may have been refused as well: its refusal came too late to be one."""
    before = master._service.config
    for client, hang_timeout_s in (("first", 20.0), ("second", 30.0)):
        read(master, client, answers)
        found(master, hang_timeout_s)
    assert answers == {}
    master._reloading.on_refused("planted")
    assert master._service.config == before
    assert answers == {"first": False, "second": False}
