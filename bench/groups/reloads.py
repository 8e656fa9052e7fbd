"""Reloads while a server is down by its check: do clients go there, are old sessions cut?"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from bench.groups.contenders import CHECK_PORT, EVERY_S, Group, hosts
from bench.groups.findings import Span, failures, strays
from bench.groups.place import WITHIN_S, settle
from bench.procs import BenchError, wait_until

if TYPE_CHECKING:
    from bench.groups.contenders import Contender
    from bench.groups.place import Place, Servers

HEADING: Final = "Reloads, and a server whose check fails while it accepts sessions"
HEAD: Final = ("", "reloads", "seconds", "clients", "failed", "to the server that was down", "cut")
RATE: Final = 200
HELD: Final = 30  # sessions over three servers
REST_S: Final = 3.0  # nobody comes for so long to a server that is down
# A check fails three times; old sessions that are still there then stay. Twice, to be sure.
CUT_S: Final = 2 * 3 * EVERY_S


def run(place: Place, contender: Contender) -> list[list[str]]:
    """Many reloads under new connections; then held sessions, without and with a reload."""
    if not contender.has_checks:
        return [["has no checks", *["-"] * (len(HEAD) - 1)]]
    return [_new(place, contender), _held(place, contender, 0), _held(place, contender, 1)]


def _group() -> Group:
    return Group(servers=hosts(3), check_port=CHECK_PORT, resets=True)


def _start_checked(servers: Servers, every: tuple[str, ...]) -> None:
    for host in every:
        servers.start(host, CHECK_PORT)


def _new(place: Place, contender: Contender) -> list[str]:
    group = _group()
    sick = group.servers[1]
    # Longer than anybody takes; ended by its pid when the reloads are done.
    with place.servers(*group.servers) as servers:
        _start_checked(servers, group.servers)
        with (
            place.serving(contender, group) as child,
            place.clients(RATE, 3600) as clients,
        ):
            clients.sleep_until(2)
            servers.kill(sick, CHECK_PORT)
            down_s = _wait_for_rest(servers, sick)
            for _ in range(place.reloads):
                contender.reload_and_wait(child.pid, place.directory)
            until_s = time.monotonic()
            found = clients.stop()
    failed = Span.of(found, down_s, until_s)
    lost = strays(found, sick, down_s)
    took = f"{until_s - down_s:.0f}"
    count = f"{failed.count:,}"
    return ["new", f"{place.reloads}", took, count, failures(failed.failed), f"{lost}", "-"]


def _wait_for_rest(servers: Servers, host: str) -> float:
    """Wait until nobody has come for a while; returns since when."""
    last, since_s = -1, 0.0
    deadline = time.monotonic() + WITHIN_S

    while time.monotonic() < deadline:
        total = sum(one.total for one in servers.seen(host).values())
        if total != last:
            last, since_s = total, time.monotonic()
        elif time.monotonic() > since_s + REST_S:
            return time.monotonic()
        time.sleep(0.05)
    raise BenchError(f"{host} still gets sessions though its check fails")


def _held(place: Place, contender: Contender, reloads: int) -> list[str]:
    group = _group()
    sick = group.servers[1]
    with place.servers(*group.servers) as servers:
        _start_checked(servers, group.servers)
        with (
            place.serving(contender, group) as child,
            place.clients(RATE, 5, hold_ms=600_000, total=HELD),
        ):
            settle(servers, group.servers, HELD)
            for _ in range(reloads):
                contender.reload_and_wait(child.pid, place.directory)
            before = _open(servers, sick)
            servers.kill(sick, CHECK_PORT)
            began_s = time.monotonic()
            with suppress(BenchError):  # what is left is what we came for
                wait_until(lambda: _open(servers, sick) == 0, "cut", CUT_S)
            took_s = time.monotonic() - began_s
            left = _open(servers, sick)
    cut = f"{before - left} of {before}" + (f" after {took_s:.1f} s" if left == 0 else "")
    return ["held", f"{reloads}", "-", f"{HELD}", "-", "-", cut]


def _open(servers: Servers, host: str) -> int:
    return sum(one.open for one in servers.seen(host).values())
