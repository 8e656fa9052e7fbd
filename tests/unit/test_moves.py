"""Sessions on their way have one owner, whoever dies, hangs or refuses; none ends unnoticed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import procfs
from support.moved import RULE, Process, World

from forwarder.ipc.channel import Received
from forwarder.ipc.consignment import MAX_SESSIONS, Consignment, Refusal
from forwarder.supervision import move_plan, moves
from forwarder.supervision.move_plan import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forwarder.ipc.channel import Message


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], World]]:
    """Makes a world of some workers with some sessions each; all is closed at the end."""
    before = len(procfs.descriptors(os.getpid()))
    made: list[World] = []

    def build(workers: int, sessions: int) -> World:
        world = World(workers, sessions)
        monkeypatch.setattr(moves, "time", world)
        made.append(world)
        return world

    yield build
    for world in made:
        world.close()
    assert len(procfs.descriptors(os.getpid())) == before


def given_by_another(make: Callable[[int, int], World]) -> tuple[World, Process, Process]:
    """A worker of another instance has given its sessions up, and one of ours was sent them."""
    world = make(1, 0)
    (taker,) = world.processes
    giver = world.start(10)
    giver.is_foreign = True
    world.moves.add(giver)
    world.turn()
    giver.act()
    world.hear(giver)
    return world, giver, taker


def until_out(world: World, giver: Process) -> None:
    """Let a giver that drains give sessions up, and the master send them on."""
    giver.drains = True
    world.turn()
    giver.act()
    world.hear(giver)


def test_a_worker_that_drains_gives_all_to_the_others_in_equal_parts(
    make: Callable[[int, int], World],
) -> None:
    world = make(4, 300)
    giver, *others = world.processes
    giver.drains = True
    world.settle()
    assert not giver.has
    assert [len(one.has) for one in others] == [400, 400, 400]
    assert not world.moves.is_busy
    assert world.moves.afloat() == {}


def test_few_sessions_do_not_all_go_to_one_worker(make: Callable[[int, int], World]) -> None:
    world = make(4, 0)
    giver, *others = world.processes
    giver.has = set(range(20))
    giver.drains = True
    world.settle()
    assert max(len(one.has) for one in others) <= 8


def test_what_cannot_be_moved_yet_is_asked_for_again(make: Callable[[int, int], World]) -> None:
    world = make(2, 10)
    giver, other = world.processes
    giver.drains, giver.busy = True, {0, 1}
    world.settle(20)
    assert len(other.has) == 18
    giver.busy.clear()
    world.settle(20)
    assert len(other.has) == 20


def test_one_at_a_time_is_on_its_way_and_counted_meanwhile(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 250)
    giver, other = world.processes
    until_out(world, giver)
    for _ in range(3):
        world.turn()
    assert not giver.can_act
    assert world.moves.afloat() == {RULE: MAX_SESSIONS}
    other.act()
    world.hear(other)
    assert world.moves.afloat() == {}


@pytest.mark.parametrize("answered", [False, True])
def test_the_taker_dies(make: Callable[[int, int], World], *, answered: bool) -> None:
    """Before it has answered nothing is lost; after it, what it has taken is lost with it."""
    world = make(3, 10)
    giver, *others = world.processes
    until_out(world, giver)
    (taker,) = [one for one in others if one.inbox.waiting]
    (other,) = [one for one in others if one is not taker]
    if answered:
        taker.act()
    world.kill(taker)
    world.settle()
    assert len(world.killed) == (10 + 5 if answered else 10)
    assert len(other.has) == 30 - len(world.killed)


@pytest.mark.parametrize("has_claimed", [False, True])
def test_both_die_and_the_next_worker_gets_them(
    make: Callable[[int, int], World], *, has_claimed: bool
) -> None:
    """Also if the taker had claimed them, and has not said so."""
    world = make(2, 10)
    giver, taker = world.processes
    until_out(world, giver)
    world.kill(giver)
    taker.dies_claiming = has_claimed
    if has_claimed:
        taker.act()
    else:
        world.kill(taker)
    for process in (giver, taker):
        world.reap(process)
    world.turn()
    assert world.moves.afloat() == {RULE: 10}
    late = world.start()
    world.settle()
    assert len(late.has) == 10
    assert world.lost == {}


def test_the_giver_dies_before_it_has_answered(make: Callable[[int, int], World]) -> None:
    world = make(2, 10)
    giver, other = world.processes
    giver.drains = True
    world.turn()
    world.kill(giver)
    world.settle()
    assert len(other.has) == 10
    assert not world.moves.is_busy


def test_a_taker_that_is_stopped_keeps_nobody_waiting(make: Callable[[int, int], World]) -> None:
    world = make(3, 10)
    giver, stopped, other = world.processes
    stopped.has = set()
    until_out(world, giver)
    assert stopped.inbox.waiting
    stopped.is_stopped = True
    began = world.now
    world.settle()
    assert len(other.has) == 20
    assert world.now < began + 2 * move_plan.TAKEN_WITHIN_S
    stopped.is_stopped = False
    world.settle()
    assert not stopped.has, "it has taken what others have"


def test_a_taker_that_is_stopped_has_what_it_has_claimed(
    make: Callable[[int, int], World],
) -> None:
    """Its answer is on its way when the time is up."""
    world = make(2, 10)
    giver, taker = world.processes
    until_out(world, giver)
    taker.act()
    world.now += move_plan.TAKEN_WITHIN_S
    world.turn()
    assert not giver.can_act
    world.settle()
    assert len(taker.has) == 20


def test_sessions_that_kill_their_takers_stay_where_they_are(
    make: Callable[[int, int], World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make(6, 10)
    giver = world.processes[0]
    giver.drains = True
    for one in world.processes:
        one.dies_claiming = True
    world.settle()
    assert len(giver.has) == 10
    assert sum(one.is_killed for one in world.processes) == move_plan.MOST_DEATHS
    assert "sessions=0" in caplog.text


def test_sessions_that_kill_their_takers_are_reset_if_their_giver_is_gone(
    make: Callable[[int, int], World],
) -> None:
    world = make(6, 10)
    giver = world.processes[0]
    until_out(world, giver)
    out = world.moves.afloat()
    world.kill(giver)
    for one in world.processes:
        one.dies_claiming = True
    world.settle()
    assert sum(one.is_killed for one in world.processes) == move_plan.MOST_DEATHS + 1
    assert world.lost == out


@pytest.mark.parametrize("refuses", [4, 10])
def test_what_one_worker_refuses_goes_to_another(
    make: Callable[[int, int], World], refuses: int
) -> None:
    world = make(3, 10)
    giver, taker, other = world.processes
    taker.refuses = refuses
    giver.drains = True
    world.settle()
    assert len(taker.has) == 10 + max(0, 5 - refuses)
    assert len(taker.has | other.has) == 30


@pytest.mark.parametrize("refuses", [1, 10])
def test_what_one_worker_refuses_goes_to_another_when_its_giver_is_gone(
    make: Callable[[int, int], World], refuses: int
) -> None:
    world = make(3, 10)
    giver, taker, other = world.processes
    until_out(world, giver)
    world.kill(giver)
    world.reap(giver)
    taker.refuses = refuses
    world.settle()
    assert len(taker.has) == 10 + max(0, 5 - refuses)
    assert len(taker.has | other.has) == 20 + 5
    assert world.lost == {}


def test_what_nobody_takes_is_reset_in_the_end_if_its_giver_is_gone(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 10)
    giver, other = world.processes
    until_out(world, giver)
    world.kill(giver)
    other.refuses = MAX_SESSIONS
    world.settle()
    assert world.lost == {RULE: 10}


def test_what_others_have_kept_of_a_worker_that_has_died_goes_on_in_the_next_that_is_ready(
    make: Callable[[int, int], World],
) -> None:
    world = make(0, 0)
    content = {"terms": [{"name": RULE}], "sessions": [{"terms": 0, "id": i} for i in range(6)]}
    kept = [Consignment.of(0, content, [[] for _ in range(6)])]
    world.moves.adopt("worker slot=0 pid=100", kept)
    world.settle(3)
    assert world.moves.is_adopting
    assert world.moves.afloat() == {RULE: 6}
    first, second = world.start(), world.start()
    first.dies_claiming = True
    world.settle()
    assert second.has == set(range(6))
    assert not world.moves.is_adopting


def test_sessions_of_a_version_that_is_not_known_end_where_they_are(
    make: Callable[[int, int], World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make(2, 10)
    giver, other = world.processes
    giver.drains = True
    other.refuses, other.why = MAX_SESSIONS, Refusal.VERSION
    world.settle()
    assert len(giver.has) == 10
    assert caplog.text.count("the rest stays there: version") == 1


def test_sessions_for_which_there_are_no_descriptors_go_back_and_come_in_smaller_parts(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 10)
    giver, other = world.processes
    giver.drains = giver.is_truncated = True
    world.settle(10)
    assert len(other.has) == 10
    giver.is_truncated = False
    world.settle()
    assert len(other.has) == 20


def test_sessions_whose_giver_dies_before_it_hears_that_they_did_not_come_are_counted_as_lost(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 10)
    giver, other = world.processes
    giver.drains = giver.is_truncated = True
    world.turn()
    giver.act()
    given = 10 - len(giver.has)
    assert given
    world.hear(giver)
    world.kill(giver)
    world.reap(giver)
    world.settle()
    assert world.lost[RULE] == given
    assert len(other.has) == 10
    assert not world.moves.is_busy


def test_nothing_is_asked_for_while_it_has_to_be_counted_who_holds_what(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 10)
    giver, other = world.processes
    giver.drains = world.must_recount = True
    world.settle(10)
    assert not world.moves.is_busy
    world.must_recount = False
    world.settle()
    assert len(other.has) == 20


@pytest.mark.parametrize("passed_on", [False, True])
def test_at_a_stop_sessions_stay_where_they_are(
    make: Callable[[int, int], World], *, passed_on: bool
) -> None:
    """What no worker has yet goes back to its giver; a worker answers for what it was sent."""
    world = make(2, 10)
    giver, other = world.processes
    if passed_on:
        until_out(world, giver)
    else:
        giver.drains = True
        world.turn()
        giver.act()
    world.moves.cancel()
    world.settle()
    assert len(giver.has) == (0 if passed_on else 10)
    assert len(giver.has | other.has) == 20


def test_sessions_whose_giver_has_died_are_reset_at_a_stop_without_a_worker(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 10)
    giver, other = world.processes
    until_out(world, giver)
    for one in (giver, other):
        world.kill(one)
        world.reap(one)
    world.moves.cancel()
    assert world.lost == {RULE: 10}
    assert not world.moves.is_busy


@pytest.mark.parametrize("fails", [False, True])
def test_sessions_of_a_giver_that_is_only_gone_for_us_are_not_reset(
    make: Callable[[int, int], World], *, fails: bool
) -> None:
    """It goes on with them; whether we stop or end by a failure."""
    world, giver, taker = given_by_another(make)
    giver.lose_master()
    taker.refuses = MAX_SESSIONS
    taker.act()
    world.hear(taker)
    world.kill(taker)
    world.reap(taker)
    with patch.object(Consignment, "abort") as abort:
        if fails:
            world.moves.close()
        else:
            world.moves.cancel()
    abort.assert_not_called()
    assert (len(giver.has), world.lost) == (10, {})


@pytest.mark.parametrize("refuses", [4, 10])
@pytest.mark.parametrize("has_answered", [False, True])
def test_a_giver_that_dies_before_it_has_taken_back_what_was_refused(
    make: Callable[[int, int], World], refuses: int, *, has_answered: bool
) -> None:
    """Another one goes on with it; but what it has had again is lost with it."""
    world = make(2, 10)
    giver, taker = world.processes
    taker.refuses = refuses
    until_out(world, giver)
    taker.act()
    world.hear(taker)
    assert world.moves.afloat() == {RULE: refuses}
    if has_answered:
        giver.act()
        world.hear(giver)
        assert world.moves.afloat() == {}
    world.kill(giver)
    taker.refuses = 0
    world.settle()
    assert len(taker.has) == 20 - (refuses if has_answered else 0)
    assert (world.lost, world.moves.is_busy) == ({}, False)


@pytest.mark.parametrize("goes_on", [False, True])
def test_sessions_of_a_foreign_giver_that_a_dead_taker_had_claimed_are_not_left_to_the_giver(
    make: Callable[[int, int], World], *, goes_on: bool
) -> None:
    """It goes on with them only if it was the one that has claimed; else the next worker does.

    Closed by all, cut streams would look whole.
    """
    world, giver, taker = given_by_another(make)
    if goes_on:
        giver.lose_master()
        world.kill(taker)
    else:
        taker.dies_claiming = True
        taker.act()
        giver.lose_master()
    world.reap(taker)
    late = world.start()
    world.settle()
    assert (len(giver.has), len(late.has)) == ((10, 0) if goes_on else (0, 10))
    assert (world.lost, world.moves.is_busy) == ({}, False)


def test_sessions_that_nobody_has_any_more_are_reset_also_if_we_fail(
    make: Callable[[int, int], World],
) -> None:
    world, giver, taker = given_by_another(make)
    taker.dies_claiming = True
    taker.act()
    giver.lose_master()
    world.reap(taker)
    with patch.object(Consignment, "abort", autospec=True, side_effect=Consignment.close) as abort:
        world.moves.close()
    abort.assert_called_once()


def test_two_that_have_died_and_of_which_one_is_reaped_first_lose_nothing(
    make: Callable[[int, int], World],
) -> None:
    """A giver whose channel has ended has claimed nothing, though it was not reaped yet."""
    world = make(2, 10)
    giver, taker = world.processes
    until_out(world, giver)
    world.kill(giver)
    giver.is_cut_off = True
    taker.dies_claiming = True
    taker.act()
    world.reap(taker)
    world.turn()
    world.reap(giver)
    late = world.start()
    world.settle()
    assert (len(late.has), world.lost) == (10, {})


def test_sessions_that_nobody_has_asked_for_are_nonsense_or_another_masters(
    make: Callable[[int, int], World],
) -> None:
    world = make(1, 0)
    received = Received({"op": "parcels", "number": 7}, [])
    with pytest.raises(ValueError, match="nobody has asked for"):
        world.moves.on_message(100, received)
    passed: list[tuple[int, Received]] = []

    def pass_on(pid: int, it: Received) -> bool:
        passed.append((pid, it))
        return True

    world.moves.pass_on = pass_on
    world.moves.on_message(100, received)
    assert passed == [(100, received)]


# -- orders


def ordered(world: World, slot: int, **choice: object) -> Outcome:
    """Order sessions to a slot; what became of it, once that is known."""
    found: list[Message] = []
    assert world.moves.order(dict(choice), slot, found.append) == ""
    world.settle()
    (outcome,) = found
    return Outcome(**outcome)  # type: ignore[arg-type]  # its own fields


def test_an_order_moves_what_is_meant_and_says_what_became_of_it(
    make: Callable[[int, int], World],
) -> None:
    world = make(3, 4)
    one, two, three = world.processes
    one.busy = {1}
    outcome = ordered(world, 2, ids=[0, 1, 4, 8])
    assert three.has == {0, 4, 8, 9, 10, 11}
    assert (outcome.moved, outcome.busy, outcome.back, outcome.silent) == (2, 1, 0, [])
    assert one.has | two.has == {1, 2, 3, 5, 6, 7}


def test_an_order_to_nobody_is_refused(make: Callable[[int, int], World]) -> None:
    world = make(2, 4)
    world.processes[1].drains = True
    problem = world.moves.order({}, 1, lambda _: None)
    assert problem == "no worker is ready in slot 1; slots with one that is: 0"


def test_an_order_is_answered_though_a_worker_is_not(make: Callable[[int, int], World]) -> None:
    world = make(3, 4)
    one, two, three = world.processes
    one.is_stopped = True
    outcome = ordered(world, 2)
    assert (outcome.moved, outcome.silent) == (4, [one.pid])
    one.is_stopped = False
    world.settle()
    assert one.has | two.has | three.has == set(range(12))


def test_an_order_does_not_try_again_what_is_refused(make: Callable[[int, int], World]) -> None:
    world = make(2, 4)
    one, two = world.processes
    two.refuses = 3
    outcome = ordered(world, 1)
    assert (outcome.moved, outcome.back, outcome.why) == (1, 3, Refusal.DESCRIPTORS)
    assert len(one.has) == 3


def test_orders_that_contradict_each_other_come_to_an_end(
    make: Callable[[int, int], World],
) -> None:
    world = make(2, 150)
    found: list[Message] = []
    for slot in (0, 1):
        assert world.moves.order({}, slot, found.append) == ""
    world.settle()
    assert len(found) == 2
    assert len(world.owners()) == 300


def test_where_both_die_of_an_order_another_worker_gets_the_sessions(
    make: Callable[[int, int], World],
) -> None:
    world = make(3, 4)
    giver, taker, other = world.processes
    other.has.clear()
    world.moves.order({"ids": [0, 1]}, 1, lambda _: None)
    world.turn()
    giver.act()
    world.hear(giver)
    for one in (giver, taker):
        world.kill(one)
    world.settle()
    assert other.has == {0, 1}


def test_an_order_ends_with_the_master(make: Callable[[int, int], World]) -> None:
    world = make(2, 4)
    found: list[Message] = []
    world.moves.order({}, 1, found.append)
    world.moves.cancel()
    assert [outcome["why"] for outcome in found] == ["the forwarder is stopping"]
    world.settle()


# -- anything at all


class MovesMachine(RuleBasedStateMachine):
    """Workers start, drain, stop, refuse and are killed at every step of a move."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptors = len(procfs.descriptors(os.getpid()))
        self.world = World(2, 150)
        self.patch = patch.object(moves, "time", self.world)
        self.patch.start()

    def some(self, data: st.DataObject, fit: Callable[[Process], bool]) -> Process | None:
        """One of the workers that can do this, if there is one."""
        found = [one for one in self.world.processes if fit(one)]
        return data.draw(st.sampled_from(found)) if found else None

    @rule()
    def turn(self) -> None:
        self.world.turn()

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.6, 5.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        if one := self.some(data, lambda it: it.can_act):
            one.act()

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        if one := self.some(data, lambda it: bool(it.outbox.waiting) and not it.is_gone):
            self.world.hear(one)

    @rule(data=st.data(), is_on=st.booleans())
    def truncate(self, data: st.DataObject, *, is_on: bool) -> None:
        if one := self.some(data, lambda _: True):
            one.is_truncated = is_on

    @rule(data=st.data(), count=st.sampled_from([0, 1, 40, 1000]))
    def refuse(self, data: st.DataObject, count: int) -> None:
        if one := self.some(data, lambda _: True):
            one.refuses = count

    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        if one := self.some(data, lambda it: not it.drains):
            one.drains = True

    @rule(data=st.data(), is_on=st.booleans())
    def stop(self, data: st.DataObject, *, is_on: bool) -> None:
        if one := self.some(data, lambda it: it.is_stopped is not is_on):
            one.is_stopped = is_on

    @rule(data=st.data(), is_amid=st.booleans())
    def kill(self, data: st.DataObject, *, is_amid: bool) -> None:
        if one := self.some(data, lambda it: not it.is_killed):
            if is_amid:
                one.dies_claiming = True
            else:
                self.world.kill(one)

    @rule(data=st.data())
    def reap(self, data: st.DataObject) -> None:
        if one := self.some(data, lambda it: it.is_killed and not it.is_reaped):
            self.world.reap(one)

    @precondition(lambda self: len(self.world.processes) < 6)
    @rule()
    def start(self) -> None:
        self.world.start(30)

    @rule(data=st.data())
    def order(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, 5))
        self.world.moves.order({}, slot, lambda _: None)

    @invariant()
    def at_most_one_is_out_of_each(self) -> None:
        for process in self.world.processes:
            assert len(process.out) <= 1

    def teardown(self) -> None:
        world = self.world
        try:
            for process in world.processes:
                process.is_stopped = process.is_truncated = process.dies_claiming = False
                process.refuses = 0
            world.start()
            world.settle()
            assert not world.moves.is_busy
            found = len(world.owners()) + len(world.killed) + world.lost[RULE]
            assert found == world.sessions
            assert not any(one.has for one in world.processes if one.drains)
        finally:
            world.close()
            self.patch.stop()
        assert len(procfs.descriptors(os.getpid())) == self.descriptors


TestAnything = MovesMachine.TestCase
TestAnything.settings = settings(stateful_step_count=40, max_examples=40, deadline=None)
