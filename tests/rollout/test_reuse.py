"""The reuse rule: what groups may take from GEPA's evaluations, and that it shifts no reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fst_fast import checkpoint
from fst_fast.config import preset
from fst_fast.errors import UserError
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.rollout.collect import Ask
from fst_fast.rollout.reuse import RolloutStore, Rule, effective_sample_size, eligible, k3, plan, reuse_metrics, take
from fst_fast.train import train

SAMPLING = SamplingParams(1.0, 20)
PROMPTS = [Prompt(f"prompt {k}") for k in range(4)]


def problems(n: int) -> list[Problem]:
    return [Problem(f"x{i}", {}) for i in range(n)]


def asks(over: Sequence[Problem], *, size: int = 8) -> list[Ask]:
    """Groups of `size`, as the trainer deals them out."""
    return [Ask(PROMPTS[i % 4], x, i // 4) for x in over for i in range(size)]


def scored(prompt: Prompt, problem: Problem, reward: float = 0.0) -> Rollout:
    """One rollout of a full evaluation, by version 5 of the weights."""
    return Rollout(
        prompt, problem, 0, "gepa", (1,), (2, 3), (-1.0, -2.0), ((5, 2),), SAMPLING, "stop", "test", "",
        Verdict(reward, ""), scoring=True,
    )  # fmt: skip


def store_of(over: Sequence[Problem]) -> dict[int, Rollout]:
    return dict(enumerate(scored(prompt, x) for prompt in PROMPTS for x in over))


def rule(over: Sequence[Problem]) -> Rule:
    return Rule(frozenset(x.id for x in over), SAMPLING, version=7, oldest=2, cap=0.5)


def unmoved(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
    return [torch.zeros(len(r.response_ids)) for r in rollouts]


# -------------------------------------------------------------------------------------------------------- Monte Carlo


def bias(rewards: np.ndarray, p: np.ndarray, rng: np.random.Generator, *, rule_applies: bool) -> tuple[float, float]:
    """Mean reward of groups minus the truth, and its standard error.

    rewards [cycles, 4 prompts, n problems] are what the store holds of problems that succeed with p [n] under any
    prompt. They go through `eligible` and `take`, or through `take` alone (the rule loosened).
    """
    cycles, _, n = rewards.shape
    over, whole = problems(n), problems(192)
    wanted = asks(over, size=4)  # one rollout a prompt, so that half of them stay behind: which half must not matter
    made = [[scored(prompt, x, float(r)) for prompt in PROMPTS for x in over] for r in (0, 1)]
    errors = []
    for cycle in range(cycles):
        stored = {i: made[int(r)][i] for i, r in enumerate(rewards[cycle].ravel())}
        allowed = eligible(wanted, stored, rule(whole))[0] if rule_applies else stored
        taken = take(wanted, allowed, 0.5)
        group = (rng.random((n, 4)) < p[:, None]).astype(float)
        for slot, i in taken.items():
            group[slot // 4, slot % 4] = stored[i].reward
        errors.append(group.mean(1) - p)
    every = np.concatenate(errors)
    return float(every.mean()), float(every.std() / len(every) ** 0.5)


def survivors(cycles: int, p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outcomes [cycles, 4, n] of the best 4 of 8 equally good prompts."""
    outcomes = rng.random((cycles, 8, len(p))) < p
    best = np.argsort(-outcomes.mean(2) + 1e-9 * rng.random((cycles, 8)), axis=1)[:, :4]
    return np.take_along_axis(outcomes, best[:, :, None], axis=1)


def accepted(cycles: int, p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Outcomes [cycles, 4, 3] of children on the minibatches that accepted them, parents being equally good."""
    pairs = rng.random((cycles * 40, 2, 3)) < p
    won = pairs[pairs[:, 0].sum(1) > pairs[:, 1].sum(1), 0]
    return won[: cycles * 4].reshape(cycles, 4, 3)


def rates(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.7, n)


def test_the_rule_does_not_shift_the_reward_of_a_hundred_thousand_groups() -> None:
    rng, p = np.random.default_rng(1), rates(192)
    shift, error = bias(rng.random((521, 4, 192)) < p, p, rng, rule_applies=True)
    assert error < 8e-4
    assert abs(shift) < 3 * error


@pytest.mark.parametrize(("draw", "n", "least"), [(survivors, 32, 0.015), (accepted, 3, 0.08)])
def test_survivors_of_small_sets_and_acceptance_minibatches_would_shift_it_and_are_refused(
    draw: object, n: int, least: float
) -> None:
    assert callable(draw)
    rng, p = np.random.default_rng(2), rates(n)
    rewards = draw(6000 // n, p, rng)
    shift, error = bias(rewards, p, rng, rule_applies=False)
    assert shift > max(least, 5 * error)
    shift, error = bias(rewards, p, rng, rule_applies=True)  # nothing is taken
    assert abs(shift) < 3 * error


def test_what_stays_of_the_survivors_bias_at_the_papers_set_is_small_but_not_zero() -> None:
    """Why every step logs the gap: the population is itself chosen by these scores."""
    rng, p = np.random.default_rng(3), rates(192)
    shift = float((survivors(2000, p, rng) - p).mean())  # of reused rollouts, twice that of a group
    assert 0.01 < shift < 0.035


# ------------------------------------------------------------------------------------------------------------ the rule


def test_each_condition_refuses_by_its_name() -> None:
    over = problems(3)
    good = store_of(over)
    wanted = asks(over)
    assert eligible(wanted, good, rule(over)) == (good, {})
    changes = {
        "minibatch": {"scoring": False},
        "population": {"prompt": Prompt("gone")},
        "sampling": {"sampling": SamplingParams(1.0, 21)},
        "stale": {"versions": ((1, 1), (5, 1))},  # the oldest token counts
        "incomplete": {"logprobs": (-1.0,)},
    }
    cases = [
        *changes.items(),
        ("incomplete", {"finish_reason": "aborted"}),
        ("incomplete", {"versions": ((5, 1),)}),
        ("stale", {"versions": ((5, 1), (8, 1))}),  # by weights yet to come
    ]
    for reason, change in cases:
        spare = dict(enumerate((replace(r, sample=1, **change) for r in good.values()), start=100))  # type: ignore[arg-type]
        assert eligible(wanted, good | spare, rule(over)) == (good, {reason: len(spare)}), reason
    assert eligible(wanted, good, replace(rule(over), used=frozenset({0, 5})))[1] == {"used": 2}
    assert eligible(wanted, good, replace(rule(over), version=4))[1] == {"stale": 12}  # by weights yet to come


def test_a_prompt_scored_on_part_of_the_lookahead_is_refused() -> None:
    over = problems(3)
    stored = {i: r for i, r in store_of(over).items() if (r.prompt, r.problem.id) != (PROMPTS[1], "x2")}
    allowed, drops = eligible(asks(over[:1]), stored, rule(over))
    assert drops == {"partial": 1}
    assert {r.prompt for r in allowed.values()} == set(PROMPTS) - {PROMPTS[1]}


def test_other_problems_of_the_store_are_neither_taken_nor_counted() -> None:
    over = problems(3)
    found = plan(asks(over[:1]), store_of(over), rule(over), unmoved)
    assert len(found.taken) == 4
    assert found.drops == {}


def test_the_lowest_sample_is_taken_and_the_rest_topped_up() -> None:
    over = problems(2)
    stored = store_of(over)
    extra = {100 + i: replace(r, sample=1) for i, r in stored.items()}
    wanted = asks(over)
    half = take(wanted, extra | stored, 0.5)
    assert sorted(half.values()) == sorted(stored)  # sample 0 first, whatever the order of the store
    assert len(take(wanted, extra | stored, 1.0)) == 16  # fresh(x, φ) = G/K − min(G/K, eligible) = 0
    assert len(take(wanted, stored, 1.0)) == 8
    for slot, i in half.items():
        r = stored[i]
        assert (wanted[slot].prompt, wanted[slot].problem.id, wanted[slot].sample) == (r.prompt, r.problem.id, 0)


@pytest.mark.parametrize("cap", [0.0, 0.3, 0.5, 1.0])
def test_no_group_takes_more_than_the_cap_and_each_rollout_only_once(cap: float) -> None:
    over = problems(50)
    taken = take(asks(over, size=4), store_of(over), cap)
    counts = np.bincount([slot // 4 for slot in taken], minlength=50)
    assert set(counts) == {int(cap * 4)}
    assert len(set(taken.values())) == len(taken)


def test_under_the_cap_every_prompt_has_its_turn_and_rewards_do_not_matter() -> None:
    over = problems(400)
    wanted, stored = asks(over, size=4), store_of(over)
    taken = take(wanted, stored, 0.5)
    counts = [sum(wanted[slot].prompt == prompt for slot in taken) for prompt in PROMPTS]
    assert sum(counts) == 800
    assert min(counts) > 160
    solved = {i: replace(r, verdict=Verdict(float(i % 3 == 0), "")) for i, r in stored.items()}
    assert take(wanted, solved, 0.5) == taken


# ------------------------------------------------------------------------------------------------------------ the gates


def test_a_sequence_whose_policy_moved_away_is_sampled_anew() -> None:
    over = problems(2)
    stored = store_of(over)
    far = stored[0]

    def moved(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        return [torch.full((2,), 0.3 if r is far else 0.1) for r in rollouts]  # k3 .05 and .005

    found = plan(asks(over), stored, rule(over), moved)
    assert sorted(found.taken.values()) == list(range(1, 8))
    assert found.drops == {"k3": 1}
    assert found.cap == 0.5


def test_few_effective_sequences_halve_the_cap() -> None:
    over = problems(2)
    stored = store_of(over)
    long = torch.full((1000,), -0.01)  # each token near, the whole sequence not

    def moved(rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        return [torch.zeros(1000) if r is stored[0] else long for r in rollouts]

    found = plan(asks(over), stored, rule(over), moved)
    assert found.cap == 0.25
    assert len(found.taken) == 4
    assert found.drops == {"cap": 4}


def test_measures_against_their_definitions() -> None:
    logs = torch.tensor([0.2, -0.4, 0.0], dtype=torch.float64)
    w = logs.exp()
    assert torch.allclose(k3(logs), w - 1 - logs)
    assert effective_sample_size(logs) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()) / 3)
    assert effective_sample_size(torch.tensor([-3000.0, 800.0])) == pytest.approx(0.5)


def test_metrics_tell_reused_from_fresh() -> None:
    over = problems(3)
    wanted, stored = asks(over), store_of(over)
    found = plan(wanted, stored, rule(over), unmoved)
    rollouts = [
        replace(stored[found.taken[i]], verdict=Verdict(1.0, ""))
        if i in found.taken
        else replace(scored(a.prompt, a.problem, float(a.problem.id == "x0")), purpose="rl", versions=((7, 2),))
        for i, a in enumerate(wanted)
    ]
    logs = [(r, torch.full((2,), 0.1 if r.purpose == "gepa" else 0.0)) for r in rollouts]
    metrics = reuse_metrics(found, rollouts, logs, version=7, weight_max=1.05)
    assert (metrics["fraction"], metrics["ages"], metrics["cap"]) == (0.5, {"2": 12}, 0.5)
    assert metrics["gap"] == pytest.approx(2 / 3)  # 0, 1, 1
    assert metrics["gap_error"] == pytest.approx(1 / 3)
    assert metrics["reused_ratio"] == pytest.approx(np.exp(0.1), rel=1e-6)
    assert (metrics["reused_clipped"], metrics["fresh_clipped"], metrics["fresh_ratio"]) == (1, 0, 1)


# ------------------------------------------------------------------------------------------------------------ the store


def test_the_store_reads_back_what_was_scored_and_nothing_else(tmp_path: Path) -> None:
    over = problems(3)
    store = RolloutStore(tmp_path)
    store.add([scored(PROMPTS[0], over[0])], step=0)
    start = store.offset
    odd = replace(
        scored(Prompt('\ud800 \u2028 ,"crc":"'), over[1], 0.5), logprobs=(-1 / 3, -1e-30), versions=((4, 1), (5, 1))
    )
    store.add([odd, replace(odd, scoring=False), scored(PROMPTS[1], over[2])], step=1)
    kept = dict(store.scored)
    offset, count = store.offset, store.count
    store.add([odd], step=2)
    store.close()
    with open(store.path, "ab") as file:
        file.write(b'{"id":7,"torn')
    again = RolloutStore(tmp_path, offset=offset, count=count)
    again.read_back({x.id: x for x in over}, start=start)
    assert again.scored == {i: r for i, r in kept.items() if i > 0}
    assert [(r.policy_version, r.newest_version) for r in again.scored.values()] == [(4, 5), (5, 5)]
    again.close()


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_damaged_line_is_one_clear_error(at: float, tmp_path: Path) -> None:
    over = problems(3)
    store = RolloutStore(tmp_path)
    store.add([scored(PROMPTS[0], x) for x in over], step=0)
    store.close()
    data = bytearray(store.path.read_bytes())
    data[int(at * len(data))] ^= 1
    store.path.write_bytes(data)
    again = RolloutStore(tmp_path, offset=len(data), count=3)
    with pytest.raises(UserError, match=r"rollouts\.jsonl: the line that ends at byte \d+ is damaged"):
        again.read_back({x.id: x for x in over}, start=0)
    again.close()


# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_fills_its_groups_from_the_store_and_its_totals_add_up(tmp_path: Path) -> None:
    config = preset("glyph", "fst")
    config = replace(
        config, stream="glyph:A@3", tensorboard=False, progress=False,
        rollout=replace(config.rollout, problems=4, group_size=4),
        fast=replace(
            config.fast, every=2, minibatch=4, first_proposals=24, population=2, scoring_problems=2, reuse=True
        ),
        slow=replace(config.slow, minibatches=1),
        eval=replace(config.eval, every=3, problems=4, samples=1),
    )  # fmt: skip
    train(config, tmp_path / "run")
    read = lambda name: [json.loads(s) for s in (tmp_path / "run" / name).read_text().splitlines()]  # noqa: E731
    steps = [r for r in read("metrics.jsonl") if r["kind"] == "step"]
    spent = [r for r in read("rollouts/rollouts.jsonl") if r["purpose"] != "eval"]
    last = steps[-1]
    assert (last["rollouts"], last["tokens"]) == (len(spent), sum(len(r["response_ids"]) for r in spent))
    assert [r["reuse"]["fraction"] for r in steps] == [0.5, 0.5, 0.5]
    assert [r["reuse"]["ages"] for r in steps] == [{"0": 8}, {"1": 8}, {"0": 8}]
    fresh = [r for r in spent if r["purpose"] == "rl"]
    assert len(fresh) == 3 * 8  # the other half of 3 × 4 × 4
    assert {r["sample"] for r in fresh} == {1}
    full = {}
    for r in spent:
        if r["scoring"]:
            full.setdefault((r["step"], r["prompt_id"]), []).append(r["problem_id"])
    assert all(len(ids) == len(set(ids)) == 8 for ids in full.values())  # the lookahead
    assert any(r["purpose"] == "gepa" and not r["scoring"] for r in spent)
    assert steps[0]["reuse"]["reused_ratio"] == pytest.approx(1, abs=1e-5)  # the weights that sampled them
    assert steps[1]["reuse"]["reused_k3"] > 10 * steps[0]["reuse"]["reused_k3"]
    reused = checkpoint.read_state(checkpoint.folders(tmp_path / "run")[0])["reused"]
    assert (len(reused["used"]), reused["cap"]) == (8, 1)  # of the second cycle
    whole = (tmp_path / "run" / "rollouts" / "rollouts.jsonl").read_bytes()
    assert json.loads(whole[reused["start"] :].splitlines()[0])["step"] == 2
