"""Whole models packed against separate sequences, and a GPU's calls on kernels emulated with its signatures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from fst_fast.errors import UserError
from fst_fast.model import Model, load_model
from fst_fast.slow import tree_attention as tree
from fst_fast.slow.packing import Packed, _states, pack, prepare
from tests.models import save_tiny, tiny
from tests.slow.test_packing import seen_by, tries

# several levels, a branch inside responses, equal ones, one that is another's beginning, several roots, a loner
RAGGED: list[Sequence[int]] = [
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (1, 2, 3, 4, 5, 16, 17, 18), (1, 2, 3, 4, 5, 16, 17, 18, 19), (1, 2, 3, 4, 25),
    (1, 2, 3, 40, 5, 16, 17), (9, 8, 7), (9, 8, 7), (9, 8), tuple(range(50, 350)), (*range(50, 250), 1, 2, 3),
]  # fmt: skip


def errors(sequences: Sequence[Sequence[int]], min_saving: int, dtype: torch.dtype, spans_of: Any) -> list[float]:
    """‖difference‖ / ‖exact‖ of the output and the gradients of q, k, v, against a dense ancestor mask in float64."""
    packed, mask = seen_by(sequences, min_saving)
    torch.manual_seed(0)
    n = len(packed.ids)
    exact = [torch.randn(1, h, n, 8).to(dtype).double().requires_grad_() for h in (6, 2, 2)]
    upstream = torch.randn(1, 6, n, 8).to(dtype)
    mine = [x.detach().to(dtype).requires_grad_() for x in exact]
    ours = tree.tree_attention(mine[0], mine[1], mine[2], spans_of(packed.spans), 0.7)
    k, v = (x.repeat_interleave(3, 1) for x in exact[1:])
    truth = (exact[0] @ k.mT * 0.7).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    found = [ours.detach(), *torch.autograd.grad(ours, mine, upstream)]
    expected = [truth.detach(), *torch.autograd.grad(truth, exact, upstream.double())]
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_every_type_keeps_its_precision(dtype: torch.dtype, tolerance: float) -> None:
    assert max(errors(RAGGED, 1, dtype, lambda spans: tree.Tree(spans, []))) < tolerance


def test_plain_products_serve_where_no_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 on a GPU."""
    monkeypatch.setattr(tree, "_on_cpu", lambda _: False)
    assert max(errors(RAGGED, 1, torch.float64, lambda spans: tree.Tree(spans, []))) < 1e-12


# ---- a GPU's calls -------------------------------------------------------------------------------------------------


class Flash:
    """aten's flash attention for variable lengths on CPU tensors of any floating dtype, strict about what the CUDA one
    takes for granted: one sequence after another, a causal mask aligned at the bottom right."""

    def __init__(self) -> None:
        self.calls = 0

    def segments(self, q: Any, k: Any, cu: Any, causal: bool, scale: float) -> Iterator[tuple[slice, slice, Any]]:
        """Of each sequence: its rows, its keys, and the scores [H, rows, keys]."""
        cu_q, cu_k, longest_q, longest_k = cu
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
        assert q.stride(-1) == k.stride(-1) == 1
        assert causal
        assert longest_q > 1  # one query a sequence takes another way there
        for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            assert 0 < b - a <= longest_q
            assert b - a <= d - c <= longest_k
            scores = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            yield slice(a, b), slice(c, d), scores.masked_fill(~seen, -torch.inf)

    def forward(self, q: Any, k: Any, v: Any, *rest: Any, scale: float) -> tuple[Any, ...]:
        cu, (dropout, causal, debug) = rest[:4], rest[4:]
        assert (dropout, debug) == (0.0, False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for rows, keys, scores in self.segments(q, k, cu, causal, scale):
            values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
            out[rows], lse[:, rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values), scores.logsumexp(-1)
        self.calls += 1
        return out, lse, None, None, None

    def backward(self, grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, scale: float) -> Any:
        cu, (dropout, causal, random, unused) = rest[:4], rest[4:]
        assert (dropout, random.dtype, random.shape, unused.numel()) == (0.0, torch.uint64, (2,), 0)
        assert lse.shape == (q.shape[1], len(q))
        assert grad.is_contiguous()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        repeat = q.shape[1] // k.shape[1]
        fold = lambda x: x.unflatten(1, (-1, repeat)).sum(2)  # noqa: E731
        for rows, keys, scores in self.segments(q, k, cu, causal, scale):
            p = (scores - lse[:, rows, None]).exp()
            dp = torch.einsum("ihd,jhd->hij", grad[rows], v[keys].repeat_interleave(repeat, 1))
            ds = p * (dp - (grad[rows] * out[rows]).sum(-1).T[..., None]) * scale
            dq[rows] = torch.einsum("hij,jhd->ihd", ds, k[keys].repeat_interleave(repeat, 1))
            dk[keys] = fold(torch.einsum("hij,ihd->jhd", ds, q[rows]))
            dv[keys] = fold(torch.einsum("hij,ihd->jhd", p, grad[rows]))
        return dq, dk, dv


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """As on a GPU, in every dtype."""
    emulated = Flash()
    monkeypatch.setattr(tree, "_on_flash", lambda _: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", emulated.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", emulated.backward)
    monkeypatch.setattr(tree.Tree, "of", staticmethod(whole))
    return emulated


def whole(spans: list[tree.Span], _device: torch.device | None = None) -> tree.Tree:
    return tree.Tree(spans, tree._paths(spans, torch.device("cpu")))


@given(tries, st.integers(1, 5), st.sampled_from([1, 20, 2**16]))
@settings(max_examples=60)
def test_the_calls_of_a_gpu_are_right_on_emulated_kernels(
    sequences: list[list[int]], min_saving: int, copied: int
) -> None:
    emulated = Flash()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "COPIED_KEYS", copied)
        patch.setattr(tree, "_on_flash", lambda _: True)
        patch.setattr(torch.ops.aten, "_flash_attention_forward", emulated.forward)
        patch.setattr(torch.ops.aten, "_flash_attention_backward", emulated.backward)
        assert max(errors(sequences, min_saving, torch.float64, whole)) < 1e-12
    if copied == 1:
        assert emulated.calls == len(pack(sequences, min_saving=min_saving).spans)
    if copied > 1000:
        assert emulated.calls == 1


def test_torch_takes_the_calls_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch's own shape functions of the kernels, which need no GPU."""
    monkeypatch.setattr(tree, "_on_flash", lambda _: True)
    packed = pack(RAGGED, min_saving=1)
    paths = [
        p._replace(keys=p.keys.to("meta"), cu_q=p.cu_q.to("meta"), cu_k=p.cu_k.to("meta"))
        for p in whole(packed.spans).paths
    ]
    q, k, v = leaves = [
        torch.empty(1, h, len(packed.ids), 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for h in (4, 2, 2)
    ]
    out = tree.tree_attention(q, k, v, tree.Tree(packed.spans, paths), 1.0)
    assert out.shape == q.shape
    for x, grad in zip(leaves, torch.autograd.grad(out, leaves, torch.empty_like(out)), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


# ---- whole models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3", "llama", "mistral", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With full attention in all layers, prepared."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    config = json.loads((folder / "config.json").read_text())
    config |= {"sliding_window": None} if request.param == "mistral" else {"layer_types": ["full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder))
    model.usual = separate(model)  # type: ignore[attr-defined]
    prepare(model)
    return model


@pytest.fixture
def exact(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The model in float64, also where transformers computes norms in float32."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        gemma = isinstance(self, Gemma3RMSNorm)
        scale, eps = (1 + self.weight, self.eps) if gemma else (self.weight, self.variance_epsilon)
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    for kind in (Gemma3RMSNorm, LlamaRMSNorm, MistralRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(kind, "forward", norm)
    model.lm.to(torch.float64)
    yield model
    model.lm.to(torch.float32)


def separate(model: Model) -> torch.Tensor:
    return torch.cat([model.hidden(torch.tensor([s]), use_cache=False)[0] for s in RAGGED])


def together(model: Model, packed: Packed) -> torch.Tensor:
    hidden = _states(packed, model.device)(model)
    return torch.cat([hidden[torch.from_numpy(place)] for place in packed.places])


def difference(model: Model, min_saving: int = 1) -> float:
    """The largest ‖difference‖ / ‖exact‖ over the loss and every parameter's gradient, packed against separate."""
    found = [
        loss_and_gradients(model, x) for x in (together(model, pack(RAGGED, min_saving=min_saving)), separate(model))
    ]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True) if b.norm() > 0)


def loss_and_gradients(model: Model, hidden: torch.Tensor) -> list[torch.Tensor]:
    """A loss that is not linear, and its gradients."""
    torch.manual_seed(1)
    targets = torch.randint(model.config.vocab_size, (len(hidden),))
    loss = torch.nn.functional.cross_entropy(hidden @ model.head.weight.T, targets, reduction="sum")
    gradients = torch.autograd.grad(loss, list(model.lm.parameters()), allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def test_loss_and_gradients_are_those_of_separate_sequences_in_float64(exact: Model) -> None:
    assert difference(exact) < 1e-12
    assert difference(exact, min_saving=32) < 1e-12


def test_so_they_are_by_the_calls_of_a_gpu(exact: Model, flash: Flash) -> None:
    assert difference(exact) < 1e-12
    assert flash.calls == 2  # one a layer


def test_loss_and_gradients_are_those_of_separate_sequences_in_float32(model: Model) -> None:
    assert difference(model) < 1e-5


def test_ordinary_passes_stay_bit_equal(model: Model) -> None:
    assert torch.equal(separate(model), model.usual)  # type: ignore[attr-defined]


def _detached(real: Callable[..., Any]) -> Callable[..., Any]:
    """A prefix that gets no gradient from what is below it."""

    def backward(grad: Any, q: Any, k: Any, *rest: Any) -> Any:
        n = k.shape[-2]
        _, dk, dv = real(grad[..., :n, :], q[..., :n, :], k, rest[0], rest[1][..., :n, :], rest[2][..., :n], *rest[3:])
        return real(grad, q, k, *rest)[0], dk, dv

    return backward


def _unmerged(real: Callable[..., Any]) -> Callable[..., Any]:
    """A backward by each call's own softmax, instead of the merged one."""

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float) -> Any:
        return real(grad, q, k, v, *tree._forward(q, k, v, scale), scale)

    return backward


@pytest.mark.parametrize("wrong", [_detached, _unmerged])
def test_these_comparisons_see_a_wrong_backward(
    exact: Model, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(tree, "_backward", wrong(tree._backward))
    assert difference(exact) > 1e-3


def test_these_comparisons_see_positions_that_are_not_depths(exact: Model) -> None:
    good = pack(RAGGED, min_saving=1)
    bad = Packed(good.ids, torch.arange(len(good.ids)).numpy(), good.spans, good.places)
    expected = separate(exact)
    assert (together(exact, good) - expected).norm() < 1e-12 * expected.norm()
    assert (together(exact, bad) - expected).norm() > 1e-3 * expected.norm()


# ---- models that are refused ---------------------------------------------------------------------------------------


def test_attention_sinks_are_refused_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, eos_token_id=1,
        layer_types=["full_attention"] * 2, max_position_embeddings=512,
    )  # fmt: skip
    model = Model(GptOssForCausalLM(config).eval(), load_model(str(save_tiny("llama", tmp_path))).tokenizer, "gpt-oss")
    before = separate(model)
    with pytest.raises(UserError, match=r"gpt-oss cannot run packed .GptOssAttention has s_aux."):
        prepare(model)
    assert torch.equal(separate(model), before)


def test_a_layer_that_mixes_neighbours_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no argument tells: e.g. a convolution over tokens, which a packed row would carry over branches."""
    model = tiny("llama", tmp_path)
    norm = model.lm.base_model.norm
    real = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: real(x + 0.5 * x.roll(1, 1)))
    with pytest.raises(UserError, match="gives other hidden states"):
        prepare(model)
