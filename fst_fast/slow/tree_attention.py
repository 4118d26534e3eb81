"""Attention over tokens packed as a trie: each sees its ancestors and itself, and a shared prefix is computed once.

Flash kernels see no trie, so it is cut into calls they know: a node's own tokens causally, and all tokens below a node
unmasked onto that node's keys. Partial results are merged by their log-sum-exp; the backward gives every call's kernel
the merged output and log-sum-exp, as ring attention does (Liu et al. 2023, arXiv:2310.01889). No ancestor is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from fst_fast.errors import UserError
from fst_fast.model import Model
from fst_fast.prefix_tree import PrefixTree

NAME = "fst_tree"  # in transformers' AttentionInterface
BLOCK = 128  # the CPU's causal kernel computes what it masks: 700 tokens at once took 1.5 times those in such blocks

Cumulative = tuple[
    torch.Tensor, torch.Tensor, int, int
]  # as flash attention's `cu_seqlens` of q and k, and the longest


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call: packed tokens [q, q_end) onto [k, k_end), causally (then they are the same) or all onto all."""

    q: int
    q_end: int
    k: int
    k_end: int
    causal: bool
    cu: Cumulative | None = None  # on a GPU


def calls_of(tree: PrefixTree, device: torch.device) -> list[Call]:
    """The calls for tokens packed node after node. The causal ones come first and cover every token once."""
    lengths = [node.end - node.start for node in tree.nodes]
    below = [0] * len(lengths)  # tokens below each node; they follow its own
    for k in reversed(range(len(lengths))):
        if (parent := tree.nodes[k].parent) >= 0:
            below[parent] += lengths[k] + below[k]
    bounds = [0, *accumulate(lengths)]
    down = [Call(end, end + n, start, end, False) for (start, end), n in zip(pairwise(bounds), below, strict=True) if n]
    if device.type == "cuda":
        return _gpu_calls(bounds, down, device)
    blocks = [(start, i, min(i + BLOCK, end)) for start, end in pairwise(bounds) for i in range(start, end, BLOCK)]
    own = [Call(i, end, i, end, True) for _, i, end in blocks]
    return own + [Call(i, end, start, i, False) for start, i, end in blocks if start < i] + down


def _gpu_calls(bounds: Sequence[int], down: Sequence[Call], device: torch.device) -> list[Call]:
    """All nodes' own tokens are one call with variable lengths; `bounds` of the nodes are int32 there."""

    def cu(q: Sequence[int], k: Sequence[int]) -> Cumulative:
        on_device = [torch.tensor(x, dtype=torch.int32, device=device) for x in (q, k)]
        longest = [max(b - a for a, b in pairwise(x)) for x in (q, k)]
        return on_device[0], on_device[1], longest[0], longest[1]

    own = Call(0, bounds[-1], 0, bounds[-1], True, cu(bounds, bounds))
    return [own] + [replace(c, cu=cu([0, c.q_end - c.q], [0, c.k_end - c.k])) for c in down]


class TreeAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale) v over ancestors: q [T, H, D], k and v [T, K, D] (K divides H) → [T, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: Sequence[Call], scale: float
    ) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)  # what partial results are summed in
        out = q.new_empty(q.shape, dtype=wide)
        lse = q.new_empty(q.shape[:2], dtype=wide)
        for c in calls:
            part, of_part = _forward(q[c.q : c.q_end], k[c.k : c.k_end], v[c.k : c.k_end], c, scale)
            if c.causal:
                out[c.q : c.q_end], lse[c.q : c.q_end] = part, of_part
                continue
            mine = lse[c.q : c.q_end]
            out[c.q : c.q_end].lerp_(part.to(wide), torch.sigmoid(of_part - mine)[..., None])
            torch.logaddexp(mine, of_part, out=mine)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
        for c in ctx.calls:
            rows, keys = slice(c.q, c.q_end), slice(c.k, c.k_end)
            parts = _backward(grad[rows], q[rows], k[keys], v[keys], out[rows], lse[rows], c, ctx.scale)
            for total, part in zip((dq[rows], dk[keys], dv[keys]), parts, strict=True):
                total.copy_(part) if c.causal else total.add_(part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one call [q, H, D] and its log-sum-exp [q, H]."""
    if c.cu is not None:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *c.cu, 0.0, c.causal, False, scale=scale)
        return out, lse.T
    q, k, v = _grouped(q, k, v)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, c.causal, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1)


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    c: Call, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """This call's share of the gradients of q [q, H, D] and k, v [k, K, D]; `out` and `lse` are the merged ones."""
    if c.cu is not None:
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that there is not
        return torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse.T.contiguous(), *c.cu, 0.0, c.causal, random, random[:0], scale=scale
        )
    groups = k.shape[1]
    grad, out = (x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3) for x in (grad, out))
    lse = lse.unflatten(1, (groups, -1)).permute(1, 2, 0)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *_grouped(q, k, v), out, lse, 0.0, c.causal, scale=scale
    )
    return dq.permute(2, 0, 1, 3).flatten(1, 2), dk.sum(1).transpose(0, 1), dv.sum(1).transpose(0, 1)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As views [K, H / K, tokens, D]: key heads take the kernel's batch axis, so that none is repeated in memory."""
    grouped = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    shared = (x.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    return (grouped, *shared)


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object,
    *, tree: Sequence[Call], scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls: query [1, H, T, D], key and value [1, K, T, D] → [1, T, H, D].

    Raises UserError for what would change the numbers and the kernels cannot do.
    """
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(f"{type(module).__name__} has {name}, which tree attention does not know")
    if dropout or attention_mask is not None:
        raise UserError("the model has dropout or a mask of its own, which tree attention does not know")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return TreeAttention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), tree, scale)[None], None


def tree_hidden(model: Model, ids: torch.Tensor, positions: torch.Tensor, calls: Sequence[Call]) -> torch.Tensor:
    """Final hidden states [T, H] of packed token ids [T] at depths `positions` [T]."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    usual = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        return model.hidden(ids[None], position_ids=positions[None], tree=calls, use_cache=False)[0]
    finally:
        model.config._attn_implementation = usual
