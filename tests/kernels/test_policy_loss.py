"""linear_policy_loss and policy_loss against the float64 reference: shapes, kinds, terms, dtypes, hostile numbers."""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_kernels import linear_policy_loss, linear_token_logprobs, policy_loss, reference

KINDS = ("cispo", "ppo", "reinforce")
Fixture = Callable[..., Any]
SLOW = 20 if os.environ.get("TRITON_INTERPRET") == "1" else 1  # test_triton.py runs this file again
pytestmark = pytest.mark.usefixtures("backend")


@settings(max_examples=150 // SLOW, derandomize=True, database=None)
@given(
    n=st.integers(0, 37),
    h=st.integers(1, 19),
    v=st.integers(2, 131),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
    live=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_rows=st.sampled_from([None, 1, 5, 64]),
    options=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(KINDS),
            "weight_min": st.sampled_from([0.0, 0.3]),
            "weight_max": st.sampled_from([0.5, 4.0]),
            "clip_high": st.sampled_from([0.2, 0.4]),
            "entropy_coef": st.sampled_from([0.0, 0.1]),
            "kl_coef": st.sampled_from([0.0, 0.3]),
            "softcap": st.sampled_from([None, 3.0]),
            "denominator": st.sampled_from([None, 11.0]),
        }
    ),
    temperature=st.sampled_from([1.0, 0.6, "per token"]),
    biased=st.booleans(),
    weighted=st.booleans(),
)
def test_matches_the_reference_on_any_shape_and_any_combination(
    make_problem: Fixture,
    assert_same_loss: Fixture,
    n: int,
    h: int,
    v: int,
    seed: int,
    scale: float,
    live: float,
    chunk_rows: int | None,
    options: dict[str, Any],
    temperature: Any,
    biased: bool,
    weighted: bool,
) -> None:
    p = make_problem(n, h, v, seed=seed, scale=scale, live=live)
    options = options | p.ref | {"mask": p.mask}
    options["temperature"] = torch.linspace(0.5, 2, n) if temperature == "per token" else temperature
    inputs = (p.hidden, p.weight)
    if biased:
        options["bias"] = p.bias
        inputs = (*inputs, p.bias)
    if weighted:
        options["token_weights"] = p.token_weights
    ours = linear_policy_loss(p.hidden, p.weight, *p.rows, **options, chunk_rows=chunk_rows)
    truth = reference.linear_policy_loss(p.hidden, p.weight, *p.rows, **options)
    assert ours.logprobs is not None
    assert ours.logprobs.dtype == ours.loss.dtype == torch.float32
    assert_same_loss(ours, truth, inputs)


@pytest.mark.parametrize(("n", "h", "v", "scale"), [(9, 8, 1100, 0.01), (2, 16, 151936, 5.0), (9, 64, 4099, 25.0)])
def test_vocabularies_that_no_block_divides(
    make_problem: Fixture, assert_same_loss: Fixture, n: int, h: int, v: int, scale: float
) -> None:
    p = make_problem(n, h, v, scale=scale / 3)
    options: dict[str, Any] = {"weight_max": 4.0, "entropy_coef": 0.01, "kl_coef": 0.1} | p.ref
    ours = linear_policy_loss(p.hidden, p.weight, *p.rows, **options)
    truth = reference.linear_policy_loss(p.hidden, p.weight, *p.rows, **options)
    # of fewer than 4 rows MKL on an AMD CPU sums the V products of a dH in one chain, whose rounding grows as a walk
    chain = 4 * v**0.5 * 2**-24
    assert_same_loss(ours, truth, (p.hidden, p.weight), gradient=max(1e-5, chain))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ten_thousand_stay_exact_and_finite(
    make_problem: Fixture, assert_same_loss: Fixture, kind: str
) -> None:
    p = make_problem(12, 12, 50)
    hidden = torch.eye(12, requires_grad=True)  # logits are the weights themselves
    extreme = torch.tensor([-1e4, -1.0, 0.0, 9999.5, 1e4])
    weight = extreme[torch.randint(5, (50, 12), generator=torch.Generator().manual_seed(0))].requires_grad_()
    behavior = torch.full((12,), -1.0)
    args = hidden, weight, p.targets, behavior, p.advantages
    options: dict[str, Any] = {"kind": kind, "weight_max": 4.0, "entropy_coef": 0.1}
    ours, truth = linear_policy_loss(*args, **options), reference.linear_policy_loss(*args, **options)
    assert_same_loss(ours, truth, (hidden, weight))


def test_a_bias_of_minus_infinity_forbids_a_token_without_a_nan(
    make_problem: Fixture, assert_same_loss: Fixture
) -> None:
    p = make_problem(20, 6, 40)
    bias = p.bias.detach().clone()
    bias[30:] = -math.inf
    bias.requires_grad_()
    targets = p.targets % 30
    args = p.hidden, p.weight, targets, p.behavior_logprobs, p.advantages
    options: dict[str, Any] = {"weight_max": 4.0, "entropy_coef": 0.1, "kl_coef": 0.2, "bias": bias, **p.ref}
    options["ref_bias"] = bias.detach()
    ours, truth = linear_policy_loss(*args, **options), reference.linear_policy_loss(*args, **options)
    assert_same_loss(ours, truth, (p.hidden, p.weight, bias))


@pytest.mark.parametrize("kind", ["cispo", "ppo"])
def test_a_target_the_policy_cannot_produce_has_ratio_zero_and_pushes_nothing(make_problem: Fixture, kind: str) -> None:
    p = make_problem(12, 3, 40, live=1.0)
    bias = torch.zeros(40)
    bias[p.targets[2]] = -math.inf
    advantages = torch.where(p.targets == p.targets[2], 0, p.advantages)

    def run(a: torch.Tensor) -> tuple[Any, ...]:
        args = p.hidden, p.weight, p.targets, p.behavior_logprobs, a
        out = linear_policy_loss(*args, kind=kind, weight_max=4.0, bias=bias)
        return out, *torch.autograd.grad(out.loss, (p.hidden, p.weight))

    (out, *gradients), (without, *expected) = (
        run(p.advantages.clone().index_fill(0, torch.tensor(2), 1)),
        run(advantages),
    )
    assert out.logprobs[2] == -math.inf
    assert all(torch.isfinite(value) for value in out.metrics.values())
    for a, b in zip((out.loss, *gradients), (without.loss, *expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", [{}, {"entropy_coef": 0.1, "kl_coef": 0.2}])
def test_masked_rows_of_nan_and_inf_contribute_exactly_nothing(
    make_problem: Fixture, kind: str, terms: dict[str, float]
) -> None:
    p = make_problem(21, 6, 41)
    poison = torch.tensor([math.nan, math.inf, -math.inf]).repeat(7)
    assert len(set(map(str, poison[~p.mask].tolist()))) == 3  # each kind stands in some masked row
    temperature = torch.linspace(0.5, 2, 21)

    def spoil(x: torch.Tensor) -> torch.Tensor:
        return torch.where(p.mask.view(-1, *[1] * (x.ndim - 1)), x, poison.view(-1, *[1] * (x.ndim - 1)))

    def run(rows: torch.Tensor, spoiled: bool) -> tuple[Any, tuple[torch.Tensor, ...]]:
        touch = spoil if spoiled else lambda x: x
        hidden = touch(p.hidden.detach())[rows].requires_grad_()
        out = linear_policy_loss(
            hidden,
            p.weight,
            torch.where(p.mask, p.targets, -100)[rows] if spoiled else p.targets[rows],
            touch(p.behavior_logprobs)[rows],
            touch(p.advantages)[rows],
            p.mask[rows],
            kind=kind,
            weight_max=4.0,
            temperature=touch(temperature)[rows],
            token_weights=touch(p.token_weights)[rows],
            denominator=7.0,
            ref_hidden=touch(p.ref_hidden)[rows],
            ref_weight=p.ref_weight,
            chunk_rows=4,
            **terms,
        )
        return out, torch.autograd.grad(out.loss, (hidden, p.weight))

    everything, only_live = torch.arange(21), p.mask.nonzero().squeeze(1)
    out, (hidden_grad, weight_grad) = run(everything, spoiled=True)
    clean, (clean_hidden_grad, clean_weight_grad) = run(only_live, spoiled=False)
    assert torch.equal(weight_grad, clean_weight_grad)
    assert torch.equal(hidden_grad[only_live], clean_hidden_grad)
    assert torch.equal(hidden_grad[~p.mask], torch.zeros_like(hidden_grad[~p.mask]))
    torch.testing.assert_close(out.loss, clean.loss)
    for name in ("logprobs", "entropy", "kl"):
        assert torch.equal(getattr(out, name)[only_live], getattr(clean, name))
        assert not getattr(out, name)[~p.mask].any()
    for name, value in clean.metrics.items():
        torch.testing.assert_close(out.metrics[name], value)


def test_a_nan_in_a_row_that_counts_is_not_hidden(make_problem: Fixture) -> None:
    p = make_problem(10, 6, 41, live=1.0)
    with torch.no_grad():
        p.hidden[3] = math.nan
    p.advantages[3] = 1.0
    out = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0)
    assert math.isnan(out.loss.item())
    assert torch.autograd.grad(out.loss, p.weight)[0].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [-1e4, -25.0, 25.0, 1e4])
def test_ratios_beyond_exp_stay_finite(make_problem: Fixture, assert_same_loss: Fixture, kind: str, gap: float) -> None:
    p = make_problem(10, 6, 41)
    p.behavior_logprobs -= gap
    args = p.hidden, p.weight, *p.rows
    ours = linear_policy_loss(*args, kind=kind, weight_max=1e6)
    assert_same_loss(ours, reference.linear_policy_loss(*args, kind=kind, weight_max=1e6), (p.hidden, p.weight))


@pytest.mark.parametrize("weight_max", [0.1, 1.0, 4.0, 100.0, 1e6])
def test_weight_max_caps_the_ratio_itself_over_its_whole_range(
    make_problem: Fixture, assert_same_loss: Fixture, weight_max: float
) -> None:
    p = make_problem(10, 6, 41, live=1.0)
    advantages = torch.ones(10)
    logprobs = reference.linear_token_logprobs(p.hidden, p.weight, p.targets).logprobs.detach()
    behavior = (logprobs - torch.linspace(-4, 18, 10)).float()  # ρ from 0.02 to 7e7
    args = p.hidden, p.weight, p.targets, behavior, advantages
    ours = linear_policy_loss(*args, weight_max=weight_max)
    weights = (logprobs - behavior.double()).exp().clamp(max=weight_max)
    assert ours.loss.item() == pytest.approx(-(weights * logprobs).mean().item(), rel=1e-5)
    assert_same_loss(ours, reference.linear_policy_loss(*args, weight_max=weight_max), (p.hidden, p.weight))


def test_the_fst_loss_averages_each_problems_tokens_and_then_the_problems(make_problem: Fixture) -> None:
    p = make_problem(12, 5, 33, live=1.0)
    problem = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2])  # of each token, its group's tokens all together
    logprobs = reference.linear_token_logprobs(p.hidden, p.weight, p.targets).logprobs
    ratios = (logprobs - p.behavior_logprobs).exp().clamp(max=4).detach()
    per_token = ratios * p.advantages * logprobs
    by_hand = -sum(per_token[problem == x].sum() / (problem == x).sum() for x in range(3)) / 3  # fst.md's L(θ)
    ours = linear_policy_loss(
        p.hidden, p.weight, *p.rows, weight_max=4.0, token_weights=1 / problem.bincount()[problem], denominator=3
    )
    torch.testing.assert_close(ours.loss.double(), by_hand, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_with_the_global_denominator_add_up(make_problem: Fixture, kind: str) -> None:
    p = make_problem(11, 5, 33)
    options: dict[str, Any] = {"kind": kind, "weight_max": 4.0, "entropy_coef": 0.1, "denominator": int(p.mask.sum())}

    def part(rows: slice) -> tuple[torch.Tensor, ...]:
        args = (x[rows] for x in p.rows)
        out = linear_policy_loss(p.hidden[rows], p.weight, *args, p.mask[rows], **options)
        return out.loss, *torch.autograd.grad(out.loss, (p.hidden, p.weight))

    whole, first, second = part(slice(11)), part(slice(6)), part(slice(6, 11))
    for a, b, c in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a, b + c)
    default = linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, **{**options, "denominator": None})
    torch.testing.assert_close(default.loss, whole[0])


def test_bf16_operands_keep_fp32_logits_and_round_gradients_once(make_problem: Fixture, assert_close: Fixture) -> None:
    p = make_problem(64, 32, 700, dtype=torch.bfloat16, scale=8.0)
    p.weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
    args = p.hidden, p.weight, *p.rows, p.mask
    ours, truth = linear_policy_loss(*args, weight_max=4.0), reference.linear_policy_loss(*args, weight_max=4.0)
    assert_close(ours.logprobs, truth.logprobs, absolute=1e-5)
    assert_close(ours.entropy, truth.entropy, absolute=1e-5)
    exact = [x.detach().double().requires_grad_() for x in (p.hidden, p.weight)]
    truth = reference.linear_policy_loss(*exact, *p.rows, p.mask, weight_max=4.0)
    of_hidden, of_weight = torch.autograd.grad(truth.loss, exact)
    ours.loss.backward(retain_graph=True)
    assert p.weight.grad.dtype == torch.float32
    assert p.hidden.grad.dtype == torch.bfloat16
    assert_close(p.weight.grad, of_weight, absolute=0, relative=1e-5)
    assert (p.hidden.grad - of_hidden.bfloat16()).norm() <= 1e-3 * of_hidden.norm()  # beyond its own rounding

    p.weight.grad = None
    p.weight.grad_dtype = torch.bfloat16  # the default  # type: ignore[attr-defined]
    ours.loss.backward()
    assert (p.weight.grad - of_weight.bfloat16()).norm() <= 1e-3 * of_weight.norm()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_operands_of_two_dtypes_are_multiplied_in_fp32(
    make_problem: Fixture, assert_close: Fixture, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    p = make_problem(14, 16, 301, scale=6.0)
    hidden = p.hidden.detach().to(hidden_dtype).requires_grad_()
    weight = p.weight.detach().to(weight_dtype).requires_grad_()
    bias = p.bias.detach().bfloat16().requires_grad_()
    ref = {"ref_hidden": p.ref_hidden.bfloat16(), "ref_weight": p.ref_weight}
    options: dict[str, Any] = {"weight_max": 4.0, "entropy_coef": 0.1, "kl_coef": 0.2, "bias": bias, **ref}
    ours = linear_policy_loss(hidden, weight, *p.rows, p.mask, **options, chunk_rows=7)
    truth = reference.linear_policy_loss(hidden, weight, *p.rows, p.mask, **options)
    assert_close(ours.logprobs, truth.logprobs, absolute=1e-5)
    assert_close(ours.kl, truth.kl, absolute=1e-5, relative=2e-6)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    options["bias"] = exact[2]
    truth = reference.linear_policy_loss(exact[0], exact[1], *p.rows, p.mask, **options)
    gradients = torch.autograd.grad(ours.loss, (hidden, weight, bias))
    for g, x in zip(gradients, torch.autograd.grad(truth.loss, exact), strict=True):
        assert (g.double() - x.to(g.dtype).double()).norm() <= 1e-3 * x.norm()  # beyond its own rounding
    with torch.no_grad():
        alone = linear_token_logprobs(hidden, weight, p.targets, bias=bias).logprobs
    assert_close(alone[p.mask], ours.logprobs[p.mask], absolute=1e-5)


def test_fp16_gradients_survive_until_the_loss_scaler_lifts_them(make_problem: Fixture) -> None:
    p = make_problem(16, 8, 50, dtype=torch.float16, live=1.0)
    out = linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, denominator=1e9)
    (out.loss * 1e9).backward()
    exact = p.hidden.detach().double().requires_grad_()
    reference.linear_policy_loss(exact, p.weight.detach(), *p.rows, weight_max=4.0, denominator=1.0).loss.backward()
    assert (p.hidden.grad - exact.grad).norm() <= 1e-3 * exact.grad.norm()


@pytest.mark.parametrize("trainable", ["hidden", "weight", "bias"])
def test_only_what_is_trainable_gets_a_gradient_and_it_is_the_same(make_problem: Fixture, trainable: str) -> None:
    p = make_problem(20, 5, 33)
    inputs = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}

    def gradient(names: tuple[str, ...]) -> torch.Tensor:
        own = {k: x.detach().clone().requires_grad_(k in names) for k, x in inputs.items()}
        linear_policy_loss(
            own["hidden"], own["weight"], *p.rows, weight_max=4.0, bias=own["bias"], softcap=3.0, chunk_rows=8
        ).loss.backward()
        assert {k for k, x in own.items() if x.grad is not None} == set(names)
        return own[trainable].grad  # type: ignore[return-value]

    assert torch.equal(gradient((trainable,)), gradient(tuple(inputs)))


def test_a_head_tied_to_the_embedding_gets_both_gradients(make_problem: Fixture, assert_close: Fixture) -> None:
    p = make_problem(20, 5, 33)
    tokens = torch.randint(33, (20,), generator=torch.Generator().manual_seed(5))

    def gradient(loss: Fixture, dtype: torch.dtype) -> torch.Tensor:
        embedding = p.weight.detach().to(dtype).requires_grad_()
        hidden = torch.tanh(embedding[tokens])
        return torch.autograd.grad(loss(hidden, embedding, *p.rows, weight_max=4.0).loss, embedding)[0]

    ours, truth = gradient(linear_policy_loss, torch.float32), gradient(reference.linear_policy_loss, torch.float64)
    assert_close(ours, truth, absolute=0, relative=1e-5)


def test_a_reference_without_coefficient_is_only_measured(make_problem: Fixture, assert_same_loss: Fixture) -> None:
    p = make_problem(20, 5, 33)
    ref_bias = torch.zeros(33)
    ref_bias[7] = -math.inf  # KL is infinite, the loss must not be
    args = p.hidden, p.weight, *p.rows
    plain = linear_policy_loss(*args, weight_max=4.0)
    measured = linear_policy_loss(*args, weight_max=4.0, **p.ref, ref_bias=ref_bias)
    assert measured.kl is not None
    assert (measured.kl == math.inf).all()
    assert torch.equal(plain.loss, measured.loss)
    for a, b in zip(*(torch.autograd.grad(x.loss, args[:2]) for x in (plain, measured)), strict=True):
        assert torch.equal(a, b)
    finite = linear_policy_loss(*args, weight_max=4.0, **p.ref)
    assert_same_loss(finite, reference.linear_policy_loss(*args, weight_max=4.0, **p.ref), args[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(make_problem: Fixture, kind: str) -> None:
    p = make_problem(7, 3, 11, dtype=torch.float64)
    # Finite differences see through cispo's stop-gradient, so all its ratios lie above the cap; PPO's off its kinks.
    behavior = p.behavior_logprobs.double() - (12 if kind == "cispo" else 0)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear_policy_loss(
            hidden,
            weight,
            p.targets,
            behavior,
            p.advantages,
            p.mask,
            kind=kind,
            weight_max=2.0,
            entropy_coef=0.3,
            kl_coef=0.5,
            temperature=torch.linspace(0.5, 2, 7).double(),
            softcap=4.0,
            bias=bias,
            chunk_rows=3,
            **p.ref,
        ).loss

    assert loss(p.hidden, p.weight, p.bias).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [0.0, 30.0])
def test_policy_loss_from_given_logprobs_matches_the_reference(
    make_problem: Fixture, assert_same_loss: Fixture, kind: str, gap: float
) -> None:
    p = make_problem(50, 6, 41)
    logprobs = -3 * p.token_weights.clone()
    behavior = logprobs + p.advantages.roll(1) - gap
    options: dict[str, Any] = {"kind": kind, "weight_max": 2.0, "token_weights": p.token_weights.flip(0)}
    logprobs.requires_grad_()
    ours = policy_loss(logprobs, behavior, p.advantages, p.mask, **options)
    truth = reference.policy_loss(logprobs, behavior, p.advantages, p.mask, **options)
    assert_same_loss(ours, truth, (logprobs,))

    spoiled = torch.where(p.mask, logprobs.detach(), math.nan).requires_grad_()
    out = policy_loss(spoiled, behavior, p.advantages, p.mask, **options)
    (gradient,) = torch.autograd.grad(out.loss, spoiled)
    assert torch.equal(gradient, torch.autograd.grad(ours.loss, logprobs)[0])
    assert torch.equal(out.loss, ours.loss)


def test_all_rows_masked_is_a_loss_of_zero_with_zero_gradients(make_problem: Fixture) -> None:
    p = make_problem(9, 4, 17)
    out = linear_policy_loss(p.hidden, p.weight, *p.rows, torch.zeros(9), weight_max=4.0, entropy_coef=1.0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.metrics["tokens"].item() == 0
    assert not p.hidden.grad.any()
    assert not p.weight.grad.any()
