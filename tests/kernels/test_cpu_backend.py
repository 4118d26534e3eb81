"""The compiled rows: every instruction set, exp over its whole range, any tiling, any threads; and their lack."""

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fst_kernels import blocks, cpu_backend, linear_policy_loss, linear_token_logprobs, reference
from fst_kernels.blocks import Ask, Measures
from fst_kernels.library import load
from fst_kernels.types import Logits

Fixture = Callable[..., Any]
COMPILED = cpu_backend.LIBRARY
pytestmark = pytest.mark.skipif(COMPILED is None, reason="fst_kernels._csrc is not built")


@pytest.fixture(params=cpu_backend.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    assert COMPILED is not None
    wanted = cpu_backend.LEVELS.index(request.param)
    if wanted > COMPILED.best_level:
        pytest.skip(f"this machine has no {request.param}")
    COMPILED.level = wanted
    yield request.param
    COMPILED.level = COMPILED.best_level


@pytest.mark.parametrize("v", [1, 2, 3, 4, 5, 7, 15, 16, 17, 33, 1023, 1024, 1025, 1100, 2049])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_instruction_set_matches_the_reference_at_every_tail(
    make_problem: Fixture, assert_same_loss: Fixture, level: str, v: int, softcap: float | None
) -> None:
    p = make_problem(9, 5, v, scale=4.0)
    options: dict[str, Any] = {"weight_max": 4.0, "entropy_coef": 0.1, "kl_coef": 0.2, "softcap": softcap, **p.ref}
    options |= {"bias": p.bias, "ref_bias": p.bias.detach().flip(0), "temperature": torch.linspace(0.5, 2, 9)}
    ours = linear_policy_loss(p.hidden, p.weight, *p.rows, **options, backend="cpu")
    truth = reference.linear_policy_loss(p.hidden, p.weight, *p.rows, **options)
    assert_same_loss(ours, truth, (p.hidden, p.weight, p.bias))


def _gradient_of_one_logit(z: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """d logsumexp(z, 0) / dz row by row (n,): e^z / (1 + e^z) of the capped z, times the cap's slope."""
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    hidden = z[:, None].clone().requires_grad_()
    out = linear_token_logprobs(
        hidden, weight, torch.zeros(len(z), dtype=torch.int64), softcap=softcap, backend="cpu"
    ).logsumexp
    return torch.autograd.grad(out.sum(), hidden)[0].squeeze(1)


def test_exp_is_exact_to_a_millionth_over_its_whole_range(level: str) -> None:
    z = -torch.cat([torch.linspace(0, 87.3, 20011), torch.logspace(-30, 0, 97)])
    exact = torch.sigmoid(z.double())
    assert ((_gradient_of_one_logit(z, None).double() - exact) / exact).abs().max() < 1e-6
    assert not _gradient_of_one_logit(torch.tensor([-90.0, -1e4, -3e38]), None).any()


def test_a_softcaps_slope_is_exact_to_a_millionth_where_it_saturates(level: str) -> None:
    z = torch.linspace(-40, 40, 4001) * 0.5
    exact = torch.cosh(z.double()) ** -2 * torch.sigmoid(torch.tanh(z.double()))
    assert ((_gradient_of_one_logit(z, 1.0).double() - exact) / exact).abs().max() < 2e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_or_inf_logit_is_not_hidden(level: str, value: float) -> None:
    for position in (0, 5, 40):
        weight = torch.zeros(41, 1)
        weight[position] = value
        out = linear_token_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 5]), entropy=True, backend="cpu")
        assert out.entropy is not None
        assert out.logprobs.isnan().all()
        assert out.entropy.isnan().all()


def _rows(logits: torch.Tensor, ref: torch.Tensor, forward_kl: bool) -> tuple[cpu_backend._Block, torch.Tensor]:
    """The rows of these logits measured as one tile, and the gradient in them."""
    n = len(logits)
    one = torch.tensor(1.0)
    ask = Ask(torch.arange(n), True, Logits(ref, None, one, None), forward_kl)
    block = cpu_backend._Block(Logits(logits, None, one, None), ask)
    block.measure(logits, ref)
    grad, upstream = torch.empty_like(logits), torch.linspace(-1, 1, n)
    block.gradient(Measures(upstream, -upstream, 2 * upstream, upstream + 1), grad)
    return block, grad


def test_rows_have_the_same_bits_with_any_number_of_threads(level: str) -> None:
    logits, ref = torch.randn(2, 61, 40_000, generator=torch.Generator().manual_seed(0))
    one, grad = _rows(logits, ref, True)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        many, same_grad = _rows(logits, ref, True)
        assert torch.equal(one.states, many.states)
        assert torch.equal(grad, same_grad)
    torch.set_num_threads(1)


@pytest.mark.parametrize("forward_kl", [True, False])
def test_tiles_of_the_vocabulary_add_up_in_any_split_and_order_of_peaks(level: str, forward_kl: bool) -> None:
    logits, ref = torch.randn(2, 20, 3000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:10] += torch.linspace(-60, 60, 3000)  # the peak keeps moving
    ref[5:15] += torch.linspace(60, -60, 3000)
    logits[:, :1500] = torch.where(torch.arange(20)[:, None] < 3, -math.inf, logits[:, :1500])
    ref[:, :1500] = torch.where(torch.arange(20)[:, None] < 3, -math.inf, ref[:, :1500])
    whole, _ = _rows(logits, ref, forward_kl)
    p, q = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    a, b = (p, q) if forward_kl else (q, p)
    kl = (a.exp() * (a - b).masked_fill(a == -math.inf, 0)).sum(-1)
    torch.testing.assert_close(whole.measures().kl, kl.float(), atol=1e-5, rtol=2e-6)
    for width in (1, 17, 1000):
        parts = cpu_backend._Block(whole.logits, whole.ask)
        for start in range(0, 3000, width):
            tile = slice(start, start + width)
            parts.measure(logits[:, tile], ref[:, tile], start)
        for x, y in zip(parts.measures(), whole.measures(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_pass_keeps_one_tile_of_logits(
    make_problem: Fixture, watcher: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu_backend, "TILE_LOGITS", 50 * 100)
    p = make_problem(300, 4, 5000, dtype=dtype)
    with watcher, torch.no_grad():
        out = linear_token_logprobs(p.hidden, p.weight, p.targets, entropy=True, chunk_rows=50, backend="cpu")
    truth = reference.linear_token_logprobs(p.hidden, p.weight, p.targets, entropy=True)
    torch.testing.assert_close(out.logprobs, truth.logprobs.float(), atol=1e-5, rtol=1e-6)
    assert watcher.largest == 50 * 100
    assert watcher.multiply_adds == 300 * 4 * 5000


def test_bf16_heads_are_never_copied_whole(
    make_problem: Fixture, watcher: Any, monkeypatch: pytest.MonkeyPatch, assert_same_loss: Fixture
) -> None:
    p = make_problem(40, 16, 3000, dtype=torch.bfloat16)
    p.weight.requires_grad_(False)
    monkeypatch.setattr(blocks, "CAST_ON_CPU", 16 * 1024)
    with watcher:
        linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0, chunk_rows=4, backend="cpu")
    assert watcher.largest == 1024 * 16


def test_an_extension_built_from_other_code_is_not_used() -> None:
    class Wider(ctypes.Structure):
        _fields_ = (*cpu_backend._Rows._fields_, ("added", ctypes.c_int64))

    own = cpu_backend._Library
    assert load("_csrc", "fst_rows_bytes", cpu_backend._Rows, own) is not None
    assert load("_csrc", "fst_rows_bytes", Wider, own) is None
    assert load("_csrc", "fst_rows_of_the_future", cpu_backend._Rows, own) is None
    assert load("_csrc", "fst_rows_bytes", cpu_backend._Rows, lambda library: library.fst_of_the_future) is None
    assert load("_never_built", "fst_rows_bytes", cpu_backend._Rows, own) is None


def test_it_refuses_what_it_cannot_take(make_problem: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def x(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        return torch.zeros(2, 2, dtype=dtype, device=device)

    assert not any(cpu_backend.refusal(x(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert cpu_backend.refusal(x(torch.float32), x(torch.float64)) == "float64 is the torch backend's"
    assert "meta" in str(cpu_backend.refusal(x(torch.float32, "meta")))
    monkeypatch.setattr(cpu_backend, "LIBRARY", None)
    p = make_problem(3, 2, 5)
    with pytest.raises(ValueError, match=r"backend='cpu' is not available: .* not built"):
        linear_token_logprobs(p.hidden, p.weight, p.targets, backend="cpu")
    with pytest.warns(UserWarning, match="not built .*: slower torch code runs instead"):
        linear_token_logprobs(p.hidden, p.weight, p.targets)
