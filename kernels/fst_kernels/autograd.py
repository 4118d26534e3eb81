"""Gradients that are known before `.backward()` is called, attached to the loss they belong to."""

from typing import Any

import torch
from torch import Tensor


def reject_second_order(name: str) -> None:
    """Call inside a hand-written backward: autograd runs it with gradients enabled only for create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True")


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        reject_second_order("the fused policy loss")
        # A product, never in place: a second backward(retain_graph=True) reads the saved gradients again.
        return None, None, *(None if g is None else g * upstream[0] for g in ctx.saved_tensors)


def attach_gradients(loss: Tensor, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
    """The value of `loss`, with d loss / d inputs[i] = gradients[i]. Autograd casts each to its input's dtype."""
    return _KnownGradients.apply(loss, gradients, *inputs)
