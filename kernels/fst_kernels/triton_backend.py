"""The row step on a GPU: cuBLAS writes a chunk of fp32 logits, one Triton kernel measures it and makes its gradient.

A bf16 gradient lies in the first half of each row of the logits it came from: the chunk is the only large tensor there
is, which a buffer of its own would raise to 1.5 chunks. Rounding d logits to bf16 is what products of bf16 operands
ask for (every bf16 training step does it), and costs 2e-3 of dX and dW against float64; kernels.md's 1e-3 is meant
against the same rounding.
"""

import torch
import triton
from torch import Tensor

from .blocks import WIDTH, Ask, Measures
from .objective import PolicyRows
from .row_arguments import row_arguments
from .triton_kernels import row_kernel
from .types import Logits

INTERPRETED = not isinstance(row_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: the kernel runs on CPU tensors
# Items and warps of a program: within 1 % of the fastest on an H200 (tune.py), when measuring took twice the
# instructions that it takes now.
BLOCK, WARPS = 2048, 8


def row_step(logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None, grad: Tensor | None) -> Measures:
    products, ref = logits.products, None if ask.ref is None else ask.ref.products
    n, v = products.shape
    width = triton.cdiv(v, WIDTH) * WIDTH if logits.ours else v
    given = row_arguments(logits, ask, upstream)
    if n:
        with torch.cuda.device_of(products):
            row_kernel[(n,)](
                products,
                ref,
                given.bias,
                given.ref_bias,
                grad,
                given.targets,
                given.temperature,
                *given.found,
                *given.slopes,
                given.behavior,
                given.advantages,
                given.weights,
                given.low,
                given.high,
                float(logits.softcap or 0),
                v,
                width,
                products.stride(0),
                0 if ref is None else ref.stride(0),
                0 if grad is None else grad.stride(0),
                KIND=given.kind,
                CAPPED=logits.softcap is not None,
                FORWARD_KL=ask.forward_kl,
                BLOCK=BLOCK,
                RUN=16 // products.element_size(),
                NEIGHBOURS=not any(x % 16 for x in (products.data_ptr(), products.stride(0), width)),
                num_warps=WARPS,
                enable_fp_fusion=False,  # both passes then see the same logits, and no log-prob is above 0
            )
    return given.found
