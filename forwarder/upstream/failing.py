"""Addresses of upstreams that fail, from workers to the status. Pure.

While an address fails, a worker reports all that it knows at each beat; the last report holds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple

from forwarder.ipc.channel import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from forwarder.upstream.pool import Pool

# What a worker reports at most, so that it fits into a message: about 200 bytes each, but more
# where names are long or have characters that JSON escapes.
MAX_SAID: Final = 100
MAX_SAID_BYTES: Final = MAX_MESSAGE_BYTES * 3 // 4
_MAX_WHY: Final = 100
# Seconds of any clock are less; a worker is not trusted.
_MAX_TIME: Final = 1 << 53


class Failing(NamedTuple):
    """``what`` of ``rule`` fails, in seconds of the monotonic clock, and ``why`` it did last."""

    rule: str
    what: str
    why: str
    since: float
    last: float


def of_pools(pools: Iterable[Pool], now: float) -> list[Failing]:
    """The failing addresses of some rules; those not tried for long are forgotten first."""
    found: list[Failing] = []
    size = 0
    for pool in pools:
        pool.failures.expire(now)
        for what, how in pool.failures.known.items():
            why = how.why[:_MAX_WHY]
            one = Failing(pool.rule.name, str(what), why, how.since, how.last)
            size += len(json.dumps(one))
            if len(found) < MAX_SAID and size <= MAX_SAID_BYTES:
                found.append(one)
    return found


def read(message: Mapping[str, object]) -> list[Failing]:
    """What a worker has reported. Raises KeyError or TypeError for nonsense."""
    said = message["failing"]
    if not isinstance(said, list):
        raise TypeError("not a list")
    found = []
    for one in said[:MAX_SAID]:
        rule, what, why, since, last = one
        found.append(Failing(str(rule), str(what), str(why), _time(since), _time(last)))
    return found


def _time(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < _MAX_TIME:  # nor is NaN
        raise TypeError("not a time")
    return value


def describe(
    rules: Collection[dict[str, object]], said: Iterable[Iterable[Failing]], now: float
) -> list[dict[str, object]]:
    """Rules as in the status, each with its failing addresses, as the workers report them."""
    by_rule: dict[str, dict[str, Failing]] = {}
    for one in (failing for worker in said for failing in worker):
        known = by_rule.setdefault(one.rule, {}).get(one.what, one)
        latest = max(one, known, key=lambda failing: failing.last)
        since = min(one.since, known.since)
        by_rule[one.rule][one.what] = latest._replace(since=since)
    return [
        {
            **rule,
            "failing": [
                {
                    "upstream": one.what,
                    "why": one.why,
                    "since_s": round(max(0.0, now - one.since), 1),
                    "last_s": round(max(0.0, now - one.last), 1),
                }
                for _, one in sorted(by_rule.get(str(rule["name"]), {}).items())
            ],
        }
        for rule in rules
    ]
