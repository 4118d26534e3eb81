"""What the row kernels of a GPU take, from a row step's arguments: contiguous vectors, numbers, room for measures."""

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Ask, Measures
from .objective import PolicyRows
from .types import Logits


class RowArguments(NamedTuple):
    """Of n rows; vectors are (n,), None where there is nothing or nobody asks."""

    bias: Tensor | None  # (V,)
    ref_bias: Tensor | None  # (V,)
    targets: Tensor | None
    temperature: Tensor | None  # fp32; None: 1
    found: Measures  # to be filled
    slopes: Measures  # of the loss; that in the log-probs only if kind is "given"
    kind: str  # of the objective that makes it otherwise, from what follows
    low: float  # the ratio's bounds
    high: float
    behavior: Tensor | None
    advantages: Tensor | None
    weights: Tensor | None


def row_arguments(logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None) -> RowArguments:
    n, device = len(logits.products), logits.products.device

    def per_row(wanted: bool) -> Tensor | None:
        return torch.empty(n, dtype=torch.float32, device=device) if wanted else None

    found = Measures(
        per_row(ask.targets is not None), per_row(ask.entropy), per_row(ask.ref is not None), per_row(True)
    )
    slopes, low, high = Measures(), 0.0, 0.0
    kind, behavior, advantages, weights = "given", None, None, None
    if isinstance(upstream, PolicyRows):
        slopes = Measures(None, *upstream.term_slopes())
        kind, (low, high) = upstream.objective.kind, upstream.objective.bounds
        behavior, advantages, weights = upstream.behavior_logprobs, upstream.advantages, upstream.weights
    elif upstream is not None:
        slopes = Measures(*(_contiguous(g) for g in upstream))
    return RowArguments(
        _contiguous(logits.bias),
        None if ask.ref is None else _contiguous(ask.ref.bias),
        _contiguous(ask.targets),
        _temperature(logits.temperature, n, device),
        found,
        slopes,
        kind,
        float(low),
        float(high),
        behavior,
        advantages,
        weights,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _temperature(temperature: Tensor, n: int, device: torch.device) -> Tensor | None:
    if temperature.ndim == 0 and temperature.device.type == "cpu" and temperature.item() == 1:
        return None
    return temperature.to(device=device, dtype=torch.float32).expand(n).contiguous()
