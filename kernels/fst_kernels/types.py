"""The records that go in and out of the kernels. N tokens, H hidden size, V vocabulary."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from .autograd import reject_forward_mode

OPERANDS = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Differentiable, per token, under softmax(logits / temperature); fp32, or fp64 for fp64 inputs."""

    logprobs: Tensor  # (N,) of the targets
    entropy: Tensor | None  # (N,) over the whole vocabulary, in nats; None unless asked for
    logsumexp: Tensor  # (N,) of the logits after softcap and temperature


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """A scalar to call `.backward()` on, and detached numbers to log; per-token tensors are 0 at masked rows."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]  # each (); means are over unmasked tokens
    logprobs: Tensor | None = None  # (N,)
    entropy: Tensor | None = None  # (N,)
    kl: Tensor | None = None  # (N,) exact KL(policy‖ref); None without a reference


for _record in (TokenLogprobs, PolicyLoss):  # DDP(static_graph=True) sums no gradient of what it cannot look into
    register_dataclass(_record)


@dataclass(frozen=True, eq=False)
class Head:
    """What makes the logits: softcap(hidden · weightᵀ + bias) / temperature. Raises ValueError on a misfit."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    temperature: Tensor  # () or (N,)
    softcap: float | None  # c in c · tanh(logits / c), as in Gemma 2 (arXiv 2408.00118)

    def __post_init__(self) -> None:
        h, w, b = self.hidden, self.weight, self.bias
        reject_forward_mode(h, w, b)
        for name, x in (("hidden", h), ("weight", w), ("bias", b)):
            if x is not None and x.dtype not in OPERANDS:
                raise ValueError(f"{name} must be one of {', '.join(map(str, OPERANDS))}, got {x.dtype}")
            if x is not None and x.device != h.device:
                raise ValueError(f"{name} must be on hidden's device, {h.device}, got {x.device}")
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
            raise ValueError(f"hidden must be [N,H] and weight [V,H], got {list(h.shape)} and {list(w.shape)}")
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"bias must be [{len(w)}], one entry a vocabulary item, got {list(b.shape)}")
        if self.temperature.shape not in ((), (len(h),)):
            raise ValueError(f"temperature must be a number or [{len(h)}], got {list(self.temperature.shape)}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be above 0 and finite, got {self.softcap}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic on these logits, and of what comes out."""
        return arithmetic_dtype(self.hidden, self.weight)


@dataclass(frozen=True, eq=False)
class Logits:
    """Rows of logits as a product left them or a user gives them: softcap(products + bias) / temperature is meant."""

    products: Tensor  # (n, V); rows may lie apart
    bias: Tensor | None  # (V,)
    temperature: Tensor  # () or (n,)
    softcap: float | None
    ours: bool = True  # the memory may be overwritten, and each row is followed by what rounds V up to WIDTH

    def room(self, dtype: torch.dtype) -> Tensor:
        """Their own memory as (n, V) of a dtype no wider: a gradient there needs no tensor of its own."""
        return self.products if self.products.dtype == dtype else self.products.view(dtype)[:, : self.products.shape[1]]


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
