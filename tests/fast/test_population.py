"""The scored pool: fronts, domination, coverage, and its way through JSON."""

import json
from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.fast.population import Member, breeding_weights, distinct, dominates, front, greedy_coverage, normalised
from fst_fast.records import Prompt

PROBLEMS = ("a", "b", "c", "d")
rewards = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])
scores = st.fixed_dictionaries(dict.fromkeys(PROBLEMS, rewards))
pools = st.lists(scores, min_size=1, max_size=6)


def member(text: str, *rewards: float, cycle: int = 0) -> Member:
    return Member(Prompt(text), cycle=cycle, scores=dict(zip(PROBLEMS, rewards, strict=False)))


def members(pool: list[dict[str, float]]) -> list[Member]:
    return [Member(Prompt(str(i)), scores=scores) for i, scores in enumerate(pool)]


def coverage(pool: list[Member], k: int) -> tuple[Member, ...]:
    by_text = sorted(pool, key=lambda m: m.prompt.text)
    rows = np.array([[m.scores[x] for x in PROBLEMS] for m in by_text])
    (chosen,) = greedy_coverage(rows, k, np.ones((1, len(PROBLEMS)), bool), np.ones((1, len(pool)), bool)).tolist()
    return tuple(by_text[i] for i in chosen)


def texts(chosen: tuple[Member, ...]) -> list[str]:
    return [m.prompt.text for m in chosen]


def covered(pool: tuple[Member, ...]) -> float:
    return sum(max((m.scores[p] for m in pool), default=0.0) for p in PROBLEMS)


def test_coverage_prefers_the_complementary_specialist_to_the_better_generalist() -> None:
    pool = [member("most", 1, 1, 1, 0), member("nearly", 1, 1, 0, 0), member("other", 0, 0, 0, 1)]
    assert texts(coverage(pool, 2)) == ["most", "other"]


def test_coverage_fills_by_mean_score_when_nothing_adds() -> None:
    pool = [member("c", 0, 0, 0, 0), member("b", 1, 0, 0, 0), member("a", 1, 1, 0, 0), member("d", 0, 1, 0, 0)]
    assert texts(coverage(pool, 4)) == ["a", "b", "d", "c"]
    assert texts(coverage(pool, 9)) == ["a", "b", "d", "c"]


def test_coverage_breaks_ties_of_gain_by_mean_then_by_text() -> None:
    pool = [member("first", 1, 1, 0, 0), member("z", 0, 0, 1, 0), member("y", 0, 0, 1, 0), member("w", 1, 0, 1, 0)]
    assert texts(coverage(pool, 3)) == ["first", "w", "y"]


@given(pools, st.randoms())
def test_coverage_does_not_depend_on_the_order_of_the_pool(pool: list[dict[str, float]], rng: object) -> None:
    shuffled = members(pool)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert coverage(members(pool), 4) == coverage(shuffled, 4)


@given(pools)
def test_a_smaller_choice_is_a_prefix_and_the_first_has_the_highest_mean(pool: list[dict[str, float]]) -> None:
    chosen = coverage(members(pool), len(pool))
    assert sorted(texts(chosen)) == sorted(texts(tuple(members(pool))))
    for k in range(len(pool)):
        assert coverage(members(pool), k) == chosen[:k]
    assert chosen[0].mean >= max(m.mean for m in chosen) - 1e-9


@given(pools)
def test_greedy_coverage_is_within_the_known_bound_of_the_best_pair(pool: list[dict[str, float]]) -> None:
    best = max(covered(pair) for pair in combinations(members(pool) * 2, 2))
    assert covered(coverage(members(pool), 2)) >= 0.75 * best - 1e-9  # 1 − (1 − 1/k)^k


def test_the_front_leaves_out_problems_that_nobody_scores_on() -> None:
    assert front([{"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.5}, {"a": 0.0, "b": 0.1}]) == {"b": [0, 1]}
    assert front([]) == {}


def test_domination_needs_one_problem_that_is_really_better() -> None:
    assert dominates({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.0})
    assert not dominates({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert not dominates({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.1})


def test_parents_are_weighted_by_the_problems_they_are_best_on_and_dominated_ones_left_out() -> None:
    pool = [{"a": 1, "b": 1, "c": 0}, {"a": 1, "b": 0, "c": 0}, {"a": 0, "b": 0, "c": 1}]
    assert breeding_weights(pool) == [2, 0, 1]


def test_all_parents_are_equal_while_nobody_scores() -> None:
    assert breeding_weights([{"a": 0.0}, {"a": 0.0}]) == [1, 1]


@given(pools)
def test_somebody_can_always_breed_and_never_a_dominated_one(pool: list[dict[str, float]]) -> None:
    weights = breeding_weights(pool)
    assert sum(weights) > 0
    if any(value > 0 for scores in pool for value in scores.values()):
        for weight, scores in zip(weights, pool, strict=True):
            assert not (weight and any(dominates(other, scores) for other in pool))


def test_duplicates_are_told_by_text_without_white_space_and_the_first_stays() -> None:
    pool = [member("say  it\n", 1), member("b", 0), member(" say it", 0.5), member("Say it", 0)]
    assert texts(tuple(distinct(pool))) == ["say  it\n", "b", "Say it"]
    assert normalised(" a\t b\n") == "a b"


def test_members_survive_json() -> None:
    before = Member(Prompt('</script>"é\n'), parent="abc", cycle=3, scores={"x": 0.5, "y": 1.0})
    after = Member.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after == before
    assert Member.from_dict(json.loads(json.dumps(Member(Prompt("seed")).to_dict()))) == Member(Prompt("seed"))
    assert Member(Prompt("unscored")).mean == 0.0
