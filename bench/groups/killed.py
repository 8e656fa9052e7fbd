"""A server is killed, refuses or falls silent under new connections: who fails, who waits?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import SERVER_PORT, Group, hosts
from bench.groups.findings import Span, failures, ms
from bench.groups.place import refuse

if TYPE_CHECKING:
    from bench.groups.contenders import Contender
    from bench.groups.place import Place, Servers

HEADING: Final = "One of three servers goes under load"
HEAD: Final = (
    "the server",
    "clients",
    "new/s",
    "failed",
    "failed with it",
    "p50 before, ms",
    "p99 before, ms",
    "p99 in the first 10 s, ms",
    "slowest, ms",
    "p99 afterwards, ms",
)
FIRST_S: Final = 10.0  # three failed checks of up to 3 s
EVENTS: Final = ("is killed", "refuses", "is silent")


def run(place: Place, contender: Contender) -> list[list[str]]:
    """A row for each way to go."""
    return [_one(place, contender, event) for event in EVENTS]


def _one(place: Place, contender: Contender, event: str) -> list[str]:
    every = hosts(3)
    group = Group(servers=every, check_port=SERVER_PORT)
    with (
        place.servers(*every) as servers,
        place.serving(contender, group),
        place.clients(place.rate, place.seconds) as clients,
    ):
        began_s = clients.sleep_until(1)  # the first second is not measured
        at_s = clients.sleep_until(place.seconds / 3)
        _happen(servers, every[1], event)
        gone_s = time.monotonic()
        found = clients.wait()
    until_s = clients.began_s + place.seconds
    before = Span.of(found, began_s, at_s)
    first = Span.of(found, at_s, at_s + FIRST_S)
    after = Span.of(found, at_s + FIRST_S, until_s)
    # Whoever began before it was gone may have been in it.
    failed = Span.of(found, gone_s, until_s).failed
    died = Span.of(found, 0, gone_s).failed
    times = (before.p50_s, before.p99_s, first.p99_s, first.slowest_s, after.p99_s)
    rate = (before.count + first.count + after.count) / (until_s - began_s)
    return [
        event,
        f"{len(found):,}",
        f"{rate:,.0f}",
        failures(failed),
        failures(died),
        *map(ms, times),
    ]


def _happen(servers: Servers, host: str, event: str) -> None:
    if event == "is killed":
        servers.kill(host)
    else:
        refuse(host, "drop" if event == "is silent" else "reject with tcp reset")
