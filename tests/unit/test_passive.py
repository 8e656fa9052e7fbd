"""When failed connects are enough to eject a server."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.checker import passive
from forwarder.config.model import Group

GROUP = Group(fail=3, fail_within_s=10.0)


def look(
    *spans: tuple[int, int], group: Group = GROUP, every_s: float = 0.1, is_first: bool = False
) -> bool:
    """Whether it is enough after looks at so many connects that failed, and that worked."""
    row: passive.Row = ()
    for number, (failed, worked) in enumerate(spans):
        row = passive.after(
            row, failed, worked, group, number * every_s, is_first=is_first and not number
        )
    return passive.is_enough(row, group)


def test_so_many_in_a_row_are_enough() -> None:
    assert not look((1, 0), (1, 0))
    assert look((1, 0), (1, 0), (1, 0))
    assert look((3, 0))


def test_what_worked_between_ends_the_row() -> None:
    assert not look((2, 0), (0, 1), (2, 0))
    assert not look((2, 0), (5, 1), (2, 0))
    assert look((2, 0), (0, 1), (2, 0), (1, 0))


def test_what_is_long_ago_does_not_count() -> None:
    assert not look((1, 0), (1, 0), (1, 0), every_s=6.0)
    assert look((1, 0), (1, 0), (1, 0), every_s=5.0)
    assert look((1, 0), (1, 0), (1, 0), (1, 0), (1, 0), every_s=5.0)


def test_before_the_first_look_what_worked_came_first_but_that_is_not_certain() -> None:
    assert not look((9, 100), is_first=True)
    assert look((9, 100), (1, 0), is_first=True)
    assert not look((1, 100), (1, 0), is_first=True)
    assert look((1, 100), (1, 0), (1, 0), is_first=True)
    assert not look((0, 100), (2, 0), is_first=True)


def test_it_can_be_off() -> None:
    assert not look((100, 0), group=replace(GROUP, fail=0))


def test_one_can_be_enough() -> None:
    assert look((1, 9), group=replace(GROUP, fail=1), is_first=True)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=50),
    st.integers(1, 10),
    st.floats(0.5, 20.0),
)
def test_it_is_enough_exactly_when_so_many_failed_since_something_worked(
    spans: list[tuple[int, int]], fail: int, within_s: float
) -> None:
    group = replace(GROUP, fail=fail, fail_within_s=within_s)
    since = max((i + 1 for i, (_, worked) in enumerate(spans) if worked), default=0)
    last = len(spans) - 1
    count = sum(spans[i][0] for i in range(since, last + 1) if last - i <= within_s)
    assert look(*spans, group=group, every_s=1.0) == (count >= fail)


@pytest.mark.parametrize("fail", [1, 2, 3])
def test_the_memory_of_a_row_is_bounded(fail: int) -> None:
    group = replace(GROUP, fail=fail, fail_within_s=1e9)
    row: passive.Row = ()
    for number in range(100):
        row = passive.after(row, 1, 0, group, float(number), is_first=False)
    assert len(row) == fail
