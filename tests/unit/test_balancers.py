"""The balancers of a worker: which are kept, which are new, where a name has two definitions."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from forwarder.balancing.balancers import Balancers
from forwarder.balancing.table import ServerTable
from forwarder.config.address import Address
from forwarder.config.model import Balance, Group, Rule, Upstream
from forwarder.errors import Place
from forwarder.limits.gate import Gate, Holder, Holdings
from forwarder.stats.board import ROWS
from forwarder.stats.rows import new_row

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED = Group(name="pg")


@pytest.fixture
def balancers() -> Iterator[Balancers]:
    with closing(Gate()) as gate, closing(ServerTable()) as table:
        holder = Holder(gate, Holdings())
        yield Balancers(table, lambda _: new_row(), holder, lambda: None)


def rule(name: str, *numbers: int, group: Group = SHARED) -> Rule:
    upstreams = tuple(Upstream(Address(host=f"10.0.0.{number}", port=80)) for number in numbers)
    listen = Address(host="127.0.0.1", port=80)
    return Rule(name=name, listen=listen, upstreams=upstreams, group=group, place=Place("", 1))


def rows(*numbers: int) -> tuple[int, ...]:
    return tuple(ROWS + number for number in (*numbers, 99))


def test_rules_of_a_group_share_a_balancer_and_keep_it(balancers: Balancers) -> None:
    two, seats = [rule("one", 1, 2), rule("other", 1, 2)], [rows(1, 2)] * 2
    (first, second) = balancers.apply(two, seats, 0.0)
    assert first is second is not None
    assert balancers.apply(two, seats, 0.5) == [first, first]
    assert list(balancers) == [first]
    plain = replace(rule("plain", 1), group=Group())
    assert balancers.apply([plain], [()], 0.0) == [None]
    assert list(balancers) == []


def test_the_rule_of_a_closing_address_goes_on_as_it_was(balancers: Balancers) -> None:
    old = rule("one", 1, 2)
    (before,) = balancers.apply([old], [rows(1, 2)], 0.0)
    new = rule("one", 2, 3, 4, group=replace(SHARED, balance=Balance.HASH))
    for _ in range(2):
        now, closes = balancers.apply(
            [new, replace(old, name="one, closing")], [rows(2, 3, 4), rows(1, 2)], 0.0
        )
        assert now is not None
        assert [server.row - ROWS for server in now.servers] == [2, 3, 4]
        assert closes is before
        assert list(balancers) == [now, before]
    assert balancers.apply([new], [rows(2, 3, 4)], 0.0) == [now]
