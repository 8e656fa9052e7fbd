"""Interfaces that upstreams need: noticing at each beat which have come or gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.relay.relay import Relay
    from forwarder.upstream.pool import Pool


def look_at_interfaces(relay: Relay, pools: Iterable[Pool]) -> None:
    """See which interfaces are there that ``pools`` name; some microseconds for each."""
    for pool in pools:
        for what, why in pool.interfaces():
            if why:
                relay.on_unanswered(pool, what, why)
            else:
                relay.on_attempt_worked(pool, what)
