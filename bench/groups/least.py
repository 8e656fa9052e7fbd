"""Long sessions by least: how even are they over the servers, whichever worker has the client?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import Group, hosts
from bench.procs import BenchError, wait_until

if TYPE_CHECKING:
    from bench.groups.contenders import Contender
    from bench.groups.place import Place

HEADING: Final = "300 long sessions from one address, least, 4 workers, 3 servers"
HEAD: Final = ("sessions", "by server", "most - fewest")
SESSIONS: Final = 300
HOLD_MS: Final = 30_000  # until everybody is there, however busy the machine
WORKERS: Final = 4


def run(place: Place, contender: Contender) -> list[list[str]]:
    """One row."""
    every = hosts(3)
    with (
        place.servers("0.0.0.0") as servers,
        place.serving(contender, Group(servers=every, balance="least", workers=WORKERS)),
        place.clients(place.rate, 5, hold_ms=HOLD_MS, total=SESSIONS),
    ):
        counts: list[int] = []

        def have_come() -> bool:
            counts[:] = [one.open for one in servers.seen("0.0.0.0").values()]
            return sum(counts) >= SESSIONS

        try:
            wait_until(have_come, f"{SESSIONS} sessions", HOLD_MS / 2e3)
        except BenchError:
            time.sleep(0)  # the row shows how many there are
    most = max(counts, default=0) - min(counts, default=0)
    return [[f"{sum(counts)}", ", ".join(map(str, counts)), f"{most}"]]
