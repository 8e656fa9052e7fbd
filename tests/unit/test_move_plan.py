"""Who gets sessions on their way, when more are asked for, and what if nobody takes them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from forwarder.supervision.move_plan import (
    BUSY_S,
    LONGEST_PAUSE_S,
    MOST_DEATHS,
    MOST_TRIES,
    Fate,
    Taker,
    choose,
    fate,
    next_ask,
    share,
)

COUNTS = st.integers(0, 100_000)
TAKERS = st.lists(
    st.builds(Taker, st.integers(1, 9), st.integers(0, 8), COUNTS), unique_by=lambda one: one.pid
)
BOOLS = st.booleans()


@given(TAKERS, st.sets(st.integers(1, 9)))
def test_the_one_with_the_fewest_gets_them_and_one_to_avoid_only_if_all_are(
    takers: list[Taker], avoided: set[int]
) -> None:
    chosen = choose(takers, avoided)
    assert (chosen is None) is (not takers)
    if chosen is not None:
        others = [one for one in takers if one.pid not in avoided] or takers
        assert chosen in others
        assert chosen.sessions == min(one.sessions for one in others)


@given(COUNTS, st.integers(0, 64), st.integers(1, 100))
def test_all_takers_get_some_of_few_sessions_and_many_go_by_the_message(
    sessions: int, takers: int, most: int
) -> None:
    at_once = share(sessions, takers, most)
    assert 1 <= at_once <= most
    if at_once < most and takers:
        assert at_once * takers >= sessions
        assert (at_once - 1) * takers < max(sessions, 1)


@given(COUNTS, COUNTS, st.integers(0, 1000), st.floats(0, 1e6))
def test_a_giver_is_asked_until_nothing_is_left_and_later_if_it_got_something_back(
    left: int, busy: int, failures: int, now: float
) -> None:
    at = next_ask(left, busy, failures, now)
    if failures:
        assert at is not None
        assert now < at <= now + LONGEST_PAUSE_S
    elif left:
        assert at == now
    else:
        assert at == (now + BUSY_S if busy else None)


@given(BOOLS, BOOLS, BOOLS, st.integers(0, 20), st.integers(0, 20))
def test_sessions_are_reset_only_where_nobody_can_have_them(
    has_giver: bool, has_taker: bool, is_ending: bool, tries: int, deaths: int
) -> None:
    found = fate(
        has_giver=has_giver,
        has_taker=has_taker,
        is_ending=is_ending,
        tries=tries,
        deaths=deaths,
    )
    assert (found is Fate.BACK) <= has_giver
    assert (found is Fate.SEND) <= has_taker
    if found is Fate.RESET:
        is_tried = deaths >= MOST_DEATHS or tries >= MOST_TRIES
        assert not has_giver
        assert is_tried or (is_ending and not has_taker)
    if found is Fate.KEEP:
        assert not any((has_giver, has_taker, is_ending))


def test_pauses_are_finite_however_often_something_came_back() -> None:
    at = next_ask(0, 0, 10**9, 0.0)
    assert at is not None
    assert math.isfinite(at)
