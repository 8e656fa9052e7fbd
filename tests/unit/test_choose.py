"""What each chooser promises, for any weights, any sets, and weights that change in between."""

from __future__ import annotations

import math
import random
from collections import Counter
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forwarder.balancing import choose
from forwarder.balancing.choose import (
    First,
    Hash,
    Least,
    Random,
    Turn,
    indices,
    mask_of,
    network_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.balancing.choose import Chooser

SMALL = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)
# Some that have nothing in common.
ODD = st.lists(st.integers(0, 300), min_size=1, max_size=9).filter(any)
WEIGHTS = SMALL | ODD
PARTS = st.sampled_from((0.0, 0.25, 0.5, 0.75))
CLIENTS = [bytes((10, host >> 8, host & 255, 7)) for host in range(3000)]


def all_choosers(size: int, sessions: Sequence[int] | None = None) -> list[Chooser]:
    counts = sessions or [0] * size
    rows = range(size)
    return [
        Turn(),
        Least(counts, rows),
        Random(counts, rows, random.Random(size).random),
        Hash(names_of(size)),
        First(),
    ]


def names_of(size: int) -> list[str]:
    return [f"10.0.0.{index + 1}:80" for index in range(size)]


def cycle_of(weights: Sequence[int]) -> int:
    return sum(weights) // math.gcd(*weights)


# -- all of them


@pytest.mark.parametrize("seed", range(40))
def test_what_is_chosen_is_allowed(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.randint(1, 7)
    sessions = [chance.randint(0, 5) for _ in range(size)]
    for chooser in all_choosers(size, sessions):
        for _ in range(10):
            weights = [chance.randint(0, 4) for _ in range(size)]
            if not any(weights):
                continue
            chooser.reweigh(weights)
            mask = mask_of(weights)
            for _ in range(10):
                allowed = mask & chance.randint(0, mask) or mask
                assert allowed >> chooser.pick(allowed, chance.choice(CLIENTS)) & 1


def test_a_set_is_its_servers() -> None:
    assert list(indices(0b1001_0110)) == [1, 2, 4, 7]
    assert mask_of([0, 5, 1, 0, 2, 0, 0, 1]) == 0b1001_0110
    assert list(indices(0)) == []


# -- turn


@given(WEIGHTS, PARTS)
@example([1000, 3000, 0, 2000], 0.5)
def test_in_a_cycle_of_turns_each_gets_its_weight(weights: list[int], part: float) -> None:
    turn = Turn(part)
    turn.reweigh(weights)
    everyone, unit = mask_of(weights), math.gcd(*weights)
    for _ in range(2):
        picked = Counter(turn.pick(everyone) for _ in range(cycle_of(weights)))
        assert picked == {i: weight // unit for i, weight in enumerate(weights) if weight}


@given(WEIGHTS)
def test_turns_are_even_within_a_cycle(weights: list[int]) -> None:
    """Whatever number of turns: nobody is a turn ahead for each that has one, nor behind."""
    turn = Turn()
    turn.reweigh(weights)
    everyone, total = mask_of(weights), sum(weights)
    members = sum(weight > 0 for weight in weights)
    picked = [0] * len(weights)
    for turns in range(1, min(2 * cycle_of(weights), 500)):
        picked[turn.pick(everyone)] += 1
        for weight, count in zip(weights, picked, strict=True):
            assert abs(count - turns * weight / total) < max(members - 1, 1)


def test_turns_of_the_same_weight_are_in_order() -> None:
    turn = Turn()
    turn.reweigh([1000] * 4)
    assert [turn.pick(0b1111) for _ in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_turns_are_spread_as_nginx_does() -> None:
    """The example of the commit that introduced them there (52327e0627f4)."""
    turn = Turn()
    turn.reweigh([5000, 1000, 1000])
    assert "".join("abc"[turn.pick(0b111)] for _ in range(14)) == "aabacaa" * 2


def test_workers_do_not_begin_with_the_same_server() -> None:
    firsts = []
    for slot in range(4):
        turn = Turn(slot / 4)
        turn.reweigh([1000] * 8)
        firsts.append([turn.pick(255) for _ in range(9)])
    assert [turns[0] for turns in firsts] == [0, 2, 4, 6]
    assert all(turns[0] == turns[8] and len(set(turns)) == 8 for turns in firsts)


@given(WEIGHTS, st.lists(st.integers(1, 40), min_size=1, max_size=12), st.randoms())
def test_changed_weights_cost_nobody_a_turn(
    weights: list[int], stretches: list[int], chance: random.Random
) -> None:
    """However often they are set, and what else is chosen from: all in all weights are kept."""
    turn = Turn()
    due, picked = [0.0] * len(weights), [0] * len(weights)
    for stretch in stretches:
        share = chance.choice((1, 10, 100))  # a slow start of the first server
        now = [max(weight * share // 100, 1) if weight else 0 for weight in weights[:1]]
        now += weights[1:]
        if not any(now):
            now = weights
        turn.reweigh(now)
        everyone, total = mask_of(now), sum(now)
        for _ in range(stretch):
            picked[turn.pick(everyone)] += 1
            for index, weight in enumerate(now):
                due[index] += weight / total
    for was_due, count in zip(due, picked, strict=True):
        assert abs(count - was_due) <= len(weights) + 1


@given(WEIGHTS, st.integers(1, 300), st.integers(0, 30))
def test_soon_after_a_change_the_turns_repeat(weights: list[int], first: int, turns: int) -> None:
    """From there on a turn costs the same, whatever the number of servers."""
    turn = Turn()
    turn.reweigh([first, *weights[1:]])
    for _ in range(turns):
        turn.pick(mask_of([first, *weights[1:]]))
    turn.reweigh(weights)
    everyone, cycle, unit = mask_of(weights), cycle_of(weights), math.gcd(*weights)
    if cycle > choose.LONGEST_CYCLE // 2:
        return
    for _ in range(2 * cycle):
        turn.pick(everyone)
    assert turn._is_known
    picked = Counter(turn.pick(everyone) for _ in range(cycle))
    assert picked == {i: weight // unit for i, weight in enumerate(weights) if weight}


def test_a_change_for_each_session_starves_nobody() -> None:
    """Neither among all, nor among those that are left, which is the same here."""
    turn = Turn()
    picked = Counter[int]()
    for share in range(100, 1000):
        turn.reweigh([5 * share, 1000, 1000, 1])
        picked[turn.pick(0b111)] += 1
    assert picked[1] > 200
    assert abs(picked[1] - picked[2]) <= 1


@given(WEIGHTS, st.integers(0, 8))
def test_without_one_the_others_share_by_weight(weights: list[int], absent: int) -> None:
    """One that is full, or without an address: for good, and between turns of everyone."""
    absent = list(indices(mask_of(weights)))[absent % sum(map(bool, weights))]
    others = [0 if index == absent else weight for index, weight in enumerate(weights)]
    if not any(others):
        return
    turn = Turn()
    turn.reweigh(weights)
    everyone, allowed = mask_of(weights), mask_of(others)
    picked = Counter[int]()
    for _ in range(cycle_of(others)):
        turn.pick(everyone)
        picked[turn.pick(allowed)] += 1
    unit = math.gcd(*others)
    assert picked == {i: weight // unit for i, weight in enumerate(others) if weight}


def test_a_cycle_that_is_too_long_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, worked_out = Turn(), Turn()
    weights = [7, 5, 3]
    kept.reweigh(weights)
    everyone = mask_of(weights)
    turns = [kept.pick(everyone) for _ in range(60)]
    monkeypatch.setattr(choose, "LONGEST_CYCLE", 14)
    worked_out.reweigh(weights)
    assert [worked_out.pick(everyone) for _ in range(60)] == turns


# -- least


@given(SMALL, st.integers(0, 200), st.lists(st.integers(0, 20), min_size=9, max_size=9))
def test_least_fills_up_to_the_weights(weights: list[int], clients: int, had: list[int]) -> None:
    """No session would be better off with another server than with the one that it got."""
    sessions = had[: len(weights)]
    least = Least(sessions, range(len(weights)))
    least.reweigh(weights)
    for _ in range(clients):
        picked = least.pick(mask_of(weights))
        load = (sessions[picked] + 1) / weights[picked]
        for count, weight in zip(sessions, weights, strict=True):
            assert not weight or load <= (count + 1) / weight
        sessions[picked] += 1


def test_sessions_that_last_are_equally_many() -> None:
    sessions = [0] * 3
    workers = [Least(sessions, range(3), slot / 4) for slot in range(4)]
    for worker in workers:
        worker.reweigh([1000] * 3)
    chance = random.Random(1)
    for _ in range(299):
        sessions[chance.choice(workers).pick(0b111)] += 1
    assert sorted(sessions) == [99, 100, 100]


def test_of_equally_many_the_next_one_in_turn() -> None:
    least = Least([0] * 4, range(4))
    least.reweigh([2, 2, 0, 2])
    assert [least.pick(0b1011) for _ in range(7)] == [0, 1, 3, 0, 1, 3, 0]
    least.reweigh([2, 0, 2, 2])  # 1 is gone, 2 has come
    assert [least.pick(0b1101) for _ in range(4)] == [2, 3, 0, 2]
    assert least.pick(0b1000) == 3


# -- random


@given(WEIGHTS, st.integers(0, 2**32))
def test_of_two_drawn_the_lesser(weights: list[int], seed: int) -> None:
    """By another way of drawing two: take the first out, then draw again."""
    sessions = [random.Random(seed + 1).randint(0, 3) for _ in weights]
    chooser = Random(sessions, range(len(weights)), random.Random(seed).random)
    chooser.reweigh(weights)
    chance = random.Random(seed)
    for _ in range(20):
        urn = [index for index, weight in enumerate(weights) for _ in range(weight)]
        one = urn[int(chance.random() * len(urn))]
        urn = [index for index in urn if index != one]
        expected = one
        if urn:
            other = urn[int(chance.random() * len(urn))]
            if (sessions[other] + 1) / weights[other] < (sessions[one] + 1) / weights[one]:
                expected = other
        assert chooser.pick(mask_of(weights)) == expected


def test_sessions_that_do_not_last_are_drawn_by_weight() -> None:
    chooser = Random([0] * 3, range(3), random.Random(5).random)
    chooser.reweigh([1000, 1000, 1000])
    picked = Counter(chooser.pick(0b111) for _ in range(9000))
    assert all(abs(count - 3000) < 6 * math.sqrt(2000) for count in picked.values())


# -- hash


def places(chooser: Hash, mask: int) -> list[int]:
    return [chooser.pick(mask, client) for client in CLIENTS]


def test_hashing_is_the_same_everywhere() -> None:
    """Golden values: another result here sends clients to other servers when it is upgraded."""
    chooser = Hash(["10.0.0.1:80", "10.0.0.2:80", "db.example:5432", "/run/db.sock"])
    clients = [bytes((192, 0, 2, host)) for host in range(16)]
    clients += [ip_address(f"2001:db8::{host}").packed for host in range(8)]
    chooser.reweigh([1000] * 4)
    assert (
        "".join(str(chooser.pick(15, client)) for client in clients) == "103223301101202222031220"
    )
    chooser.reweigh([1000, 3000, 500, 2000])
    assert (
        "".join(str(chooser.pick(15, client)) for client in clients) == "133223331101303110131210"
    )


@pytest.mark.parametrize("weights", [[1000] * 10, [1000, 2000, 3000, 500, 256000] * 2])
@pytest.mark.parametrize("gone", range(10))
def test_only_the_clients_of_a_lost_server_move(weights: list[int], gone: int) -> None:
    chooser = Hash(names_of(10))
    chooser.reweigh(weights)
    before = places(chooser, 1023)
    without = places(chooser, 1023 ^ 1 << gone)  # it is tried, or full
    chooser.reweigh([0 if index == gone else weight for index, weight in enumerate(weights)])
    after = places(chooser, 1023 ^ 1 << gone)  # it is down
    assert after == without
    for was, now in zip(before, after, strict=True):
        assert was == now or was == gone != now
    chooser.reweigh(weights)
    assert places(chooser, 1023) == before


def test_a_server_of_another_place_in_the_group_keeps_its_clients() -> None:
    names = names_of(6)
    one, other = Hash(names), Hash(names[::-1][:5])  # without the first, and turned round
    one.reweigh([1] * 6)
    other.reweigh([1] * 5)
    for was, now in zip(places(one, 63), places(other, 31), strict=True):
        assert was in (0, 5 - now)


@pytest.mark.parametrize("weights", [[1000] * 7, [1000, 3000, 6000, 500], [1, 1]])
def test_hashing_honours_weights(weights: list[int]) -> None:
    chooser = Hash(names_of(len(weights)))
    chooser.reweigh(weights)
    picked = Counter(places(chooser, mask_of(weights)))
    for index, weight in enumerate(weights):
        part = weight / sum(weights)
        due = len(CLIENTS) * part
        assert abs(picked[index] - due) < 4 * math.sqrt(due * (1 - part))


def test_the_same_weight_for_all_is_no_weight() -> None:
    """Whether or not logarithms are needed, the numbers that the servers draw are the same."""
    even, uneven = Hash(names_of(6)), Hash(names_of(6))
    even.reweigh([700] * 6)
    uneven.reweigh([700] * 5 + [701])
    assert places(even, 0b011111) == places(uneven, 0b011111)


def test_more_weight_only_takes_clients() -> None:
    chooser = Hash(names_of(5))
    chooser.reweigh([1000] * 5)
    before = places(chooser, 31)
    chooser.reweigh([1000, 1000, 1500, 1000, 1000])
    after = places(chooser, 31)
    assert all(now in (was, 2) for was, now in zip(before, after, strict=True))
    assert after.count(2) > before.count(2)


def test_more_clients_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = Hash(names_of(5))
    chooser.reweigh([1] * 5)
    before = places(chooser, 31)
    monkeypatch.setattr(choose, "REMEMBERED", 10)
    assert places(chooser, 31) == before == places(chooser, 31)


def test_who_has_no_address_is_taken_in_turn() -> None:
    chooser = Hash(names_of(3))
    chooser.reweigh([1] * 3)
    assert [chooser.pick(7, b"") for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_a_client_is_hashed_by_its_network() -> None:
    chooser = Hash(names_of(9), (24, 56))
    chooser.reweigh([1] * 9)
    assert len({chooser.pick(511, bytes((10, 1, 2, host))) for host in range(256)}) == 1
    assert len({chooser.pick(511, bytes((10, 1, net, 1))) for net in range(256)}) == 9


@given(st.ip_addresses(), st.integers(0, 32), st.integers(0, 128))
def test_networks_are_those_of_the_library(address: object, bits: int, more: int) -> None:
    one = ip_address(str(address))
    prefix = bits if one.version == 4 else more
    expected = ip_network(f"{one}/{prefix}", strict=False).network_address.packed
    mapped = getattr(one, "ipv4_mapped", None)
    if mapped is not None:
        expected = ip_network(f"{mapped}/{bits}", strict=False).network_address.packed
    assert network_of(one.packed, (bits, more)) == expected


def test_an_ipv4_client_of_an_ipv6_listener_is_the_same_client() -> None:
    client = ip_address("192.0.2.77")
    mapped = ip_address("::ffff:192.0.2.77")
    assert network_of(mapped.packed, (24, 64)) == network_of(client.packed, (24, 64))
    chooser = Hash(names_of(64))
    chooser.reweigh([1] * 64)
    assert chooser.pick(2**64 - 1, mapped.packed) == chooser.pick(2**64 - 1, client.packed)


# -- first


def test_first_is_the_first() -> None:
    assert [First().pick(allowed) for allowed in (0b1, 0b110, 0b1000, 0b1011)] == [0, 1, 3, 0]
