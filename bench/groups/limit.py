"""Far more clients than servers may have at once: is the limit of a server ever exceeded?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import Group, hosts
from bench.groups.findings import SERVED, per_second, too_many

if TYPE_CHECKING:
    from bench.groups.contenders import Contender
    from bench.groups.place import Place

HEADING: Final = "10,000 attempts of 20 ms, 5 sessions for each of 3 servers, 8 workers"
HEAD: Final = ("", "attempts", "served", "served/s", "most at once", "too many")
ATTEMPTS: Final = 10_000
RATE: Final = 2000  # times the time held: 40 at once for 15 places
HOLD_MS: Final = 20
LIMIT: Final = 5
WORKERS: Final = 8
QUEUE: Final = 200
# What is run: nginx with memory for all workers and without it, the forwarder without a queue and
# with one. HAProxy has a queue always.
VARIANTS: Final[dict[str, tuple[tuple[dict[str, bool | int], str], ...]]] = {
    "nginx": (({"zone": True}, "zone"), ({"zone": False}, "without zone")),
    "forwarder": (({}, ""), ({"max_queue": QUEUE}, "with a queue")),
}


def run(place: Place, contender: Contender) -> list[list[str]]:
    """A row for each variant."""
    rows = []
    for variant, name in VARIANTS.get(contender.name, (({}, ""),)):
        group = Group(servers=hosts(3), max_sessions=LIMIT, workers=WORKERS)
        with (
            place.servers("0.0.0.0") as servers,
            place.serving(contender, replace(group, **variant)),  # type: ignore[arg-type]
            place.clients(RATE, 60, hold_ms=HOLD_MS, total=ATTEMPTS) as clients,
        ):
            found = clients.wait()
            seen = servers.seen("0.0.0.0")
        served = sum(knock.outcome == SERVED for knock in found)
        rows.append(
            [
                name,
                f"{len(found):,}",
                f"{served:,}",
                f"{per_second(found):.0f}",
                ", ".join(str(one.most) for one in seen.values()),
                f"{too_many(seen, LIMIT)}",
            ]
        )
    return rows
