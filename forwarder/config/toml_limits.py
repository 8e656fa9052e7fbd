"""The limits of a rule, out of its TOML table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from forwarder.config.model import Limits, OnLimit
from forwarder.config.quantities import (
    BANDWIDTH_FORMS,
    RATE_FORMS,
    parse_bandwidth,
    parse_rate,
)
from forwarder.config.toml_table import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.toml_table import Table

LIMIT_KEYS: Final = (
    "bandwidth",
    "burst",
    "burst_per_client",
    "max_sessions",
    "max_sessions_per_client",
    "on_limit",
    "rate",
    "rate_per_client",
)
# More than a machine has ports and memory for; catches a number in the wrong place.
MOST_SESSIONS: Final = 100_000_000


def read_limits(table: Table, *, is_udp: bool, has_total: bool) -> Limits:
    """Read the keys that limit a rule; what is not there limits nothing.

    ``is_udp``: it listens on UDP. ``has_total``: there is a limit of all rules together.
    """
    rate = _quantity(table, "rate", parse_rate, RATE_FORMS)
    rate_per_client = _quantity(table, "rate_per_client", parse_rate, RATE_FORMS)
    limits = Limits(
        max_sessions=_count(table, "max_sessions"),
        max_sessions_per_client=_count(table, "max_sessions_per_client"),
        rate=rate,
        burst=_burst(table, "burst", "rate", rate),
        rate_per_client=rate_per_client,
        burst_per_client=_burst(table, "burst_per_client", "rate_per_client", rate_per_client),
        bandwidth=_quantity(table, "bandwidth", parse_bandwidth, BANDWIDTH_FORMS),
        on_limit=table.choice("on_limit", OnLimit) or OnLimit.RESET,
    )
    _warn_of_what_has_no_effect(table, limits, is_udp=is_udp, has_total=has_total)
    return limits


def _warn_of_what_has_no_effect(
    table: Table, limits: Limits, *, is_udp: bool, has_total: bool
) -> None:
    if is_udp and limits.on_limit is OnLimit.QUEUE:
        table.issues.warn(
            table.place("on_limit"),
            "on_limit has no effect on a UDP rule: datagrams that would begin a flow are dropped",
        )
    elif "on_limit" in table and not (has_total or "max_sessions" in table or "rate" in table):
        table.issues.warn(
            table.place("on_limit"),
            "on_limit has no effect: the rule has neither max_sessions nor rate",
            hint="limits of single clients always reset",
        )
    if 0 < limits.max_sessions <= limits.max_sessions_per_client:
        table.issues.warn(
            table.place("max_sessions_per_client"),
            "max_sessions_per_client has no effect: max_sessions is not above it",
        )


def _count(table: Table, key: str) -> int:
    found = table.number(key, 1, MOST_SESSIONS)
    return found.value if found else 0


def _burst(table: Table, key: str, of: str, rate: float) -> float:
    """What may come at once; as much as in a second unless it is written."""
    found = table.number(key, 1, MOST_SESSIONS)
    if found and of not in table:
        table.issues.warn(found.place, f"{key} has no effect without {of}")
    return float(found.value) if found else max(1.0, rate)


def _quantity(table: Table, key: str, parse: Callable[[object], float], allowed: str) -> float:
    value = table.get(key)
    if value is None:
        return 0.0
    try:
        return parse(value)
    except ValueError as error:
        what = f"{key}: {describe(value)} {error}"
        table.issues.error(table.place(key), what, allowed=allowed)
        return 0.0
