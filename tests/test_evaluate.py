from __future__ import annotations

import pytest

from fst_fast.evaluate import cross_fitted, mean_scores
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict

SLICES = {f"{s}{i}": s for s in ("a", "b") for i in range(4)}


def test_specialists_count_fully_when_each_slice_gets_its_best_prompt() -> None:
    scores = {p: {x: float(s == p) for x, s in SLICES.items()} for p in ("a", "b")}
    assert cross_fitted(scores, SLICES) == 1.0
    assert cross_fitted({"a": scores["a"]}, SLICES) == 0.5


def test_a_prompt_that_was_only_lucky_on_the_half_it_was_chosen_on_earns_nothing() -> None:
    first, second = list(SLICES)[:4:2] + list(SLICES)[4::2], list(SLICES)[1:4:2] + list(SLICES)[5::2]
    lucky = dict.fromkeys(first, 1.0) | dict.fromkeys(second, 0.0)
    other = dict.fromkeys(first, 0.0) | dict.fromkeys(second, 1.0)
    # chosen and scored on the same problems these two would look perfect
    assert cross_fitted({"lucky": lucky, "other": other}, SLICES) == 0.0


def test_one_prompt_and_no_slices_is_its_plain_mean() -> None:
    scores = {"p": {"x": 0.25, "y": 0.75, "z": 0.2}}
    assert cross_fitted(scores, {"x": "", "y": "", "z": ""}) == pytest.approx(0.4)


def test_scores_are_means_over_samples_by_prompt_and_problem() -> None:
    def rollout(prompt: str, problem: str, reward: float) -> Rollout:
        return Rollout(
            Prompt(prompt), Problem(problem, {}), 0, "eval", (1,), (2,), (-1.0,), ((0, 1),), SamplingParams(), "stop",
            "test", "", Verdict(reward, ""),
        )  # fmt: skip

    scores = mean_scores([rollout("p", "x", 1), rollout("p", "x", 0), rollout("p", "y", 1), rollout("q", "x", 0)])
    assert scores == {Prompt("p").id: {"x": 0.5, "y": 1.0}, Prompt("q").id: {"x": 0.0}}
