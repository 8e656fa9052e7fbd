"""When a service manager that watches us hears from us; no socket, no clock."""

from __future__ import annotations

import itertools

import pytest

from forwarder.system.notify import Watchdog


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "soon", "WATCHDOG_PID": "7"},
        {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"},
    ],
)
def test_nobody_watches_us(environment: dict[str, str]) -> None:
    watchdog = Watchdog(environment, 7, 100.0)
    assert watchdog.deadline is None
    assert not watchdog.falls_due(1e9)
    assert environment == {}


@pytest.mark.parametrize("more", [{}, {"WATCHDOG_PID": "7"}])
def test_a_sign_of_life_is_given_more_than_twice_per_interval(more: dict[str, str]) -> None:
    watchdog = Watchdog({"WATCHDOG_USEC": "3000000", **more}, 7, 100.0)
    signs = [now / 10 for now in range(1000, 1100) if watchdog.falls_due(now / 10)]
    gaps = [later - sooner for sooner, later in itertools.pairwise(signs)]
    assert signs[0] == 100.0
    assert max(gaps) < 1.5
    assert len(signs) == 10


def test_the_next_one_is_due_some_time_after_a_late_one() -> None:
    watchdog = Watchdog({"WATCHDOG_USEC": "3000000"}, 7, 100.0)
    assert watchdog.falls_due(150.0)
    assert not watchdog.falls_due(150.0)
    assert watchdog.deadline == 151.0


def test_an_heir_is_watched_too_whatever_its_pid() -> None:
    environment = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}
    Watchdog(environment, 7, 100.0)
    assert environment == {"WATCHDOG_USEC": "3000000"}
    assert Watchdog(environment, 8, 100.0).deadline == 100.0
