"""Addresses of upstreams that do not answer, as one worker has found: remembered, counted, logged.

Tries nothing itself except whether an interface exists; the dialer and the flows do.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from forwarder.stats.rows import ATTEMPTS_FAILED
from forwarder.system.printable import field
from forwarder.system.rarely import Crowds

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forwarder.net.sockets import Target
    from forwarder.net.zones import Zoned
    from forwarder.relay.workbench import Workbench
    from forwarder.upstream.pool import Pool

log = logging.getLogger(__name__)

_FAILED: Final = "upstream.failed"
_RECOVERED: Final = "upstream.recovered"


class Outages:
    """``pools``: rules some of whose addresses fail, or did; the worker removes recovered ones."""

    __slots__ = ("_bench", "_crowds", "pools")

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._crowds = Crowds()
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
        if is_news and has_others and self._names(_FAILED, pool, target):
            rule = pool.rule.name
            # A client that asks all ports of a range must not fill the log.
            about = f"upstream {rule} {_name(pool, target)}"
            self._bench.warn_rarely(about, f"{_FAILED} rule={field(rule)} upstream={target}: {why}")

    def on_attempt_worked(self, pool: Pool, target: Target | Zoned | str) -> None:
        """An address of an upstream has answered; called while some fail, or it was on trial."""
        if pool.failures.forget(target) and self._names(_RECOVERED, pool, target):
            log.info("%s rule=%s upstream=%s", _RECOVERED, field(pool.rule.name), target)

    def _names(self, event: str, pool: Pool, target: Target | Zoned | str) -> bool:
        """Whether to name an address in the log, which is one of many in an outage."""
        now = self._bench.poller.now
        return self._crowds.names((event, pool.rule.name), _name(pool, target), now)

    def look(self) -> None:
        """Log how many addresses were not named. Now and then."""
        for (event, rule), more in self._crowds.over(self._bench.poller.now):
            level = logging.WARNING if event == _FAILED else logging.INFO
            log.log(level, "%s rule=%s and %d more upstreams", event, field(rule), more)

    def look_at_interfaces(self, pools: Iterable[Pool]) -> None:
        """Check which interfaces that ``pools`` name exist; some microseconds for each."""
        for pool in pools:
            for what, why in pool.interfaces():
                if why:
                    self.on_unanswered(pool, what, why)
                else:
                    self.on_attempt_worked(pool, what)


def _name(pool: Pool, target: Target | Zoned | str) -> str:
    """An address as it is remembered; all of a range are one."""
    return str(target) if pool.origin is pool else "of a range"
