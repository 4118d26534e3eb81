"""Gradients that are known before `.backward()` is called, attached to the loss they belong to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def reject_second_order(name: str) -> None:
    """Call inside a hand-written backward: autograd runs it with gradients enabled only for create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True")


Gradients = tuple[Tensor | None, ...]
Place = Callable[[Gradients], Gradients]


def reject_forward_mode(*tensors: Tensor | None) -> None:
    """Call where tensors come in: what follows would drop their tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("fst_kernels has no forward-mode derivatives: use backward, or fst_kernels.reference")


def reject_vmap(x: Tensor) -> None:
    """Call where a tensor comes in that a loss depends on: inside torch.vmap it looks as if it needed no gradient."""
    if not torch.is_grad_enabled():
        return
    outer = x
    while torch._C._functorch.is_batchedtensor(outer):
        outer = torch._C._functorch.get_unwrapped(outer)
    if outer is not x and outer.requires_grad:
        raise RuntimeError("fst_kernels has no gradients inside torch.vmap: call it once for each loss")


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, place: Place | None, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.place = place
        ctx.dtypes = [_gradient_dtype(x) for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        reject_second_order("the fused policy loss")
        # A product, never in place: a second backward(retain_graph=True) reads the saved gradients again.
        if ctx.place is not None:
            scaled = tuple(_scaled(g, upstream[0], None) for g in ctx.saved_tensors)
            return None, None, None, *ctx.place(scaled)
        found = (_scaled(g, upstream[0], dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, None, *found


def _gradient_dtype(x: Tensor | None) -> torch.dtype | None:
    """What autograd casts the gradient of x to; None in a graph of torch.compile, which does not carry it."""
    if x is None or torch.compiler.is_compiling():
        return None
    return x.grad_dtype if x.is_leaf else x.dtype


def _scaled(g: Tensor | None, by: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """g · by, rounded at once where that is known: no fp32 product lies beside the sums of a head.

    by [1], not (): a GPU would round a number to the dtype of a bf16 g first, and a third is then .2 % off everywhere.
    """
    return None if g is None else torch.mul(g, by[None], out=torch.empty_like(g, dtype=dtype or g.dtype))


def attach_gradients(loss: Tensor, inputs: Gradients, gradients: Gradients, place: Place | None = None) -> Tensor:
    """The value of `loss`, with d loss / d inputs[i] = gradients[i]. Autograd casts each to its input's dtype.

    place: takes these gradients, times that of the loss, to where the inputs lie; called in every backward pass.
    """
    return _KnownGradients.apply(loss, gradients, place, *inputs)
