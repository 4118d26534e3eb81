from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.experiments.stats import (
    area_between,
    bootstrap_asymptotes,
    fit_sigmoid,
    interval,
    judge,
    reaches,
    standard_error,
)

COMPUTE = np.geomspace(300, 30_000, 14)


def sigmoid(start: float, asymptote: float, middle: float, slope: float, x: np.ndarray = COMPUTE) -> np.ndarray:
    return start + (asymptote - start) / (1 + (middle / x) ** slope)


@settings(max_examples=40)
@given(st.floats(0, 0.3), st.floats(0.4, 0.95), st.floats(600, 8000), st.floats(1, 8))
def test_a_sigmoid_is_recovered_from_its_own_points(start: float, top: float, middle: float, slope: float) -> None:
    y = sigmoid(start, top, middle, slope)
    found = fit_sigmoid(COMPUTE, y, start)
    assert found(COMPUTE) == pytest.approx(y, abs=2e-3)
    if slope >= 2:  # a flatter one has not bent by the end of the data
        assert found.asymptote == pytest.approx(top, abs=0.02)
        assert found.middle == pytest.approx(middle, rel=0.05)


def test_a_fit_of_nothing_learned_stays_in_range_and_finite() -> None:
    for y in (np.zeros(14), np.ones(14)):
        found = fit_sigmoid(COMPUTE, y, float(y[0]))
        assert found.asymptote == y[0]
        assert np.isfinite(found(COMPUTE)).all()
    assert 0.5 <= fit_sigmoid(COMPUTE, sigmoid(0.5, 1, 1000, 3)[::-1], 0.5).asymptote <= 1


def test_the_bootstrap_interval_of_the_asymptote_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, truth, covered = np.random.default_rng(0), 0.7, 0
    clean = sigmoid(0.05, truth, 2000, 2.5)
    for _ in range(20):
        seeds = [(COMPUTE, rng.binomial(128, clean) / 128, 0.05) for _ in range(2)]
        low, high = np.quantile(bootstrap_asymptotes(seeds, 128, rng, draws=60), (0.025, 0.975))
        covered += low <= truth <= high
        assert high - low < 0.15
    assert covered >= 16


def test_with_three_seeds_the_bootstrap_draws_seeds_too() -> None:
    clean = [sigmoid(0, top, 2000, 3) for top in (0.3, 0.6, 0.9)]
    draws = bootstrap_asymptotes([(COMPUTE, y, 0.0) for y in clean], 10_000, np.random.default_rng(1), draws=60)
    assert draws.std() > 0.08  # of means of three from three: .14


def test_the_t_interval_covers_and_needs_three_finite_values() -> None:
    rng = np.random.default_rng(2)
    found = [interval(rng.normal(5, 2, 3).tolist()) for _ in range(1000)]
    covered = sum(i.low <= 5 <= i.high for i in found if i)
    assert 930 <= covered <= 970
    assert interval([1.0, 2.0]) is None
    assert interval([1.0, 2.0, math.inf]) is None


@pytest.mark.parametrize(
    ("effects", "verdict", "said"),
    [
        ([0.2, 0.3], "held", "in 2 of 2 seeds; too few for an interval"),
        ([0.2, -0.3], "mixed", "in 1 of 2 seeds"),
        ([-0.1], "not held", "in 0 of 1 seeds"),
        ([0.2, 0.21, 0.19], "held", "95 % over seeds"),
        ([-0.2, -0.21, -0.19], "not held", "95 % over seeds"),
        ([0.5, 0.01, 0.02], "unclear", "in 3 of 3 seeds"),  # all agree, and the interval still holds 0
        ([0.5, 0.4, -math.inf], "mixed", "no finite number"),
    ],
)
def test_a_verdict_says_no_more_than_its_seeds(effects: list[float], verdict: str, said: str) -> None:
    found, how = judge(effects)
    assert found == verdict
    assert said in how


def test_a_claim_of_being_no_worse_is_judged_against_its_margin() -> None:
    assert judge([-0.04, -0.02], -0.05)[0] == "held"
    assert judge([-0.04, -0.06], -0.05)[0] == "mixed"


def test_a_level_is_reached_between_two_points_or_never() -> None:
    curve = [(0, 0.0), (10, 0.4), (20, 0.2), (30, 0.8)]
    assert reaches(curve, 0.2) == pytest.approx(5)
    assert reaches(curve, 0.6) == pytest.approx(20 + 10 * 0.4 / 0.6)
    assert reaches(curve, 0.9) is None
    assert reaches([(5, 0.3)], 0.3) == 5


def test_the_area_between_curves_is_taken_where_both_have_been() -> None:
    """KL = r² against KL = r / 10: over rewards .1 to .8, one curve coming back on its way."""
    rewards = np.linspace(0.1, 0.8, 200).tolist()
    one = [(r, r * r) for r in rewards]
    other = [(0.0, 0.0), (0.5, 0.05), (0.3, 7.0), (0.5, 0.05), (1.0, 0.1)]
    areas = area_between(one, other)
    assert areas
    assert areas[0] == pytest.approx((0.8**3 - 0.1**3) / 3, rel=1e-3)
    assert areas[1] == pytest.approx((0.8**2 - 0.1**2) / 20, rel=1e-3)
    assert area_between(one, [(0.0, 0.0), (0.05, 0.1)]) is None


def test_the_standard_error_is_never_zero() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 128) > 0
