"""The Triton backend: on a GPU as it is, elsewhere in Triton's interpreter, which wants a process of its own.

There `backend="auto"` means triton (conftest.py), so the tests of the losses and measures run as tests of it too.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fst_kernels import PolicyLoss, api, cuda_backend, linear_kl, linear_policy_loss, linear_token_logprobs, reference
from fst_kernels.blocks import Ask, Measures, Multiplier
from fst_kernels.objective import Objective, PolicyRows
from fst_kernels.types import Head, Logits

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in test_in_the_interpreter's process")
needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
Fixture = Callable[..., Any]


# Triton 3.6's interpreter cannot count a loop with NumPy 2.4 or newer; 3.7's can. On a GPU the tests run as they are.
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests run in this process")
def test_in_the_interpreter() -> None:
    here = Path(__file__).parent
    names = "triton", "triton_matrix", "policy_loss", "token_logprobs"
    files = [here / f"test_{name}.py" for name in names]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *files],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_and_auto_leaves_them_to_others(make_problem: Fixture) -> None:
    p = make_problem(4, 3, 7)
    with pytest.raises(ValueError, match=r"backend='triton' needs tensors on a GPU.*got cpu"):
        linear_token_logprobs(p.hidden, p.weight, p.targets, backend="triton")
    assert api._backend("auto", p.hidden, p.weight) != "triton"


def test_fp64_operands_are_refused_and_auto_leaves_them_to_torch(make_problem: Fixture) -> None:
    p = make_problem(4, 3, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="computes in fp32"):
        linear_token_logprobs(p.hidden, p.weight, p.targets, backend="triton")
    assert linear_token_logprobs(p.hidden, p.weight, p.targets).logprobs.dtype == torch.float64


@pytest.fixture
def make(make_problem: Fixture) -> Fixture:
    """A problem on the device under test."""

    def on_device(*args: Any, **kw: Any) -> Any:
        p = make_problem(*args, **kw)
        for name, x in vars(p).items():
            setattr(p, name, x.detach().to(DEVICE).requires_grad_(x.requires_grad))
        return p

    return on_device


def _loss(p: Any, **kw: Any) -> PolicyLoss:
    kw = {"weight_max": 4.0, "entropy_coef": 0.1, "kl_coef": 0.3, "bias": p.bias, **p.ref, **kw}
    return linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, backend="triton", **kw)


def _truth(p: Any, **kw: Any) -> PolicyLoss:
    kw = {"weight_max": 4.0, "entropy_coef": 0.1, "kl_coef": 0.3, "bias": p.bias, **p.ref, **kw}
    return reference.linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, **kw)


@runs
@pytest.mark.parametrize("kind", ["cispo", "ppo", "reinforce"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.6}])
@pytest.mark.parametrize("v", [2, 16, 17, 1100, 2047, 2048, 2049])
def test_vocabularies_around_the_blocks(
    make: Fixture, assert_same_loss: Fixture, kind: str, options: dict[str, Any], v: int
) -> None:
    p = make(7, 5, v)
    assert_same_loss(_loss(p, kind=kind, **options), _truth(p, kind=kind, **options), (p.hidden, p.weight, p.bias))


@runs
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.6}])
def test_every_measure_and_its_gradient(
    make: Fixture, assert_close: Fixture, direction: str, options: dict[str, Any]
) -> None:
    p = make(7, 5, 2100)
    inputs, weights = (p.hidden, p.weight, p.bias), torch.randn(4, 7, generator=torch.Generator().manual_seed(0))

    def measures(linear_token_logprobs: Fixture, linear_kl: Fixture, **kw: Any) -> list[Tensor]:
        out = linear_token_logprobs(p.hidden, p.weight, p.targets, bias=p.bias, entropy=True, **options, **kw)
        kl = linear_kl(p.hidden, p.weight, *p.ref.values(), bias_p=p.bias, direction=direction, **options, **kw)
        return [out.logprobs, out.entropy, out.logsumexp, kl]

    ours = measures(linear_token_logprobs, linear_kl, backend="triton", chunk_rows=3)
    truth = measures(reference.linear_token_logprobs, reference.linear_kl)
    for a, b, w in zip(ours, truth, weights.to(DEVICE), strict=True):
        assert_close(a, b, absolute=1e-5)
        gradients = (torch.autograd.grad((w * x).sum(), inputs, retain_graph=True) for x in (a, b))
        for of_ours, of_truth in zip(*gradients, strict=True):
            assert_close(of_ours, of_truth, absolute=1e-6, relative=1e-5)


@runs
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_what_stands_in_the_padding_counts_nothing(
    make: Fixture, assert_same_loss: Fixture, garbage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, made = make(7, 5, 1101), Multiplier.logits

    def spoiled(head: Multiplier, rows: Tensor) -> Logits:
        logits = made(head, rows)
        assert logits.products.stride() == (1104, 1)
        logits.products.as_strided((len(rows), 1104), (1104, 1))[:, 1101:] = garbage
        return logits

    monkeypatch.setattr(Multiplier, "logits", spoiled)
    assert_same_loss(_loss(p, softcap=3.0), _truth(p, softcap=3.0), (p.hidden, p.weight, p.bias))


@runs
@pytest.mark.parametrize("softcap", [1e-3, 0.5, 1.0, 30.0, 1e4])
def test_the_softcap_is_tanh_to_the_last_digits_at_any_size(
    make: Fixture, assert_close: Fixture, softcap: float
) -> None:
    z = torch.cat([torch.logspace(-6, 3, 10), -torch.logspace(-5, 2, 8), torch.zeros(1)]).to(DEVICE)
    weight, hidden = z[:, None].clone().requires_grad_(), torch.ones(len(z), 1, device=DEVICE)
    every = torch.arange(len(z), device=DEVICE)
    ours = linear_token_logprobs(hidden, weight, every, softcap=softcap, backend="triton")
    truth = reference.linear_token_logprobs(hidden, weight, every, softcap=softcap)
    scale = min(softcap, 1e3)
    assert_close(ours.logprobs, truth.logprobs, absolute=2e-6 + 2e-7 * scale)
    upstream = torch.randn(len(z), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    a, b = (torch.autograd.grad((upstream * x.logprobs).sum(), weight)[0] for x in (ours, truth))
    assert_close(a, b, absolute=1e-6, relative=1e-5)


@runs
def test_a_bf16_gradient_in_the_logits_own_storage_is_the_rounded_gradient(make: Fixture) -> None:
    from fst_kernels import triton_backend

    p = make(5, 8, 9001)  # several blocks, so that a write reaches back over earlier ones
    head, ref = (
        Multiplier(Head(h, w, None, torch.tensor(1.0), None), torch.float32)
        for h, w in ((p.hidden.detach(), p.weight.detach()), (p.ref_hidden, p.ref_weight))
    )
    weights = torch.rand(5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = PolicyRows(*p.rows, p.mask, weights, Objective("cispo", 0.0, 4.0), 0.1, 0.3)
    rows = torch.arange(5, device=DEVICE)

    def gradient(dtype: torch.dtype) -> tuple[Measures, Tensor]:
        logits = head.logits(rows)
        grad = logits.room(dtype)
        return triton_backend.row_step(logits, Ask(p.targets, True, ref.logits(rows)), batch, grad), grad.clone()

    (exact_measures, exact), (measures, rounded) = gradient(torch.float32), gradient(torch.bfloat16)
    room = head.logits(rows).room(torch.bfloat16)
    assert room.dtype == torch.bfloat16
    assert room.stride(0) * 2 == head.logits(rows).products.stride(0) * 4  # each row in its own row of the chunk
    step = 2.0**-8 if DEVICE == "cuda" else 2.0**-7  # the interpreter truncates
    assert ((rounded.float() - exact).abs() <= step * exact.abs()).all()
    for a, b in zip(measures, exact_measures, strict=True):
        assert torch.equal(a, b)


@runs
def test_two_runs_and_any_chunk_size_give_the_same_bits_per_token(make: Fixture) -> None:
    p = make(9, 5, 3001)

    def everything(chunk_rows: int) -> list[Tensor]:
        out = _loss(p, chunk_rows=chunk_rows)
        kl = linear_kl(
            p.hidden, p.weight, *p.ref.values(), direction="reverse", chunk_rows=chunk_rows, backend="triton"
        )
        return [out.logprobs, out.entropy, out.kl, kl, *torch.autograd.grad(out.loss, (p.hidden, p.weight, p.bias))]

    first = everything(4)
    for a, b in zip(first, everything(4), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first, everything(9), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@runs
def test_a_nan_in_a_row_that_counts_is_a_nan_there_never_a_number(make: Fixture) -> None:
    p = make(6, 5, 2100, live=1.0)
    p.advantages = torch.ones(6, device=DEVICE)
    with torch.no_grad():
        p.hidden[3] = math.nan
    out = _loss(p)
    assert out.loss.isnan()
    assert torch.autograd.grad(out.loss, p.weight)[0].isnan().any()
    others = torch.arange(6, device=DEVICE) != 3
    assert out.logprobs is not None
    assert torch.isfinite(out.logprobs[others]).all()


@runs
def test_nothing_to_do_launches_nothing(make: Fixture) -> None:
    p = make(0, 5, 37)
    assert _loss(p).loss == 0
    q = make(5, 5, 37, live=0.0)
    out = _loss(q)
    out.loss.backward()
    assert out.loss == 0
    assert not q.weight.grad.any()


# ---- on a GPU only ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_auto_on_a_gpu_is_cuda_where_it_is_built_and_triton_elsewhere(make: Fixture) -> None:
    p = make(4, 8, 16)
    ours = "triton" if cuda_backend.refusal(p.hidden, p.weight) else "cuda"
    assert api._backend("auto", p.hidden, p.weight) == ours
    logits = torch.randn(4, 16, device=DEVICE)
    assert api._backend("auto", logits) == ours
    assert api._backend("auto", logits[:, 1:9]) == "triton"  # rows that do not begin at 16 bytes


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("v", [4099, 151936])
def test_bf16_gradients_are_those_of_logit_gradients_rounded_to_bf16(
    make: Fixture, assert_close: Fixture, v: int
) -> None:
    p = make(300, 256, v, dtype=torch.bfloat16, scale=8.0, live=1.0)
    p.weight.grad_dtype = torch.float32
    options: dict[str, Any] = {"entropy_coef": 0.0, "kl_coef": 0.0, "bias": None}
    out = _loss(p, chunk_rows=128, **options)
    out.loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (p.hidden, p.weight)]
    logits = (exact[0] @ exact[1].T).detach().requires_grad_()
    truth = reference.token_logprobs(logits, p.targets)
    assert_close(out.logprobs, truth.logprobs, absolute=1e-5, relative=2e-6)  # of logits up to 40, summed in fp32
    loss = reference.policy_loss(truth.logprobs, p.behavior_logprobs, p.advantages, p.mask, weight_max=4.0).loss
    (of_logits,) = torch.autograd.grad(loss, logits)
    rounded = of_logits.float().bfloat16().double()
    for ours, of_rounded, of_exact in (
        (p.weight.grad, rounded.T @ exact[0], of_logits.T @ exact[0]),
        (p.hidden.grad, (rounded @ exact[1]).bfloat16(), of_logits @ exact[1]),
    ):
        assert (ours - of_rounded).norm() <= 1e-3 * of_rounded.norm()
        assert (ours - of_exact).norm() <= 4e-3 * of_exact.norm()


@pytest.mark.gpu
@needs_gpu
def test_a_chunk_of_more_than_two_to_the_31_logits(make: Fixture) -> None:
    n, v = 14500, 151936
    p = make(n, 16, 64, live=1.0)
    weight = torch.randn(v, 16, device=DEVICE, dtype=torch.bfloat16)
    hidden = p.hidden.detach().bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)

    def run(chunk_rows: int) -> tuple[Any, ...]:
        args = hidden, weight, targets, p.behavior_logprobs, p.advantages
        out = linear_policy_loss(*args, weight_max=4.0, chunk_rows=chunk_rows)
        return out.logprobs, out.entropy, torch.autograd.grad(out.loss, hidden)[0].float()

    for a, b in zip(run(n), run(1000), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-2)


@pytest.mark.gpu
@needs_gpu
def test_peak_memory_is_one_chunk(make: Fixture) -> None:
    h, v, chunk = 64, 151936, 2048
    p = make(3 * chunk, h, 64, dtype=torch.bfloat16, live=1.0)
    weight = torch.randn(v, h, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_policy_loss(p.hidden, weight, *p.rows, weight_max=4.0, chunk_rows=chunk)
    peak = torch.cuda.max_memory_allocated() - before
    gradients = weight.numel() * 4 + p.hidden.numel() * 2
    assert out.loss.isfinite()
    assert peak - gradients <= 1.2 * chunk * v * 4
