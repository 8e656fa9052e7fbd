"""Which servers may be chosen at all: tiers, panic, and what is left when none is usable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.balancing.table import FULL
from forwarder.balancing.tiers import BACKUPS, LAST, PRIMARIES, State, standings

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
def test_what_is_down_is_used_only_if_nothing_is_up(
    found: list[State], panic: int, fails_open: bool
) -> None:
    tiers, is_open = standings(found, panic, fails_open=fails_open)
    usable = {index for index, one in enumerate(found) if one.share and not one.is_out}
    not_out = {index for index, one in enumerate(found) if not one.is_out}
    used = set().union(*map(members, tiers))
    assert is_open == (fails_open and not usable and bool(not_out))
    if is_open:
        assert used == not_out
    elif panic:
        assert usable <= used <= not_out
    else:
        assert used == usable


@given(STATES, st.integers(0, 100), st.booleans())
def test_each_server_is_in_one_tier(found: list[State], panic: int, fails_open: bool) -> None:
    tiers, is_open = standings(found, panic, fails_open=fails_open)
    for index, one in enumerate(found):
        weights = [tier[index] for tier in tiers]
        home = LAST if not one.weight else BACKUPS if one.is_backup else PRIMARIES
        assert not any(weight for tier, weight in enumerate(weights) if tier != home)
        share = FULL if is_open else one.share
        if share and not one.is_out:
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
    tiers, is_open = standings(states(text), panic, fails_open=True)
    assert members(tiers[PRIMARIES]) == primaries
    assert not is_open


def test_in_panic_who_is_up_keeps_its_part() -> None:
    found = [State(2, 100, False, False), State(3, 0, False, False)]
    assert standings(found, 80, fails_open=False).tiers[PRIMARIES] == (200, 3 * FULL)


@pytest.mark.parametrize("fails_open", [False, True])
def test_an_order_is_kept_whatever_happens(fails_open: bool) -> None:
    assert standings(states("oOo"), 100, fails_open=fails_open).is_empty
    tiers, _ = standings(states("odO"), 100, fails_open=True)
    assert set().union(*map(members, tiers)) == {1}


def test_weight_0_is_the_last_resort_of_what_is_up() -> None:
    tiers, is_open = standings(states("d0DZ"), 0, fails_open=True)
    assert (members(tiers[LAST]), is_open) == ({1, 3}, False)


def test_without_servers_there_is_none() -> None:
    found = standings([], 50, fails_open=True)
    assert found.is_empty
    assert not found.is_open
