"""Meters on a clock that the test turns: how much passes, and whose turn it is."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.by_hand import HandLoop

from forwarder.limits.gate import CATCH_UP_S, Gate
from forwarder.limits.meter import LARGEST_BYTES, SMALLEST_BYTES, STEP_S, Meter, quantum_of

if TYPE_CHECKING:
    from collections.abc import Iterator

READ = 20 * 1024  # what a way may move beyond its room


class Bench:
    """Meters of several workers on one line."""

    def __init__(self, gate: Gate, workers: int, rate: float) -> None:
        self.loop = HandLoop()
        loop = self.loop
        self.rate = rate
        self.meters = [Meter(loop, gate, 2, rate, self.loop.time) for _ in range(workers)]
        self.moves: list[tuple[float, int]] = []

    def bound(self, seconds: float) -> float:
        """What may pass in so many seconds: see the documentation of the limit."""
        quantum = quantum_of(self.rate)
        ahead = quantum + len(self.meters) * (3 * quantum + READ)
        return self.rate * (seconds + CATCH_UP_S) + ahead

    def assert_bounded(self) -> None:
        """No window has more than :meth:`bound`."""
        sums = [0, *itertools.accumulate(count for _, count in self.moves)]
        for first in range(0, len(self.moves), max(1, len(self.moves) // 40)):
            for last in range(first, len(self.moves)):
                took = self.moves[last][0] - self.moves[first][0]
                assert sums[last + 1] - sums[first] <= self.bound(took)


class FlowDirection:
    """Moves what there is: ``chunk`` bytes more than its room at most, ``left`` in all."""

    def __init__(self, bench: Bench, meter: Meter, chunk: int = 0, left: float = 1e18) -> None:
        self.bench, self.meter, self.chunk, self.left = bench, meter, chunk, left
        self.moved = 0
        self.is_waiting = self.is_broken = False
        self.bugs = 0

    def start(self) -> None:
        """Ask, move, ask again."""
        while self.left > 0:
            if not self.step():
                return

    def step(self) -> bool:
        room = self.meter.room(self)
        if not room:
            self.is_waiting = True
            return False
        count = int(min(room + self.chunk, self.left))
        self.moved += count
        self.left -= count
        self.bench.moves.append((self.bench.loop.now, count))
        self.meter.spend(count)
        return True

    def go_on(self, now: float) -> None:
        assert now == self.bench.loop.now
        assert self.is_waiting, "called though it does not wait"
        self.is_waiting = False
        if self.is_broken:
            raise RuntimeError("a bug")
        if self.left > 0 and self.step():
            # As yield_turn: the others first.
            self.bench.loop.call_soon(self.start)

    def on_bug(self) -> None:
        self.bugs += 1


@contextmanager
def make_gate() -> Iterator[Gate]:
    gate = Gate()
    try:
        yield gate
    finally:
        gate.close()


@pytest.fixture
def gate() -> Iterator[Gate]:
    with make_gate() as it:
        yield it


@given(
    rate=st.floats(1000, 2e9),
    workers=st.integers(1, 4),
    ways=st.integers(1, 5),
    chunk=st.sampled_from([0, 1, 1000, READ]),
)
def test_all_meters_of_a_line_together_are_as_fast_as_its_rate_and_no_faster(
    rate: float, workers: int, ways: int, chunk: int
) -> None:
    """Ways with more to move than time for it, over 30 quanta and half a second at least."""
    with make_gate() as gate:
        bench = Bench(gate, workers, rate)
        for meter, _ in itertools.product(bench.meters, range(ways)):
            FlowDirection(bench, meter, chunk).start()
        seconds = max(0.5, 30 * quantum_of(rate) / rate)
        bench.loop.pass_time(seconds)
        total = sum(count for _, count in bench.moves)
        bench.assert_bounded()
        assert total >= rate * seconds * 0.95 - quantum_of(rate)


def test_nothing_polls(gate: Gate) -> None:
    """Eight ways over four meters, an hour of which only a part has something to move.

    *Result*: no timer but those that lead to a quantum, and none when nobody waits.
    """
    rate = 100_000.0
    bench = Bench(gate, 4, rate)
    for meter in bench.meters * 2:
        FlowDirection(bench, meter, left=500_000).start()
    bench.loop.pass_time(60)
    assert sum(count for _, count in bench.moves) == 8 * 500_000
    quanta = 8 * 500_000 / quantum_of(rate)
    # Each worker that waits wakes up for each quantum, and who has moved asks once more.
    assert bench.loop.calls <= 6 * quanta
    calls = bench.loop.calls
    bench.loop.pass_time(3600)
    assert bench.loop.calls == calls


@given(st.integers(2, 12), st.sampled_from([0, READ]))
def test_ways_that_wait_go_on_in_turn(count: int, chunk: int) -> None:
    with make_gate() as gate:
        bench = Bench(gate, 1, 1e6)
        ways = [FlowDirection(bench, bench.meters[0], chunk) for _ in range(count)]
        for way in ways:
            way.start()
        bench.loop.pass_time(2)
        moved = sorted(way.moved for way in ways)
        assert moved[0] > 0
        assert moved[-1] - moved[0] <= 3 * (quantum_of(1e6) + chunk)


def test_ways_that_end_while_they_wait_cost_the_others_nothing(gate: Gate) -> None:
    bench = Bench(gate, 1, 1e6)
    (meter,) = bench.meters
    first = FlowDirection(bench, meter)
    first.start()
    gone = [FlowDirection(bench, meter) for _ in range(1000)]
    for way in gone:
        way.start()
        meter.forget(way)
    bench.loop.pass_time(1)
    assert first.moved >= 0.95e6
    assert not any(way.moved for way in gone)
    assert len(meter._waiting) <= 1


def test_a_bug_in_one_way_is_told_to_it_and_the_others_go_on(gate: Gate) -> None:
    bench = Bench(gate, 1, 1e6)
    ways = [FlowDirection(bench, bench.meters[0]) for _ in range(3)]
    for way in ways:
        way.start()
    ways[1].is_broken = True
    bench.loop.pass_time(1)
    assert [way.bugs for way in ways] == [0, 1, 0]
    assert min(ways[0].moved, ways[2].moved) > 0.4e6


def test_what_one_end_takes_too_much_is_owed_by_all_of_its_worker(gate: Gate) -> None:
    bench = Bench(gate, 1, 1e5)
    (meter,) = bench.meters
    FlowDirection(bench, meter, chunk=1_000_000, left=1_000_000).step()
    other = FlowDirection(bench, meter)
    other.start()
    bench.loop.pass_time(9.9)
    assert other.moved == 0
    bench.loop.pass_time(0.2)
    assert other.moved > 0


@pytest.mark.parametrize("new", [1e4, 1e6, 0.0])
def test_a_new_rate_is_in_force_at_once_for_those_that_wait(gate: Gate, new: float) -> None:
    """At first 8 kbit, so that a quantum takes four seconds; 0 is no limit."""
    bench = Bench(gate, 3, 1000)
    ways = [FlowDirection(bench, meter, left=1e5) for meter in bench.meters]
    for way in ways:
        way.start()
    for meter in bench.meters:
        meter.set_rate(new)
    bench.loop.pass_time(0.01 + (3e5 / new if new else 0))
    # What was drawn at the former rate counts.
    assert sum(way.moved for way in ways) == pytest.approx(3e5, abs=quantum_of(new) * 4)
    if not new:
        assert all(way.left == 0 for way in ways)


def test_what_cannot_wait_gets_a_share_beside_those_that_do(gate: Gate) -> None:
    """Offered ten times the rate in small pieces, beside a way that is never done."""
    rate = 1e6
    bench = Bench(gate, 1, rate)
    (meter,) = bench.meters
    FlowDirection(bench, meter).start()
    passed = 0
    for _ in range(10_000):
        bench.loop.pass_time(0.0001)
        if meter.room_now():
            meter.spend_now(1000)
            passed += 1000
    total = passed + sum(count for _, count in bench.moves)
    assert rate * 0.9 <= total <= bench.bound(1.0)
    assert 0.2 * total <= passed <= 0.8 * total


def test_a_quantum_is_bounded() -> None:
    assert quantum_of(1000) == SMALLEST_BYTES
    assert quantum_of(10e6) == 100_000
    assert quantum_of(125e9) == LARGEST_BYTES
    assert quantum_of(0) == LARGEST_BYTES


def test_no_wait_is_shorter_than_a_step_of_the_loop(gate: Gate) -> None:
    """Else a timer that is due at once would be made again and again."""
    bench = Bench(gate, 1, 2e9)
    way = FlowDirection(bench, bench.meters[0], left=2e9 * 0.1)
    way.start()
    bench.loop.pass_time(1)
    assert way.left == 0
    assert bench.loop.calls <= 3 * 0.1 / STEP_S
