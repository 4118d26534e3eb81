"""The store-free forward against the float64 reference: in Triton's interpreter (see test_triton.py), or on a GPU."""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels import linear_kl, linear_policy_loss, linear_token_logprobs, reference
from fst_kernels.blocks import Measures
from fst_kernels.types import Head

pytest.importorskip("triton", reason="triton is not installed")
from fst_kernels import triton_matrix
from fst_kernels.triton_matrix import CONFIGURATIONS, Tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs in test_triton.py's interpreter process")
Fixture = Callable[..., Any]
SMALL = Tiles(rows=64, items=64, depth=32, warps=4, stages=2, programs=1, group=2)  # so that little takes many


def _random(n: int, h: int, v: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """hidden, weight, targets: logits of about this scale."""
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, h, generator=g) * scale / h**0.5).to(dtype)
    weight = torch.randn(v, h, generator=g).to(dtype)
    return hidden.to(DEVICE), weight.to(DEVICE), torch.randint(v, (n,), generator=g).to(DEVICE)


def _measure(
    hidden: Tensor, weight: Tensor, targets: Tensor, tiles: Tiles = SMALL, entropy: bool = True, **kw: Any
) -> Measures:
    t = torch.as_tensor(kw.get("temperature", 1.0))
    return triton_matrix.measure(Head(hidden, weight, kw.get("bias"), t, kw.get("softcap")), targets, entropy, tiles)


def _default(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    found = _measure(hidden, weight, targets, tiles=CONFIGURATIONS[0])
    return [x for x in found if x is not None]


def _check(assert_close: Fixture, hidden: Tensor, weight: Tensor, targets: Tensor, **kw: Any) -> Measures:
    ours = _measure(hidden, weight, targets, **kw)
    kw = {name: x for name, x in kw.items() if name in ("bias", "temperature", "softcap")}
    truth = reference.linear_token_logprobs(hidden, weight, targets, entropy=True, **kw)
    assert_close(ours.logprobs, truth.logprobs, absolute=1e-5, relative=1e-6)
    assert_close(ours.logsumexp, truth.logsumexp, absolute=1e-5, relative=1e-6)
    if ours.entropy is not None:
        assert_close(ours.entropy, truth.entropy, absolute=1e-5, relative=1e-6)
    return ours


@runs
@settings(max_examples=20, derandomize=True, database=None)
@given(
    n=st.integers(1, 300),
    h=st.integers(1, 12),
    v=st.integers(1, 700),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    entropy=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.6, "per token"]),
)
def test_measures_match_the_reference(
    assert_close: Fixture, n: int, h: int, v: int, seed: int, dtype: torch.dtype, **kw: Any
) -> None:
    hidden, weight, targets = _random(n, 8 * h, v, seed, dtype=dtype)
    kw["bias"] = torch.linspace(-3, 3, v, device=DEVICE) if kw["bias"] else None
    if kw["temperature"] == "per token":
        kw["temperature"] = torch.linspace(0.5, 2, n, device=DEVICE)
    ours = _check(assert_close, hidden, weight, targets, **kw)
    assert (ours.entropy is None) != kw["entropy"]


@runs
@pytest.mark.parametrize("tiles", CONFIGURATIONS)
@pytest.mark.parametrize(
    ("n", "h", "v", "scale"), [(1, 8, 1, 1), (5, 72, 7, 3), (300, 64, 1100, 0.01), (3, 200, 4099, 5)]
)
def test_every_configuration_at_sizes_that_nothing_divides(
    assert_close: Fixture, tiles: Tiles, n: int, h: int, v: int, scale: float
) -> None:
    _check(assert_close, *_random(n, h, v, scale=scale), tiles=tiles)


@runs
@pytest.mark.parametrize("splits", [1, 2, 5, 14])
def test_any_number_of_splits_gives_the_measures_and_always_the_same_bits(
    assert_close: Fixture, monkeypatch: pytest.MonkeyPatch, splits: int
) -> None:
    monkeypatch.setattr(triton_matrix, "_splits", lambda *_: splits)  # of 11 parts: some of 14 are empty
    arguments = _random(150, 40, 700, scale=10.0)
    first = _check(assert_close, *arguments)
    for a, b in zip(first, _measure(*arguments), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("blocks", "parts", "programs"), [(256, 594, 132), (1, 594, 132), (33, 1187, 264), (7, 3, 132)]
)
def test_the_splits_fill_the_gpu_in_waves_that_waste_little(blocks: int, parts: int, programs: int) -> None:
    splits = triton_matrix._splits(blocks, parts, programs)
    assert 1 <= splits <= min(parts, programs)
    waves, tiles = -(-blocks * splits // programs), -(-parts // splits)
    needed = blocks * parts / programs
    assert waves * tiles <= max(1, 1.03 * needed, needed + 1)


@runs
def test_logits_of_ten_thousand_keep_the_digits_of_their_differences(assert_close: Fixture) -> None:
    weight = torch.zeros(300, 8, dtype=torch.bfloat16, device=DEVICE)
    weight[:4, 0] = torch.tensor([9984.0, 9984.0, -9984.0, 9920.0])
    weight[:4, 1] = torch.tensor([1.0, 0.5, 0.0, 0.0])
    weight[200, 0] = 9984.0
    hidden = torch.zeros(3, 8, dtype=torch.bfloat16, device=DEVICE)
    hidden[:, 0], hidden[:, 1] = torch.tensor([1.0, -1.0, 1.0]), 1
    for target in range(4):
        ours = _measure(hidden, weight, torch.full((3,), target, device=DEVICE))
        truth = reference.linear_token_logprobs(hidden, weight, torch.full((3,), target, device=DEVICE), entropy=True)
        for row in range(3):
            assert_close(ours.logprobs[row], truth.logprobs[row], absolute=1e-5, relative=2e-7)
        assert_close(ours.entropy, truth.entropy, absolute=1e-5)


@runs
def test_forbidden_items_count_nothing_and_a_row_of_them_alone_has_no_distribution(assert_close: Fixture) -> None:
    hidden, weight, targets = _random(70, 16, 150)
    bias = torch.zeros(150, device=DEVICE)
    bias[20:] = -math.inf
    for softcap in (None, 2.0):  # under a softcap they are at −2, as the definition has it
        _check(assert_close, hidden, weight, targets % 20, bias=bias, softcap=softcap)
    out = _measure(hidden, weight, torch.full_like(targets, 30), bias=bias)
    assert (out.logprobs == -math.inf).all()
    out = _measure(hidden, weight, targets, bias=torch.full_like(bias, -math.inf))
    assert (out.logsumexp == -math.inf).all()
    assert out.logprobs is not None
    assert out.logprobs.isnan().all()


@runs
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_nan_and_spoils_no_other(wrong: float) -> None:
    hidden, weight, targets = _random(100, 16, 300)
    right = _measure(hidden, weight, targets)
    hidden[[3, 70], 5] = wrong
    others = torch.ones(100, dtype=torch.bool, device=DEVICE)
    others[[3, 70]] = False
    for a, b in zip(_measure(hidden, weight, targets), right, strict=True):
        if a is not None:
            assert a[~others].isnan().all()
            assert torch.equal(a[others], b[others])


@runs
def test_a_nearly_certain_target_has_no_logprob_above_zero_and_no_entropy_below() -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.full((200, 64), 3.0).bfloat16()
    weight = torch.zeros(130, 64).bfloat16()
    weight[7] = torch.rand(64, generator=g).bfloat16()
    t = torch.linspace(0.3, 6, 200)
    out = _measure(hidden.to(DEVICE), weight.to(DEVICE), torch.full((200,), 7, device=DEVICE), temperature=t.to(DEVICE))
    assert out.logprobs is not None
    assert out.entropy is not None
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= 0).all()


@runs
def test_the_public_function_measures_with_it_and_takes_gradients_from_the_chunks(assert_close: Fixture) -> None:
    hidden, weight, targets = _random(40, 16, 100)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_token_logprobs(*inputs, targets, entropy=True, backend="triton-matrix")
    for a, b in zip((out.logprobs, out.entropy, out.logsumexp), _default(*inputs, targets), strict=True):
        assert torch.equal(a, b)
    truth = reference.linear_token_logprobs(*inputs, targets, entropy=True)
    assert_close(out.logprobs, truth.logprobs, absolute=1e-5)
    assert_close(out.entropy, truth.entropy, absolute=1e-5)
    upstream = torch.linspace(-1, 1, 40, device=DEVICE)
    for a, b in zip(
        torch.autograd.grad((upstream * (out.logprobs + out.entropy)).sum(), inputs),
        torch.autograd.grad((upstream * (truth.logprobs + truth.entropy)).sum(), inputs),
        strict=True,
    ):
        assert_close(a, b, absolute=1e-5, relative=2**-7)
    empty = linear_token_logprobs(hidden[:0], weight, targets[:0], backend="triton-matrix")
    assert empty.logprobs.shape == empty.logsumexp.shape == (0,)


def test_what_the_copy_engine_or_the_arithmetic_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(hidden: Tensor, weight: Tensor) -> str:
        with pytest.raises(ValueError, match="backend='triton-matrix' is not available") as error:
            linear_token_logprobs(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), backend="triton-matrix")
        return str(error.value)

    hidden, weight, _ = (x.cpu() for x in _random(6, 32, 50))
    if not INTERPRETED:
        assert "it needs tensors on a Hopper GPU, got cpu" in refused(hidden, weight)
        monkeypatch.setattr(triton_matrix, "INTERPRETED", True)
    assert "must both be bf16 or both fp16, got torch.float32" in refused(hidden.float(), weight.float())
    assert "must both be bf16 or both fp16" in refused(hidden.half(), weight)
    assert "multiple of 8 elements, 16-byte aligned, got shape [6, 12]" in refused(hidden[:, :12], weight[:, :12])
    assert "hidden must have dense rows" in refused(hidden[:, 4:12], weight[:, :8].contiguous())
    assert "weight must have dense rows" in refused(hidden, weight.T.contiguous().T)
    assert "at least one row, got none" in (triton_matrix.refusal(hidden, weight[:0]) or "")
    assert triton_matrix.refusal(hidden[:, 8:24], weight[:, 8:24]) is None


def test_losses_and_kls_do_not_take_it() -> None:
    hidden, weight, targets = (x.cpu() for x in _random(6, 32, 50))
    rows = torch.zeros(6)
    with pytest.raises(ValueError, match="backend='triton-matrix' is not available: use one of"):
        linear_policy_loss(hidden, weight, targets, rows, rows, kind="reinforce", backend="triton-matrix")
    with pytest.raises(ValueError, match="backend='triton-matrix' is not available: use one of"):
        linear_kl(hidden, weight, hidden, weight, backend="triton-matrix")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("tiles", CONFIGURATIONS)
def test_a_real_vocabulary_on_a_gpu(assert_close: Fixture, tiles: Tiles) -> None:
    hidden, weight, targets = _random(4096, 1024, 151936, scale=6.0)
    ours = _measure(hidden, weight, targets, tiles=tiles)
    for rows in torch.arange(4096, device=DEVICE).split(256):
        truth = reference.linear_token_logprobs(hidden[rows], weight, targets[rows], entropy=True)
        for name in ("logprobs", "entropy", "logsumexp"):
            assert_close(getattr(ours, name)[rows], getattr(truth, name), absolute=2e-5, relative=1e-6)
    for a, b in zip(ours, _measure(hidden, weight, targets, tiles=tiles), strict=True):
        assert a is b is None or torch.equal(a, b)
