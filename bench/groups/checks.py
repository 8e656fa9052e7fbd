"""A thousand servers, each checked every two seconds: what does that cost?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import EVERY_S, SERVER_PORT, Group, hosts
from bench.procs import PROC, cpu_ns, tree

if TYPE_CHECKING:
    from bench.groups.contenders import Contender
    from bench.groups.place import Place

HEADING: Final = "1,000 servers, checked every 2 s by a TCP connection"
HEAD: Final = ("", "checks/s", "us of CPU a check", "% of a CPU")
SERVERS: Final = 1000
WARM_S: Final = 3 * EVERY_S  # until the checks are spread
CHECKER: Final = b"forwarder: checker"


def run(place: Place, contender: Contender) -> list[list[str]]:
    """The whole program, and the forwarder's checker alone."""
    if not contender.has_checks:
        return [["has no checks", *["-"] * (len(HEAD) - 1)]]
    group = Group(servers=hosts(SERVERS), check_port=SERVER_PORT)
    with (
        place.servers("0.0.0.0"),
        place.serving(contender, group, rests=False) as child,
    ):
        time.sleep(WARM_S)
        roots = {"all processes": child.pid, **_checker(child.pid)}
        began_s, before = time.monotonic(), {name: cpu_ns(pid) for name, pid in roots.items()}
        checked = _total()
        time.sleep(place.seconds)
        took_s = time.monotonic() - began_s
        used = {name: cpu_ns(pid) - before[name] for name, pid in roots.items()}
        checks = _total() - checked
    rate = f"{checks / took_s:,.0f}"
    return [
        [name, rate, f"{ns / 1e3 / max(checks, 1):.1f}", f"{ns / took_s / 1e7:.2f}"]
        for name, ns in used.items()
    ]


def _checker(root: int) -> dict[str, int]:
    pids = (proc.pid for proc in tree(root))
    found = [pid for pid in pids if CHECKER in (PROC / str(pid) / "cmdline").read_bytes()]
    return {"the checker": found[0]} if found else {}


def _total() -> int:
    """How many connections this namespace has begun.

    Servers cannot count checks: HAProxy resets before the handshake is over, so nothing is there to
    accept.
    """
    rows = map(str.split, (PROC / "net/snmp").read_text().splitlines())
    head, row = (row for row in rows if row[0] == "Tcp:")
    return int(row[head.index("ActiveOpens")])
