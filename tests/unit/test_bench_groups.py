"""What scenarios of groups make of what clients and servers have seen, and how groups are told."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.groups.contenders import CHECK_PORT, Group, contenders, hosts
from bench.groups.findings import (
    Knock,
    Seen,
    Span,
    failures,
    knocks,
    ms,
    per_second,
    percentile,
    seen,
    shares,
    strays,
    too_many,
)
from forwarder.config import load
from forwarder.config.model import Balance, OnDown

if TYPE_CHECKING:
    from pathlib import Path

CLIENTS = [
    Knock(1.0, 0.001, "served", "a"),
    Knock(2.0, 0.002, "served", "b"),
    Knock(3.0, 0.5, "reset", "-"),
    Knock(4.0, 0.004, "served", "b"),
]


def test_what_a_client_prints_is_read_in_seconds() -> None:
    assert knocks("2000000 1500 served 127.0.0.2\n3000000 15000001 late -\n") == [
        Knock(2.0, 0.0015, "served", "127.0.0.2"),
        Knock(3.0, 15.000001, "late", "-"),
    ]


def test_a_line_that_was_cut_is_no_client() -> None:
    with pytest.raises(ValueError, match="unpack"):
        knocks("2000000 1500 ser")


def test_what_servers_print_is_read_by_address() -> None:
    assert seen("127.0.0.2 1 5 70\n127.0.0.3 0 6 71\n") == {
        "127.0.0.2": Seen(1, 5, 70),
        "127.0.0.3": Seen(0, 6, 71),
    }


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_percentile_is_a_value_that_this_part_does_not_exceed(
    values: list[float], part: float
) -> None:
    found = percentile(values, part)
    assert found in values
    assert sum(value <= found for value in values) >= part * len(values)
    assert sum(value < found for value in values) < part * len(values)


def test_a_percentile_of_nothing_is_a_dash() -> None:
    assert math.isnan(percentile([], 0.99))
    assert ms(percentile([], 0.99)) == "-"
    assert ms(0.0123) == "12.3"


def test_a_span_has_those_that_began_in_it_and_times_of_those_that_were_served() -> None:
    assert Span.of(CLIENTS, 2.0, 4.0) == Span(
        count=2, rate=1.0, failed=Counter({"reset": 1}), p50_s=0.002, p99_s=0.002, slowest_s=0.002
    )


def test_who_was_served_counts_from_the_first_to_the_last() -> None:
    assert per_second(CLIENTS) == pytest.approx(3 / 3.004)
    assert per_second(CLIENTS[2:3]) == 0


def test_failures_are_told_by_kind_the_most_common_first() -> None:
    assert failures(Counter()) == "0"
    assert failures(Counter({"late": 1, "reset": 2})) == "3: reset 2, late 1"


def test_only_clients_that_were_served_count_for_a_server() -> None:
    assert shares(CLIENTS) == Counter({"b": 2, "a": 1})


def test_too_many_is_the_worst_server_at_its_worst() -> None:
    assert too_many({"a": Seen(0, 5, 9), "b": Seen(0, 7, 9)}, 5) == 2
    assert too_many({"a": Seen(0, 5, 9)}, 5) == 0
    assert too_many({}, 5) == 0


def test_a_client_strays_only_after_the_server_was_down() -> None:
    assert strays(CLIENTS, "b", 2.5) == 1
    assert strays(CLIENTS, "a", 2.5) == 0


def test_servers_have_different_addresses_of_loopback() -> None:
    every = hosts(1000)
    assert every[:2] == ("127.0.0.2", "127.0.0.3")
    assert len({*every}) == 1000
    assert all(0 <= int(part) <= 255 for host in every for part in host.split("."))


def test_the_forwarder_is_told_of_the_same_group(tmp_path: Path) -> None:
    group = Group(
        servers=hosts(2), balance="least", max_sessions=5, check_port=CHECK_PORT, resets=True
    )
    contender = contenders(["forwarder"])["forwarder"]
    contender.write(group, tmp_path)
    (rule,) = load(tmp_path / contender.file).config.rules
    assert [str(one) for one in rule.upstreams] == ["127.0.0.2:9001", "127.0.0.3:9001"]
    assert {one.max_sessions for one in rule.upstreams} == {5}
    assert rule.group.balance is Balance.LEAST
    assert rule.group.on_down is OnDown.RESET
    assert rule.group.check is not None
    assert rule.group.check.port == CHECK_PORT
