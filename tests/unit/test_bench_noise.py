"""Whether a change between two runs is called one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.noise import Verdict, change, ranks, two_sided

FIGURES = st.lists(st.floats(0.1, 1e6), min_size=4, max_size=6)


def test_equal_figures_share_the_mean_of_their_ranks() -> None:
    assert ranks([30.0, 10.0, 20.0, 20.0, 20.0]) == [5.0, 1.0, 3.0, 3.0, 3.0]


def test_the_probability_is_that_of_the_tables_of_the_rank_sum_test() -> None:
    """4 against 4, wholly apart: 2 of the 70 ways to split them. One swapped: 4 of them."""
    assert two_sided([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert two_sided([1, 2, 3, 5], [4, 6, 7, 8]) == pytest.approx(4 / 70)
    assert two_sided([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)


def test_three_rounds_are_too_few_to_tell_and_four_are_not() -> None:
    assert change([1, 2, 3], [40, 50, 60]).verdict is Verdict.TOO_FEW
    assert change([1, 2, 3, 4], [40, 50, 60, 70]).verdict is Verdict.CHANGED


def test_figures_that_overlap_are_noise() -> None:
    assert change([10, 12, 14, 16], [11, 13, 15, 17]).verdict is Verdict.NOISE


def test_a_single_spoiled_round_neither_makes_nor_hides_a_change() -> None:
    assert change([10, 11, 12, 13, 14], [10, 11, 12, 13, 900]).verdict is Verdict.NOISE
    assert change([1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 3]).verdict is Verdict.CHANGED


def test_medians_and_their_ratio_are_told() -> None:
    found = change([10, 20, 30, 40, 50], [60, 60, 60, 60, 60])
    assert (found.before, found.after, found.ratio) == (30, 60, 2)
    assert math.isnan(change([0, 0, 0, 0], [1, 1, 1, 1]).ratio)


def test_many_rounds_are_split_at_random_and_judged_as_by_all_splits() -> None:
    """10 against 10 are 184,756 ways: drawn, and the same again the next time."""
    apart = [float(number) for number in range(20)]
    assert two_sided(apart[:10], apart[10:]) < 0.001
    mixed = two_sided(apart[::2], apart[1::2])
    assert mixed > 0.5
    assert two_sided(apart[::2], apart[1::2]) == mixed


@given(FIGURES, FIGURES)
def test_it_matters_neither_which_run_comes_first_nor_in_which_unit(
    first: list[float], second: list[float]
) -> None:
    there = two_sided(first, second)
    assert there == pytest.approx(two_sided(second, first))
    assert there == pytest.approx(two_sided([2 * x for x in first], [2 * x for x in second]))
    assert 0 < there <= 1


@given(FIGURES)
def test_a_run_is_no_change_from_itself(figures: list[float]) -> None:
    assert two_sided(figures, figures) == 1
    assert change(figures, figures).verdict is Verdict.NOISE
