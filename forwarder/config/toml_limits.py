"""The limits of a rule in its TOML table: what is left out, and what has no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forwarder.config.keys import OF_A_RULE, values_of
from forwarder.config.model import Limits, OnLimit
from forwarder.config.raw import Placed

if TYPE_CHECKING:
    from forwarder.config.raw import RawKeys
    from forwarder.config.toml_table import Table


def finish_limits(table: Table, keys: RawKeys, *, is_udp: bool, has_total: bool) -> None:
    """Complete the ``keys`` that have been read of a table, and warn of what has no effect.

    ``is_udp``: the rule listens on UDP. ``has_total``: there is a limit of all rules together.
    """
    _finish_burst(table, keys, "burst", "rate")
    _finish_burst(table, keys, "burst_per_client", "rate_per_client")
    limits = Limits(**values_of(Limits, keys, OF_A_RULE))  # type: ignore[arg-type]  # as each is read
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


def _finish_burst(table: Table, keys: RawKeys, key: str, of: str) -> None:
    """What may come at once is as much as in a second unless it is written."""
    burst, rate = keys.get(key), keys.get(of)
    if burst and of not in table:
        table.issues.warn(burst.place, f"{key} has no effect without {of}")
    if rate and not burst and isinstance(rate.value, float):
        keys[key] = Placed(max(1.0, rate.value), rate.place)
