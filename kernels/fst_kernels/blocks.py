"""What the chunked backends share: a head's products, blocks of rows, gradients summed in fp32, the order of it all.

A backend is one `RowStep`, which turns a block of logits into its measures and its gradient.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .objective import PolicyRows
from .types import Head, Logits, arithmetic_dtype

# Rows of logits begin at multiples of this, so that a kernel's loads are 16 bytes wide whatever V is.
WIDTH = 16
CHUNK_ROWS = 4096  # on a GPU
CHUNK_LOGITS = (
    2**24
)  # on a CPU, 64 MiB: every chunk reads and writes the weight's gradient, and casts a bf16 head twice
CAST_ON_CPU, CAST_ON_GPU = 2**21, 2**26  # elements of a head that has to be cast, at a time: no copy of it exists


class Multiplier:
    """A head ready to multiply: bf16 operands on a GPU go as they are into an fp32 product, others are upcast first."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        keep = head.hidden.is_cuda and head.hidden.dtype == head.weight.dtype == torch.bfloat16
        self.source, self.dtype = head, dtype
        self.operand_dtype = torch.bfloat16 if keep else self.dtype
        self._buffer: Tensor | None = None

    def inputs(self, rows: Tensor) -> Tensor:
        return self.source.hidden[rows].to(self.operand_dtype)  # (n, H)

    @property
    def columns(self) -> int:
        """How many of the head's rows to take at a time: all, unless they have to be cast."""
        v, h = self.source.weight.shape
        if self.source.weight.dtype == self.operand_dtype:
            return max(1, v)
        elements = CAST_ON_CPU if self.source.weight.device.type == "cpu" else CAST_ON_GPU
        return max(1, min(v, max(1024, elements // max(1, h))))

    def tiles(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """The head's rows as operands, so many at a time."""
        v = len(self.source.weight)
        for start in range(0, v, columns):
            tile = slice(start, min(v, start + columns))
            yield tile, self.source.weight[tile].to(self.operand_dtype)

    def logits(self, rows: Tensor) -> Logits:
        """The logits of these rows, in memory that the next call uses again."""
        n, v = len(rows), len(self.source.weight)
        if self._buffer is None or len(self._buffer) < n:
            self._buffer = torch.empty(n, -(-v // WIDTH) * WIDTH, dtype=self.dtype, device=rows.device)
        products, inputs = self._buffer[:n, :v], self.inputs(rows)
        for tile, weight in self.tiles(self.columns):
            self.product(inputs, weight.T, out=products[:, tile])
        return self.shaped(rows, products)

    def shaped(self, rows: Tensor, products: Tensor) -> Logits:
        t = self.source.temperature
        return Logits(products, self.source.bias, t[rows] if t.ndim else t, self.source.softcap)

    def back(self, grad: Tensor) -> Tensor:
        """grad · weight (n, H) in the arithmetic's dtype, for a gradient (n, V) of the logits in the operands'."""
        total = grad.new_zeros(len(grad), self.source.weight.shape[1], dtype=self.dtype)
        for tile, weight in self.tiles(self.columns):
            self.add_product(total, grad[:, tile], weight)
        return total

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
    ref: Logits | None = None  # of the KL
    forward_kl: bool = True
    keep: bool = False  # the logits are needed again: whatever `ours` says, they stay as they are


class RowStep(Protocol):
    def __call__(
        self, logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None, grad: Tensor | None
    ) -> Measures:
        """The measures of these rows (n,); if there is an upstream, the gradient in logits.products goes into `grad`.

        upstream: the slopes of a loss in the measures, or the batch of these rows whose loss it is. A row whose slopes
        are all 0 has gradient 0, whatever its logits.
        grad: (n, V), fp32 or narrower; may be logits.room(its dtype).
        """


def slopes_of(upstream: Measures | PolicyRows, found: Measures) -> Measures:
    """Of the loss in the measures, once these are known."""
    if isinstance(upstream, Measures):
        return upstream
    assert found.logprobs is not None
    return Measures(upstream.logprob_slopes(found.logprobs), *upstream.term_slopes())


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
            self.hidden[rows] = self.head.back(grad).to(self.hidden.dtype)
        if self.weight is not None:
            self.head.add_product(self.weight, grad.T, self.head.inputs(rows))

    def all(self) -> Gradients:
        return self.hidden, self.weight, self.bias


def default_rows(v: int, on_gpu: bool) -> int:
    """Of a block: so many that updating the weight gradient costs little beside its product."""
    return CHUNK_ROWS if on_gpu else max(256, CHUNK_LOGITS // max(1, v))


def _split(rows: Tensor, chunk_rows: int | None, v: int) -> tuple[Tensor, ...]:
    return rows.split(chunk_rows or default_rows(v, rows.is_cuda))


def _multipliers(head: Head, ref: Head | None) -> tuple[Multiplier, Multiplier | None]:
    return Multiplier(head, head.dtype), None if ref is None else Multiplier(ref, head.dtype)


def join(parts: Iterable[Measures]) -> Measures:
    return Measures(*(None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True)))


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
    blocks = []
    for rows in _split(torch.arange(len(head.hidden), device=head.hidden.device), chunk_rows, len(head.weight)):
        ref_logits = None if reference is None else reference.logits(rows)
        ask = Ask(None if targets is None else targets[rows], entropy, ref_logits, forward_kl)
        blocks.append(step(policy.logits(rows), ask, None, None))
    return join(blocks)


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
    for rows in _split(used_rows(upstream, head.hidden), chunk_rows, len(head.weight)):
        ref_logits = None if reference is None else reference.logits(rows)
        ask = Ask(None if targets is None else targets[rows], upstream.entropy is not None, ref_logits, forward_kl)
        logits = policy.logits(rows)
        grad = logits.room(gradients.dtype)
        step(logits, ask, Measures(*(None if g is None else g[rows] for g in upstream)), grad)
        gradients.add(rows, grad)
    return gradients.all()


def used_rows(upstream: Measures, hidden: Tensor) -> Tensor:
    """Numbers of the rows with a slope that is not 0."""
    used = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for g in upstream:
        used = used if g is None else used | (g != 0)
    return used.nonzero().squeeze(1)


# ---- the measures of logits that are given: no product --------------------------------------------------------------


def _row_blocks(logits: Logits) -> Iterator[tuple[slice, Logits]]:
    n, v = logits.products.shape
    step = max(1, n if logits.products.is_cuda else CHUNK_LOGITS // max(1, v))
    for start in range(0, max(1, n), step):
        rows = slice(start, start + step)
        t = logits.temperature
        yield rows, replace(logits, products=logits.products[rows], temperature=t[rows] if t.ndim else t)


def measure_logits(step: RowStep, logits: Logits, targets: Tensor, entropy: bool) -> Measures:
    return join(step(block, Ask(targets[rows], entropy), None, None) for rows, block in _row_blocks(logits))


def measure_logits_backward(step: RowStep, logits: Logits, targets: Tensor, upstream: Measures) -> Tensor:
    grad = torch.empty_like(logits.products, memory_format=torch.contiguous_format)
    for rows, block in _row_blocks(logits):
        slopes = Measures(*(None if g is None else g[rows] for g in upstream))
        step(block, Ask(targets[rows], upstream.entropy is not None), slopes, grad[rows])
    return grad


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
    # Both are read before anything large is launched: the host then runs ahead while a GPU works on the chunks.
    of_both = [chosen.nonzero().squeeze(1) for chosen in (learning, batch.live & ~learning)]
    for learns, chosen in zip((True, False), of_both, strict=True):
        for rows in _split(chosen, chunk_rows, len(head.weight)):
            of_rows, logits = batch.at(rows), policy.logits(rows)
            ask = Ask(of_rows.targets, True, None if reference is None else reference.logits(rows))
            grad = logits.room(gradients.dtype) if learns else None
            found = step(logits, ask, of_rows if learns else None, grad)
            assert found.logprobs is not None
            assert found.entropy is not None
            logprobs[rows], entropy[rows] = found.logprobs, found.entropy
            if kl is not None and found.kl is not None:
                kl[rows] = found.kl
            if grad is not None:
                gradients.add(rows, grad)
    return PolicyPass(logprobs, entropy, kl, gradients.all())
