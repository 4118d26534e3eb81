"""What the chunked backends share: a head's products, blocks of rows, gradients summed in fp32, the order of it all.

A backend is one `RowStep`, which turns a block of logits into its measures and its gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .objective import PolicyRows
from .types import Head, arithmetic_dtype


class Multiplier:
    """A head ready to multiply: bf16 operands on a GPU go as they are into an fp32 product, others are upcast first."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        keep = head.hidden.is_cuda and head.hidden.dtype == head.weight.dtype == torch.bfloat16
        self.source, self.dtype = head, dtype
        self.operand_dtype = torch.bfloat16 if keep else dtype
        self.weight = head.weight.to(self.operand_dtype)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):  # it would round the logits to bf16: 3.4 % of ρ
            if self.operand_dtype == self.dtype:
                return torch.mm(a, b, out=out)
            return torch.mm(a, b, out_dtype=self.dtype, out=out)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a · b inside the product, so that no second tensor of that size exists."""
        with torch.autocast(a.device.type, enabled=False):
            if self.operand_dtype == self.dtype:
                total.addmm_(a, b)
            else:
                torch.addmm(total, a, b, out_dtype=self.dtype, out=total)

    def inputs(self, rows: Tensor) -> Tensor:
        return self.source.hidden[rows].to(self.operand_dtype)  # (n, H)

    def temperature(self, rows: Tensor) -> Tensor:
        t = self.source.temperature
        return t[rows, None] if t.ndim else t


class Measures(NamedTuple):
    """What is measured under a softmax, or the gradient in it; per token, None where nobody asks."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    logsumexp: Tensor | None = None


class Ask(NamedTuple):
    """What to measure in a block of rows; logsumexp always is."""

    targets: Tensor | None  # (n,)
    entropy: bool
    ref: Multiplier | None  # of the KL
    forward_kl: bool = True


class RowStep(Protocol):
    def __call__(
        self,
        head: Multiplier,
        rows: Tensor,
        ask: Ask,
        upstream: Measures | PolicyRows | None,
        grad_dtype: torch.dtype,
    ) -> tuple[Measures, Tensor | None]:
        """The measures of these rows (n,), and the gradient (n, V) in the head's own logits if there is an upstream.

        upstream: the slopes of a loss in the measures, or the batch of these rows whose loss it is. The gradient is in
        grad_dtype, before softcap and temperature were applied, and free to be overwritten.
        """


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # in hidden, weight, bias; None where not wanted


def zero_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> Gradients:
    dtype = arithmetic_dtype(hidden, weight)
    # Rows are written once, so bf16 stays bf16; fp16 would lose small gradients before a loss scaler lifts them.
    row_dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else dtype
    return (
        torch.zeros_like(hidden, dtype=row_dtype) if wanted[0] else None,
        torch.zeros_like(weight, dtype=dtype) if wanted[1] else None,
        torch.zeros_like(bias, dtype=dtype) if bias is not None and wanted[2] else None,
    )


class _HeadGradients:
    """Sums the gradients of hidden, weight and bias over blocks, in fp32."""

    def __init__(self, head: Multiplier, wanted: Sequence[bool]) -> None:
        self.head, source = head, head.source
        self.hidden, self.weight, self.bias = zero_gradients(source.hidden, source.weight, source.bias, wanted)

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradient of the logits: the products round it to their operands' dtype, a bias sums it as it is."""
        return self.head.operand_dtype if self.bias is None else self.head.dtype

    def add(self, rows: Tensor, grad: Tensor) -> None:
        """Carry a gradient (n, V) of the logits back through the head."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(self.head.operand_dtype)
        if self.hidden is not None:
            self.hidden[rows] = self.head.product(grad, self.head.weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.head.add_product(self.weight, grad.T, self.head.inputs(rows))

    def all(self) -> Gradients:
        return self.hidden, self.weight, self.bias


def _split(rows: Tensor, chunk_rows: int | None, head: Head) -> tuple[Tensor, ...]:
    """Blocks of row numbers, large enough that updating the weight gradient costs little beside its product."""
    default = 4096 if head.weight.is_cuda else max(256, 2**23 // max(1, len(head.weight)))
    return rows.split(chunk_rows or default)


def _multipliers(head: Head, ref: Head | None) -> tuple[Multiplier, Multiplier | None]:
    return Multiplier(head, head.dtype), None if ref is None else Multiplier(ref, head.dtype)


# ---- log-probs, entropy, logsumexp, exact KL: backward computes the logits again, 4 products in all -----------------


def measure(
    step: RowStep,
    head: Head,
    targets: Tensor | None,
    ref: Head | None,
    entropy: bool,
    forward_kl: bool,
    chunk_rows: int | None,
) -> Measures:
    policy, reference = _multipliers(head, ref)
    every = torch.arange(len(head.hidden), device=head.hidden.device)
    blocks = []
    for rows in _split(every, chunk_rows, head):
        ask = Ask(None if targets is None else targets[rows], entropy, reference, forward_kl)
        blocks.append(step(policy, rows, ask, None, head.dtype)[0])
    return Measures(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True)))


def measure_backward(
    step: RowStep,
    head: Head,
    targets: Tensor | None,
    ref: Head | None,
    forward_kl: bool,
    chunk_rows: int | None,
    upstream: Measures,
    wanted: Sequence[bool],
) -> Gradients:
    policy, reference = _multipliers(head, ref)
    gradients = _HeadGradients(policy, wanted)
    used = torch.zeros(len(head.hidden), dtype=torch.bool, device=head.hidden.device)
    for g in upstream:
        used = used if g is None else used | (g != 0)
    for rows in _split(used.nonzero().squeeze(1), chunk_rows, head):
        ask = Ask(None if targets is None else targets[rows], upstream.entropy is not None, reference, forward_kl)
        of_rows = Measures(*(None if g is None else g[rows] for g in upstream))
        _, grad = step(policy, rows, ask, of_rows, gradients.dtype)
        assert grad is not None
        gradients.add(rows, grad)
        del grad  # before the next one is made
    return gradients.all()


# ---- the policy loss: the gradient is taken while the logits are there, 3 products, 4 with a reference --------------


class PolicyPass(NamedTuple):
    """What one pass over the rows found. Per-token tensors are 0 at masked rows."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    kl: Tensor | None  # (N,)
    gradients: Gradients  # of the loss


def policy_pass(
    step: RowStep, head: Head, ref: Head | None, batch: PolicyRows, chunk_rows: int | None, wanted: Sequence[bool]
) -> PolicyPass:
    """Forward and backward of `batch.loss`. Masked rows take no product, rows that cannot have a gradient only one."""
    policy, reference = _multipliers(head, ref)
    gradients = _HeadGradients(policy, wanted)
    logprobs, entropy = torch.zeros_like(batch.weights), torch.zeros_like(batch.weights)
    kl = None if ref is None else torch.zeros_like(batch.weights)
    learning = batch.learning() & any(wanted)
    for learns, chosen in ((True, learning), (False, batch.live & ~learning)):
        for rows in _split(chosen.nonzero().squeeze(1), chunk_rows, head):
            of_rows = batch.at(rows)
            ask = Ask(of_rows.targets, True, reference)
            found, grad = step(policy, rows, ask, of_rows if learns else None, gradients.dtype)
            assert found.logprobs is not None
            assert found.entropy is not None
            logprobs[rows], entropy[rows] = found.logprobs, found.entropy
            if kl is not None and found.kl is not None:
                kl[rows] = found.kl
            if grad is not None:
                gradients.add(rows, grad)
            del grad  # before the next one is made
    return PolicyPass(logprobs, entropy, kl, gradients.all())
