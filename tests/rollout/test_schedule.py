from __future__ import annotations

import itertools
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.rollout.schedule import AHEAD, LengthPredictor, Plan, Unit, peak_tokens, place, plan

PROMPTS = [(1,) * 30 + (k,) * 10 for k in range(4)]
PROBLEMS = [(100 + x,) * 5 for x in range(6)]
REQUESTS = [p + x for x in PROBLEMS for p in PROMPTS for _ in range(2)]  # problem-major, two samples each


def lengths(seed: int) -> list[float]:
    """One prediction per problem: the prompt says nothing about it."""
    rng = random.Random(seed)
    of_problem = [rng.uniform(10, 1000) for _ in PROBLEMS]
    return [of_problem[i // (2 * len(PROMPTS))] for i in range(len(REQUESTS))]


@given(st.integers(0, 99), st.sampled_from([0, 60, 100, 10**6]), st.booleans())
@settings(max_examples=60)
def test_a_plan_names_every_request_once_with_siblings_side_by_side(seed: int, cache: int, guess: bool) -> None:
    rng = random.Random(seed)
    priority = [rng.choice([0, 1, 7]) for _ in REQUESTS]
    found = plan(REQUESTS, priority, lengths(seed) if guess else None, cache_tokens=cache)
    assert sorted(i for u in found.units for i in u.requests) == list(range(len(REQUESTS)))
    assert [u.priority for u in found.units] == sorted(u.priority for u in found.units)
    for unit in found.units:
        assert {(REQUESTS[i], priority[i]) for i in unit.requests} == {(REQUESTS[unit.requests[0]], unit.priority)}
        assert sum(found.node_tokens[k] for k in unit.path) == len(REQUESTS[unit.requests[0]])
    assert len({(u.priority, u.path) for u in found.units}) == len(found.units)


def test_with_a_large_cache_the_longest_go_first_and_with_a_small_one_the_trie_is_walked() -> None:
    predicted = lengths(3)
    large = plan(REQUESTS, [0] * len(REQUESTS), predicted, cache_tokens=10**6)
    assert [u.predicted for u in large.units] == sorted((u.predicted for u in large.units), reverse=True)
    small = plan(REQUESTS, [0] * len(REQUESTS), predicted, cache_tokens=60)
    prompts = [REQUESTS[u.requests[0]][30] for u in small.units]
    assert len(list(itertools.groupby(prompts))) == len(PROMPTS)  # each prompt is entered once
    for _, units in itertools.groupby(small.units, key=lambda u: u.path[-2]):
        within = [u.predicted for u in units]
        assert within == sorted(within, reverse=True)


def prefill_tokens(found: Plan, cache_tokens: int) -> int:
    """Prompt tokens computed when units are served one after the other by a cache that drops what was used longest ago,
    of one prompt its tail first."""
    cache: OrderedDict[int, int] = OrderedDict()
    computed = 0
    for unit in found.units:
        for node in reversed(unit.path):
            if node not in cache:
                computed += found.node_tokens[node]
                cache[node] = found.node_tokens[node]
            cache.move_to_end(node)
        while sum(cache.values()) > cache_tokens:
            cache.popitem(last=False)
    return computed


def test_with_one_path_of_cache_only_depth_first_computes_every_prefix_once() -> None:
    deep = plan(REQUESTS, [0] * len(REQUESTS), lengths(1), cache_tokens=60)
    once = sum(deep.node_tokens)
    path = max(map(len, REQUESTS))
    shuffled = Plan(random.Random(0).sample(deep.units, len(deep.units)), deep.node_tokens)
    assert prefill_tokens(deep, path) == once
    assert prefill_tokens(shuffled, path) > 1.5 * once
    assert prefill_tokens(shuffled, 10**6) == once
    assert prefill_tokens(deep, path - 3) == once  # the tail is dropped first, and is the one that is not shared


def test_what_only_siblings_share_needs_no_cache_and_what_units_share_at_most_an_eighth_of_it() -> None:
    shared = 30 + 4 * 10  # the header and the four prompts; a problem under a prompt is one unit of two samples
    for cache, longest_first in ((8 * shared, True), (8 * shared - 1, False)):
        found = plan(REQUESTS, [0] * len(REQUESTS), lengths(3), cache_tokens=cache)
        means = [u.predicted / len(u.requests) for u in found.units]
        assert (means == sorted(means, reverse=True)) is longest_first
    apart = [(k, *(9,) * 500) for k in range(5) for _ in range(2)]
    found = plan(apart, [0] * 10, [float(i // 2) for i in range(10)], cache_tokens=1)
    assert [u.predicted for u in found.units] == [8, 6, 4, 2, 0]


def makespan(costs: list[float], chosen: list[int], engines: int) -> float:
    return max(sum(c for c, e in zip(costs, chosen, strict=True) if e == k) for k in range(engines))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
@settings(max_examples=100)
def test_placement_is_within_four_thirds_of_the_best(costs: list[int], engines: int) -> None:
    units = [Unit((i,), (), 0, float(c)) for i, c in enumerate(costs)]
    chosen = place(Plan(units, []), [0.0] * engines)
    assignments = itertools.product(range(engines), repeat=len(costs) - 1)
    floats = [float(c) for c in costs]
    best = min(makespan(floats, [0, *rest], engines) for rest in assignments)  # the first one's engine is arbitrary
    assert makespan(floats, chosen, engines) <= (4 / 3 - 1 / (3 * engines)) * best + 1e-9


def test_of_equal_engines_a_unit_joins_its_prefix() -> None:
    units = [Unit((i,), (i % 2,), 0, 100.0 - i // 2) for i in range(20)]  # pairs of equals
    chosen = place(Plan(units, [50, 50]), [0.0, 0.0])
    assert {tuple(chosen[0::2]), tuple(chosen[1::2])} == {(0,) * 10, (1,) * 10}
    assert place(Plan(units, [50, 50]), [0.0, 10_000.0]) == [0] * 20  # work comes before affinity


def test_a_prefix_that_is_on_two_engines_is_work_on_neither() -> None:
    units = [Unit((i,), (0, 1 + i), 0, predicted) for i, predicted in enumerate((100.0, 90.0, 10.0))]
    assert place(Plan(units, [1000, 0, 0, 0]), [0.0, 0.0]) == [0, 1, 1]


def test_a_problem_under_all_prompts_is_spread_when_nothing_is_known_of_lengths() -> None:
    requests = [(k,) * 50 + (100 + x,) * 5 for k in range(8) for x in range(64)]
    found = plan(requests, [0] * len(requests), [1.0] * len(requests), cache_tokens=10**6)
    engines: dict[int, set[int]] = {}
    for unit, engine in zip(found.units, place(found, [0.0] * 8), strict=True):
        engines.setdefault(requests[unit.requests[0]][-1], set()).add(engine)
    assert sum(map(len, engines.values())) > 4 * len(engines)


def test_an_urgent_class_is_placed_before_a_longer_later_one() -> None:
    units = [Unit((i,), (), i % 2, 10.0 + 90 * (i % 2)) for i in range(4)]
    chosen = place(Plan(units, []), [0.0, 0.0])
    assert {chosen[0], chosen[2]} == {0, 1}


def draw(rng: np.random.Generator, problem_mean: float, sigma: float) -> int:
    return max(1, int(math.exp(rng.normal(problem_mean, sigma))))


def test_the_predictor_learns_each_problems_length_and_the_spread() -> None:
    rng = np.random.default_rng(0)
    means = {f"p{i}": rng.normal(6, 0.6) for i in range(50)}
    predictor = LengthPredictor()
    error = []
    for seen in (0, 1, 4, 16):
        error.append(np.mean([abs(math.log(predictor.expected(p)) - 0.08 - m) for p, m in means.items()]))
        for p, m in means.items():
            for _ in range(max(1, seen)):
                predictor.observe(p, draw(rng, m, 0.4))
    assert error[1] > error[2] > error[3]
    assert error[3] < 0.25
    new = predictor.expected("never seen")
    assert abs(math.log(new) - 6.1) < 0.3  # the mean of all


def test_survival_is_that_of_the_lengths_that_come() -> None:
    rng = np.random.default_rng(1)
    predictor = LengthPredictor()
    for _ in range(3000):
        predictor.observe("p", draw(rng, 6, 0.5))
    sample = np.exp(rng.normal(6, 0.5, 20000))
    for so_far in (0.0, 200.0, 600.0):
        left = sample[sample > so_far] - so_far
        found = predictor.survival(["p"], np.array([so_far]), np.array([50.0, 200.0, 500.0]))[0]
        assert found == pytest.approx(
            [(left > t).mean() for t in (50, 200, 500)], abs=0.12
        )  # a logistic tail is a little heavier


def test_the_peak_is_that_of_sequences_that_grow_and_let_go() -> None:
    ends = np.array([100.0, 3000.0])  # one goes on for 100 steps, one for 3000
    held = np.array([1000.0, 10.0])
    alive = (ends[:, None] > AHEAD).astype(float)
    exact = max(sum(h + t for h, e in zip(held, ends, strict=True) if e > t) for t in AHEAD)
    assert peak_tokens(alive, held, ends) == exact
    unsure = np.full((2, len(AHEAD)), 0.5)
    assert peak_tokens(unsure, held, ends) > (0.5 * (held[:, None] + AHEAD) * (ends[:, None] >= AHEAD)).sum(0).max()
