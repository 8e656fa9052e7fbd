"""Whose turn it is to be looked up."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.upstream.schedule import (
    LIMIT_S,
    LONGEST_RETRY_S,
    LONGEST_TTL_S,
    MAX_AT_ONCE,
    MAX_OF_A_KIND,
    NAME_TTL_S,
    RESERVED,
    REST_S,
    SLOW_S,
    Schedule,
)


def take_all(schedule: Schedule, now: float) -> list[str]:
    """Begin all that may begin."""
    found = []
    while (host := schedule.take(now)) is not None:
        found.append(host)
    return found


def known(*hosts: str, now: float = 0.0) -> Schedule:
    """Names that were looked up at ``now``, and found."""
    schedule = Schedule()
    for host in hosts:
        schedule.want(host, now)
    for host in take_all(schedule, now):
        schedule.done(host, now, has_failed=False)
    return schedule


def test_a_name_is_asked_for_at_once_and_again_when_its_answer_is_old() -> None:
    schedule = Schedule()
    assert schedule.deadline() == math.inf
    schedule.want("a", 5.0)
    schedule.want("a", 6.0)
    assert schedule.deadline() == 5.0
    assert take_all(schedule, 5.0) == ["a"]
    assert take_all(schedule, 5.0) == [], "it is under way"
    assert schedule.done("a", 5.1, has_failed=False)
    assert schedule.deadline() == 5.1 + NAME_TTL_S
    assert take_all(schedule, 5.0 + NAME_TTL_S) == []
    assert take_all(schedule, 5.1 + NAME_TTL_S) == ["a"]


def test_an_answer_is_asked_for_again_shortly_before_its_ttl_is_over() -> None:
    schedule = Schedule()
    schedule.want("a", 0.0)
    for ttl_s, due_s in ((100.0, 90.0), (0.0, REST_S), (1e9, 0.9 * LONGEST_TTL_S)):
        now = schedule.deadline()
        assert schedule.take(now) == "a"
        schedule.done("a", now, has_failed=False, good_for_s=ttl_s)
        assert schedule.deadline() == pytest.approx(now + due_s)


def test_failures_are_tried_again_less_and_less_often() -> None:
    schedule = Schedule()
    schedule.want("a", 0.0)
    now, waits = 0.0, []
    for _ in range(2000):
        assert take_all(schedule, now) == ["a"]
        schedule.done("a", now, has_failed=True)
        waits.append(schedule.deadline() - now)
        now = schedule.deadline()
    assert waits[:6] == [1, 2, 4, 8, 16, LONGEST_RETRY_S]
    assert waits[-1] == LONGEST_RETRY_S


def test_who_hurries_a_name_has_it_looked_up_soon_but_not_all_the_time() -> None:
    schedule = known("a", "b")
    for _ in range(100):
        schedule.hurry("a", 0.1)
    schedule.hurry("unknown", 0.1)
    assert take_all(schedule, 0.2) == []
    assert take_all(schedule, REST_S) == ["a"]
    schedule.hurry("a", REST_S)
    schedule.done("a", REST_S + 0.1, has_failed=False)
    assert take_all(schedule, NAME_TTL_S) == ["b"]
    assert take_all(schedule, NAME_TTL_S + 5) == ["a"]


def test_a_look_up_that_has_had_its_time_is_told_once_and_its_end_all_the_same() -> None:
    schedule = Schedule()
    schedule.want("a", 0.0)
    assert take_all(schedule, 0.0) == ["a"]
    assert schedule.overdue(LIMIT_S - 0.1) == []
    assert schedule.overdue(LIMIT_S) == ["a"]
    assert schedule.overdue(LIMIT_S + 1) == []
    assert take_all(schedule, LIMIT_S + 1) == [], "one look-up of a name at a time"
    assert schedule.done("a", 60.0, has_failed=False)
    assert schedule.deadline() == 60.0 + NAME_TTL_S


def test_a_name_that_nobody_wants_any_more_is_forgotten() -> None:
    schedule = known("a", "b")
    schedule.forget("a")
    schedule.forget("never heard of")
    assert take_all(schedule, NAME_TTL_S) == ["b"]
    schedule.forget("b")
    assert schedule.overdue(NAME_TTL_S + LIMIT_S) == []
    assert not schedule.done("b", NAME_TTL_S + 1, has_failed=False)
    schedule.want("b", 100.0)
    assert take_all(schedule, 100.0) == ["b"]
    schedule.forget("b")
    schedule.want("b", 100.0)
    assert schedule.done("b", 100.0, has_failed=False), "it was wanted again meanwhile"


def test_the_dead_never_keep_the_living_waiting() -> None:
    """However many there are, and though each of them is asked for in every moment."""
    schedule = known("live")
    for i in range(10 * MAX_AT_ONCE):
        schedule.want(f"dead{i}", 0.0)
    now = 0.0
    while now < NAME_TTL_S - 1:
        take_all(schedule, now)
        schedule.overdue(now)
        for i in range(0, 10 * MAX_AT_ONCE, 7):
            schedule.hurry(f"dead{i}", now)
        now += 0.5
    assert schedule.running == MAX_AT_ONCE - RESERVED
    assert take_all(schedule, NAME_TTL_S) == ["live"]
    schedule.done("live", NAME_TTL_S, has_failed=False)


def test_new_names_wait_for_those_that_are_slow_but_a_moment() -> None:
    schedule = Schedule()
    for i in range(MAX_OF_A_KIND):
        schedule.want(f"dead{i}", 0.0)
    schedule.want("live", 0.0)
    assert len(take_all(schedule, 0.0)) == MAX_OF_A_KIND
    assert schedule.deadline() == SLOW_S
    schedule.overdue(SLOW_S)
    assert take_all(schedule, SLOW_S) == ["live"]


@given(st.lists(st.tuples(st.sampled_from("wfhtde"), st.sampled_from("abcdef"), st.floats(0, 40))))
def test_whatever_happens_no_name_is_lost_and_none_is_asked_for_twice_at_once(
    steps: list[tuple[str, str, float]],
) -> None:
    schedule = Schedule()
    wanted: set[str] = set()
    running: set[str] = set()
    now = 0.0
    for action, host, passes_s in steps:
        now += passes_s
        if action == "w":
            schedule.want(host, now)
            wanted.add(host)
        elif action == "f":
            schedule.forget(host)
            wanted.discard(host)
        elif action == "h":
            schedule.hurry(host, now)
        elif action == "t" and (begun := schedule.take(now)):
            assert begun not in running
            running.add(begun)
        elif host in running:
            running.discard(host)
            assert schedule.done(host, now, has_failed=action == "d") == (host in wanted)
        assert set(schedule.overdue(now)) <= running & wanted
    for host in running:
        schedule.done(host, now, has_failed=False)
    assert set(take_all(schedule, now + NAME_TTL_S)) == wanted
