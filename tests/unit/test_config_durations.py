"""Durations as people write them."""

from __future__ import annotations

import pytest

from forwarder.config.durations import parse_duration


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0), (2.5, 2.5), ("500ms", 0.5), ("10s", 10), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5)],
)
def test_durations(value: object, seconds: float) -> None:
    assert parse_duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    [True, "", "10", "s", "1m1h", "-1s", -1, float("nan"), float("inf"), "367d", 10**400, []],
)
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_duration(value)
