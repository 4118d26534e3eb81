"""The row step on a GPU: cuBLAS writes a chunk of fp32 logits, one Triton kernel measures it and makes its gradient.

A bf16 gradient lies in the first half of each row of the logits it came from: the chunk is the only large tensor there
is, which a buffer of its own would raise to 1.5 chunks. Rounding d logits to bf16 is what products of bf16 operands
ask for (every bf16 training step does it), and costs 2e-3 of dX and dW against float64; kernels.md's 1e-3 is meant
against the same rounding.
"""

import torch
import triton
from torch import Tensor

from .blocks import Ask, Measures, Multiplier
from .objective import PolicyRows
from .triton_kernels import row_kernel

INTERPRETED = not isinstance(row_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: the kernel runs on CPU tensors
# Items and warps of a program; half the items with a reference, which doubles what a lane holds. Not measured on a GPU:
# chosen from compiled code, where 4096 items take twice the registers (two programs a multiprocessor instead of five).
BLOCK, WARPS = 2048, 8
WIDTH = 16  # rows of logits begin at multiples of this, so that loads are 16 bytes wide whatever V is


def row_step(
    head: Multiplier, rows: Tensor, ask: Ask, upstream: Measures | PolicyRows | None, grad_dtype: torch.dtype
) -> tuple[Measures, Tensor | None]:
    n, v = len(rows), len(head.weight)
    logits = _logits(head, rows)
    ref_logits = None if ask.ref is None else _logits(ask.ref, rows)

    def per_row(wanted: bool) -> Tensor | None:
        return torch.empty(n, dtype=torch.float32, device=rows.device) if wanted else None

    found = Measures(
        per_row(ask.targets is not None), per_row(ask.entropy), per_row(ask.ref is not None), per_row(True)
    )
    grad = None if upstream is None else logits if grad_dtype == logits.dtype else logits.view(grad_dtype)
    kind, low, high, behavior, advantages, weights = "given", 0.0, 0.0, None, None, None
    slopes = Measures()
    if isinstance(upstream, PolicyRows):
        kind, (low, high) = upstream.objective.kind, upstream.objective.bounds
        behavior, advantages, weights = upstream.behavior_logprobs, upstream.advantages, upstream.weights
        slopes = Measures(None, *upstream.term_slopes())
    elif upstream is not None:
        slopes = Measures(*(None if g is None else g.contiguous() for g in upstream))
    if n:
        with torch.cuda.device_of(logits):
            row_kernel[(n,)](
                logits,
                ref_logits,
                _bias(head),
                None if ask.ref is None else _bias(ask.ref),
                grad,
                ask.targets,
                _temperature(head, rows),
                *found,
                *slopes,
                behavior,
                advantages,
                weights,
                float(low),
                float(high),
                float(head.source.softcap or 0),
                v,
                logits.stride(0),
                0 if grad is None else grad.stride(0),
                KIND=kind,
                CAPPED=head.source.softcap is not None,
                FORWARD_KL=ask.forward_kl,
                BLOCK=BLOCK if ref_logits is None else BLOCK // 2,
                num_warps=WARPS,
                enable_fp_fusion=False,  # both passes then see the same logits, and no log-prob is above 0
            )
    return found, None if grad is None else grad[:, :v]


def _logits(head: Multiplier, rows: Tensor) -> Tensor:
    """The head's product alone, (n, V and some padding)."""
    v = len(head.weight)
    width = triton.cdiv(v, WIDTH) * WIDTH
    logits = torch.empty(len(rows), width, dtype=torch.float32, device=rows.device)
    head.product(head.inputs(rows), head.weight.T, out=logits[:, :v])
    return logits


def _bias(head: Multiplier) -> Tensor | None:
    bias = head.source.bias
    return None if bias is None else bias.contiguous()


def _temperature(head: Multiplier, rows: Tensor) -> Tensor | None:
    t = head.source.temperature
    if t.ndim == 0 and t.device.type == "cpu" and t.item() == 1:
        return None
    t = t.to(device=rows.device, dtype=torch.float32)
    return t[rows] if t.ndim else t.expand(len(rows)).contiguous()
