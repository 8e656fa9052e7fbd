"""What checks and failed connects make of a server."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.balancing.table import FULL, Standing
from forwarder.checker import standing
from forwarder.checker.outcome import Advice, Outcome, Word
from forwarder.checker.standing import Event, State, What
from forwarder.config.model import Check, CheckKind, Group

if TYPE_CHECKING:
    from forwarder.checker.standing import Change

CHECK = Check(kind=CheckKind.TCP, every_s=2.0, fast_s=1.0, down_s=5.0, fall=3, rise=2)
CHECKED = Group(check=CHECK, slow_start_s=30.0)
UNCHECKED = Group()
UP = State(Standing.UP, 0.0, is_checked=True)


def outcome(*, is_good: bool, advice: Advice | None = None) -> Outcome:
    return Outcome(is_good, "" if is_good else "http 503", 0.001, advice)


def check(state: State, text: str, group: Group = CHECKED, now: float = 100.0) -> Change:
    """After checks that passed (+) or failed (-); with the events of the last one."""
    events: tuple[Event, ...] = ()
    for one in text:
        state, events = standing.checked(state, group, outcome(is_good=one == "+"), now)
    return state, events


# -- checks


def test_a_server_is_down_after_so_many_failed_checks_in_a_row() -> None:
    state, events = check(UP, "-")
    assert (state.standing, events) == (Standing.UP, (Event(What.FAILING, "http 503", 1),))
    state, events = check(state, "-+--")
    assert (state.standing, events) == (Standing.UP, ())
    state, events = check(state, "-")
    assert (state.standing, events) == (Standing.DOWN, (Event(What.DOWN, "http 503", 3),))
    assert (state.since, state.why) == (100.0, "http 503")
    assert standing.share(state, CHECKED, 1, 100.0) == 0


def test_a_server_is_up_after_so_many_passed_checks_in_a_row() -> None:
    down, _ = check(UP, "---")
    state, events = check(down, "+")
    assert (state.standing, events) == (Standing.DOWN, (Event(What.RECOVERING, "", 1),))
    state, events = check(state, "-+")
    assert state.standing is Standing.DOWN
    state, events = check(state, "+", now=200.0)
    assert (state.standing, events) == (Standing.SLOW, (Event(What.UP, "", 2),))
    assert (state.since, state.why) == (200.0, "")


def test_the_first_check_of_all_decides_alone() -> None:
    new = standing.first(CHECKED, 0.0)
    assert new.standing is Standing.UP
    assert check(new, "-")[1] == (Event(What.DOWN, "http 503", 1),)
    assert check(new, "+-")[0].standing is Standing.UP


def test_a_server_that_starts_down_waits_for_its_first_check() -> None:
    group = replace(CHECKED, check=replace(CHECK, starts_down=True))
    new = standing.first(group, 0.0)
    assert (new.standing, standing.share(new, group, 1, 0.0)) == (Standing.UNKNOWN, 0)
    up, events = check(new, "+", group)
    assert (up.standing, events[0].what) == (Standing.UP, What.UP)  # not slowly
    assert check(new, "-", group)[0].standing is Standing.DOWN


def test_nothing_is_made_where_a_check_passes_as_ever() -> None:
    """It is what nearly always happens, for each server all the time."""
    assert check(UP, "+")[0] is UP


def test_what_a_good_check_remarks_is_news_once() -> None:
    """When a certificate ends, say. It changes nothing."""
    state = UP
    seen: list[Event] = []
    for why in ("", "29 days", "29 days", "28 days", ""):
        remark = Outcome(is_good=True, why=why, took_s=0.0)
        state, events = standing.checked(state, CHECKED, remark, 1.0)
        seen += events
        assert replace(state, why="") == UP
    assert seen == [Event(What.REMARK, why, 0) for why in ("29 days", "28 days", "")]


def test_checks_come_sooner_while_something_changes() -> None:
    def interval(text: str) -> float:
        return standing.interval_s(check(UP, text)[0], CHECKED)

    assert [interval("+"), interval("-"), interval("---"), interval("---+")] == [2.0, 1.0, 5.0, 1.0]


# -- slow start


def test_the_share_grows_from_a_tenth_to_all() -> None:
    slow, _ = check(UP, "---++")
    shares = [standing.share(slow, CHECKED, 1, 100.0 + s) for s in (0, 10, 20, 30, 40)]
    assert shares == [100, 400, 700, FULL, FULL]
    assert standing.later(slow, CHECKED, 129.9) == (slow, ())
    assert standing.later(slow, CHECKED, 130.0)[0].standing is Standing.UP


def test_a_check_that_fails_once_does_not_begin_the_slow_start_again() -> None:
    slow, _ = check(UP, "---++")
    assert check(slow, "-", now=110.0)[0].since == 100.0


# -- ejection


def test_an_ejected_server_returns_by_itself_later_each_time() -> None:
    state, now, lengths = UP, 0.0, []
    for _ in range(40):
        state, events = standing.ejected(state, UNCHECKED, 3, now)
        assert events == (Event(What.EJECTED, "3 failed connects", 3),)
        back_at = standing.due(state, UNCHECKED, now)
        assert standing.later(state, UNCHECKED, back_at - 0.1)[0] is state
        lengths.append(back_at - now)
        now = back_at
        state, events = standing.later(state, UNCHECKED, now)
        assert events == (Event(What.RETURNED, "its time is over", 0),)
    assert lengths[:3] == pytest.approx([10.0, 20.0, 30.0])
    assert lengths[-1] == pytest.approx(standing.LONGEST_EJECTION_S)


def test_ejections_are_forgotten() -> None:
    state, _ = standing.ejected(replace(UP, ejections=5, back_at=50.0), UNCHECKED, 3, 350.0)
    assert state.ejections == 1
    state, _ = standing.ejected(replace(UP, ejections=5, back_at=50.0), UNCHECKED, 3, 349.0)
    assert state.ejections == 6


def test_where_there_is_a_check_it_brings_an_ejected_server_back() -> None:
    state, _ = standing.ejected(UP, CHECKED, 3, 100.0)
    assert standing.later(state, CHECKED, 1e6) == (state, ())
    back, events = check(state, "+")
    assert (back.standing, events) == (Standing.UP, (Event(What.RETURNED, "", 1),))
    again, _ = standing.ejected(back, CHECKED, 3, 101.0)
    assert check(again, "+", now=110.0)[0].standing is Standing.EJECTED  # where clients fail
    assert check(again, "+", now=111.0)[0].standing is Standing.UP
    assert check(again, "---")[1] == (Event(What.DOWN, "http 503", 3),)


def test_the_last_usable_server_of_a_group_is_not_ejected() -> None:
    assert standing.may_eject(0, [True, True])
    assert not standing.may_eject(0, [True, False, False])


def test_ejected_servers_return_when_no_other_is_usable() -> None:
    out, _ = standing.ejected(UP, CHECKED, 3, 0.0)
    down = State(Standing.DOWN, 0.0)
    assert standing.to_release([out, down, UP], [False, False, True]) == []
    assert standing.to_release([out, down, out], [False, False, False]) == [0, 2]
    assert standing.released(out, 1.0)[0].standing is Standing.UP


# -- agents


def advised(state: State, advice: Advice) -> State:
    return standing.checked(state, CHECKED, outcome(is_good=True, advice=advice), 100.0)[0]


def test_an_agent_says_how_much_a_server_can_take() -> None:
    half = advised(UP, Advice(percent=50))
    assert standing.share(half, CHECKED, 4, 100.0) == 500
    more = advised(half, Advice(weight=8))
    assert standing.share(more, CHECKED, 4, 100.0) == 2000
    assert standing.share(advised(more, Advice(percent=100)), CHECKED, 4, 100.0) == FULL
    assert advised(half, Advice(max_sessions=7)).advice == Advice(50, None, 7)


def test_a_server_drains_until_its_agent_says_that_it_is_ready() -> None:
    drained = advised(UP, Advice(word=Word.DRAIN))
    assert drained.is_usable
    assert standing.share(drained, CHECKED, 1, 100.0) == 0
    assert standing.share(advised(drained, Advice(percent=80)), CHECKED, 1, 100.0) == 0
    ready = advised(drained, Advice(word=Word.READY))
    assert standing.share(ready, CHECKED, 1, 100.0) == FULL


def test_the_word_of_an_agent_is_enough() -> None:
    down, events = standing.checked(
        UP, CHECKED, Outcome(is_good=False, why="disk", took_s=0.0, advice=Advice(is_up=False)), 1.0
    )
    assert (down.standing, events) == (Standing.DOWN, (Event(What.DOWN, "disk", 1),))
    assert advised(down, Advice(is_up=True)).standing is Standing.SLOW


# -- another configuration, another checker


def test_a_changed_check_keeps_what_is_thought_of_a_server() -> None:
    down, _ = check(UP, "---")
    other = replace(CHECKED, check=replace(CHECK, kind=CheckKind.HTTP))
    assert standing.adapted(down, other, 1.0) == (down, ())


def test_without_a_check_nothing_is_down() -> None:
    down, _ = check(UP, "---")
    state, events = standing.adapted(down, UNCHECKED, 1.0)
    assert (state.standing, events[0].what) == (Standing.UP, What.UP)


def test_what_can_not_last_any_more_ends() -> None:
    out, _ = standing.ejected(UP, UNCHECKED, 3, 0.0)
    assert standing.adapted(out, replace(UNCHECKED, fail=0), 1.0)[0].standing is Standing.UP
    slow, _ = check(UP, "---++")
    fast = replace(CHECKED, slow_start_s=0.0)
    assert standing.adapted(slow, fast, 100.0)[0].standing is Standing.UP
    unknown = State(Standing.UNKNOWN, 0.0)
    assert standing.adapted(unknown, CHECKED, 1.0)[0].standing is Standing.UP


def test_another_checker_goes_on_where_one_has_ended() -> None:
    down = standing.resumed(Standing.DOWN, 5.0, CHECKED, 9.0, is_checked=True)
    assert (down.standing, down.since) == (Standing.DOWN, 5.0)
    up = standing.resumed(Standing.UP, 5.0, CHECKED, 9.0, is_checked=True)
    assert check(up, "--")[0].standing is Standing.UP
    out = standing.resumed(Standing.EJECTED, 5.0, UNCHECKED, 9.0, is_checked=False)
    assert standing.due(out, UNCHECKED, 9.0) == 15.0


# -- whatever happens

SPANS = st.floats(0.0, 40.0)
HAPPENS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("+-fw"), SPANS), max_size=80)
GROUPS = st.builds(
    Group,
    check=st.none()
    | st.builds(
        Check,
        kind=st.just(CheckKind.TCP),
        fall=st.integers(1, 4),
        rise=st.integers(1, 4),
        starts_down=st.booleans(),
    ),
    slow_start_s=st.sampled_from([0.0, 0.5, 30.0]),
    eject_s=st.sampled_from([0.0, 1.0, 10.0]),
)


class Servers:
    """Three servers of a group, and what the checker does with them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.now = 0.0
        self.states = [standing.first(group, 0.0) for _ in range(3)]
        self.in_a_row = ["", "", ""]  # checks

    def happen(self, index: int, what: str, span_s: float) -> None:
        before = self.states[index]
        if what == "w":
            self.now += span_s
            for other, state in enumerate(self.states):
                self.states[other] = standing.later(state, self.group, self.now)[0]
        elif what == "f":
            usable = [state.is_usable for state in self.states]
            if standing.may_eject(index, usable):
                self.states[index] = standing.ejected(before, self.group, 3, self.now)[0]
        elif self.group.check is not None:
            self.in_a_row[index] = self.in_a_row[index].rstrip("+-".replace(what, "")) + what
            self.states[index] = check(before, what, self.group, self.now)[0]
        usable = [state.is_usable for state in self.states]
        for other in standing.to_release(self.states, usable):
            self.states[other] = standing.released(self.states[other], self.now)[0]

    def row(self, index: int) -> int:
        """How many of the last checks of a server ended alike."""
        text = self.in_a_row[index]
        return len(text) - len(text.rstrip(text[-1:]))


@given(GROUPS, HAPPENS)
def test_whatever_happens(group: Group, happens: list[tuple[int, str, float]]) -> None:
    servers = Servers(group)
    fall = group.check.fall if group.check else 0
    rise = group.check.rise if group.check else 0
    for index, what, span_s in happens:
        before = servers.states[index]
        shares = [standing.share(state, group, 1, servers.now) for state in servers.states]
        slow = [state if state.standing is Standing.SLOW else None for state in servers.states]
        servers.happen(index, what, span_s)
        state = servers.states[index]
        if what == "-" and state.standing is Standing.DOWN and before.is_usable and group.check:
            assert servers.row(index) >= (fall if before.is_checked else 1)
        if what == "+" and before.standing is Standing.DOWN and state.is_usable:
            assert servers.row(index) >= rise
        if before.standing is Standing.DOWN and what != "+":
            assert state.standing is Standing.DOWN
        usable = [it.is_usable for it in servers.states]
        out = [it.standing is Standing.EJECTED for it in servers.states]
        assert any(usable) or not any(out)
        for other, it in enumerate(servers.states):
            share = standing.share(it, group, 1, servers.now)
            assert 0 <= share <= FULL
            assert (share > 0) == it.is_usable
            if slow[other] is not None and it.is_usable:
                assert share >= shares[other]
            due = standing.due(it, group, servers.now)
            if it.standing is Standing.SLOW:
                assert servers.now <= due <= it.since + group.slow_start_s
            if it.standing is Standing.EJECTED and group.check is None:
                assert due <= servers.now + standing.LONGEST_EJECTION_S


@given(GROUPS, HAPPENS)
def test_a_server_that_works_is_used_in_the_end(
    group: Group, happens: list[tuple[int, str, float]]
) -> None:
    servers = Servers(group)
    for index, what, span_s in happens:
        servers.happen(index, what, span_s)
    for _ in range(10):
        servers.happen(0, "w", standing.LONGEST_EJECTION_S)
        for index in range(3):
            servers.happen(index, "+", 0.0)
    shares = [standing.share(state, group, 1, servers.now) for state in servers.states]
    assert shares == [FULL] * 3
