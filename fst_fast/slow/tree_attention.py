"""Attention over a token trie: every token sees its ancestors, and a shared prefix is computed once. Exact.

Tokens lie depth-first, so that whatever stands below a node is one slice after it. On a CPU the keys of a node are seen
by its own tokens causally and by all tokens below it whole: one kernel call a node. Outputs are merged by their
log-sum-exp, and backward hands each call the merged output and log-sum-exp, as ring attention does (arXiv 2310.01889).
On a GPU launches cost more than copies: the nodes are the sequences of one call, each with a copy of the keys above it
(a training step of Qwen3-1.7B on an H200: .39 s, with a call a node .54, with FlexAttention .38 and its compilation).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fst_fast.model import on_device

NAME = "fst_tree"
COPIED_KEYS = 2**16  # tokens in one call on a GPU: with 8 KV heads for 32 of 128, its copies and gradients take 1.6 GB


class Span(NamedTuple):
    """A node of the trie: its tokens are [start, end), those below it [end, stop)."""

    start: int
    end: int
    stop: int
    top: bool  # it has no ancestors


class Paths(NamedTuple):
    """Some neighbouring nodes as sequences of flash attention: the queries of each are its tokens, its keys those of
    its ancestors and its own, so that a causal mask at the bottom right is the trie's."""

    rows: slice  # of the nodes' tokens
    keys: torch.Tensor  # int64 [K]: where each node's keys are, node after node
    cu_q: torch.Tensor  # int32 [nodes + 1]: where each node begins in rows
    cu_k: torch.Tensor  # int32 [nodes + 1]: and in keys
    longest_q: int
    longest_k: int


class Tree(NamedTuple):
    """The nodes of a trie, depth-first, and what flash attention on a GPU takes for them (elsewhere nothing)."""

    spans: list[Span]
    paths: list[Paths]

    @staticmethod
    def of(spans: list[Span], device: torch.device) -> Tree:
        return Tree(spans, _paths(spans, device) if device.type == "cuda" else [])


def _paths(spans: list[Span], device: torch.device) -> list[Paths]:
    calls: list[list[np.ndarray]] = []  # of each its nodes' keys
    copied, path = COPIED_KEYS, list[Span]()
    for span in spans:
        while path and path[-1].stop <= span.start:
            path.pop()
        path.append(span)
        keys = np.concatenate([np.arange(x.start, x.end) for x in path])
        copied += len(keys)
        if copied > COPIED_KEYS:
            calls.append([])
            copied = len(keys)
        calls[-1].append(keys)
    out, begin = [], 0
    for nodes in calls:
        mine = [span.end - span.start for span in spans[begin : begin + len(nodes)]]
        seen = [len(keys) for keys in nodes]
        cu_q, cu_k = (on_device(np.cumsum([0, *x]).astype(np.int32), device) for x in (mine, seen))
        start = spans[begin].start
        out.append(
            Paths(
                slice(start, start + sum(mine)),
                on_device(np.concatenate(nodes), device),
                cu_q,
                cu_k,
                max(2, *mine),  # 1 would have the kernel fold heads into queries: another layout, for nothing
                max(seen),
            )
        )
        begin += len(nodes)
    return out


def install(lm: Any) -> None:
    """Let a transformers model attend over tries where its forward pass gets `tree`, and as before where not."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    lm.set_attn_implementation(NAME)


def inputs(spans: list[Span], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a forward pass over the trie: no mask is made for a mask that comes with four dimensions."""
    return {
        "tree": Tree.of(spans, device),
        "attention_mask": torch.empty(1, 1, 0, 0, device=device),
        "use_cache": False,
    }


def tree_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float) -> torch.Tensor:
    """softmax(scale · q kᵀ) v over each token's ancestors and itself: [1, H, N, D].

    q [1, H, N, D], k and v [1, KV heads, N, D] with KV heads a divisor of H. Differentiable in q, k, v, once. Any
    floating dtype on a CPU; on a GPU bf16 and fp16 take flash attention (D a multiple of 8 up to 256), the others plain
    products.
    """
    if tree.paths and _on_flash(q):
        return _PathAttention.apply(*(x[0].transpose(0, 1) for x in (q, k, v)), tree.paths, scale).transpose(0, 1)[None]
    heads, n, d = q.shape[1:]
    groups = heads // k.shape[1]
    q = q.reshape(-1, groups, n, d)  # [KV heads, heads that share them, N, D]: keys are not copied
    out = _TreeAttention.apply(q, k[0], v[0], tree.spans, scale)
    return out.reshape(1, heads, n, d)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: [1, N, H, D] and no attention weights."""
    if tree is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} has {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree_attention(query, key, value, tree, scale).transpose(1, 2), None


class _PathAttention(torch.autograd.Function):
    """Of q [N, H, D], k and v [N, KV heads, D]: [N, H, D], by torch's flash attention for variable lengths."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paths: list[Paths], scale: float
    ) -> torch.Tensor:
        outs, lses = [], []
        for p in paths:
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                q[p.rows], k[p.keys], v[p.keys], *p[2:], 0.0, True, False, scale=scale
            )
            outs.append(out)
            lses.append(lse)
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        ctx.save_for_backward(q, k, v, out, *lses)
        ctx.paths, ctx.scale = paths, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *lses = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is not
        for p, lse in zip(ctx.paths, lses, strict=True):
            dq[p.rows], part_k, part_v = torch.ops.aten._flash_attention_backward(
                grad[p.rows].contiguous(), q[p.rows], k[p.keys], v[p.keys], out[p.rows], lse, *p[2:], 0.0, True,
                random, random[:0], scale=ctx.scale,
            )  # fmt: skip
            _add(dk, p.keys, part_k)
            _add(dv, p.keys, part_v)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _add(total: torch.Tensor, at: torch.Tensor, parts: torch.Tensor) -> None:
    """Gradients of copied keys [K, ...] to those of the keys [N, ...], `at` which they were."""
    total.index_add_(0, at, parts.to(total.dtype))


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: list[Span], scale: float
    ) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(q.shape, dtype=wide)
        lse = q.new_empty(q.shape[:-1], dtype=wide)
        for span in spans:
            rows = slice(span.start, span.stop)
            part, part_lse = _forward(q[..., rows, :], *_keys(k, v, span, q.shape[1]), scale)
            if span.top:
                out[..., rows, :], lse[..., rows] = part, part_lse
            else:
                so_far = lse[..., rows]
                weight = torch.sigmoid(part_lse - so_far)[..., None]
                out[..., rows, :].lerp_(part.to(wide), weight)
                torch.logaddexp(so_far, part_lse, out=so_far)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq = torch.empty_like(q, dtype=lse.dtype)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for span in ctx.spans:
            rows, own = slice(span.start, span.stop), slice(span.start, span.end)
            keys = _keys(k, v, span, q.shape[1])
            of_rows = grad[..., rows, :], q[..., rows, :], *keys, out[..., rows, :], lse[..., rows]
            part, *parts = _backward(*of_rows, ctx.scale)
            if span.top:
                dq[..., rows, :] = part
            else:
                dq[..., rows, :] += part
            dk[:, own], dv[:, own] = (x.sum(1, dtype=lse.dtype) for x in parts)
        return dq.to(q.dtype), dk, dv, None, None


def _keys(k: torch.Tensor, v: torch.Tensor, span: Span, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[KV heads, groups, keys, D], the same memory for every head of a group."""
    k, v = (x[:, None, span.start : span.end].expand(-1, groups, -1, -1) for x in (k, v))
    return k, v


def _on_cpu(q: torch.Tensor) -> bool:
    return q.device.type == "cpu"


def _on_flash(q: torch.Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [..., L, D] and log-sum-exp [..., L] of queries [..., L, D] over keys [..., S, D], S ≤ L: query i sees the
    keys up to i, and those after the last key see all of them, as torch's CPU kernel aligns its causal mask."""
    if _on_cpu(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    scores = _scores(q, k, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v where `out` and `lse` are those over *all* keys: probabilities come out right without the
    other keys."""
    if _on_cpu(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )
    p = (_scores(q, k, scale) - lse[..., None]).exp()
    delta = (grad * out).sum(-1, dtype=lse.dtype)
    ds = p * ((grad @ v.mT).to(lse.dtype) - delta[..., None]) * scale
    return ds.to(k.dtype) @ k, ds.to(q.dtype).mT @ q, p.to(grad.dtype).mT @ grad


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~seen, float("-inf"))
