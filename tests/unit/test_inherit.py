"""Numbers of descriptors in a variable of the environment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forwarder.inherit import numbers_as_text, numbers_in


@given(st.lists(st.integers(0, 30)))
def test_numbers_come_back_in_their_order(numbers: list[int]) -> None:
    assert numbers_in(numbers_as_text(numbers)) == numbers


def test_what_a_version_without_runs_has_written_is_read() -> None:
    assert numbers_in("") == []
    assert numbers_in("3,4,9") == [3, 4, 9]


def test_a_hundred_thousand_descriptors_fit_into_a_variable() -> None:
    """One has at most 128 KiB on Linux (execve(2), MAX_ARG_STRLEN)."""
    assert len(numbers_as_text(range(5, 100_005))) < 128 * 1024
