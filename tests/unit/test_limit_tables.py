"""Tables of counts and of rates against naive models; rates and bandwidths as text."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forwarder.config.quantities import (
    MAX_BANDWIDTH,
    MAX_RATE,
    MIN_BANDWIDTH,
    MIN_RATE,
    parse_bandwidth,
    parse_rate,
)
from forwarder.limits.tables import CountTable, RateTable, key_of, pass_at, table_words

if TYPE_CHECKING:
    from collections.abc import Sequence

KEYS = 8
PLACES = 2 * KEYS


def words(count: int) -> memoryview[int]:
    return memoryview(bytearray(8 * count)).cast("Q")


def times(count: int) -> memoryview[float]:
    return memoryview(bytearray(8 * count)).cast("d")


def count_table(keys: int = KEYS) -> CountTable:
    return CountTable(words(table_words(keys)))


# -- counts

# Mostly keys that belong to the same few places at the end of the table, so that they wrap around.
HARD_KEYS = st.one_of(
    st.builds(
        lambda low, high: (high * PLACES + low) or PLACES, st.integers(13, 16), st.integers(0, 9)
    ),
    st.integers(1, 2**64 - 1),
)


class CountMachine(RuleBasedStateMachine):
    """A table of 16 places against a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table = count_table()
        self.model: dict[int, int] = {}

    @rule(key=HARD_KEYS, count=st.integers(1, 3))
    def add(self, key: int, count: int) -> None:
        has_room = key in self.model or len(self.model) < KEYS
        assert self.table.add(key, count) is has_room
        if has_room:
            self.model[key] = self.model.get(key, 0) + count

    @rule(data=st.data())
    def remove_one_that_is_there(self, data: st.DataObject) -> None:
        if self.model:
            key = data.draw(st.sampled_from(sorted(self.model)))
            assert self.table.remove(key)
            self.model[key] -= 1
            if not self.model[key]:
                del self.model[key]

    @rule(key=HARD_KEYS)
    def remove_any(self, key: int) -> None:
        if key not in self.model:
            assert not self.table.remove(key)

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.model.clear()

    @invariant()
    def every_key_is_found(self) -> None:
        assert {key: self.table.get(key) for key in self.model} == self.model
        assert dict(self.table.items()) == self.model
        assert len(self.table) == len(self.model)

    @invariant()
    def no_other_key_is_found(self) -> None:
        assert all(self.table.get(key) == 0 for key in range(1, 40) if key not in self.model)


TestCountMachine = CountMachine.TestCase


@given(st.binary(min_size=8 * table_words(2), max_size=8 * table_words(2)), st.data())
def test_what_a_killed_writer_has_left_raises_nothing(torn: bytes, data: st.DataObject) -> None:
    """Any bytes but a table without a free place, which no writer makes. Counts stay 0 or more."""
    memory = memoryview(bytearray(torn)).cast("Q")
    memory[2 * data.draw(st.integers(0, 3))] = 0
    table = CountTable(memory)
    for key in (memory[0] or 1, memory[2] or 2, memory[4] or 3):
        if table.get(key) < 2**64 - 1:
            table.add(key)
        table.remove(key)
        table.remove(key)
        assert table.get(key) >= 0


def test_a_key_is_never_none_and_differs_by_rule_and_client() -> None:
    keys = {key_of(rule, client) for rule in ("a", "b") for client in ("10.0.0.1", "::1", "unix")}
    assert len(keys) == 6
    assert all(0 < key < 2**64 for key in keys)


# -- rates

RATES = st.floats(MIN_RATE, 1000)
BURSTS = st.floats(1, 50)
# In parts of the time that one takes on average.
GAPS = st.lists(st.one_of(st.just(0.0), st.floats(0, 3), st.floats(0, 100)), max_size=60)
START = 1e6  # a machine that has been up for days: floats are coarser there


def arrivals(gaps: Sequence[float], rate: float) -> list[float]:
    at, found = START, []
    for gap in gaps:
        at += gap / rate
        found.append(at)
    return found


@given(RATES, BURSTS, GAPS)
@example(1.0, 1.0, [0.0, 1.0, 1.0, 1.0])
def test_a_rate_is_a_token_bucket(rate: float, burst: float, gaps: list[float]) -> None:
    """Against tokens as a real number, where the two do not differ by rounding alone."""
    tokens, last, due = burst, START, 0.0
    for now in arrivals(gaps, rate):
        tokens, last = min(burst, tokens + (now - last) * rate), now
        passed = pass_at(due, now, rate, burst)
        if abs(tokens - 1) > 1e-6 * rate + 1e-6:
            assert (passed is not None) is (tokens >= 1)
        if passed is not None:
            due = passed
            tokens -= 1


@given(RATES, BURSTS, GAPS)
def test_no_window_lets_more_pass_than_burst_and_rate(
    rate: float, burst: float, gaps: list[float]
) -> None:
    due, passed = 0.0, []
    for now in arrivals(gaps, rate):
        if (new := pass_at(due, now, rate, burst)) is not None:
            due = new
            passed.append(now)
    for first, start in enumerate(passed):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + rate * (passed[last] - start) + 1e-6 * rate + 1e-6


@given(RATES, BURSTS)
def test_who_comes_no_faster_than_the_rate_always_passes(rate: float, burst: float) -> None:
    due = 0.0
    for number in range(50):
        new = pass_at(due, START + number * (1 + 1e-6) / rate, rate, burst)
        assert new is not None
        due = new


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(0, 0.5)), max_size=80), BURSTS)
def test_a_table_of_rates_gives_each_key_its_own(
    events: list[tuple[int, float]], burst: float
) -> None:
    table = RateTable(words(8), times(8))  # one set: room for eight keys
    dues: dict[int, float] = {}
    now = START
    for key, gap in events:
        now += gap
        new = pass_at(dues.get(key, 0.0), now, 2.0, burst)
        assert table.try_pass(key, now, 2.0, burst) is (new is not None)
        if new is not None:
            dues[key] = new


def test_a_full_table_of_rates_forgets_who_was_silent_for_longest() -> None:
    table = RateTable(words(8), times(8))
    for key in range(1, 9):
        assert table.try_pass(key, START + key, 0.001, 1)
    assert table.try_pass(9, START + 9, 0.001, 1), "somebody new is never kept out by others"
    assert not table.try_pass(9, START + 10, 0.001, 1)
    assert not any(table.try_pass(key, START + 10, 0.001, 1) for key in range(2, 9))
    assert table.try_pass(1, START + 10, 0.001, 1), "the first one was forgotten"


def test_random_keys_of_a_large_table_do_not_disturb_each_other() -> None:
    table = RateTable(words(4096), times(4096))
    chance = random.Random(1)
    keys = [chance.getrandbits(64) for _ in range(500)]
    assert all(table.try_pass(key, START, 1.0, 1) for key in keys)
    assert not any(table.try_pass(key, START, 1.0, 1) for key in keys)


# -- as people write them


@pytest.mark.parametrize(
    ("written", "per_second"),
    [
        (5, 5.0),
        (0.5, 0.5),
        ("100/s", 100.0),
        ("30/m", 0.5),
        ("600/h", 1 / 6),
        ("0.5/s", 0.5),
        ("1/h", 1 / 3600),
        ("1000000/s", MAX_RATE),
    ],
)
def test_a_rate_is_read(written: object, per_second: float) -> None:
    assert parse_rate(written) == pytest.approx(per_second)


@pytest.mark.parametrize(
    ("written", "bytes_per_second"),
    [
        ("8kbit", 1000.0),
        ("100Mbit", 12.5e6),
        ("1Gbit", 125e6),
        ("1.5Gbit/s", 187.5e6),
        ("100 Mbitps", 12.5e6),
        ("2MB", 2e6),
        ("64KiB", 65536.0),
        ("1MiB/s", 2.0**20),
        ("1000B", 1000.0),
        ("8Kibit", 1024.0),
        ("1000Gbit", MAX_BANDWIDTH),
    ],
)
def test_a_bandwidth_is_read(written: str, bytes_per_second: float) -> None:
    assert parse_bandwidth(written) == pytest.approx(bytes_per_second)


@pytest.mark.parametrize(
    "written",
    [
        *("", "1", "/s", "1/", "1/d", "-1/s", "1 /s", "1/s ", "1.e3/s", "1e3/s", "٣/s", "0/s"),
        *(0, -1, 1e7, 10**400, math.nan, math.inf, True, None, [], {}),
    ],
    ids=lambda written: repr(written)[:12],
)
def test_nonsense_is_no_rate(written: object) -> None:
    with pytest.raises(ValueError, match=r"is not (a rate|between)"):
        parse_rate(written)


@pytest.mark.parametrize(
    "written",
    [
        *("", "1", "Mbit", "1Mb", "1mbit", "1 M bit", "1kibit", "-1Mbit", "1Mbit/h", "1TB", "٣MB"),
        *("7999bit", "999B", "1001Gbit", "126GB", "1.Mbit", "1e3kB", "1Mbit\n"),
        *(100, 1.5, True, None, []),
    ],
)
def test_nonsense_is_no_bandwidth(written: object) -> None:
    with pytest.raises(ValueError, match=r"is not (a bandwidth|between)"):
        parse_bandwidth(written)


@given(st.integers(1, 999_999_999), st.sampled_from("smh"))
def test_every_rate_within_the_bounds_round_trips(count: int, unit: str) -> None:
    seconds = {"s": 1, "m": 60, "h": 3600}[unit]
    rate = count / seconds
    if MIN_RATE <= rate <= MAX_RATE:
        assert parse_rate(f"{count}/{unit}") * seconds == pytest.approx(count)
        assert parse_rate(rate) == rate
    else:
        with pytest.raises(ValueError, match="is not between"):
            parse_rate(f"{count}/{unit}")


@given(
    st.integers(1, 999_999_999),
    st.sampled_from(["", "k", "K", "M", "G", "Ki", "Mi", "Gi"]),
    st.sampled_from(["bit", "B"]),
)
def test_every_bandwidth_within_the_bounds_is_its_product(
    amount: int, prefix: str, unit: str
) -> None:
    factor = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}.get(prefix) or 1024 ** (
        "KMG".index(prefix[0]) + 1
    )
    expected = amount * factor / (8 if unit == "bit" else 1)
    if MIN_BANDWIDTH <= expected <= MAX_BANDWIDTH:
        assert parse_bandwidth(f"{amount}{prefix}{unit}") == pytest.approx(expected)
    else:
        with pytest.raises(ValueError, match="is not between"):
            parse_bandwidth(f"{amount}{prefix}{unit}")


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    for parse in (parse_rate, parse_bandwidth):
        try:
            assert parse(text) > 0
        except ValueError:
            continue
