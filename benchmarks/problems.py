"""The shapes and the rows that kernels are compared at: random, with a behaviour policy a little off the policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from measure import DEVICE
from torch import Tensor

from fst_kernels import linear_token_logprobs

CAP = 4.0  # of ρ
SEQUENCE = 256  # tokens that share an advantage: Liger takes one a sequence


@dataclass(frozen=True)
class Shape:
    n: int
    h: int
    v: int
    softcap: float | None = None


SHAPES = {
    "quick": Shape(512, 128, 8192),
    "rehearsal": Shape(256, 32, 1024),
    "rehearsal-softcap": Shape(256, 32, 1024, softcap=30.0),
    "cpu": Shape(2048, 512, 32768),
    "qwen3-0.6b": Shape(32768, 1024, 151936),
    "qwen3-8b": Shape(32768, 4096, 151936),
    "llama-3.1-8b": Shape(32768, 4096, 128256),
    "gemma-2-9b": Shape(16384, 3584, 256000, softcap=30.0),
}


@dataclass(frozen=True)
class Rows:
    """Which rows there are: a fraction is not masked, and of the sequences a fraction has advantage 0."""

    live: float
    flat: float = 0.0


ROWS = {
    "all rows": Rows(1.0),
    "52% live": Rows(0.52),
    "10% live": Rows(0.1),
    "48% learn": Rows(0.8, flat=0.4),  # 20 % prompt, and 40 % of the rest in groups without a signal
}


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    behavior: Tensor  # (N,)
    advantages: Tensor  # (N,), one value a sequence
    mask: Tensor  # (N,) bool
    softcap: float | None
    ref_hidden: Tensor  # (N, H)
    ref_weight: Tensor  # (V, H)

    @property
    def labels(self) -> Tensor:
        """The targets, −100 where a row is masked: how cross-entropies are told."""
        return self.targets.where(self.mask, -100)

    def first(self, n: int) -> Problem:
        """The first n rows, with parameters of their own."""
        names = ("targets", "behavior", "advantages", "mask", "ref_hidden")
        rows = {name: getattr(self, name)[:n] for name in names}
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden[:n], self.weight))
        return replace(self, hidden=hidden, weight=weight, **rows)

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_problem(shape: Shape, rows: Rows, dtype: torch.dtype) -> Problem:
    g = torch.Generator(DEVICE).manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g, device=DEVICE) * scale).to(dtype)

    hidden = randn(shape.n, shape.h, scale=3 / shape.h**0.5)
    weight = randn(shape.v, shape.h)
    targets = torch.randint(shape.v, (shape.n,), generator=g, device=DEVICE)
    sequences = shape.n // SEQUENCE
    signal = torch.arange(sequences, device=DEVICE) < sequences - round(rows.flat * sequences)  # exactly so many
    advantages = (torch.randn(sequences, generator=g, device=DEVICE) * signal).repeat_interleave(SEQUENCE)
    mask = torch.rand(shape.n, generator=g, device=DEVICE) < rows.live
    own = linear_token_logprobs(hidden, weight, targets, softcap=shape.softcap, backend="torch").logprobs
    behavior = own + 0.3 * torch.randn(shape.n, generator=g, device=DEVICE)
    ref_hidden = hidden + randn(shape.n, shape.h, scale=1 / shape.h**0.5)
    learned = hidden.requires_grad_(), weight.requires_grad_()
    return Problem(*learned, targets, behavior, advantages, mask, shape.softcap, ref_hidden.detach(), weight.detach())
