"""Which servers may be chosen at all: tiers, panic, and what is left when none is usable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.balancing.table import FULL
from forwarder.balancing.tiers import BACKUPS, LAST, PRIMARIES, State, in_turn, rank

STATES = st.lists(
    st.builds(
        State,
        weight=st.integers(0, 3),
        share=st.sampled_from((0, 1, 100, FULL)),
        is_backup=st.booleans(),
        is_out=st.booleans(),
    ),
    max_size=7,
)


def states(text: str) -> list[State]:
    """``u``: up; ``d``: down; ``o``: up, and out by an order; ``0``: up, with weight 0.

    In capitals a backup; ``Z`` is one of weight 0.
    """
    return [
        State(
            weight=0 if one in "0Z" else 2,
            share=0 if one in "dD" else FULL,
            is_backup=one.isupper(),
            is_out=one in "oO",
        )
        for one in text
    ]


def members(weights: tuple[int, ...]) -> set[int]:
    return {index for index, weight in enumerate(weights) if weight}


@given(STATES, st.integers(0, 100), st.booleans())
def test_what_is_usable_is_up_and_not_out(found: list[State], panic: int, fails_open: bool) -> None:
    ranks = rank(found, panic, fails_open=fails_open)
    up = {index for index, one in enumerate(found) if one.share and not one.is_out}
    not_out = {index for index, one in enumerate(found) if not one.is_out}
    used = set().union(*map(members, ranks.usable))
    assert up <= used <= not_out if panic else used == up
    assert used or not up
    assert not used or up
    assert set().union(*map(members, ranks.open)) == (not_out if fails_open else set())


@given(STATES, st.integers(0, 100), st.booleans())
def test_each_server_is_in_one_tier(found: list[State], panic: int, fails_open: bool) -> None:
    for is_open, tiers in enumerate(rank(found, panic, fails_open=fails_open)):
        for index, one in enumerate(found):
            weights = [tier[index] for tier in tiers]
            home = LAST if not one.weight else BACKUPS if one.is_backup else PRIMARIES
            assert not any(weight for tier, weight in enumerate(weights) if tier != home)
            share = FULL if is_open else one.share
            if share and weights[home]:
                assert weights[home] == (one.weight or 1) * share


@pytest.mark.parametrize(
    ("text", "panic", "primaries"),
    [
        ("udddd", 0, {0}),
        ("udddd", 20, {0}),  # not below
        ("udddd", 21, {0, 1, 2, 3, 4}),
        ("uuddd", 41, {0, 1, 2, 3, 4}),
        ("uuddd", 40, {0, 1}),
        ("uddoo", 34, {0, 1, 2}),  # who is out is not one of those that are usable or not
        ("ud00o", 50, {0}),
        ("udDDU", 50, {0}),  # nor are backups
        ("udDDU", 51, {0, 1}),
        ("ddU", 99, set()),  # backups are for this
    ],
)
def test_panic_is_below_a_part_of_usable_primaries(
    text: str, panic: int, primaries: set[int]
) -> None:
    ranks = rank(states(text), panic, fails_open=True)
    assert members(ranks.usable[PRIMARIES]) == primaries


def test_in_panic_who_is_up_keeps_its_part() -> None:
    found = [State(2, 100, False, False), State(3, 0, False, False)]
    assert rank(found, 80, fails_open=False).usable[PRIMARIES] == (200, 3 * FULL)


def test_an_order_is_kept_whatever_happens() -> None:
    ranks = rank(states("odO"), 100, fails_open=True)
    assert not any(map(any, ranks.usable))
    assert [members(tier) for tier in ranks.open] == [{1}, set(), set()]


def test_weight_0_is_the_last_resort_of_what_is_up() -> None:
    ranks = rank(states("d0DZ"), 0, fails_open=True)
    assert [members(tier) for tier in ranks.usable] == [set(), set(), {1, 3}]
    assert [members(tier) for tier in ranks.open] == [{0}, {2}, {1, 3}]


@pytest.mark.parametrize(
    ("text", "panic", "fails_open", "used"),
    [
        ("uuU", 0, True, {0, 1}),
        ("duU0", 0, True, {1}),
        ("ddUU", 0, True, {2, 3}),
        ("udd", 50, True, {0, 1, 2}),
        ("dd0", 0, True, {2}),
        ("ddD", 0, True, {0, 1}),
        ("odD", 0, True, {1}),
        ("ooo", 0, True, set()),
        ("ddD", 0, False, set()),
    ],
)
def test_who_gets_the_next_sessions(
    text: str, panic: int, fails_open: bool, used: set[int]
) -> None:
    assert members(in_turn(rank(states(text), panic, fails_open=fails_open))) == used
