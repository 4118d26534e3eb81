"""Tree attention against one dense ancestor mask and against separate sequences, in float64 to rounding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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
from fst_fast.prefix_tree import PrefixTree, build
from fst_fast.slow import tree_attention
from fst_fast.slow.packing import Pack, packed_hidden, unpackable
from fst_fast.slow.tree_attention import TreeAttention, calls_of
from tests.models import save_tiny, tiny

CPU = torch.device("cpu")
FULL = ("qwen3", "llama", "mistral", "gemma3")  # with full attention in all layers
# three levels and more, a branch inside responses, equal ones, one that is another's beginning, several roots, a loner
RAGGED: list[Sequence[int]] = [
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10), (1, 2, 3, 4, 5, 16, 17, 18), (1, 2, 3, 4, 5, 16, 17, 18, 19), (1, 2, 3, 4, 25),
    (1, 2, 3, 40, 5, 16, 17), (9, 8, 7), (9, 8, 7), (9, 8), tuple(range(50, 350)), (*range(50, 250), 1, 2, 3),
]  # fmt: skip
tries = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: PrefixTree, scale: float) -> torch.Tensor:
    """The oracle: one mask over all packed tokens; quadratic in their number."""
    owner = [k for k, node in enumerate(tree.nodes) for _ in range(node.start, node.end)]
    above: list[set[int]] = []
    for node in tree.nodes:
        above.append({len(above)} | (above[node.parent] if node.parent >= 0 else set()))
    mask = torch.tensor([[b in above[a] and j <= i for j, b in enumerate(owner)] for i, a in enumerate(owner)])
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(repeat, 1)) * scale
    return torch.einsum(
        "hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(repeat, 1)
    )


def errors(
    tree: PrefixTree, calls: Sequence[tree_attention.Call], heads: tuple[int, int], dtype: torch.dtype, *,
    device: torch.device = CPU, scale: float = 0.7,
) -> list[float]:  # fmt: skip
    """‖difference‖ / ‖exact‖ of the output and of the gradients of q, k, v."""
    torch.manual_seed(0)
    exact = [torch.randn(tree.tokens, n, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])]
    exact = [x.to(dtype).double().requires_grad_() for x in exact]
    mine = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    upstream = torch.randn(tree.tokens, heads[0], 8, dtype=torch.float64).to(dtype).double()
    expected = dense(*exact, tree, scale)
    found = TreeAttention.apply(*mine, calls, scale)
    pairs = [
        (found, expected),
        *zip(
            torch.autograd.grad(found, mine, upstream.to(found)),
            torch.autograd.grad(expected, exact, upstream),
            strict=True,
        ),
    ]
    return [
        float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm().clamp(min=1e-3)) for a, b in pairs
    ]


@given(tries, st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_any_trie_attends_as_under_a_dense_ancestor_mask(
    sequences: list[list[int]], heads: tuple[int, int], min_saving: int
) -> None:
    tree = build(sequences, min_saving=min_saving)
    assert max(errors(tree, calls_of(tree, CPU), heads, torch.float64)) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_long_nodes_are_cut_into_blocks_and_every_type_keeps_its_precision(
    dtype: torch.dtype, tolerance: float
) -> None:
    tree = build(RAGGED)
    assert max(errors(tree, calls_of(tree, CPU), (4, 2), dtype)) < tolerance


def varlen(
    q: torch.Tensor, k: torch.Tensor, cu: Sequence[Any], causal: bool, scale: float
) -> Iterator[tuple[Any, ...]]:
    """Of each segment: its rows, its keys, and the scores [H, rows, keys] of flash attention's variable lengths."""
    assert cu[0].dtype == cu[1].dtype == torch.int32
    for a, b, c, d in zip(*(x for cu_ in cu[:2] for x in (cu_[:-1].tolist(), cu_[1:].tolist())), strict=True):
        assert b - a <= cu[2]
        assert d - c <= cu[3]
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril(), -torch.inf)
        yield slice(a, b), slice(c, d), scores


def test_the_calls_of_a_gpu_are_right_on_kernels_emulated_with_its_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash kernels on variable lengths, in float64: layouts as in torch.nn.attention.varlen."""
    asked = []

    def forward(q, k, v, *cu, scale):  # type: ignore[no-untyped-def]
        cu, (dropout, causal, debug) = cu[:4], cu[4:]
        assert (dropout, debug) == (0.0, False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for rows, keys, scores in varlen(q, k, cu, causal, scale):
            values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
            out[rows], lse[:, rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values), scores.logsumexp(-1)
        asked.append(causal)
        return out, lse, None, None, None

    def backward(grad, q, k, v, out, lse, *cu, scale):  # type: ignore[no-untyped-def]
        cu, (dropout, causal, random, unused) = cu[:4], cu[4:]
        assert (dropout, random.dtype, unused.numel()) == (0.0, torch.uint64, 0)
        assert lse.shape == (q.shape[1], len(q))
        assert grad.is_contiguous()
        assert lse.is_contiguous()
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        fold = lambda x: x.unflatten(1, (k.shape[1], -1)).sum(2)  # noqa: E731
        for rows, keys, scores in varlen(q, k, cu, causal, scale):
            p = (scores - lse[:, rows, None]).exp()
            repeat = q.shape[1] // k.shape[1]
            dp = torch.einsum("ihd,jhd->hij", grad[rows], v[keys].repeat_interleave(repeat, 1))
            ds = p * (dp - (grad[rows] * out[rows]).sum(-1).T[..., None]) * scale
            dq[rows] = torch.einsum("hij,jhd->ihd", ds, k[keys].repeat_interleave(repeat, 1))
            dk[keys] = fold(torch.einsum("hij,ihd->jhd", ds, q[rows]))
            dv[keys] = fold(torch.einsum("hij,ihd->jhd", p, grad[rows]))
        return dq, dk, dv

    tree = build(RAGGED)
    on_cpu = calls_of(tree, CPU)
    down = [c for c in on_cpu if not c.causal][
        -sum(any(n.parent == k for n in tree.nodes) for k in range(len(tree.nodes))) :
    ]
    bounds = [0, *torch.tensor([n.end - n.start for n in tree.nodes]).cumsum(0).tolist()]
    calls = tree_attention._gpu_calls(bounds, down, CPU)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    assert max(errors(tree, calls, (4, 2), torch.float64)) < 1e-12
    assert asked == [True] + [False] * len(down)


def test_torch_takes_the_gpu_calls() -> None:
    """Through torch's own shape functions of the kernels, which need no GPU."""
    tree = build(RAGGED)
    call = tree_attention._gpu_calls([0, tree.tokens], [], torch.device("meta"))[0]
    q, k = (torch.empty(tree.tokens, n, 8, device="meta", dtype=torch.bfloat16) for n in (4, 2))
    out, lse = tree_attention._forward(q, k, k, call, 1.0)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
    dq, dk, dv = tree_attention._backward(out, q, k, k, out, lse, call, 1.0)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


@pytest.mark.gpu
def test_a_gpu_attends_as_under_a_dense_ancestor_mask() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    tree, device = build(RAGGED), torch.device("cuda")
    assert max(errors(tree, calls_of(tree, device), (4, 2), torch.bfloat16, device=device)) < 2e-2


# ---- whole models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FULL)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    config = json.loads((folder / "config.json").read_text())
    config |= {"sliding_window": None} if request.param == "mistral" else {"layer_types": ["full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(str(folder))


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


def packed(model: Model, sequences: Sequence[Sequence[int]], first: Sequence[int], min_saving: int = 1) -> torch.Tensor:
    return packed_hidden(model, Pack.of(sequences, first, model.device, min_saving=min_saving))


def separate(model: Model, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> torch.Tensor:
    rows = [model.hidden(torch.tensor([s]), use_cache=False)[0, f:] for s, f in zip(sequences, first, strict=True)]
    return torch.cat(rows)


def difference(model: Model, sequences: Sequence[Sequence[int]], min_saving: int = 1) -> float:
    """The largest ‖difference‖ / ‖exact‖ over the loss and every parameter's gradient, packed against separate."""
    first = [min(i % 4, len(s) - 1) for i, s in enumerate(sequences)]
    found = [_loss(model, packed(model, sequences, first, min_saving)), _loss(model, separate(model, sequences, first))]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True) if b.norm() > 0)


def _loss(model: Model, hidden: torch.Tensor) -> list[torch.Tensor]:
    """A loss that is not linear, and its gradients."""
    torch.manual_seed(1)
    targets = torch.randint(model.config.vocab_size, (len(hidden),))
    loss = torch.nn.functional.cross_entropy(hidden @ model.head.weight.T, targets, reduction="sum")
    names = [p for p in model.lm.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, names, allow_unused=True)
    return [loss.detach(), *(g for g in gradients if g is not None)]


def test_loss_and_gradients_are_those_of_separate_sequences_in_float64(exact: Model) -> None:
    assert difference(exact, RAGGED) < 1e-12
    assert difference(exact, RAGGED, min_saving=32) < 1e-12


def test_loss_and_gradients_are_those_of_separate_sequences_in_float32(model: Model) -> None:
    assert difference(model, RAGGED) < 1e-5


def _detached(real: Callable[..., Any]) -> Callable[..., Any]:
    """A prefix that gets no gradient from what is below it."""

    def backward(*args: Any) -> Any:
        dq, dk, dv = real(*args)
        call = args[6]
        return (dq, dk, dv) if call.causal else (dq, 0 * dk, 0 * dv)

    return backward


def _unmerged(real: Callable[..., Any]) -> Callable[..., Any]:
    """A backward by each call's own softmax, instead of the merged one."""

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, call: Any, scale: float) -> Any:
        own, of_own = tree_attention._forward(q, k, v, call, scale)
        return real(grad, q, k, v, own, of_own, call, scale)

    return backward


@pytest.mark.parametrize("wrong", [_detached, _unmerged])
def test_these_comparisons_see_a_wrong_backward(
    exact: Model, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(tree_attention, "_backward", wrong(tree_attention._backward))
    assert difference(exact, RAGGED) > 1e-3


def test_these_comparisons_see_positions_that_are_not_depths(exact: Model) -> None:
    first = [0] * len(RAGGED)
    good = Pack.of(RAGGED, first, CPU, min_saving=1)
    bad = Pack(good.ids, torch.arange(len(good.ids)), good.wanted, good.calls)
    expected = separate(exact, RAGGED, first)
    assert (packed_hidden(exact, good) - expected).norm() < 1e-12 * expected.norm()
    assert (packed_hidden(exact, bad) - expected).norm() > 1e-3 * expected.norm()


def test_ordinary_passes_stay_bit_equal_after_packed_ones_and_after_a_failed_one(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = model.config._attn_implementation
    before = separate(model, RAGGED, [0] * len(RAGGED))
    packed(model, RAGGED, [0] * len(RAGGED))
    assert torch.equal(separate(model, RAGGED, [0] * len(RAGGED)), before)
    monkeypatch.setattr(tree_attention, "_forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed(model, RAGGED, [0] * len(RAGGED))
    assert model.config._attn_implementation == usual
    assert torch.equal(separate(model, RAGGED, [0] * len(RAGGED)), before)


def test_models_are_packed_unless_their_attention_is_another(model: Model, tmp_path: Path) -> None:
    assert unpackable(model) == ""
    model.lm.base_model.layers[0].self_attn.attention_dropout = 0.1
    assert unpackable(model) == ""  # eval mode: none is applied
    model.lm.train()
    assert "dropout" in unpackable(model)
    model.lm.eval()


@pytest.mark.parametrize(
    ("family", "why"), [("gemma2", "caps its attention"), ("gemma3", "sliding window of 8"), ("mistral", "window of 8")]
)
def test_windows_and_capped_logits_are_refused(family: str, why: str, tmp_path: Path) -> None:
    assert why in unpackable(tiny(family, tmp_path))


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = GptOssConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, eos_token_id=1,
        layer_types=["full_attention"] * 2, max_position_embeddings=512,
    )  # fmt: skip
    llama = load_model(str(folder))
    model = Model(GptOssForCausalLM(config).eval(), llama.tokenizer, "gpt-oss")
    assert "s_aux" in unpackable(model)


def test_a_layer_that_mixes_neighbours_is_found_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no argument tells: e.g. a convolution over tokens, which a packed row would carry over branches."""
    norm = model.lm.base_model.norm
    real = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: real(x + 0.5 * x.roll(1, 1)))
    assert "more than a token's ancestors" in unpackable(model)


def test_a_mask_of_the_models_own_is_an_error() -> None:
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match="mask of its own"):
        tree_attention.attend(torch.nn.Module(), x, x, x, torch.zeros(1), tree=[])
