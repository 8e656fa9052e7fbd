"""When servers are checked."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.checker.plan import MOST_AT_ONCE, REST_S, Plan


def middle() -> float:
    """No jitter."""
    return 0.5


def test_the_first_checks_are_spread_over_one_interval() -> None:
    plan = Plan(middle)
    plan.spread(range(1, 5), 2.0, 100.0)
    found = []
    while (at := plan.deadline()) < math.inf:
        seat = plan.take(at)
        found.append((at, seat))
    assert found == [(100.25, 1), (100.75, 2), (101.25, 3), (101.75, 4)]


def test_a_check_is_due_an_interval_after_the_last_one_began() -> None:
    plan = Plan(middle)
    plan.spread([1], 0.0, 0.0)
    assert plan.take(0.0) == 1
    assert plan.take(5.0) is None
    plan.done(1, 2.0, 0.1, 0.5)
    assert plan.deadline() == 2.0
    assert plan.take(1.9) is None
    assert plan.take(2.0) == 1
    plan.done(1, 2.0, 0.1, 4.5)  # it took longer than that
    assert plan.deadline() == 4.5


def test_jitter_is_a_part_of_the_interval_both_ways() -> None:
    lengths = []
    for drawn in (0.0, 0.5, 0.999999):
        plan = Plan(lambda drawn=drawn: drawn)  # type: ignore[misc]  # a default argument
        plan.spread([1], 0.0, 0.0)
        plan.take(0.0)
        plan.done(1, 10.0, 0.2, 0.0)
        lengths.append(plan.deadline())
    assert lengths == pytest.approx([8.0, 10.0, 12.0], abs=1e-4)


def test_no_more_than_may_be_are_under_way_and_the_others_do_not_lose_their_turn() -> None:
    plan = Plan(middle)
    plan.spread(range(1, 101), 0.0, 0.0)
    taken = [plan.take(0.0) for _ in range(MOST_AT_ONCE)]
    assert (plan.take(0.0), plan.deadline(), plan.running) == (None, math.inf, MOST_AT_ONCE)
    for seat in taken:
        assert seat is not None
        plan.done(seat, 1.0, 0.0, 10.0)  # due again at once: slow ones must not push in
    rest = [plan.take(10.0) for _ in range(100 - MOST_AT_ONCE)]
    assert rest == list(range(MOST_AT_ONCE + 1, 101))


def test_a_check_can_be_wanted_at_once_but_not_again_and_again() -> None:
    plan = Plan(middle)
    plan.spread([1], 0.0, 0.0)
    plan.hurry(2, 0.0)  # not one of ours
    plan.take(0.0)
    plan.hurry(1, 0.01)  # under way
    plan.done(1, 60.0, 0.0, 0.02)
    plan.hurry(1, 0.03)
    assert plan.deadline() == REST_S
    plan.hurry(1, 50.0)  # is no reason to wait
    assert plan.take(REST_S) == 1
    plan.done(1, 60.0, 0.0, 1.0)
    plan.hurry(1, 30.0)
    assert plan.deadline() == 30.0


def test_a_server_that_is_gone_is_not_checked_and_makes_room() -> None:
    plan = Plan(middle)
    plan.spread([1, 2], 0.0, 0.0)
    plan.take(0.0)
    plan.remove(1)
    plan.remove(2)
    assert (plan.running, plan.take(9.0), plan.deadline()) == (0, None, math.inf)
    plan.done(1, 1.0, 0.0, 1.0)  # of a check that was under way
    assert 1 not in plan


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.sampled_from("thrd"), st.integers(1, 200)), max_size=60),
    st.integers(0, 2**32),
)
def test_whatever_happens_every_server_is_checked_at_its_interval(
    servers: int, happens: list[tuple[str, int]], seed: int
) -> None:
    """Checks end at once or late, some are wanted at once; no server is lost, nor checked twice."""
    plan = Plan(random.Random(seed).random)
    plan.spread(range(1, servers + 1), 1.0, 0.0)
    now, running = 0.0, set[int]()
    for what, seat in happens:
        now += 0.05
        if what == "h":
            plan.hurry(seat, now)
        elif what == "d" and running:
            plan.done(running.pop(), 1.0, 0.5, now)
        else:
            while (taken := plan.take(now)) is not None:
                assert taken not in running
                running.add(taken)
        assert plan.running == len(running) <= MOST_AT_ONCE
    began: dict[int, list[float]] = {seat: [] for seat in range(1, servers + 1)}
    until = now + 20.0
    while now < until:
        for seat in running:
            plan.done(seat, 1.0, 0.1, now)
        running.clear()
        while (taken := plan.take(now)) is not None:
            running.add(taken)
            began[taken].append(now)
        now += 0.05
    counts = Counter(len(times) for times in began.values())
    assert min(counts) >= 12, counts
    for times in began.values():
        assert all(later - earlier >= 0.9 - 1e-6 for earlier, later in pairwise(times[1:]))
