from __future__ import annotations

import pytest

from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.slow.advantage import EPSILON, advantages, group_by_problem, has_signal


def rollout(problem: str, prompt: str, reward: float) -> Rollout:
    return Rollout(
        Prompt(prompt), Problem(problem, {}), 0, "rl", (1,), (2,), (-1.0,), ((0, 1),), SamplingParams(), "stop", "test",
        "", Verdict(reward, ""),
    )  # fmt: skip


def test_a_group_is_a_problem_over_all_its_prompts() -> None:
    groups = group_by_problem([rollout(x, p, 0.0) for p in ("p", "q") for x in ("a", "b", "a")])
    assert [g.problem.id for g in groups] == ["a", "b"]
    assert [{r.prompt.text for r in g.rollouts} for g in groups] == [{"p", "q"}] * 2
    assert [len(g.rollouts) for g in groups] == [4, 2]


def test_advantages_compare_prompts_with_each_other() -> None:
    # p always succeeds and q always fails: within a prompt nothing differs, over the problem everything does
    [group] = group_by_problem(
        [rollout("a", "p", 1.0), rollout("a", "p", 1.0), rollout("a", "q", 0.0), rollout("a", "q", 0.0)]
    )
    std = (4 * 0.25 / 3) ** 0.5
    assert advantages(group) == pytest.approx([0.5 / (std + EPSILON)] * 2 + [-0.5 / (std + EPSILON)] * 2)


def test_leave_one_out_rescales_the_mean_baseline() -> None:
    rewards = [0.1, 0.9, 0.4]
    [group] = group_by_problem([rollout("a", "p", r) for r in rewards])
    std = (sum((r - sum(rewards) / 3) ** 2 for r in rewards) / 2) ** 0.5
    others = [(sum(rewards) - r) / 2 for r in rewards]
    expected = [(r - b) / (std + EPSILON) for r, b in zip(rewards, others, strict=True)]
    assert advantages(group, baseline="leave-one-out") == pytest.approx(expected)


def test_equal_rewards_carry_no_signal() -> None:
    assert not has_signal(group_by_problem([rollout("a", "p", 1.0)] * 4)[0])
    assert has_signal(group_by_problem([rollout("a", "p", 1.0), rollout("a", "q", 0.5)])[0])
