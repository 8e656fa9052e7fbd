"""Back-off and the sharing of sockets, as properties; the master between a death and its news."""

from __future__ import annotations

import math
import selectors

from hypothesis import given
from hypothesis import strategies as st

from forwarder.ipc.channel import channel_pair
from forwarder.limits.gate import Holdings
from forwarder.serving.listeners import ListenerTable
from forwarder.supervision.fleet import Fleet
from forwarder.supervision.policy import (
    CRASH_LOOP_DEATHS,
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    STABLE_S,
    Backoff,
    share_sockets,
)
from forwarder.supervision.slot import WorkerProcess, WorkerTables

SLOTS = st.integers(1, 12)


@st.composite
def groups(draw: st.DrawFn) -> tuple[int, set[int], set[int]]:
    """Some slots with sockets; disjoint sets of ready and starting workers, gaps included."""
    slots = draw(SLOTS)
    states = draw(st.lists(st.sampled_from(["ready", "starting", "none"]), max_size=slots))
    ready = {slot for slot, state in enumerate(states) if state == "ready"}
    starting = {slot for slot, state in enumerate(states) if state == "starting"}
    return slots, ready, starting


@given(groups())
def test_every_socket_is_served_by_a_ready_worker_if_there_is_one(
    group: tuple[int, set[int], set[int]],
) -> None:
    slots, ready, starting = group
    shares = share_sockets(slots, ready, starting)
    served = {slot for worker in ready for slot in shares[worker]}
    assert served == (set(range(slots)) if ready else set())


@given(groups())
def test_every_worker_serves_its_own_slot_and_only_slots_that_exist(
    group: tuple[int, set[int], set[int]],
) -> None:
    slots, ready, starting = group
    shares = share_sockets(slots, ready, starting)
    assert shares.keys() == ready | starting
    for worker, mine in shares.items():
        assert worker in mine
        assert mine == sorted(set(mine))
        assert set(mine) <= set(range(slots))


@given(groups())
def test_a_worker_that_starts_serves_nobody_elses_sockets(
    group: tuple[int, set[int], set[int]],
) -> None:
    slots, ready, starting = group
    shares = share_sockets(slots, ready, starting)
    assert all(shares[worker] == [worker] for worker in starting)


@given(groups())
def test_a_socket_without_a_ready_worker_is_adopted_by_exactly_one(
    group: tuple[int, set[int], set[int]],
) -> None:
    slots, ready, starting = group
    if not ready:
        return
    shares = share_sockets(slots, ready, starting)
    adopted = sorted(slot for worker in ready for slot in shares[worker] if slot != worker)
    assert adopted == sorted(set(range(slots)) - ready)


@given(groups())
def test_the_same_state_gives_the_same_shares(group: tuple[int, set[int], set[int]]) -> None:
    slots, ready, starting = group
    again = share_sockets(slots, sorted(ready, reverse=True), list(starting))
    assert again == share_sockets(slots, ready, starting)


@given(st.lists(st.tuples(st.floats(0, 2 * STABLE_S), st.floats(0, 60)), max_size=40))
def test_backoff_grows_with_quick_deaths_and_starts_over_after_a_stable_life(
    lives: list[tuple[float, float]],
) -> None:
    backoff = Backoff()
    now = 100.0
    quick = 0
    for life, waited in lives:
        started_at = now
        now += life
        quick = 1 if now - started_at >= STABLE_S else quick + 1
        delay = backoff.on_death(started_at, now)
        naive = 0.0
        for number in range(1, quick):
            naive = FIRST_DELAY_S if number == 1 else min(2 * naive, LONGEST_DELAY_S)
        assert math.isclose(delay, naive)
        assert backoff.not_before == now + delay
        assert backoff.is_crash_loop is (quick >= CRASH_LOOP_DEATHS)
        now = max(now, backoff.not_before) + waited


def test_backoff_survives_a_crash_loop_of_a_day() -> None:
    """A death every 30 s, for 25 hours."""
    backoff = Backoff()
    for number in range(3000):
        delay = backoff.on_death(30.0 * number, 30.0 * number)
        assert delay <= LONGEST_DELAY_S
    assert backoff.is_crash_loop


def test_the_news_of_a_death_may_come_after_the_death() -> None:
    """One wait of the master may report both SIGCHLD and, behind it, the end of the channel.

    *Result*: the second report of the same death is no error.
    """
    selector = selectors.DefaultSelector()
    fleet = Fleet(ListenerTable(), selector)
    fleet.resize(1)
    ours, theirs = channel_pair()
    process = WorkerProcess(
        0, 2**22 + 1, WorkerTables(fleet.ledger.open(), Holdings(), fleet.keeper.open()), ours, 0.0
    )
    try:
        (slot,) = fleet._slots
        slot.process = process
        selector.register(ours, 1, process)
        theirs.close()
        fleet.on_exit(process.pid, 0)
        fleet.hear(process)
    finally:
        ours.close()
        selector.close()
        fleet.close()
    assert slot.process is None
