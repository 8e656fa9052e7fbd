"""What a decision about a client costs, by the number of access rules. In this process, no sockets.

The clients are of three kinds in turn: IPv4, IPv6, IPv4-mapped; none is denied, so that every rule
has its say. "first" is the first decision about a host, "again" one about a host that comes again.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
import time
from typing import TYPE_CHECKING

from bench.command_line import positive
from bench.machine import machine
from bench.report import spread
from forwarder.config.model import AccessRule, Verdict
from forwarder.errors import Place
from forwarder.relay.access import AccessList, Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTS = (0, 100, 10_000)
WILDCARDS = (0, 1, 100)
HOSTS = 20_000
NOWHERE = Place("bench")


def rules(networks: int, wildcards: int) -> tuple[AccessRule, ...]:
    """Deny rules that match none of our hosts, of ten prefix lengths in either family."""
    patterns = []
    for number in range(networks):
        prefix = 20 + number % 10
        if number % 2:
            start = (0x2001_0DB8 << 96) + (number << 96 - prefix)
            patterns.append(str(ipaddress.ip_network((start, 32 + prefix), strict=False)))
        else:
            start = (10 << 24) + (number << 8) % (1 << 24)
            patterns.append(str(ipaddress.ip_network((start, prefix), strict=False)))
    patterns += [f"192.168.{number}.?" for number in range(wildcards)]
    return tuple(
        AccessRule(verdict=Verdict.DENY, pattern=pattern, place=NOWHERE) for pattern in patterns
    )


def hosts() -> list[str]:
    """Clients, all different."""
    found = []
    for number in range(HOSTS):
        four = f"172.{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        found.append((four, f"fe80::{number:x}", f"::ffff:{four}")[number % 3])
    return found


def decisions_per_s(access: AccessList, every: Sequence[str]) -> float:
    """Judge all; each must be allowed."""
    begin = time.perf_counter()
    for host in every:
        if access.decide(host) is not Decision.ALLOWED:
            raise AssertionError(host)
    return len(every) / (time.perf_counter() - begin)


def main(argv: Sequence[str]) -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.access", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, metavar="N")
    args = parser.parse_args(argv)
    print(f"{args.rounds} rounds: median (min-max). {machine()}\n")
    print("| networks | wildcards | compiling, ms | first, decisions/s | again, decisions/s |")
    print("|---|---|---|---|---|")
    every = hosts()
    again = every[:64] * (HOSTS // 64)
    for count in COUNTS:
        for wildcards in WILDCARDS:
            own = rules(count, wildcards)
            begin = time.perf_counter()
            access = AccessList.compile((), own)
            compiling = (time.perf_counter() - begin) * 1000
            first = [decisions_per_s(access, every) for _ in range(args.rounds)]
            second = [decisions_per_s(access, again) for _ in range(args.rounds)]
            cells = (count, wildcards, f"{compiling:.1f}", spread(first, 0), spread(second, 0))
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main(sys.argv[1:])
