"""Turns beside those of HAProxy, which chooses by another way among the same weights.

It gives each server places at equal distances, and takes the heavier one where two have the same
place; ours chooses the one that has earned most, as nginx does. For two servers, and for equal
weights, there is only one order that is even, and both have it. For others the orders differ, and
both must give each server exactly its weight in every cycle, and be about as even.
"""

from __future__ import annotations

import math
import subprocess
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest
from support.echo import Echo, ask_tcp
from support.forwarder import reserve_port
from support.hosts import own_host
from support.processes import listeners
from support.programs import debian
from support.waiting import eventually

from forwarder.balancing.choose import Turn, mask_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ONE_ORDER: Final = ((1, 1), (3, 2), (13, 4), (2, 6), (1, 12), (1, 1, 1), (3, 3, 3, 3), (2,) * 8)
SEVERAL: Final = (
    (5, 1, 1),
    (1, 2, 3),
    (4, 3, 2, 1),
    (7, 5, 3),
    (9, 1, 1, 1, 1),
    (2, 4, 4, 8),
    (1, 2, 3, 4, 5, 6, 7, 8),
    (9, 8, 7, 3, 4, 3, 9, 7),
)
# How many turns a server may have had more than its weight says at one time, and less at another,
# together; some 1.6 at most was seen, of ours as of HAProxy's.
MOST_UNEVEN: Final = 2.0
DEFAULTS: Final = """\
global
    nbthread 1
defaults
    mode tcp
    timeout connect 20s
    timeout client 20s
    timeout server 20s
"""


@contextmanager
def haproxy(
    path: Path, all_weights: Sequence[Sequence[int]], servers: Sequence[tuple[str, int]]
) -> Iterator[list[tuple[str, int]]]:
    """Run it with a group for each of these weights; yields where each listens."""
    holders = [reserve_port() for _ in all_weights]
    addresses: list[tuple[str, int]] = [holder.getsockname() for holder in holders]
    text = DEFAULTS
    for (host, port), weights in zip(addresses, all_weights, strict=True):
        text += f"listen of-{port}\n    bind {host}:{port}\n    balance roundrobin\n"
        for index, (weight, (server, at)) in enumerate(zip(weights, servers, strict=False)):
            text += f"    server s{index} {server}:{at} weight {weight}\n"
    path.write_text(text)
    with subprocess.Popen(["haproxy", "-db", "-f", path], stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: all(listeners(address) for address in addresses))
            yield addresses
        finally:
            process.kill()
            for holder in holders:
                holder.close()


def is_turned(turns: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two orders are one, but for where they begin."""
    twice = [*other, *other]
    return any(twice[at : at + len(turns)] == [*turns] for at in range(len(other)))


def unevenness(turns: Sequence[int], weights: Sequence[int]) -> float:
    """The most that a server was ahead of its weight, and behind it, together."""
    total, worst = sum(weights), 0.0
    for index, weight in enumerate(weights):
        ahead, off = 0.0, [0.0]
        for one in turns:
            ahead += (one == index) - weight / total
            off.append(ahead)
        worst = max(worst, max(off) - min(off))
    return worst


@debian("haproxy")
def test_turns_are_as_even_as_those_of_haproxy(tmp_path: Path) -> None:
    hosts = [(own_host(60 + index), 0) for index in range(8)]
    every = ONE_ORDER + SEVERAL
    with Echo(tcp=hosts) as echo, haproxy(tmp_path / "haproxy.cfg", every, echo.tcp) as addresses:
        number_of = {f"{host}:{port}": index for index, (host, port) in enumerate(echo.tcp)}
        for weights, address in zip(every, addresses, strict=True):
            unit = math.gcd(*weights)
            due = {index: weight // unit for index, weight in enumerate(weights)}
            cycle = sum(due.values())
            theirs = [number_of[ask_tcp(address).partition(" ")[0]] for _ in range(2 * cycle)]
            turn = Turn()
            turn.reweigh([1000 * weight for weight in weights])
            ours = [turn.pick(mask_of(weights)) for _ in range(2 * cycle)]
            for turns in (theirs, ours):
                assert turns[:cycle] == turns[cycle:], weights
                assert Counter(turns[:cycle]) == due, weights
                assert unevenness(turns, weights) < MOST_UNEVEN, weights
            assert is_turned(theirs[:cycle], ours[:cycle]) or weights in SEVERAL, weights


@pytest.mark.parametrize(("one", "other"), [("aabac", "bacaa"), ("abc", "cab"), ("a", "a")])
def test_an_order_may_begin_anywhere(one: str, other: str) -> None:
    assert is_turned([*map(ord, one)], [*map(ord, other)])
    assert not is_turned([*map(ord, one), 0], [*map(ord, other), 1])


def test_what_is_uneven_is_found() -> None:
    assert unevenness([0, 1] * 3, (1, 1)) == 0.5
    assert unevenness([0, 0, 0, 1, 1, 1], (1, 1)) == 1.5
