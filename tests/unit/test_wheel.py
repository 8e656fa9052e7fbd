"""The wheel against a list of deadlines."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forwarder.relay.wheel import BUCKETS, TICK_S, Wheel

TURN_S = BUCKETS * TICK_S
DELAYS = st.one_of(
    st.floats(0, 1), st.floats(0, 3 * TURN_S), st.sampled_from([0.0, TICK_S, TURN_S, 2 * TURN_S])
)


class Entry:
    """Something with a deadline, which says a new one when asked too early."""

    def __init__(self, deadline: float) -> None:
        self.tick = -1
        self.deadline = deadline
        self.fired_at: float | None = None
        self.again: list[float] = []

    def on_timer(self, now: float) -> float:
        if now < self.deadline:
            return self.deadline
        if self.again:
            self.deadline = now + self.again.pop()
            return self.deadline
        self.fired_at = now
        return 0.0


class WheelMachine(RuleBasedStateMachine):
    """Entries come, move, go and fire while time passes, in ticks or in leaps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.wheel = Wheel(self.now)
        self.on: list[Entry] = []

    @rule(delay=DELAYS, again=st.lists(DELAYS.filter(bool), max_size=2))
    def add(self, delay: float, again: list[float]) -> None:
        entry = Entry(self.now + delay)
        entry.again = again
        self.wheel.add(entry, entry.deadline)
        self.on.append(entry)

    @precondition(lambda self: self.on)
    @rule(data=st.data(), delay=DELAYS)
    def move(self, data: st.DataObject, delay: float) -> None:
        entry = data.draw(st.sampled_from(self.on))
        entry.deadline = self.now + delay
        self.wheel.add(entry, entry.deadline)

    @precondition(lambda self: self.on)
    @rule(data=st.data(), delay=DELAYS)
    def postpone_without_a_word(self, data: st.DataObject, delay: float) -> None:
        """As bytes that pass do: the wheel learns of it when it asks."""
        entry = data.draw(st.sampled_from(self.on))
        entry.deadline += delay

    @precondition(lambda self: self.on)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.on))
        self.on.remove(entry)
        self.wheel.discard(entry)
        self.wheel.discard(entry)
        entry.deadline = float("-inf")

    @rule(seconds=DELAYS)
    def leap(self, seconds: float) -> None:
        """Time that passes without the wheel being turned, as when it was empty, and one turn."""
        self.now += seconds
        self.wheel.advance(self.now)

    @rule(ticks=st.integers(1, 60))
    def turn(self, ticks: int) -> None:
        for _ in range(ticks):
            self.now += TICK_S
            self.wheel.advance(self.now)

    @rule(seconds=DELAYS)
    def sleep(self, seconds: float) -> None:
        """The wheel is not turned while nothing is on it."""
        if not len(self.wheel):
            self.now += seconds

    @invariant()
    def nothing_is_overdue_and_nothing_is_lost(self) -> None:
        for entry in tuple(self.on):
            if entry.fired_at is not None:
                assert entry.fired_at >= entry.deadline
                assert entry.tick == -1
                self.on.remove(entry)
        assert len(self.wheel) == len(self.on)
        self.wheel.advance(self.now)
        for entry in self.on:
            if entry.fired_at is None:
                assert self.now < entry.deadline + TICK_S + 1e-6


TestWheel = WheelMachine.TestCase
TestWheel.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True, database=None
)


def test_an_entry_may_add_and_discard_others_while_it_is_asked() -> None:
    wheel = Wheel(0.0)
    late = Entry(5.0)
    wheel.add(late, 5.0)
    born = Entry(0.2)

    class Meddler(Entry):
        def on_timer(self, now: float) -> float:
            wheel.discard(late)
            wheel.add(born, born.deadline)
            return super().on_timer(now)

    meddler = Meddler(0.1)
    wheel.add(meddler, 0.1)
    for tick in range(100):
        wheel.advance(tick * TICK_S)
    assert (meddler.fired_at, born.fired_at) != (None, None)
    assert late.fired_at is None
    assert len(wheel) == 0
