"""Durations as people write them: a number of seconds, or "500ms", "10s", "5m", "1h30m"."""

from __future__ import annotations

import re

MAX_DURATION_S = 366 * 86400  # a year; more is a slip, and timers need not think about it

DURATION_FORMS = '0 or more seconds, or a text such as "500ms", "10s", "5m" or "1h30m"'

_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(
    r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?"
    r"(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)s)?(?:([0-9]{1,9})ms)?"
)


def parse_duration(value: object) -> float:
    """Return seconds. Raises ValueError saying what is wrong with the value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("is not a duration")  # noqa: TRY004 - one kind of error for the caller
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None or not value:
            raise ValueError("is not a duration")
        parts = zip(match.groups(), _UNITS_S.values(), strict=True)
        value = sum(float(number) * unit for number, unit in parts if number)
    if not 0 <= value <= MAX_DURATION_S:  # also refuses nan
        raise ValueError(f"is not between 0 and {MAX_DURATION_S} seconds")
    return float(value)
