"""Far more clients than servers may have at once: is the limit of a server ever exceeded?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.groups.contenders import Group, hosts
from bench.groups.findings import SERVED, too_many

if TYPE_CHECKING:
    from bench.groups.contenders import Contender
    from bench.groups.place import Place

HEADING: Final = "10,000 attempts of 20 ms, 5 sessions for each of 3 servers, 8 workers"
HEAD: Final = ("", "attempts", "served", "most at once", "too many")
ATTEMPTS: Final = 10_000
RATE: Final = 2000  # times the time held: 40 at once for 15 places
HOLD_MS: Final = 20
LIMIT: Final = 5
WORKERS: Final = 8


def run(place: Place, contender: Contender) -> list[list[str]]:
    """A row, and for nginx one without memory for all workers."""
    zones = {"nginx": ((True, "zone"), (False, "without zone"))}
    rows = []
    for zone, name in zones.get(contender.name, ((True, ""),)):
        group = Group(servers=hosts(3), max_sessions=LIMIT, workers=WORKERS, zone=zone)
        with (
            place.servers("0.0.0.0") as servers,
            place.serving(contender, group),
            place.clients(RATE, 60, hold_ms=HOLD_MS, total=ATTEMPTS) as clients,
        ):
            found = clients.wait()
            seen = servers.seen("0.0.0.0")
        served = sum(knock.outcome == SERVED for knock in found)
        most = ", ".join(str(one.most) for one in seen.values())
        rows.append([name, f"{len(found):,}", f"{served:,}", most, f"{too_many(seen, LIMIT)}"])
    return rows
