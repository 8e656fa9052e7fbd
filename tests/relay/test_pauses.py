"""Rests of listeners in the log, with a clock that the test turns by hand."""

from __future__ import annotations

import errno
import logging
import re

import pytest
from support.by_hand import HandLoop

from forwarder.relay.pauses import BUG, CALM_S, INTERVAL_S, Pauses


@pytest.fixture
def loop() -> HandLoop:
    return HandLoop()


@pytest.fixture
def pauses(loop: HandLoop, caplog: pytest.LogCaptureFixture) -> Pauses:
    caplog.set_level(logging.INFO)
    return Pauses(loop, lambda: 78)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EMFILE, "descriptors in use, 78 sessions; .* LimitNOFILE= or ulimit -n"),
        (errno.ENFILE, "the whole system has its [0-9]+ files open, 78 sessions here; .*file-max"),
        (errno.ENOMEM, "no memory .*Cannot allocate memory.*, 78 sessions; .*MemoryMax="),
        (errno.ENOBUFS, "no memory .*No buffer space.*, 78 sessions; .*tcp_mem"),
        (errno.ENOSPC, "watch is reached, 78 sessions; .*raise fs.epoll.max_user_watches"),
        (BUG, "unexpected error"),
    ],
)
def test_each_cause_has_its_own_hint(
    pauses: Pauses, caplog: pytest.LogCaptureFixture, number: int, hint: str
) -> None:
    pauses.note(number)
    assert caplog.records[0].levelno == logging.WARNING
    assert "accept.paused: " in caplog.text
    assert re.search(hint, caplog.text), caplog.text


def test_a_shortage_is_told_at_its_beginning_now_and_then_and_at_its_end(
    loop: HandLoop, pauses: Pauses, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred listeners rest ten times a second, for three minutes; then for none."""
    lasts_s = 3 * INTERVAL_S
    for _ in range(int(lasts_s * 10)):
        for _ in range(100):
            pauses.note(errno.EMFILE)
        loop.pass_time(0.1)
    assert pauses.total == lasts_s * 1000
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "more since the last report" in caplog.text
    loop.pass_time(CALM_S)
    assert caplog.records[-1].levelname == "INFO"
    assert f"accept.resumed: after {pauses.total} pauses" in caplog.text
    loop.pass_time(10 * INTERVAL_S)
    assert len(caplog.records) == 4


def test_shortages_that_come_and_go_are_told_as_rarely(
    loop: HandLoop, pauses: Pauses, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        pauses.note(errno.EMFILE)
        loop.pass_time(2 * CALM_S)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"] * 4


def test_another_cause_is_told_at_once(pauses: Pauses, caplog: pytest.LogCaptureFixture) -> None:
    pauses.note(errno.EMFILE)
    pauses.note(errno.ENOBUFS)
    assert len(caplog.records) == 2
