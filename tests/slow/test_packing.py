"""Packed steps against padded ones through the learner, and how rollouts are divided among micro-batches and ranks."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.config import SlowConfig, preset
from fst_fast.errors import UserError
from fst_fast.model import Model
from fst_fast.prefix_tree import Ragged, trie
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner, StepReport
from fst_fast.slow.packing import pack, packed_batches, packed_hidden
from fst_fast.slow.policy import Policy, response_hidden
from tests.models import tiny

OFF = SlowConfig(lr=1e-3, warmup=0, kl_coef=0.0, weight_max=1.5, pack="off")


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def base(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(model.config.model_type, tmp_path_factory.mktemp("base"), seed=9)


def make_rollouts(*, prompts: int = 3, problems: int = 4, samples: int = 1, seed: int = 1) -> list[Rollout]:
    """Every problem under every prompt; the chat's beginning is common to all, as are some responses' beginnings."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 300) for _ in range(rng.randint(low, high)))

    systems = [(1, 2, 3, *draw(40, 60)) for _ in range(prompts)]
    contents = [draw(5, 20) for _ in range(problems)]
    out = []
    for x, content in enumerate(contents):
        opening = draw(0, 8)
        for k, system in enumerate(systems):
            for i in range(samples):
                response = opening + draw(1, 30)
                behaviour = tuple(rng.uniform(-8, -4) for _ in response)
                out.append(
                    Rollout(
                        Prompt(f"p{k}"), Problem(f"x{x}", {}), i, "rl", system + content, response, behaviour,
                        ((0, len(response)),), SamplingParams(0.8), "stop", "test", "", Verdict(float((k + i) % 2), ""),
                    )
                )  # fmt: skip
    return out


def tokens(rollouts: list[Rollout], indices: list[int]) -> int:
    return trie(Ragged.of([(rollouts[i].prompt_ids + rollouts[i].response_ids)[:-1] for i in indices])).tokens


# ---- the step ------------------------------------------------------------------------------------------------------


class Recorder(Policy):
    """A policy that keeps its gradients instead of stepping."""

    def update(self) -> float:
        self.seen = {n: p.grad.clone() for n, p in self.model.lm.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return 0.0


@pytest.mark.parametrize(
    "change",
    [
        {}, {"kl_coef": 0.3, "entropy_coef": 0.2}, {"loss": "ppo"}, {"loss": "reinforce", "average": "batch"},
        {"micro_tokens": 250},
    ],
    ids=["cispo", "kl and entropy", "ppo", "reinforce, batch average", "micro-batches"],
)  # fmt: skip
def test_a_packed_step_has_the_loss_and_the_gradient_of_a_padded_one(
    model: Model, base: Model, change: dict[str, float | str]
) -> None:
    config = replace(OFF, **change)  # type: ignore[arg-type]
    groups = group_by_problem(make_rollouts(samples=2))

    def step(mode: str) -> tuple[dict[str, torch.Tensor], StepReport]:
        policy = Recorder(model, replace(config, pack=mode))  # type: ignore[arg-type]
        report = Learner(policy, base, policy.config).step(groups, random.Random(0))
        return policy.seen, report

    (expected, padded), (found, packed) = step("off"), step("on")
    assert packed.metrics == pytest.approx(padded.metrics, rel=1e-5, abs=1e-6)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() < 1e-5 * grad.norm(), name
    seen = {(r.prompt, r.problem.id, r.sample): x for r, x in padded.log_ratios}
    assert len(packed.log_ratios) == len(seen)
    for r, ratios in packed.log_ratios:
        assert torch.allclose(ratios, seen[r.prompt, r.problem.id, r.sample], atol=1e-4)


def test_packed_distillation_has_the_gradient_of_the_padded_one(model: Model, base: Model) -> None:
    rollouts = make_rollouts()
    contexts = [(4, 3, 2, 1) * 12 + r.prompt_ids[50:] for r in rollouts]
    seen = []
    for mode in ("off", "on"):
        policy = Recorder(model, replace(OFF, pack=mode))  # type: ignore[arg-type]
        report = Learner(policy, base, policy.config).distill(rollouts, contexts, random.Random(0))
        seen.append((policy.seen, report.metrics["loss"]))
    assert seen[1][1] == pytest.approx(seen[0][1], rel=1e-5)
    for name, grad in seen[0][0].items():
        assert (seen[1][0][name] - grad).norm() < 1e-5 * grad.norm(), name


def test_packed_log_ratios_stand_in_the_order_of_the_rollouts(model: Model, base: Model) -> None:
    rollouts = make_rollouts()
    padded, packed = (
        Learner(Policy(model, c), base, c).log_ratios(rollouts)
        for c in (OFF, replace(OFF, pack="on", micro_tokens=200))
    )
    assert [len(x) for x in packed] == [len(r.response_ids) for r in rollouts]
    for a, b in zip(padded, packed, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_policy_and_base_compute_each_shared_prefix_once(model: Model, base: Model) -> None:
    rollouts = make_rollouts()
    computed: list[int] = []
    hooks = [
        m.lm.base_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for m in (model, base)
    ]
    policy = Recorder(model, replace(OFF, pack="on", kl_coef=0.1))
    learner = Learner(policy, base, policy.config)
    computed.clear()  # the check of the model
    learner.step(group_by_problem(rollouts), random.Random(0))
    for hook in hooks:
        hook.remove()
    once = tokens(rollouts, list(range(len(rollouts))))
    assert len(computed) == 2
    assert computed[0] == computed[1]
    assert once <= computed[0] < once + 100 < sum(len(r.prompt_ids + r.response_ids) for r in rollouts) * 0.7


def test_every_response_has_the_hidden_states_of_its_own_sequence(model: Model) -> None:
    rollouts = [*make_rollouts(samples=2), *make_rollouts()[:2]]  # two of them twice
    with torch.no_grad():
        found, expected = packed_hidden(model, pack(rollouts, model.device)), response_hidden(model, rollouts)
    assert torch.allclose(found, expected, atol=1e-4)


def test_auto_packs_what_can_be_packed_and_on_refuses_the_rest(model: Model, base: Model, tmp_path: Path) -> None:
    auto = replace(OFF, pack="auto")
    assert Learner(Policy(model, auto), base, auto).packs
    assert not Learner(Policy(model, OFF), base, OFF).packs
    gemma = tiny("gemma3", tmp_path)
    learner = Learner(Policy(gemma, auto), gemma, auto)
    assert not learner.packs
    assert learner.step(group_by_problem(make_rollouts()), random.Random(0)).live_groups == 4
    on = replace(OFF, pack="on")
    with pytest.raises(UserError, match=r"slow\.pack = on: the model has a sliding window.*use auto or off"):
        Learner(Policy(gemma, on), gemma, on)


def test_the_default_run_stays_padded_and_the_papers_is_packed() -> None:
    assert preset("glyph", "fst").slow.pack == "off"
    assert preset("paper", "fst").slow.pack == "auto"


def test_packed_training_is_reproducible_bit_for_bit(model: Model, base: Model) -> None:
    config = replace(OFF, pack="on", micro_tokens=300)
    runs = []
    for _ in range(2):
        policy = Policy(copy.deepcopy(model), config)
        learner = Learner(policy, base, config)
        for step in range(2):
            learner.step(group_by_problem(make_rollouts()), random.Random(step))
        runs.append([p.detach().clone() for p in policy.model.lm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- micro-batches and ranks ---------------------------------------------------------------------------------------

many = st.builds(
    make_rollouts, prompts=st.integers(1, 4), problems=st.integers(1, 6), samples=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
batches = given(many, st.integers(20, 600), st.integers(1, 5))


@batches
@settings(max_examples=60, deadline=None)
def test_ranks_get_equally_many_micro_batches_that_cover_all_rollouts_within_the_budget(
    rollouts: list[Rollout], budget: int, ranks: int
) -> None:
    out = packed_batches(rollouts, budget, ranks)
    assert len(out) == ranks
    assert len({len(of_rank) for of_rank in out}) == 1
    each = [b for of_rank in out for b in of_rank]
    assert sorted(i for b in each for i in b) == list(range(len(rollouts)))
    assert all(len(b) <= 1 or tokens(rollouts, b) <= budget for b in each)
    if len(each) <= len(rollouts):
        assert all(each)
    assert out == packed_batches(list(rollouts), budget, ranks)


@batches
@settings(max_examples=60, deadline=None)
def test_a_prompt_that_fits_stands_in_one_micro_batch(rollouts: list[Rollout], budget: int, ranks: int) -> None:
    del ranks  # to be even, ranks may need more micro-batches than there are
    (of_rank,) = packed_batches(rollouts, budget)
    for prompt in {r.prompt for r in rollouts}:
        mine = [i for i, r in enumerate(rollouts) if r.prompt == prompt]
        if tokens(rollouts, mine) <= budget:
            assert sum(any(i in b for i in mine) for b in of_rank) == 1


def test_ranks_carry_about_the_same_in_every_round_and_together() -> None:
    rollouts = make_rollouts(prompts=16, problems=16)
    sizes = [[tokens(rollouts, b) for b in of_rank] for of_rank in packed_batches(rollouts, 500, 4)]
    waited = sum(max(round_) for round_ in zip(*sizes, strict=True))  # by ranks that meet after every micro-batch
    assert waited < 1.05 * sum(map(sum, sizes)) / 4
    assert max(map(sum, sizes)) < 1.1 * min(map(sum, sizes))


def test_too_few_rollouts_leave_ranks_empty_micro_batches() -> None:
    rollouts = make_rollouts(prompts=1, problems=1, samples=2)
    assert sorted(map(str, packed_batches(rollouts, 10**6, 3))) == ["[[0]]", "[[1]]", "[[]]"]
    assert packed_batches([], 100, 2) == [[], []]


def test_a_rollout_beyond_the_budget_stands_alone() -> None:
    rollouts = make_rollouts(prompts=2, problems=2)
    assert sorted(packed_batches(rollouts, 1)[0]) == [[0], [1], [2], [3]]


def test_a_larger_budget_needs_fewer_micro_batches() -> None:
    rollouts = make_rollouts(prompts=4, problems=6)
    counts = [len(packed_batches(rollouts, budget)[0]) for budget in (150, 300, 600)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
