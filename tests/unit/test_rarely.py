"""What is said at once, then only now and then with a count; tracebacks, too."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from forwarder.system import daemonlog
from forwarder.system.daemonlog import PatientHandler, RareTracebacks
from forwarder.system.rarely import INTERVAL_S, MAX_KNOWN, MOST_NAMED, QUIET_S, Crowds, Rarely

if TYPE_CHECKING:
    import pytest


def test_a_thing_is_said_at_once_and_then_with_how_often_it_was_not() -> None:
    said = Rarely(10.0)
    assert [said.note("a", 100 + n) for n in range(3)] == ["", None, None]
    assert said.note("b", 102) == ""
    assert said.note("a", 110) == " (2 more since the last report)"
    assert said.note("a", 120) == ""


def test_things_that_come_and_go_do_not_pile_up() -> None:
    said = Rarely(10.0)
    for number in range(10 * MAX_KNOWN):
        said.note(str(number), number)
    assert len(said._known) <= MAX_KNOWN


def test_more_things_at_once_than_are_remembered_do_not_pile_up_either() -> None:
    """The last ones are said as rarely as ever."""
    said = Rarely(10.0)
    for number in range(2 * MAX_KNOWN):
        assert said.note(str(number), 100.0) == ""
    assert len(said._known) == MAX_KNOWN
    said.note("0", 105.0)
    assert said.note(str(2 * MAX_KNOWN - 1), 105.0) is None
    assert said.note(str(MAX_KNOWN), 105.0) == "", "the oldest was forgotten"


def test_of_many_at_once_the_first_are_named_and_the_others_counted() -> None:
    crowds = Crowds(10.0)
    down, up = ("down", "pg"), ("up", "pg")
    assert [crowds.names(down, str(one), 100.0 + one) for one in range(8)] == (
        [True] * MOST_NAMED + [False] * (8 - MOST_NAMED)
    )
    assert crowds.names(down, "0", 108.0), "it was named already"
    assert not crowds.names(down, "7", 108.0)
    assert crowds.names(up, "7", 109.0), "that is something else"
    assert crowds.deadline == 110.0
    assert crowds.over(109.0) == []
    assert crowds.over(110.0) == [(down, 8 - MOST_NAMED)]
    assert crowds.names(down, "7", 110.0), "a new crowd"
    assert crowds.over(200.0) == []
    assert crowds.deadline is None


def test_the_others_are_counted_as_soon_as_it_is_quiet() -> None:
    """In an outage all go within a moment; what follows must not come before that."""
    crowds = Crowds(10.0)
    for one in range(8):
        crowds.names(("down", "pg"), str(one), 100.0)
    assert crowds.deadline == 100.0 + QUIET_S
    assert crowds.over(100.0 + QUIET_S) == [(("down", "pg"), 8 - MOST_NAMED)]


def _fail(*, otherwise: bool) -> None:
    if otherwise:
        raise ValueError("other")
    raise ValueError("one")


def test_a_bug_that_anybody_can_cause_leaves_one_traceback_and_a_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two bugs, a thousand times each. Result: a traceback of each; some seconds later another."""
    read_fd, write_fd = os.pipe()
    handler = PatientHandler(write_fd)
    handler.addFilter(RareTracebacks())
    logger = logging.getLogger("test")
    logger.addHandler(handler)

    def happen() -> str:
        for number in range(1000):
            try:
                _fail(otherwise=bool(number % 2))
            except ValueError:
                logger.exception("a bug of client %d", number)
        return os.read(read_fd, 1 << 20).decode()

    try:
        text = happen()
        assert text.count("Traceback") == text.count("a bug of client") == 2
        assert "ValueError: one" in text
        assert "ValueError: other" in text
        later = time.monotonic() + INTERVAL_S
        monkeypatch.setattr(time, "monotonic", lambda: later)
        text = happen()
        assert text.count("Traceback") == 2
        assert "(499 more since the last report)" in text
    finally:
        logger.removeHandler(handler)
        os.close(read_fd)
        os.close(write_fd)


def test_a_warning_that_may_come_again_and_again_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemonlog, "_rarely", Rarely())
    told = [
        daemonlog.warn_rarely(logging.getLogger("test"), "it", f"no. {number}")
        for number in range(100)
    ]
    assert told == [True] + 99 * [False]
    assert caplog.messages == ["no. 0"]
