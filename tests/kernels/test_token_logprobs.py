"""Log-probs, entropy, logsumexp and exact KL, from logits and from hidden states, against the float64 reference."""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_kernels import blocks, kl_estimate, linear_kl, linear_token_logprobs, reference, token_logprobs

Fixture = Callable[..., Any]
SLOW = 20 if os.environ.get("TRITON_INTERPRET") == "1" else 1  # test_triton.py runs this file again
pytestmark = pytest.mark.usefixtures("backend")


def assert_same_measures(ours: Any, truth: Any, inputs: tuple[torch.Tensor, ...], assert_close: Fixture) -> None:
    """Values, and gradients of a random weighting of all that is measured."""
    g = torch.Generator().manual_seed(9)
    total_ours, total_truth = 0, 0
    for name in ("logprobs", "entropy", "logsumexp"):
        a, b = getattr(ours, name), getattr(truth, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, absolute=1e-5, relative=1e-6)
            upstream = torch.randn(a.shape, generator=g).double()
            total_ours, total_truth = total_ours + (upstream * a).sum(), total_truth + (upstream * b).sum()
    for a, b in zip(torch.autograd.grad(total_ours, inputs), torch.autograd.grad(total_truth, inputs), strict=True):
        assert_close(a, b, absolute=1e-6, relative=1e-5)


@settings(max_examples=80 // SLOW, derandomize=True, database=None)
@given(
    n=st.integers(1, 30),
    h=st.integers(1, 19),
    v=st.integers(2, 131),
    seed=st.integers(0, 2**16),
    entropy=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.6, "per token"]),
    chunk_rows=st.sampled_from([None, 1, 7]),
)
def test_linear_measures_match_the_reference(
    make_problem: Fixture,
    assert_close: Fixture,
    n: int,
    h: int,
    v: int,
    seed: int,
    temperature: Any,
    chunk_rows: Any,
    **kw: Any,
) -> None:
    p = make_problem(n, h, v, seed=seed, scale=3.0)
    kw |= {"bias": p.bias, "temperature": torch.linspace(0.5, 2, n) if temperature == "per token" else temperature}
    ours = linear_token_logprobs(p.hidden, p.weight, p.targets, chunk_rows=chunk_rows, **kw)
    truth = reference.linear_token_logprobs(p.hidden, p.weight, p.targets, **kw)
    assert_same_measures(ours, truth, (p.hidden, p.weight, p.bias), assert_close)


@pytest.mark.parametrize(("n", "v", "scale"), [(9, 1100, 0.01), (2, 151936, 5.0)])
@pytest.mark.parametrize("temperature", [0.6, "per token"])
def test_measures_of_given_logits_match_the_reference(
    assert_close: Fixture, n: int, v: int, scale: float, temperature: Any
) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(n, v, generator=g)).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    t = torch.linspace(0.7, 2, n, dtype=torch.float64) if temperature == "per token" else temperature
    ours = token_logprobs(logits, targets, temperature=t, entropy=True)
    assert ours.logprobs.dtype == torch.float32
    truth = reference.token_logprobs(logits, targets, temperature=t, entropy=True)
    assert_same_measures(ours, truth, (logits,), assert_close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["rows apart", "transposed"])
def test_given_logits_of_any_dtype_and_layout_are_read_in_place_and_keep_their_values(
    assert_close: Fixture, dtype: torch.dtype, layout: str
) -> None:
    g = torch.Generator().manual_seed(0)
    store = torch.randn(20, 301, generator=g).to(dtype) if layout == "rows apart" else torch.randn(250, 20).to(dtype)
    logits = (store[::2, 7:257] if layout == "rows apart" else store[:, ::2].T).detach().requires_grad_()
    before, targets, upstream = logits.detach().clone(), torch.arange(10) * 25, torch.randn(10, generator=g).double()
    ours = token_logprobs(logits, targets, entropy=True, temperature=0.7)
    truth = reference.token_logprobs(logits, targets, entropy=True, temperature=0.7)
    assert_close(ours.logprobs, truth.logprobs, absolute=1e-5)
    total = (upstream * ours.logprobs).sum() - (upstream * ours.entropy).sum() + ours.logsumexp.sum()
    (found,) = torch.autograd.grad(total, logits)
    assert torch.equal(logits, before)
    total = (upstream * truth.logprobs).sum() - (upstream * truth.entropy).sum() + truth.logsumexp.sum()
    (exact,) = torch.autograd.grad(total, logits)
    assert found.dtype == dtype
    assert_close(found, exact, absolute=1e-6, relative={torch.float64: 1e-12, torch.float16: 1e-3}.get(dtype, 8e-3))


def test_targets_may_be_a_column_or_one_number_for_all() -> None:
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(24).view(4, 6) % 8
    for targets in (ids[:, 2], torch.tensor([3]).expand(4)):
        ours, truth = token_logprobs(logits, targets), reference.token_logprobs(logits, targets)
        torch.testing.assert_close(ours.logprobs, truth.logprobs.float())
        a, b = (torch.autograd.grad(x.logprobs.sum(), logits)[0] for x in (ours, truth))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e38, -1e30])
def test_items_masked_by_a_finite_lowest_logit_count_nothing(assert_close: Fixture, lowest: float) -> None:
    v = 6000
    mask = torch.full((v,), lowest)
    mask[::500] = 0
    logits = mask[None].clone().requires_grad_()
    targets = torch.tensor([0])
    ours, truth = (f(logits, targets, entropy=True) for f in (token_logprobs, reference.token_logprobs))
    assert_close(ours.entropy, truth.entropy, absolute=1e-5)
    assert_close(ours.logprobs, truth.logprobs, absolute=1e-5)
    assert torch.autograd.grad(ours.entropy.sum(), logits)[0].isfinite().all()
    hidden, weight = torch.ones(1, 1), torch.randn(v, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for biases, direction in (({"bias_p": mask}, "forward"), ({"bias_q": mask}, "reverse")):
        args = hidden, weight, hidden, weight.detach() + 0.1
        ours, truth = (f(*args, **biases, direction=direction) for f in (linear_kl, reference.linear_kl))
        assert_close(ours, truth, absolute=1e-5)
        assert torch.autograd.grad(ours.sum(), weight)[0].isfinite().all()


def test_given_rows_without_a_slope_get_zero_whatever_they_hold() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits[2], logits[4, 3] = math.nan, math.inf
    logits.requires_grad_()
    out = token_logprobs(logits, torch.arange(6), entropy=True)
    assert out.logprobs[2].isnan()
    keep = torch.tensor([True, True, False, True, False, True])
    (torch.where(keep, out.logprobs, 0) + torch.where(keep, out.entropy, 0)).sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~keep].any()
    assert logits.grad[keep].any(1).all()


@pytest.mark.parametrize("target", [-1, 40, -(2**40), 2**40])
def test_a_target_outside_of_given_logits_is_named_and_nothing_read_there(target: int) -> None:
    targets = torch.arange(6)
    targets[4] = target
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 40\) in every row, got {target} in row 4"):
        token_logprobs(torch.randn(6, 40), targets, entropy=True)


def test_given_logits_are_never_copied_whole(watcher: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.skip("the interpreter copies what a kernel takes")
    monkeypatch.setattr(blocks, "CHUNK_LOGITS", 10 * 900)
    logits = torch.randn(400, 900, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with watcher:
        token_logprobs(logits, torch.zeros(400, dtype=torch.int64), entropy=True).logprobs.sum().backward()
    per_row, chunk = 400 * 200, 4 * blocks.CHUNK_LOGITS
    assert watcher.peak_bytes <= logits.nbytes + per_row + (3 * chunk if backend == "torch" else 0)


def test_logits_of_ten_thousand_and_of_minus_infinity(assert_close: Fixture) -> None:
    logits = torch.tensor([[1e4, 9999.5, -1e4, -math.inf], [-1e4, -1e4, -math.inf, -math.inf]], requires_grad=True)
    targets = torch.tensor([1, 0])
    ours = token_logprobs(logits, targets, entropy=True)
    truth = reference.token_logprobs(logits, targets, entropy=True)
    assert_same_measures(ours, truth, (logits,), assert_close)
    # A head whose logits are the same numbers: bias adds the −inf.
    weight = logits.detach().clamp(min=-1e4).T.contiguous().requires_grad_()
    bias = torch.tensor([0, 0, 0, -math.inf])
    linear = linear_token_logprobs(torch.eye(2), weight, targets, bias=bias, entropy=True)
    truth = reference.linear_token_logprobs(torch.eye(2), weight, targets, bias=bias, entropy=True)
    assert_same_measures(linear, truth, (weight,), assert_close)


def test_logprobs_are_never_above_zero_for_a_nearly_certain_target() -> None:
    hidden = torch.full((4, 64), 3.0).bfloat16()
    weight = torch.zeros(50, 64).bfloat16()
    weight[7] = torch.linspace(0.1, 0.2, 64).bfloat16()
    out = linear_token_logprobs(hidden, weight, torch.full((4,), 7), entropy=True)
    assert (out.logprobs <= 0).all()
    assert out.entropy is not None
    assert (out.entropy >= 0).all()


def test_rows_without_upstream_gradient_do_not_poison_the_weight(make_problem: Fixture) -> None:
    p = make_problem(10, 4, 21)
    hidden = p.hidden.detach().clone()
    hidden[3] = math.nan
    out = linear_token_logprobs(hidden.requires_grad_(), p.weight, p.targets, entropy=True)
    keep = torch.arange(10) != 3
    (torch.where(keep, out.logprobs, 0) + torch.where(keep, out.entropy, 0)).sum().backward()
    assert torch.isfinite(p.weight.grad).all()
    assert not hidden.grad[3].any()


@settings(max_examples=60 // SLOW, derandomize=True, database=None)
@given(
    n=st.integers(1, 20),
    h=st.integers(1, 9),
    v=st.integers(2, 131),
    seed=st.integers(0, 2**16),
    direction=st.sampled_from(["forward", "reverse"]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.6, "per token"]),
    chunk_rows=st.sampled_from([None, 1, 7]),
)
def test_exact_kl_matches_the_reference_in_both_directions(
    make_problem: Fixture,
    assert_close: Fixture,
    n: int,
    h: int,
    v: int,
    seed: int,
    temperature: Any,
    chunk_rows: Any,
    **kw: Any,
) -> None:
    p = make_problem(n, h, v, seed=seed, scale=3.0)
    kw |= {"bias_p": p.bias, "temperature": torch.linspace(0.5, 2, n) if temperature == "per token" else temperature}
    args = p.hidden, p.weight, p.ref_hidden, p.ref_weight
    ours, truth = linear_kl(*args, chunk_rows=chunk_rows, **kw), reference.linear_kl(*args, **kw)
    assert_close(ours, truth, absolute=1e-5, relative=1e-6)
    upstream, inputs = p.token_weights, (p.hidden, p.weight, p.bias)
    rounding = 3e-6 * max(1.0, truth.max().item() * p.weight.abs().max().item())  # of p (log p − log q − KL) · weight
    for a, b in zip(
        torch.autograd.grad((upstream * ours).sum(), inputs),
        torch.autograd.grad((upstream * truth).sum(), inputs),
        strict=True,
    ):
        assert_close(a, b, absolute=rounding, relative=1e-5)


def test_kl_of_equal_distributions_is_zero_and_q_is_a_constant(make_problem: Fixture) -> None:
    p = make_problem(10, 4, 21)
    for direction in ("forward", "reverse"):
        assert linear_kl(p.hidden, p.weight, p.hidden, p.weight, direction=direction).abs().max() < 1e-6
    q_hidden, q_weight = p.ref_hidden.requires_grad_(), p.ref_weight.requires_grad_()
    linear_kl(p.hidden, p.weight, q_hidden, q_weight).sum().backward()
    assert p.weight.grad is not None
    assert q_hidden.grad is None
    assert q_weight.grad is None
    assert not linear_kl(p.hidden.detach(), p.weight.detach(), q_hidden, q_weight).requires_grad


def test_kl_counts_nothing_for_items_impossible_in_both_and_is_infinite_where_only_q_forbids(
    make_problem: Fixture, assert_close: Fixture
) -> None:
    p = make_problem(10, 4, 21)
    forbid = torch.zeros(21)
    forbid[[2, 5]] = -math.inf
    args = p.hidden, p.weight, p.ref_hidden, p.ref_weight
    for direction in ("forward", "reverse"):
        both: dict[str, Any] = {"bias_p": forbid, "bias_q": forbid, "direction": direction}
        assert_close(linear_kl(*args, **both), reference.linear_kl(*args, **both), absolute=1e-5)
        assert torch.isfinite(torch.autograd.grad(linear_kl(*args, **both).sum(), p.weight)[0]).all()
    assert (linear_kl(*args, bias_q=forbid) == math.inf).all()


@pytest.mark.parametrize("place", [0, 4999])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_infinite_where_one_item_is_forbidden_by_the_side_that_is_not_averaged_over(
    make_problem: Fixture, direction: str, place: int
) -> None:
    p = make_problem(2, 4, 5000)
    forbid = torch.zeros(5000)
    forbid[place] = -math.inf
    args = p.hidden, p.weight, p.ref_hidden, p.ref_weight
    kw: dict[str, Any] = {"direction": direction, "temperature": 0.6}
    of_p, of_q = linear_kl(*args, bias_p=forbid, **kw), linear_kl(*args, bias_q=forbid, **kw)
    infinite, finite = (of_q, of_p) if direction == "forward" else (of_p, of_q)
    assert (infinite == math.inf).all()
    assert finite.isfinite().all()


@pytest.mark.parametrize("masks", [(-1e4, torch.finfo(torch.float32).min), (torch.finfo(torch.bfloat16).min, -1e38)])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_counts_nothing_for_items_masked_by_two_finite_logits(
    make_problem: Fixture, assert_close: Fixture, masks: tuple[float, float], direction: str
) -> None:
    p = make_problem(10, 4, 21)
    bias, ref_bias = torch.zeros(2, 21)
    for mask, lowest in zip((bias, ref_bias), masks, strict=True):
        mask[[2, 4, 5, 6, 7]] = lowest  # 4 to 7 are all that one state has seen
    args = p.hidden, p.weight, p.ref_hidden, p.ref_weight
    for first, second in ((bias, ref_bias), (ref_bias, bias)):
        kw: dict[str, Any] = {"bias_p": first, "bias_q": second, "direction": direction}
        ours, truth = linear_kl(*args, **kw), reference.linear_kl(*args, **kw)
        assert_close(ours, truth, absolute=1e-5)
        for a, b in zip(*(torch.autograd.grad(x.sum(), args[:2]) for x in (ours, truth)), strict=True):
            assert_close(a, b, absolute=1e-5, relative=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck_in_float64(make_problem: Fixture, direction: str) -> None:
    p = make_problem(5, 3, 11, dtype=torch.float64)
    kw: dict[str, Any] = {"temperature": torch.linspace(0.5, 2, 5).double(), "softcap": 4.0, "chunk_rows": 2}

    def measures(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = linear_token_logprobs(hidden, weight, p.targets, bias=bias, entropy=True, **kw)
        assert out.entropy is not None
        kl = linear_kl(hidden, weight, p.ref_hidden, p.ref_weight, bias_p=bias, direction=direction, **kw)
        return out.logprobs, out.entropy, out.logsumexp, kl

    assert torch.autograd.gradcheck(measures, (p.hidden, p.weight, p.bias))


def test_sampled_kl_estimators_by_hand_and_in_expectation() -> None:
    d = torch.tensor([-1.0, 0.0, 2.0])
    assert kl_estimate(d, torch.zeros(3), "k1").tolist() == [-1, 0, 2]
    assert kl_estimate(d, torch.zeros(3), "k2").tolist() == [0.5, 0, 2]
    expected = [math.e - 2, 0, math.exp(-2) + 1]
    assert kl_estimate(d, torch.zeros(3), "k3").tolist() == pytest.approx(expected, abs=1e-6)

    p, q = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimate(p, q, kind)).sum(), exact)
        torch.testing.assert_close(kl_estimate(p, q, kind), reference.kl_estimate(p, q, kind))
    torch.testing.assert_close(kl_estimate(p, q, "k2"), reference.kl_estimate(p, q, "k2"))
    far = kl_estimate(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), "k3")
    assert torch.isfinite(far).all()
    assert (far >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_of_half_precision_logprobs_and_their_slopes_are_exact(
    assert_close: Fixture, dtype: torch.dtype, kind: str
) -> None:
    gap = torch.tensor([2**-9, 2**-7, -0.25, 1.0, 8.0])
    logprobs = torch.full((5,), -0.75, dtype=dtype, requires_grad=True)
    ref = (logprobs.detach() - gap).to(dtype)
    ours, truth = (f(logprobs, ref, kind) for f in (kl_estimate, reference.kl_estimate))
    assert_close(ours, truth, absolute=1e-9, relative=1e-6)
    # equal once rounded to the log-probs' dtype, but for the last digit
    slopes, expected = (torch.autograd.grad(x.sum(), logprobs)[0] for x in (ours, truth))
    torch.testing.assert_close(slopes, expected, rtol=torch.finfo(dtype).eps, atol=0)
