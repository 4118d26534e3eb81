"""The slow step against the paper's formula, written out in float64 with autograd on whole logits."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fst_fast.config import SlowConfig
from fst_fast.model import Model, load_model
from fst_fast.records import Group, Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.rollout.dispatch import Scheduler
from fst_fast.rollout.engine import Request
from fst_fast.rollout.torch_engine import TorchEngine
from fst_fast.slow.advantage import advantages, group_by_problem, has_signal
from fst_fast.slow.learner import Learner, by_rollout, token_kl
from fst_fast.slow.policy import Policy, micro_batches, response_states
from tests.models import FAMILIES, save_tiny, tiny

CONFIG = SlowConfig(lr=1e-3, warmup=0, clip=1e9, kl_coef=0.0, weight_max=1.5)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def base(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another random model of the same family: a reference that differs."""
    return tiny(
        model.config.model_type.removesuffix("_text"),
        tmp_path_factory.mktemp("base"),
        seed=9,
    )


def make_groups(model: Model, *, problems: int = 3, size: int = 4, temperature: float = 0.8) -> list[Group]:
    """Ragged random rollouts; the last group's rewards are all equal."""
    rng = random.Random(1)
    draw = lambda n: tuple(rng.randrange(5, model.config.vocab_size) for _ in range(n))  # noqa: E731
    rollouts = []
    for x in range(problems):
        for i in range(size):
            context, response = draw(rng.randint(3, 20)), draw(rng.randint(1, 9))
            reward = 1.0 if x == problems - 1 else float(i % 2)
            rollout = Rollout(
                Prompt(f"p{i % 2}"), Problem(f"x{x}", {}), i, "rl", context, response, (), ((0, len(response)),),
                SamplingParams(temperature), "stop", "test", "", Verdict(reward, ""),
            )  # fmt: skip
            with torch.no_grad():
                now = logprobs64(model, rollout).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
            # a behaviour policy near the present one, so that some ratios reach the cap and some do not
            rollouts.append(replace(rollout, logprobs=tuple(lp + rng.uniform(-1, 1) for lp in now)))
    return group_by_problem(rollouts)


def logprobs64(model: Model, r: Rollout, prompt_ids: tuple[int, ...] | None = None) -> torch.Tensor:
    """Log-probs [len(response), V] in float64 at the rollout's temperature; the model must be in float64."""
    context = r.prompt_ids if prompt_ids is None else prompt_ids
    logits = model.lm(input_ids=torch.tensor([context + r.response_ids])).logits[0]
    return (logits / r.sampling.temperature).log_softmax(-1)[len(context) - 1 : -1]


def paper_loss(model: Model, groups: Sequence[Group], config: SlowConfig, base: Model) -> torch.Tensor:
    """L = −(1/P) Σ_x [Σ_{i,t} sg(min(ρ, τ)) A_i log π] / Σ_i |y_i| (+ kl_coef · KL − entropy_coef · H per token)."""
    total = torch.zeros((), dtype=torch.float64)
    everything = sum(len(r.response_ids) for g in groups for r in g.rollouts)
    for g in groups:
        if not has_signal(g):
            continue
        tokens = sum(len(r.response_ids) for r in g.rollouts)
        for r, a in zip(g.rollouts, advantages(g), strict=True):
            logp = logprobs64(model, r)
            chosen = logp.gather(1, torch.tensor(r.response_ids)[:, None])[:, 0]
            ratio = (chosen.detach() - torch.tensor(r.logprobs, dtype=torch.float64)).exp().clamp(max=config.weight_max)
            loss = -ratio * a * chosen + config.entropy_coef * (logp.exp() * logp).sum(-1)
            if config.kl_coef:
                loss = loss + config.kl_coef * (logp.exp() * (logp - logprobs64(base, r).detach())).sum(-1)
            scale = 1 / (tokens * len(groups)) if config.average == "problem" else 1 / everything
            total = total + loss.sum() * scale
    return total


def gradients(model: Model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [n for n, p in model.lm.named_parameters() if p.requires_grad]
    return dict(
        zip(names, torch.autograd.grad(loss, [p for p in model.lm.parameters() if p.requires_grad]), strict=True)
    )


class Recorder(Policy):
    """A policy that keeps its gradients instead of stepping."""

    def update(self) -> float:
        self.seen = {n: m.grad for n, m in zip(self._names, self.masters, strict=True) if m.grad is not None}
        for master in self.masters:
            master.grad = None
        return 0.0


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"average": "batch"},
        {"kl_coef": 0.3, "entropy_coef": 0.2},
        {"micro_tokens": 40},
    ],
    ids=["paper", "batch average", "kl and entropy", "micro-batches"],
)
def test_the_gradient_is_that_of_the_papers_loss(model: Model, base: Model, change: dict[str, float | str]) -> None:
    config = replace(CONFIG, **change)  # type: ignore[arg-type]
    groups = make_groups(model)
    policy = Recorder(model, config)
    report = Learner(policy, base, config).step(groups, random.Random(0))
    exact, exact_base = copy.deepcopy(model), copy.deepcopy(base)
    for m in (exact, exact_base):
        m.lm.to(torch.float64)
    loss = paper_loss(exact, groups, config, exact_base)
    assert report.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-5)
    assert (report.groups, report.live_groups) == (3, 2)
    expected = gradients(exact, loss)
    for name, grad in expected.items():
        error = (policy.seen[name].double() - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 1e-4, (name, float(error))


def test_in_bf16_it_is_that_gradient_up_to_the_rounding_of_activations(model: Model, base: Model) -> None:
    config = replace(CONFIG, kl_coef=0.3, entropy_coef=0.2, micro_tokens=40)
    half, half_base = (load_model(m.path, dtype="bfloat16") for m in (model, base))
    groups = make_groups(half)
    policy = Recorder(half, config)
    Learner(policy, half_base, config).step(groups, random.Random(0))
    exact, exact_base = (copy.deepcopy(m) for m in (model, base))
    for m, rounded in ((exact, half), (exact_base, half_base)):
        m.lm.load_state_dict(rounded.lm.state_dict())
        m.lm.to(torch.float64)
    for name, grad in gradients(exact, paper_loss(exact, groups, config, exact_base)).items():
        assert policy.seen[name].dtype == torch.float32
        error = (policy.seen[name].double() - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error < 0.03, (name, float(error))


def test_the_cap_on_the_ratio_matters_in_this_test_data(model: Model, base: Model) -> None:
    learner = Learner(Recorder(model, CONFIG), base, CONFIG)
    assert 0.05 < learner.step(make_groups(model), random.Random(0)).metrics["clipped"] < 0.95


def test_groups_without_signal_are_counted_and_take_no_step(model: Model, base: Model) -> None:
    groups = [g for g in make_groups(model) if not has_signal(g)]
    policy = Policy(copy.deepcopy(model), CONFIG)
    before = [p.clone() for p in policy.model.lm.parameters()]
    report = Learner(policy, base, CONFIG).step(groups, random.Random(0))
    assert (report.groups, report.live_groups, report.metrics, policy.updates) == (1, 0, {}, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.lm.parameters(), strict=True))


def test_minibatches_split_groups_and_step_once_each(model: Model, base: Model) -> None:
    config = replace(CONFIG, minibatches=2)
    policy = Policy(copy.deepcopy(model), config)
    groups = make_groups(model, problems=5)
    report = Learner(policy, base, config).step(groups, random.Random(0))
    assert policy.updates == 2
    assert report.live_groups == 4


def test_what_ranks_tell_each_other_of_a_rollout_is_its_own_alone(model: Model) -> None:
    rollouts = [r for g in make_groups(model) for r in g.rollouts]
    tokens = sum(len(r.response_ids) for r in rollouts)
    for r, log_ratios in by_rollout(rollouts, torch.zeros(tokens)):
        assert len(log_ratios) == len(r.response_ids)
        assert log_ratios.untyped_storage().nbytes() == 4 * len(r.response_ids)  # all of it is pickled


def test_machines_sum_their_gradients_once_an_update(
    model: Model, base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: list[bool] = []
    monkeypatch.setattr("fst_fast.slow.learner.sum_over_machines", lambda of, last: now.append(last))
    config = SlowConfig(lr=0.0, minibatches=2, micro_tokens=40)
    learner = Learner(Policy(model, config), base, config)
    learner.step(make_groups(model, problems=4), random.Random(0))
    assert now.count(True) == 2
    assert now.count(False) > 2
    assert now[-1]


def test_training_raises_the_probability_of_the_better_responses(model: Model, base: Model) -> None:
    config = replace(CONFIG, lr=1e-3, clip=1.0)
    policy = Policy(copy.deepcopy(model), config)
    groups = make_groups(model)[:2]

    def gap() -> float:
        with torch.no_grad():
            return sum(
                a * float(logprobs64(policy.model, r).gather(1, torch.tensor(r.response_ids)[:, None]).sum())
                for g in groups
                for r, a in zip(g.rollouts, advantages(g), strict=True)
            )

    before = gap()
    for _ in range(5):
        Learner(policy, base, config).step(groups, random.Random(0))
    assert gap() > before + 1


def test_distillation_follows_the_exact_reverse_kl_to_the_prompted_teacher(model: Model, base: Model) -> None:
    rollouts = [r for g in make_groups(model) for r in g.rollouts]
    rng = random.Random(2)
    contexts = [tuple(rng.randrange(5, 400) for _ in range(rng.randint(4, 25))) for _ in rollouts]
    policy = Recorder(model, CONFIG)
    report = Learner(policy, base, CONFIG).distill(rollouts, contexts, random.Random(0))
    student, teacher = copy.deepcopy(model), copy.deepcopy(base)
    for m in (student, teacher):
        m.lm.to(torch.float64)
    tokens = {g.problem.id: sum(len(r.response_ids) for r in g.rollouts) for g in group_by_problem(rollouts)}
    loss = torch.zeros((), dtype=torch.float64)
    for r, context in zip(rollouts, contexts, strict=True):
        p, q = logprobs64(student, r), logprobs64(teacher, r, context).detach()
        loss = loss + (p.exp() * (p - q)).sum() / tokens[r.problem.id] / len(tokens)
    assert report.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, grad in gradients(student, loss).items():
        assert (policy.seen[name].double() - grad).norm() / grad.norm().clamp(min=1e-6) < 1e-4, name


def test_token_kl_is_exact_and_zero_to_itself(model: Model, base: Model) -> None:
    rollouts = [r for g in make_groups(model) for r in g.rollouts]
    with torch.no_grad():
        mine, theirs = (response_states(rollouts, m.device)(m) for m in (model, base))
        assert float(token_kl(model, mine, model, mine, rollouts).abs().max()) < 1e-6
        found = token_kl(model, mine, base, theirs, rollouts)
        exact, exact_base = copy.deepcopy(model), copy.deepcopy(base)
        for m in (exact, exact_base):
            m.lm.to(torch.float64)
        pairs = [(logprobs64(exact, r), logprobs64(exact_base, r)) for r in rollouts]
        expected = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_micro_batches_cover_all_and_keep_to_the_budget(model: Model) -> None:
    rollouts = [r for g in make_groups(model, problems=8) for r in g.rollouts]
    batches = list(micro_batches(rollouts, 90))
    assert sorted(i for b in batches for i in b) == list(range(len(rollouts)))
    for b in batches:
        longest = max(len(rollouts[i].prompt_ids) + len(rollouts[i].response_ids) for i in b)
        assert len(b) == 1 or longest * len(b) <= 90


def test_warm_up_is_linear_and_a_bad_gradient_stops_the_run(model: Model, tmp_path: Path) -> None:
    policy = Policy(copy.deepcopy(model), replace(CONFIG, warmup=4, lr=1.0))
    rates = []
    for _ in range(6):
        rates.append(policy.lr)
        policy.updates += 1
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    next(policy.model.lm.parameters()).grad = torch.full_like(next(policy.model.lm.parameters()), float("nan"))
    with pytest.raises(FloatingPointError, match="gradient norm"):
        policy.update()


def backward_of_ones(model: Model) -> None:
    torch.stack([p.sum() for p in model.lm.parameters()]).sum().backward()


def test_gradients_of_bf16_weights_are_summed_in_fp32_however_many_micro_batches_there_are(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    policy = Policy(load_model(str(tmp_path), dtype="bfloat16"), CONFIG)
    for _ in range(300):
        backward_of_ones(policy.model)
    for master in policy.masters:
        assert master.grad is not None
        assert torch.equal(master.grad, torch.full_like(master, 300.0))  # in bf16 256 + 1 is 256
    assert all(p.grad is None for p in policy.model.lm.parameters())


def test_bf16_weights_train_through_fp32_masters_and_survive_a_checkpoint(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16")
    policy = Policy(model, replace(CONFIG, lr=1e-6))
    start = [m.clone() for m in policy.masters]
    for _ in range(3):
        backward_of_ones(model)
        policy.update()
    # each step moves a weight by lr; in bf16 itself most would have stayed where they were
    for master, before in zip(policy.masters, start, strict=True):
        assert torch.allclose(before - master, torch.full_like(master, 3e-6), rtol=0.1, atol=1e-7)
    for p, master in zip(model.lm.parameters(), policy.masters, strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, master.bfloat16())
    again = Policy(load_model(str(tmp_path), dtype="bfloat16"), replace(CONFIG, lr=1e-6))
    again.load_state_dict(policy.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.masters, policy.masters, strict=True))


def test_micro_batches_count_the_longer_of_two_contexts(model: Model) -> None:
    rollouts = [r for g in make_groups(model) for r in g.rollouts]
    long = [(1,) * 50] * len(rollouts)
    assert max(map(len, micro_batches(rollouts, 120, long))) == 2
    assert max(map(len, micro_batches(rollouts, 120))) > 2


def test_rho_of_a_response_that_spans_weights_is_against_each_tokens_own_behaviour(model: Model, base: Model) -> None:
    policy = Policy(copy.deepcopy(model), replace(CONFIG, lr=1e-2))
    sampling, prompt = SamplingParams(0.8, 12), (9, 8, 7, 6, 5)
    scheduler = Scheduler([TorchEngine(policy.model)], lookahead=1)
    scheduler.submit([Request(i, prompt, sampling, seed=i, policy_version=1) for i in range(8)])
    done = [c for _ in range(5) for c in scheduler.step()]
    weights = [copy.deepcopy(policy.model)]
    for _ in range(2):  # weights 1, which sample the rest, and weights 2, which are trained
        Learner(policy, base, policy.config).step(make_groups(model), random.Random(0))
        weights.append(copy.deepcopy(policy.model))
        if len(weights) == 2:
            scheduler.load_weights(policy.model, 1)
            while scheduler.busy:
                done += scheduler.step()
    rollouts = [
        Rollout(
            Prompt("p"), Problem("x", {}), c.id, "rl", prompt, c.response_ids, c.logprobs, c.versions, sampling,
            c.finish_reason, "torch", "", Verdict(float(c.id % 2), ""),
        )
        for c in done
    ]  # fmt: skip
    assert any(r.versions == ((0, 5), (1, 7)) for r in rollouts)
    exact = [copy.deepcopy(m) for m in weights]
    for m in exact:
        m.lm.to(torch.float64)
    learner = Learner(policy, base, policy.config)
    before = learner.log_ratios(rollouts)
    trained = learner.step(group_by_problem(rollouts), random.Random(0)).log_ratios
    by_sample = {r.sample: seen for r, seen in trained}
    wrong = 0.0
    for r, planned in zip(rollouts, before, strict=True):
        with torch.no_grad():
            chosen = [logprobs64(m, r).gather(1, torch.tensor(r.response_ids)[:, None])[:, 0] for m in exact]
        number = torch.tensor([version for version, tokens in r.versions for _ in range(tokens)])
        behaviour = torch.stack(chosen)[number, torch.arange(len(number))]
        for found in (planned, by_sample[r.sample]):
            assert torch.allclose(found.double(), chosen[2] - behaviour, atol=1e-4)
        wrong = max(wrong, float((chosen[0] - behaviour).abs().max()))
    assert wrong > 1e-2  # one version for all tokens would show
