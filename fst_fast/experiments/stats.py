"""Numbers from learning curves: running peaks, matched rewards, the ScaleRL sigmoid, intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np

Curve = Sequence[tuple[float, float]]  # (x, y), in the order of time
Verdict = Literal["held", "not held", "mixed", "unclear", "measured", "not testable here"]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Sequence[float]) -> Interval | None:
    """95 % t-interval of the mean; None with fewer than three values, or when one is not finite."""
    n = len(values)
    if n < 3 or not all(map(math.isfinite, values)):
        return None
    half = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1] * stdev(values) / math.sqrt(n)
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


def judge(effects: Sequence[float], more_than: float = 0.0) -> tuple[Verdict, str]:
    """Whether a claim "the effect is greater than `more_than`" held, from one effect a seed, and in how many of them.

    With three seeds or more an interval decides: it must lie on one side. With fewer only their agreement is said.
    """
    found = sum(e > more_than for e in effects)
    said = f"in {found} of {len(effects)} seeds"
    over_seeds = interval(effects)
    if over_seeds is None:
        verdict: Verdict = "held" if found == len(effects) else "mixed" if found else "not held"
        few = "too few for an interval" if len(effects) < 3 else "no interval, since one of them has no finite number"
        return verdict, f"{said}; {few}"
    verdict = "held" if over_seeds.low > more_than else "not held" if over_seeds.high < more_than else "unclear"
    return verdict, f"{said}; mean {over_seeds}, 95 % over seeds"


def standard_error(reward: float, n: int) -> float:
    """Of a reward that `n` samples of 0 or 1 gave; never 0, since all-right by chance is no certainty."""
    smoothed = (reward * n + 1) / (n + 2)
    return math.sqrt(smoothed * (1 - smoothed) / n)


def reaches(curve: Curve, level: float) -> float | None:
    """The first x at which y is `level` or more, interpolated between points; None when it never is."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y >= level:
            if before is None:
                return x
            x0, y0 = before
            return x0 + (x - x0) * (level - y0) / (y - y0)
        before = (x, y)
    return None


def at_matched(first: Curve, second: Curve, points: int = 101) -> list[tuple[float, float, float]]:
    """(x, y of the first, y of the second) over the x that both reach, each when it first does; x here is the reward.

    Empty when there is no such range.
    """
    low = max(first[0][0], second[0][0])
    high = min(max(x for x, _ in first), max(x for x, _ in second))
    if not low < high:
        return []
    swapped = [[(y, x) for x, y in curve] for curve in (first, second)]
    matched = []
    for x in np.linspace(low, high, points).tolist():
        y, z = (reaches(curve, min(x, max(y for _, y in curve))) for curve in swapped)
        assert y is not None
        assert z is not None
        matched.append((x, y, z))
    return matched


def area_between(first: Curve, second: Curve) -> tuple[float, float] | None:
    """(∫ first dx, ∫ second dx) over the range of x that both reach, by trapezoids; None without such a range."""
    matched = at_matched(first, second)
    if not matched:
        return None
    x, y, z = np.array(matched).T
    one, other = (float((np.diff(x) * (v[1:] + v[:-1]) / 2).sum()) for v in (y, z))  # np.trapezoid is from numpy 2 on
    return one, other


# ---------------------------------------------------------------------------------------------------- the sigmoid fit


@dataclass(frozen=True)
class Sigmoid:
    """R − R0 = (A − R0) / (1 + (C_mid / C)^B): reward R after compute C (ScaleRL, arXiv 2510.13786)."""

    start: float  # R0
    asymptote: float  # A, at most 1
    middle: float  # C_mid, in the units of C
    slope: float  # B

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        return self.start + (self.asymptote - self.start) * _rise(compute, self.middle, self.slope)


def fit_sigmoid(compute: np.ndarray, reward: np.ndarray, start: float) -> Sigmoid:
    """Least squares. A enters linearly, so it is solved for on a grid of (C_mid, B) that is refined around its best
    point: no starting guess, no local optimum. A is kept within [R0, 1], C_mid within a factor 10 of the data."""
    x, y = np.asarray(compute, float), np.asarray(reward, float) - start
    middle_range, slope_range = (x.min() / 10, x.max() * 10), (0.25, 16.0)
    middles, slopes = np.geomspace(*middle_range, 41), np.geomspace(*slope_range, 31)
    for n in range(10):
        w = _rise(x, middles[:, None, None], slopes[None, :, None])  # [middles, slopes, points]
        height = np.clip((w * y).sum(-1) / np.maximum((w * w).sum(-1), 1e-12), 0, 1 - start)
        error = ((height[..., None] * w - y) ** 2).sum(-1)
        i, j = np.unravel_index(int(error.argmin()), error.shape)
        best = Sigmoid(start, start + float(height[i, j]), float(middles[i]), float(slopes[j]))
        middles = _around(best.middle, middle_range, 2 / 2**n)
        slopes = _around(best.slope, slope_range, 2 / 2**n)
    return best


def _rise(compute: np.ndarray, middle: float | np.ndarray, slope: float | np.ndarray) -> np.ndarray:
    """1 / (1 + (C_mid / C)^B), without overflow."""
    log = np.log(middle) - np.log(np.maximum(compute, 1e-300))
    return 1 / (1 + np.exp(np.clip(slope * log, -700, 700)))


def _around(best: float, limits: tuple[float, float], reach: float) -> np.ndarray:
    """A factor e^reach either way: wider than the grid before was fine, to follow a ridge on which both move."""
    low, high = limits
    return np.geomspace(max(best * math.exp(-reach), low), min(best * math.exp(reach), high), 21)


def bootstrap_asymptotes(
    curves: Sequence[tuple[np.ndarray, np.ndarray, float]], samples: int, rng: np.random.Generator, draws: int = 200
) -> np.ndarray:
    """[draws] mean asymptotes over curves (compute, reward, R0), one a seed.

    Every evaluation is drawn anew from the binomial of its `samples`; with three seeds or more these are drawn anew
    too (with fewer the spread is that of evaluation alone).
    """
    means = []
    for _ in range(draws):
        chosen = rng.integers(len(curves), size=len(curves)) if len(curves) > 2 else range(len(curves))
        fits = []
        for i in chosen:
            compute, reward, start = curves[i]
            drawn = rng.binomial(samples, np.clip(reward, 0, 1)) / samples
            fits.append(fit_sigmoid(compute, drawn, start).asymptote)
        means.append(fmean(fits))
    return np.array(means)
