"""Addresses of upstreams that do not answer, as one worker has found: remembered, counted, logged.

Tries nothing itself except whether an interface exists; the dialer and the flows do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from forwarder.stats.rows import ATTEMPTS_FAILED
from forwarder.system.printable import field

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.net.sockets import Target
    from forwarder.net.zones import Zoned
    from forwarder.relay.workbench import Workbench
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)


class Outages:
    """``pools``: rules some of whose addresses fail, or did; the worker removes recovered ones."""

    __slots__ = ("_bench", "pools")

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self.pools: dict[Pool, None] = {}

    def on_attempt_failed(self, pool: Pool, target: Target, why: str, *, has_others: bool) -> None:
        """An address of an upstream has refused, or has not answered in time.

        ``has_others``: if there are none, the failure of the session is enough.
        """
        pool.counts[ATTEMPTS_FAILED] += 1
        self.on_unanswered(pool, target, why, has_others=has_others)

    def on_unanswered(
        self,
        pool: Pool,
        target: Target | Zoned | str,
        why: str = "does not answer",
        *,
        has_others: bool = True,
    ) -> None:
        """For a while, others are tried before this address of an upstream."""
        is_news = pool.failures.note(target, why, self._bench.poller.now)
        self.pools[pool.origin] = None
        if is_news and has_others:
            rule = pool.rule.name
            # A client that asks all ports of a range must not fill the log.
            about = f"upstream {rule} {target if pool.origin is pool else 'of a range'}"
            self._bench.warn_rarely(
                about, f"upstream.failed rule={field(rule)} upstream={target}: {why}"
            )

    def on_attempt_worked(self, pool: Pool, target: Target | Zoned | str) -> None:
        """An address of an upstream has answered; called while some fail, or it was on trial."""
        if pool.failures.forget(target):
            log.info("upstream.recovered rule=%s upstream=%s", field(pool.rule.name), target)

    def look_at_interfaces(self, pools: Iterable[Pool]) -> None:
        """Check which interfaces that ``pools`` name exist; some microseconds for each."""
        for pool in pools:
            for what, why in pool.interfaces():
                if why:
                    self.on_unanswered(pool, what, why)
                else:
                    self.on_attempt_worked(pool, what)
