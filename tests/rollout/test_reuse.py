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
from fst_fast.fast.race import Race
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
    """A rollout that scored its prompt, by version 5 of the weights."""
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


def bias(cycles: int, n: int, *, blind: bool, pauses: bool = True, seed: int = 1) -> tuple[float, float]:
    """Mean reward of groups minus the truth, and its standard error.

    Each cycle 8 prompts race on `n` problems that succeed with rates of their own under any prompt, so the best 4 are
    lucky ones. Groups are filled by `eligible` and `take`; not `blind`: with the survivors whatever chose them, which
    is the rule loosened.
    """
    rng, over = np.random.default_rng(seed), problems(n)
    rates = dict(zip([x.id for x in over], np.random.default_rng(0).uniform(0.1, 0.7, n), strict=True))
    everyone = [Prompt(f"{i}") for i in range(8)]
    made = {(prompt, x.id, r): scored(prompt, x, r) for prompt in everyone for x in over for r in (0.0, 1.0)}
    errors = []

    def score(pairs: Sequence[tuple[Prompt, Problem]]) -> list[float]:
        rewards = [float(rng.random() < rates[x.id]) for _, x in pairs]
        for (prompt, x), reward in zip(pairs, rewards, strict=True):
            stored[len(stored)] = made[prompt, x.id, reward]
        return rewards

    for _ in range(cycles):
        stored: dict[int, Rollout] = {}
        race = Race(over, score, keep=4, pauses=pauses, blind=blind)
        race.enter([everyone[i] for i in rng.permutation(8)])
        population = [race.prompts[i] for i in race.standing()[:4]]
        chosen = race.blind_populations(4)
        wanted = [Ask(chosen.get(x.id, population)[i], x) for x in over for i in range(4)]
        allowed = eligible(wanted, stored, rule(over))[0]  # that every problem is blind is only true if it was
        taken = take(wanted, allowed, 0.5)  # half of them stay behind: which half must not matter
        assert len(taken) == 2 * n
        group = rng.random((n, 4)) < np.array(list(rates.values()))[:, None]
        rewards = [stored[taken[i]].reward if i in taken else float(group[i // 4, i % 4]) for i in range(len(wanted))]
        errors += (np.reshape(rewards, (n, 4)).mean(1) - list(rates.values())).tolist()
    return float(np.mean(errors)), float(np.std(errors) / len(errors) ** 0.5)


@pytest.mark.parametrize("pauses", [True, False])
def test_the_rule_does_not_shift_the_reward_of_groups(pauses: bool) -> None:
    shift, error = bias(600, 24, blind=True, pauses=pauses)
    assert error < 2.1e-3
    assert abs(shift) < 3 * error


@pytest.mark.parametrize(("cycles", "n", "least"), [(600, 24, 0.01), (400, 48, 0.005)])
def test_groups_filled_by_prompts_that_these_rollouts_chose_would_be_too_good(
    cycles: int, n: int, least: float
) -> None:
    shift, error = bias(cycles, n, blind=False)
    assert shift > max(least, 4 * error)


def test_rollouts_of_problems_that_were_not_chosen_for_blindly_are_refused() -> None:
    over = problems(3)
    stored = store_of(over)
    allowed, drops = eligible(asks(over), stored, rule(over[:2]))
    assert allowed == {i: r for i, r in stored.items() if r.problem.id != "x2"}
    assert drops == {"seen": 4}


def test_acceptance_minibatches_would_shift_it_most_and_are_refused() -> None:
    rng = np.random.default_rng(2)
    pairs = rng.random((40_000, 2, 3)) < 0.4  # child and parent, equally good, on three problems
    better = pairs[:, 0].sum(1) > pairs[:, 1].sum(1)
    assert pairs[better, 0].mean() - 0.4 > 0.2
    assert pairs[better, 1].mean() - 0.4 < -0.2
    over = problems(3)
    minibatches = {i: replace(r, scoring=False) for i, r in store_of(over).items()}
    assert eligible(asks(over), minibatches, rule(over)) == ({}, {"minibatch": 12})


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


def test_a_prompt_is_reused_only_on_the_problems_whose_groups_it_is_in() -> None:
    over = problems(2)
    wanted = [ask for ask in asks(over) if (ask.prompt, ask.problem.id) != (PROMPTS[1], "x1")]
    allowed, drops = eligible(wanted, store_of(over), rule(over))
    assert drops == {"population": 1}
    assert (PROMPTS[1], "x0") in {(r.prompt, r.problem.id) for r in allowed.values()}


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
    store.add([scored(PROMPTS[0], over[0])], step=0, posed=str)
    start = store.offset
    odd = replace(
        scored(Prompt('\ud800 \u2028 ,"crc":"'), over[1], 0.5), logprobs=(-1 / 3, -1e-30), versions=((4, 1), (5, 1))
    )
    store.add([odd, replace(odd, scoring=False), scored(PROMPTS[1], over[2])], step=1, posed=str)
    kept = dict(store.scored)
    offset, count = store.offset, store.count
    store.add([odd], step=2, posed=str)
    with open(store.path, "ab") as file:
        file.write(b'{"id":7,"torn')
    again = RolloutStore(tmp_path, offset=offset, count=count)
    again.read_back({x.id: x for x in over}, start=start)
    assert again.scored == {i: r for i, r in kept.items() if i > 0}
    assert [(r.policy_version, r.newest_version) for r in again.scored.values()] == [(4, 5), (5, 5)]


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_damaged_line_is_one_clear_error(at: float, tmp_path: Path) -> None:
    over = problems(3)
    store = RolloutStore(tmp_path)
    store.add([scored(PROMPTS[0], x) for x in over], step=0, posed=str)
    data = bytearray(store.path.read_bytes())
    data[int(at * len(data))] ^= 1
    store.path.write_bytes(data)
    again = RolloutStore(tmp_path, offset=len(data), count=3)
    with pytest.raises(UserError, match=r"rollouts\.jsonl: the line that ends at byte \d+ is damaged"):
        again.read_back({x.id: x for x in over}, start=0)


# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_fills_its_groups_from_the_store_and_its_totals_add_up(tmp_path: Path) -> None:
    config = preset("glyph", "fst")
    config = replace(
        config, stream="glyph:A@3", tensorboard=False, progress=False,
        rollout=replace(config.rollout, problems=4, group_size=4),
        fast=replace(
            config.fast, every=2, minibatch=4, first_proposals=24, population=2, scoring_problems=8
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
    assert all(len(ids) == len(set(ids)) for ids in full.values())
    assert {len(ids) for ids in full.values()} == {2, 8}  # a quarter of the lookahead, or all of it
    assert any(r["purpose"] == "gepa" and not r["scoring"] for r in spent)
    assert steps[0]["reuse"]["reused_ratio"] == pytest.approx(1, abs=1e-5)  # the weights that sampled them
    assert steps[1]["reuse"]["reused_k3"] > 10 * steps[0]["reuse"]["reused_k3"]
    reused = checkpoint.read_state(checkpoint.folders(tmp_path / "run")[0])["reused"]
    assert (len(reused["used"]), reused["cap"]) == (8, 1)  # of the second cycle
    whole = (tmp_path / "run" / "rollouts" / "rollouts.jsonl").read_bytes()
    assert json.loads(whole[reused["start"] :].splitlines()[0])["step"] == 2
