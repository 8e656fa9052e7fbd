"""What the choice of a server costs a session, in microseconds of CPU. In this process, no sockets.

The servers have one weight, weights from 1 to 3, or weights that have nothing in common, as in a
slow start. "new" are clients that come once, "again" some that come again. With max_sessions no
server is ever full. Where sessions are counted, a choice takes the lock that workers share, which
here nobody else wants; "end" is giving a session back, each by itself, though in a worker all of
one batch of events are given back together.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from bench.command_line import positive
from bench.machine import machine
from bench.report import spread
from forwarder.balancing.balancer import Balancer, Surroundings
from forwarder.balancing.table import ServerTable
from forwarder.config.address import Address
from forwarder.config.model import Balance, Group, Upstream
from forwarder.limits.gate import Gate, Holder, Holdings
from forwarder.stats.board import ROWS
from forwarder.stats.rows import new_row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SIZES = (1, 2, 8, 64)
SESSIONS = 3000
PLENTY = 2**32


class Case(NamedTuple):
    """A way to choose."""

    name: str
    balance: Balance
    weight: Callable[[int], int] = lambda _: 1
    max_sessions: int = 0
    clients: int = 16
    avoid: int = 0


CASES = (
    Case("turn", Balance.TURN),
    Case("turn, weights 1 to 3", Balance.TURN, lambda index: 1 + index % 3),
    Case("turn, any weights", Balance.TURN, lambda index: 199 + 2 * index),
    Case("turn, the first one avoided", Balance.TURN, avoid=1),
    Case("turn, max_sessions", Balance.TURN, max_sessions=PLENTY),
    Case("least", Balance.LEAST),
    Case("least, weights 1 to 3", Balance.LEAST, lambda index: 1 + index % 3),
    Case("random", Balance.RANDOM),
    Case("hash, again", Balance.HASH),
    Case("hash, new", Balance.HASH, clients=SESSIONS),
    Case("hash, new, weights 1 to 3", Balance.HASH, lambda index: 1 + index % 3, clients=SESSIONS),
    Case("first", Balance.FIRST),
)


def measure(case: Case, size: int, surroundings: Surroundings) -> tuple[float, float]:
    """One round: a choice, and the end of a session, 0 where nothing has to be given back."""
    upstreams = [
        Upstream(
            Address(host=f"10.0.0.{index}", port=80),
            weight=case.weight(index),
            max_sessions=case.max_sessions,
        )
        for index in range(size)
    ]
    rows = range(ROWS + 1, ROWS + size + 2)
    balancer = Balancer(Group(balance=case.balance), upstreams, rows, surroundings)
    keys = [bytes((10, 0, host >> 8, host & 255)) for host in range(case.clients)]
    keys *= SESSIONS // len(keys)
    choose, avoid, servers = balancer.choose, case.avoid, []
    for _ in range(2 * size):  # the turns have to be known
        choose(keys[0], 0, avoid)
    began = time.process_time()
    for key in keys:
        servers.append(choose(key, 0, avoid))  # noqa: PERF401 - as a worker does
    chosen = time.process_time()
    settle = surroundings.holder.settle
    if balancer.servers[0].is_counted:
        for server in servers:
            assert server is not None
            balancer.let_go(server)
            settle()
        ended = time.process_time()
    else:
        ended = chosen
    return (chosen - began) / len(keys) * 1e6, (ended - chosen) / len(keys) * 1e6


def main(argv: Sequence[str]) -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.choosing", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=7, metavar="N")
    args = parser.parse_args(argv)
    print(f"{args.rounds} rounds: median (min-max). {machine()}\n")
    print(f"| | {' | '.join(map(str, SIZES))} servers | end |")
    print(f"|---|{'---|' * len(SIZES)}---|")
    with closing(ServerTable()) as table, closing(Gate()) as gate:
        surroundings = Surroundings(
            table=table,
            row_of=lambda _: new_row(),
            holder=Holder(gate, Holdings()),
            settle_soon=lambda: None,
        )
        for case in CASES:
            cells, ends = [case.name], []
            for size in SIZES:
                rounds = [measure(case, size, surroundings) for _ in range(args.rounds)]
                cells.append(spread([choice for choice, _ in rounds], 2))
                ends += [end for _, end in rounds if end]
            print(f"| {' | '.join(cells)} | {spread(ends, 2)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
