"""Packed rollouts give the loss and the gradients of separate sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.config import SlowConfig
from fst_fast.errors import UserError
from fst_fast.model import Model
from fst_fast.ranks import Ranks
from fst_fast.records import Group, Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.shape import PassWork
from fst_fast.slow import tree_attention as tree
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner
from fst_fast.slow.packing import MIN_SAVING, pack, packed_batches, packed_states, prepare
from fst_fast.slow.policy import Policy, response_states
from tests.models import tiny
from tests.slow.test_learner import Recorder

tries = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


def seen_by(sequences: Sequence[Sequence[int]], min_saving: int) -> tuple[Any, torch.Tensor]:
    """The packed sequences, and the oracle's dense mask [N, N]: who is an ancestor of whom."""
    packed = pack(sequences, min_saving=min_saving)
    mask = torch.zeros(len(packed.ids), len(packed.ids), dtype=torch.bool)
    for place in packed.places:
        at = torch.from_numpy(place)
        mask[at[:, None], at[None, :]] |= torch.ones(len(at), len(at), dtype=torch.bool).tril()
    return packed, mask


@settings(max_examples=60)
@given(tries, st.integers(1, 5))
def test_every_sequence_is_found_at_its_places(sequences: list[list[int]], min_saving: int) -> None:
    packed = pack(sequences, min_saving=min_saving)
    assert len(packed.ids) <= sum(map(len, sequences))
    for sequence, place in zip(sequences, packed.places, strict=True):
        assert packed.ids[place].tolist() == sequence
        assert packed.positions[place].tolist() == list(range(len(sequence)))


@settings(max_examples=40)
@given(tries, st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_attention_and_its_gradients_are_those_of_a_dense_ancestor_mask(
    sequences: list[list[int]], min_saving: int, as_on_a_gpu: bool, seed: int
) -> None:
    packed, mask = seen_by(sequences, min_saving)
    torch.manual_seed(seed)
    n = len(packed.ids)
    q = torch.randn(1, 6, n, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(1, 6, n, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if as_on_a_gpu:  # square causal calls, rectangular whole ones, plain products
            patch.setattr(tree, "_on_cpu", lambda _: False)
        ours = tree.tree_attention(q, k, v, tree.Tree(packed.spans, []), 0.4)
        got = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    scores = (q @ k.repeat_interleave(3, 1).mT * 0.4).masked_fill(~mask, -torch.inf)
    theirs = scores.softmax(-1) @ v.repeat_interleave(3, 1)
    want = torch.autograd.grad((theirs * weights).sum(), (q, k, v))
    for a, b in zip((ours, *got), (theirs, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def rollout(
    prompt: str, problem: str, sample: int, prompt_ids: tuple[int, ...], response: tuple[int, ...], rng: random.Random
) -> Rollout:
    behaviour = tuple(rng.uniform(-8, -1) for _ in response)
    reward = float((sample + int(prompt[1:])) % 2)
    return Rollout(
        Prompt(prompt), Problem(problem, {}), sample, "rl", prompt_ids, response, behaviour, ((0, len(response)),),
        SamplingParams(0.8), "stop", "test", "", Verdict(reward, ""),
    )  # fmt: skip


def groups_of(model: Model) -> list[Group]:
    """Two long prompts on three problems, two samples each, some of which begin alike."""
    rng = random.Random(3)
    draw = lambda n: tuple(rng.randrange(5, model.config.vocab_size) for _ in range(n))  # noqa: E731
    prompts, common = [draw(70), draw(50)], draw(40)
    rollouts = []
    for x in range(3):
        problem = draw(35 + x)
        for k, prompt in enumerate(prompts):
            for i in range(2):
                response = (common if x else ()) + draw(rng.randint(1, 20))
                rollouts.append(rollout(f"p{k}", f"x{x}", i, prompt + problem, response, rng))
    return group_by_problem(rollouts)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    model, base = (tiny(request.param, tmp_path_factory.mktemp("m"), seed=seed) for seed in (0, 9))
    return model, base


@pytest.mark.parametrize("micro_tokens", [150, 10_000])
def test_a_packed_step_has_the_gradients_of_a_padded_one(models: tuple[Model, Model], micro_tokens: int) -> None:
    model, base = models
    found = {}
    for pack_ in ("off", "on"):
        config = SlowConfig(warmup=0, clip=1e9, kl_coef=0.3, micro_tokens=micro_tokens, pack=pack_)  # type: ignore[arg-type]
        policy = Recorder(model, config)
        report = Learner(policy, base, config).step(groups_of(model), random.Random(0))
        found[pack_] = policy.seen, report
    (packed, ours), (padded, theirs) = found["on"], found["off"]
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4, abs=1e-6)
    assert ours.live_groups == 3
    for name, g in padded.items():
        assert (packed[name] - g).norm() < 1e-5 * g.norm() + 1e-9, name


def test_in_float64_hidden_states_are_those_of_separate_sequences(models: tuple[Model, Model]) -> None:
    model, _ = models
    prepare(model)
    model.lm.double()
    try:
        rollouts = [r for g in groups_of(model) for r in g.rollouts]
        ours, theirs = (of(rollouts, model.device)(model).detach() for of in (packed_states, response_states))
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-12
    finally:
        model.lm.float()


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(20, 600), st.randoms(use_true_random=False))
def test_batches_hold_every_rollout_once_within_the_budget_and_a_prompt_that_fits_in_one(
    prompts: int, problems: int, budget: int, rng: random.Random
) -> None:
    draw = lambda low, high: tuple(rng.randrange(5, 300) for _ in range(rng.randint(low, high)))  # noqa: E731
    heads, contents = [(1, 2, 3, *draw(40, 60)) for _ in range(prompts)], [draw(5, 20) for _ in range(problems)]
    rollouts = [
        rollout(f"p{k}", f"x{x}", 0, head + content, draw(1, 30), rng)
        for x, content in enumerate(contents)
        for k, head in enumerate(heads)
    ]
    batches = list(packed_batches(rollouts, budget))
    assert sorted(i for b in batches for i in b) == list(range(len(rollouts)))
    assert all(len(b) == 1 or tokens(rollouts, b) <= budget for b in batches)
    for k in range(prompts):
        mine = [i for i, r in enumerate(rollouts) if r.prompt.text == f"p{k}"]
        if tokens(rollouts, mine) <= budget:
            assert sum(any(i in b for i in mine) for b in batches) == 1
    # each prompt by itself: what two of them have in common is not counted on
    alone = (tokens(rollouts, [i for i in b if i % prompts == k]) for b in batches for k in {i % prompts for i in b})
    if sum(alone) <= budget:
        assert len(batches) == 1


def tokens(rollouts: Sequence[Rollout], indices: Sequence[int]) -> int:
    return len(pack([rollouts[i].prompt_ids + rollouts[i].response_ids for i in indices], min_saving=1).ids)


def test_log_ratios_stand_in_the_order_of_the_rollouts(models: tuple[Model, Model]) -> None:
    model, base = models
    rollouts = [r for g in groups_of(model) for r in g.rollouts]
    configs = [SlowConfig(kl_coef=0.0, micro_tokens=200, pack=p) for p in ("off", "on")]  # type: ignore[arg-type]
    padded, packed = (Learner(Recorder(model, c), base, c).log_ratios(rollouts) for c in configs)
    assert [len(x) for x in packed] == [len(r.response_ids) for r in rollouts]
    for a, b in zip(padded, packed, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_policy_and_base_compute_each_shared_prefix_once(models: tuple[Model, Model]) -> None:
    computed: list[int] = []
    config = SlowConfig(kl_coef=0.1, pack="on")
    learner = Learner(Recorder(models[0], config), models[1], config)
    hooks = [
        m.lm.base_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for m in models
    ]
    groups = groups_of(models[0])
    work = learner.step(groups, random.Random(0)).work
    for hook in hooks:
        hook.remove()
    rollouts = [r for g in groups for r in g.rollouts]
    once = tokens(rollouts, range(len(rollouts)))
    assert len(computed) == 2
    assert computed[0] == computed[1]
    assert (
        once - len(rollouts)
        <= computed[0]
        < 1.1 * once
        < 0.6 * sum(len(r.prompt_ids + r.response_ids) for r in rollouts)
    )
    _, mask = seen_by([r.prompt_ids + r.response_ids[:-1] for r in rollouts], MIN_SAVING)
    assert work == PassWork(computed[0], int(mask.sum()), sum(len(r.response_ids) for r in rollouts))


@pytest.mark.parametrize("pack_", ["off", "on"])
def test_the_work_told_is_that_of_all_passes_without_padding(models: tuple[Model, Model], pack_: Any) -> None:
    computed: list[int] = []
    config = SlowConfig(kl_coef=0.0, pack=pack_, micro_tokens=350)
    learner = Learner(Recorder(models[0], config), models[1], config)
    hook = models[0].lm.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    groups = groups_of(models[0])
    work = learner.step(groups, random.Random(0)).work
    hook.remove()
    rows = [len(r.prompt_ids + r.response_ids) - 1 for g in groups for r in g.rollouts]
    assert len(computed) > 1
    if pack_ == "on":
        assert work.tokens == sum(computed) < sum(rows)
        assert work.pairs < sum(n * (n + 1) // 2 for n in rows)
    else:
        assert work.tokens == sum(rows) < sum(computed)
        assert work.pairs == sum(n * (n + 1) // 2 for n in rows)


@pytest.mark.parametrize(("family", "why"), [("mistral", "window of 8 tokens"), ("gemma2", "window of 8 tokens")])
def test_a_model_that_cannot_is_refused_or_left_unpacked(family: str, why: str, tmp_path: Path) -> None:
    model = tiny(family, tmp_path)
    config = SlowConfig(pack="on")
    with pytest.raises(UserError, match=f"{why}; use --slow.pack off"):
        Learner(Recorder(model, config), model, config)
    auto = replace(config, pack="auto")
    assert Learner(Recorder(model, auto), model, auto)._states is response_states


def test_ranks_pack_only_when_all_can(tmp_path: Path) -> None:
    """What one of them does they gather weights for together."""
    model = tiny("qwen3", tmp_path / "model")
    others: list[str] = []
    ranks = Ranks()
    object.__setattr__(ranks, "join", lambda own: [*own, *others])
    assert Learner(Policy(model, SlowConfig()), model, SlowConfig(), ranks)._packs
    others.append("slow.pack = on: of another rank")
    assert not Learner(Policy(model, SlowConfig()), model, SlowConfig(), ranks)._packs
    with pytest.raises(UserError, match="of another rank"):
        Learner(Policy(model, SlowConfig()), model, SlowConfig(pack="on"), ranks)


def test_no_memory_is_not_taken_for_a_model_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3", tmp_path / "model")
    for error, told in ((torch.OutOfMemoryError, torch.OutOfMemoryError), (RuntimeError, UserError)):
        monkeypatch.setattr(tree, "install", Mock(side_effect=error("no")))
        with pytest.raises(told):
            prepare(model)
