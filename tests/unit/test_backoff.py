"""Waits double from failure to failure, up to the longest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forwarder.system.backoff import backoff


@given(st.integers(1, 10**9), st.floats(0.01, 10), st.floats(10, 1000))
def test_a_wait_is_twice_the_one_before_or_the_longest(
    failures: int, first_s: float, longest_s: float
) -> None:
    wait = backoff(failures, first_s, longest_s)
    further = backoff(failures + 1, first_s, longest_s)
    assert backoff(1, first_s, longest_s) == first_s
    assert further == min(2 * wait, longest_s)
