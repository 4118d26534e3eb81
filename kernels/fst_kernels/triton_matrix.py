"""Log-probs, entropy and logsumexp without storing a logit: one matrix kernel for Hopper with an online softmax.

A program multiplies a block of rows with tile after tile of the weight and folds every tile of logits, still in the
registers it was accumulated in, into four numbers a row. The vocabulary is split so that the programs fill the GPU in
whole waves; the parts are joined afterwards, in a fixed order: no atomics, the same bits on every run.

What it saves is the fp32 chunk written and read (8 bytes a logit), what it costs is a softmax that the tensor cores
wait for. A multiprocessor needs 16 H clocks for a tile of 128 x 256 logits, and 3.1 thousand for its softmax: 1530
instructions in each of 8 warps, 4 issued a clock, the 16 exponentials a clock (2048 clocks) among them. That is 5 % at
H = 4096 and 19 % at H = 1024 with one program a multiprocessor; of two programs, one multiplies while the other sums,
but tiles of half the size read a third more of the L2 cache. Which is better, and whether either beats the chunks, is
to be measured: not the default yet.
"""
# mypy: allow-untyped-defs, no-check-untyped-defs

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .blocks import Measures
from .triton_kernels import LOWEST, _tanh
from .types import Head


class Tiles(NamedTuple):
    """How the product is cut. A program's shared memory holds stages · (rows + items) · depth operands."""

    rows: int
    items: int  # of the vocabulary
    depth: int  # of H
    warps: int
    stages: int
    programs: int  # on a multiprocessor at a time
    group: int  # blocks of rows that pass the same weights together, while their hidden states stay in the L2 cache


# Compiled for sm_90a without spills by triton 3.6 and 3.7 (but for a bias and a softcap together, which no known model
# has). The first is used: the fastest on an H200 at Qwen3-8B's head (benchmarks/tune.py: 61.8 ms; the others 68.8, 65.1
# and 72.4).
CONFIGURATIONS = (
    Tiles(rows=256, items=128, depth=64, warps=8, stages=4, programs=1, group=8),
    Tiles(rows=128, items=256, depth=64, warps=8, stages=4, programs=1, group=16),
    Tiles(rows=128, items=256, depth=64, warps=8, stages=3, programs=1, group=16),
    Tiles(rows=128, items=128, depth=64, warps=4, stages=3, programs=2, group=16),
)


def refusal(hidden: Tensor, weight: Tensor) -> str | None:
    """Why such a head cannot be measured here; None if it can. fp32 operands would be rounded to tf32."""
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden and weight must both be bf16 or both fp16, got {hidden.dtype} and {weight.dtype}"
    if not INTERPRETED and not (hidden.is_cuda and torch.cuda.get_device_capability(hidden.device)[0] == 9):
        return f"it needs tensors on a Hopper GPU, got {hidden.device}"
    for name, x in (("hidden", hidden), ("weight", weight)):
        # What the copy engine asks for: rows that begin at multiples of 16 bytes.
        if x.shape[1] == 0 or x.shape[1] % 8 or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            return (
                f"{name} must have dense rows of a positive multiple of 8 elements, 16-byte aligned,"
                f" got shape {list(x.shape)} and strides {list(x.stride())}"
            )
    return None if len(weight) else "weight must have at least one row, got none"


def measure(head: Head, targets: Tensor, entropy: bool, tiles: Tiles = CONFIGURATIONS[0]) -> Measures:
    """`blocks.measure` without a reference, of a head that is not refused."""
    n, (v, h), device = len(head.hidden), head.weight.shape, head.hidden.device
    blocks, parts = triton.cdiv(n, tiles.rows), triton.cdiv(v, tiles.items)
    splits = _splits(blocks, parts, tiles.programs * _multiprocessors(device))
    scale = (head.softcap or 1) * math.log2(math.e) / head.temperature.to(device=device, dtype=torch.float64)
    scale = scale.expand(n).float().contiguous()  # from accumulators, or their tanh, to logits in units of log 2
    peak, total, chosen, *moment = torch.empty(3 + entropy, splits, n, device=device)
    if n:
        with torch.cuda.device_of(head.hidden):
            matrix_kernel[(blocks * splits,)](
                TensorDescriptor.from_tensor(head.hidden, [tiles.rows, tiles.depth]),
                TensorDescriptor.from_tensor(head.weight, [tiles.items, tiles.depth]),
                None if head.bias is None else head.bias.contiguous(),
                scale,
                targets.contiguous(),
                peak,
                total,
                chosen,
                moment[0] if entropy else None,
                1 / (head.softcap or 1),
                n,
                v,
                h,
                splits,
                triton.cdiv(parts, splits),
                CAPPED=head.softcap is not None,
                ROWS=tiles.rows,
                ITEMS=tiles.items,
                DEPTH=tiles.depth,
                GROUP=tiles.group,
                INTERPRETED=INTERPRETED,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return _join(peak, total, chosen, moment[0] if entropy else None, scale)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _splits(blocks: int, parts: int, programs: int) -> int:
    """Into how many parts to cut the vocabulary: the fewest of those that take the least time in whole waves."""

    def time(splits: int) -> float:
        filling = 0.125  # of a tile's time, to fill and drain a program's pipeline: keeps programs long
        return triton.cdiv(blocks * splits, programs) * (triton.cdiv(parts, splits) + filling)

    return min(range(1, min(parts, programs) + 1), key=time)


def _join(peaks: Tensor, totals: Tensor, chosen: Tensor, moments: Tensor | None, scale: Tensor) -> Measures:
    """The measures of whole rows (N,), from those of the parts (splits, N)."""
    peak = peaks.amax(0)
    fall = peaks - peak
    weight = fall.exp2()
    total = (weight * totals).sum(0)
    # The target's logit meets the peak before it is rounded. Clamped is only what rounding leaves above 0.
    gap = (chosen.sum(0).double() * scale - peak) - total.double().log2()
    logprobs = (math.log(2) * gap).float().clamp(max=0)
    entropy = None
    if moments is not None:
        moment = (weight * (moments + fall * totals)).sum(0)
        entropy = (math.log(2) * (total.log2() - moment / total)).clamp(min=0)
    return Measures(logprobs, entropy, None, math.log(2) * (peak + total.log2()))


@triton.jit
def _above(x, scale, peak, INTERPRETED: tl.constexpr):
    """x · scale − peak, rounded once."""
    scale, peak = tl.broadcast_to(scale[:, None], x.shape), tl.broadcast_to(peak[:, None], x.shape)
    if INTERPRETED:  # there fma rounds twice
        return (x.to(tl.float64) * scale - peak).to(tl.float32)
    return tl.fma(x, scale, -peak)


@triton.jit(do_not_specialize=["N", "splits", "tiles"])  # they change from batch to batch
def matrix_kernel(
    hidden,  # descriptor of (N, H)
    weight,  # descriptor of (V, H)
    bias,  # (V,) or None
    scale,  # (N,)
    targets,  # (N,) int64
    peak_out,  # (splits, N) each: an upper bound of the scaled logits, at one of them but for rounding
    total_out,  # Σ 2^u, u = scaled logit − peak
    chosen_out,  # the target's unscaled logit, 0 where it is not in this part
    moment_out,  # Σ 2^u u, or None
    inverse_softcap,
    N,
    V,
    H,
    splits,
    tiles,  # of the vocabulary, a split
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Programs that run together share weights and hidden states: GROUP blocks of rows, split after split.
    program = tl.program_id(0)
    first = program // (GROUP * splits) * GROUP
    size = tl.minimum(GROUP, tl.cdiv(N, ROWS) - first)
    member = program % (GROUP * splits)
    row = (first + member % size) * ROWS
    split = member // size

    rows = row + tl.arange(0, ROWS)
    live = rows < N
    target = tl.load(targets + rows, mask=live, other=-1).to(tl.int32)
    scale = tl.load(scale + rows, mask=live, other=1.0)
    lanes = tl.arange(0, ITEMS)
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)

    # One loop over tiles and depth, so that the next tile's operands arrive during the softmax of this one. Written by
    # hand: tl.range(flatten=True) of two loops made triton 3.6 and 3.7 read accumulators that were not waited for.
    # Likewise x is zeroed inside the branch: a select outside has every step wait for its own product.
    deepest = (H - 1) // DEPTH * DEPTH
    start, k = (split * tiles - 1) * ITEMS, deepest
    x = tl.zeros([ROWS, ITEMS], tl.float32)
    for _ in range(tiles * tl.cdiv(H, DEPTH)):
        start = tl.where(k == deepest, start + ITEMS, start)
        k = tl.where(k == deepest, 0, k + DEPTH)
        a, b = hidden.load([row, k]), weight.load([start, k])
        if INTERPRETED:  # its bf16 products are wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b.T, x)
        if k == deepest:
            if bias is not None:
                x += tl.load(bias + start + lanes, mask=lanes < V - start, other=0.0).to(tl.float32)[None, :]
            if CAPPED:
                x = _tanh(x * inverse_softcap)
            x = tl.where((lanes < V - start)[None, :], x, float("-inf"))
            chosen += tl.sum(tl.where(lanes[None, :] == (target - start)[:, None], x, 0.0), 1)
            higher = tl.maximum(peak, tl.max(x, 1) * scale)
            fall = peak - higher
            old = tl.exp2(fall)
            u = _above(x, scale, higher, INTERPRETED)
            if moment_out is not None:
                u = tl.maximum(u, -160.0, propagate_nan=tl.PropagateNan.ALL)  # 0 · −inf would be NaN
                moment = old * (moment + fall * total) + tl.sum(tl.exp2(u) * u, 1)
            total = old * total + tl.sum(tl.exp2(u), 1)
            peak = higher
            x = tl.zeros([ROWS, ITEMS], tl.float32)

    to = split.to(tl.int64) * N + rows
    tl.store(peak_out + to, peak, mask=live)
    tl.store(total_out + to, total, mask=live)
    tl.store(chosen_out + to, chosen, mask=live)
    if moment_out is not None:
        tl.store(moment_out + to, moment, mask=live)


INTERPRETED = not isinstance(matrix_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: the kernel runs on CPU tensors
