"""Local ports of sockets towards UDP upstreams: how many this worker may take. Moves nothing.

A UDP socket that is not bound to an address takes its port from all programs of this host: Linux
gives each the next free one of net.ipv4.ip_local_port_range, 28,232 by default. So that look-ups of
names and other programs still get some, flows leave a part of the range alone. Upstream sockets
that are bound to a source address share the ports of that address; with ``transparent``, of the
client's.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from forwarder.system import kernel

if TYPE_CHECKING:
    from forwarder.config.model import Rule
    from forwarder.upstream.pool import Pool

# An eighth of the ports is left to others. Arbitrary.
_SHARES: Final = 8
_DEFAULT_RANGE: Final = (32768, 60999)  # ip(7)
SETTING: Final = "net.ipv4.ip_local_port_range"


def most_ports() -> int:
    """How many local ports flows may have, of all workers together, towards one upstream or all."""
    first, last = _DEFAULT_RANGE
    numbers = kernel.setting(SETTING.replace(".", "/")).split()
    if len(numbers) == 2:
        first, last = map(int, numbers)
    total = last - first + 1
    return max(1, total - -(-total // _SHARES))


class Ports:
    """Ports in use in this worker, by the source address of a rule. ``limit`` is of all workers."""

    __slots__ = ("_used", "limit")

    def __init__(self) -> None:
        self.limit = most_ports()
        self._used: Counter[str | None] = Counter()

    def used(self, rule: Rule) -> int:
        """How many the rules with this one's source address have."""
        return self._used[rule.source]

    def take(self, pool: Pool) -> None:
        """An upstream socket of a rule was made."""
        if pool.takes_ports:
            self._used[pool.rule.source] += 1

    def give(self, pool: Pool) -> None:
        """It is closed."""
        if pool.takes_ports:
            self._used[pool.rule.source] -= 1
