"""The chunked torch backend, for any device: logits exist for one block of rows at a time, never [N,V].

First a head's products and a block of rows; then each op: algorithm, autograd wrapper, functional face.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import reject_second_order
from .objective import PolicyRows
from .types import Head


class _Multiplier:
    """A head ready to multiply: bf16 operands on a GPU go as they are into an fp32 product, others are upcast first."""

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        keep = head.hidden.is_cuda and head.hidden.dtype == head.weight.dtype == torch.bfloat16
        self.source, self.dtype = head, dtype
        self.operand_dtype = torch.bfloat16 if keep else dtype
        self.weight = head.weight.to(self.operand_dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):  # it would round the logits to bf16: 3.4 % of ρ
            return a @ b if self.operand_dtype == self.dtype else torch.mm(a, b, out_dtype=self.dtype)

    def inputs(self, rows: Tensor) -> Tensor:
        return self.source.hidden[rows].to(self.operand_dtype)  # (n, H)

    def temperature(self, rows: Tensor) -> Tensor:
        t = self.source.temperature
        return t[rows, None] if t.ndim else t

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of these rows (n, V), and the softcap's derivative there."""
        z, slope = self.product(self.inputs(rows), self.weight.T), None
        if self.source.bias is not None:
            z += self.source.bias
        if self.source.softcap is not None:
            z.div_(self.source.softcap)
            slope = z.cosh().square_().reciprocal_()  # 1 − tanh² would lose its digits where the cap saturates
            z.tanh_().mul_(self.source.softcap)
        return z.div_(self.temperature(rows)), slope


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax (n, V), its log (n, V), logsumexp (n,)), in place on z.

    On a CPU torch.log_softmax was off by 1.5e-5 at V = 151936 (it sums in fp32, one after the other), this by 4e-6.
    """
    peak = z.amax(-1, keepdim=True)
    probs = z.sub_(peak).exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return probs.div_(total), z.sub_(log_total), (peak + log_total).squeeze(-1)


def _weighted(probs: Tensor, logs: Tensor) -> Tensor:
    """probs · logs, in place on logs; an item of probability 0 counts 0 even if its log is −inf."""
    return logs.mul_(probs).masked_fill_(probs == 0, 0)


class Measures(NamedTuple):
    """What is measured under a softmax, or the gradient in it; per token, None where nobody asks."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    logsumexp: Tensor | None = None


class _Block:
    """The softmax of some rows, its measures (n,), and the way back from them to the logits."""

    def __init__(
        self,
        head: _Multiplier,
        rows: Tensor,
        targets: Tensor | None,
        entropy: bool,
        ref: _Multiplier | None = None,
        forward_kl: bool = True,
    ) -> None:
        z, self.softcap_slope = head.logits(rows)
        self.probs, logs, logsumexp = _softmax(z)
        logprobs = entropies = kl = None
        if targets is not None:
            self.targets = targets[rows]
            logprobs = logs.gather(1, self.targets[:, None]).squeeze(1)
        if ref is not None:
            ref_probs, ref_logs, _ = _softmax(ref.logits(rows)[0])
            if forward_kl:  # Σ p (log p − log q); slope p (log p − log q) − p KL
                self.kl_slope = _weighted(self.probs, torch.sub(logs, ref_logs, out=ref_logs))
                kl = self.kl_center = self.kl_slope.sum(-1)
            else:  # Σ q (log q − log p); slope −q + p
                kl = _weighted(ref_probs, ref_logs.sub_(logs)).sum(-1)
                self.kl_slope, self.kl_center = ref_probs.neg_(), -torch.ones_like(kl)
        if entropy:
            self.entropy_slope = _weighted(self.probs, logs).neg_()  # −p log p − p H
            entropies = self.entropy_center = self.entropy_slope.sum(-1)
        self.measures = Measures(logprobs, entropies, kl, logsumexp)

    def gradient(self, upstream: Measures) -> Tensor:
        """Σ upstream · d measures / d logits (n, V). Overwrites the block."""
        on_probs = torch.zeros_like(self.probs[:, 0])
        if upstream.logprobs is not None:
            on_probs -= upstream.logprobs
        if upstream.entropy is not None:
            on_probs -= upstream.entropy * self.entropy_center
        if upstream.kl is not None:
            on_probs -= upstream.kl * self.kl_center
        if upstream.logsumexp is not None:
            on_probs += upstream.logsumexp
        grad = self.probs.mul_(on_probs[:, None])
        if upstream.entropy is not None:
            grad.addcmul_(self.entropy_slope, upstream.entropy[:, None])
        if upstream.kl is not None:
            grad.addcmul_(self.kl_slope, upstream.kl[:, None])
        if upstream.logprobs is not None:  # one element a row: no two writes meet
            grad[torch.arange(len(grad), device=grad.device), self.targets] += upstream.logprobs
        return grad


class _HeadGradients:
    """Sums the gradients of hidden, weight and bias over blocks, in fp32; None where not wanted."""

    def __init__(self, head: _Multiplier, wanted: tuple[bool, ...]) -> None:
        hidden, weight, bias = head.source.hidden, head.source.weight, head.source.bias
        self.head = head
        # Rows are written once, so bf16 stays bf16; fp16 would lose small gradients before a loss scaler lifts them.
        row_dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else head.dtype
        self.hidden = torch.zeros_like(hidden, dtype=row_dtype) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=head.dtype) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=head.dtype) if bias is not None and wanted[2] else None

    def add(self, rows: Tensor, grad: Tensor, softcap_slope: Tensor | None) -> None:
        """Carry a gradient (n, V) of the logits, which is overwritten, back through temperature, softcap and head."""
        grad.div_(self.head.temperature(rows))
        if softcap_slope is not None:
            grad.mul_(softcap_slope)
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(self.head.operand_dtype)
        if self.hidden is not None:
            self.hidden[rows] = self.head.product(grad, self.head.weight).to(self.hidden.dtype)
        if self.weight is not None and grad.dtype == self.weight.dtype:
            self.weight.addmm_(grad.T, self.head.inputs(rows))
        elif self.weight is not None:
            self.weight += self.head.product(grad.T, self.head.inputs(rows))

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def _split(rows: Tensor, chunk_rows: int | None, head: Head) -> tuple[Tensor, ...]:
    """Blocks of row numbers, large enough that updating the weight gradient costs little beside its product."""
    default = 4096 if head.weight.is_cuda else max(256, 2**23 // max(1, len(head.weight)))
    return rows.split(chunk_rows or default)


# ---- log-probs, entropy, logsumexp, exact KL: backward computes the logits again, 4 products in all -----------------


def _measure(
    head: Head, targets: Tensor | None, ref: Head | None, entropy: bool, forward_kl: bool, chunk_rows: int | None
) -> Measures:
    policy, reference = _Multiplier(head, head.dtype), None if ref is None else _Multiplier(ref, head.dtype)
    rows_of_all = torch.arange(len(head.hidden), device=head.hidden.device)
    blocks = (
        _Block(policy, rows, targets, entropy, reference, forward_kl).measures
        for rows in _split(rows_of_all, chunk_rows, head)
    )
    return Measures(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _measure_backward(
    head: Head,
    targets: Tensor | None,
    ref: Head | None,
    forward_kl: bool,
    chunk_rows: int | None,
    upstream: Measures,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    policy, reference = _Multiplier(head, head.dtype), None if ref is None else _Multiplier(ref, head.dtype)
    gradients = _HeadGradients(policy, wanted)
    used = torch.zeros(len(head.hidden), dtype=torch.bool, device=head.hidden.device)
    for g in upstream:
        used = used if g is None else used | (g != 0)
    for rows in _split(used.nonzero().squeeze(1), chunk_rows, head):
        block = _Block(policy, rows, targets, upstream.entropy is not None, reference, forward_kl)
        of_rows = Measures(*(None if g is None else g[rows] for g in upstream))
        gradients.add(rows, block.gradient(of_rows), block.softcap_slope)
        del block  # before the next one is built
    return gradients.all()


class Engine(NamedTuple):
    """How a backend computes what `_Measure` differentiates."""

    measure: Callable[..., Measures]
    backward: Callable[..., tuple[Tensor | None, ...]]


ENGINE = Engine(_measure, _measure_backward)


class _Measure(torch.autograd.Function):
    """Tensors: hidden, weight, bias, temperature, targets, ref_hidden, ref_weight, ref_bias."""

    @staticmethod
    def forward(
        ctx: Any, options: tuple[Engine, float | None, bool, bool, int | None], *tensors: Tensor | None
    ) -> Measures:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        engine, softcap, entropy, forward_kl, chunk_rows = options
        return engine.measure(*_Measure.heads(softcap, *tensors), entropy, forward_kl, chunk_rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        reject_second_order("a fused log-prob or KL")
        engine, softcap, _, forward_kl, chunk_rows = ctx.options
        head, targets, ref = _Measure.heads(softcap, *ctx.saved_tensors)
        wanted = ctx.needs_input_grad[1:4]
        grads = engine.backward(head, targets, ref, forward_kl, chunk_rows, Measures(*upstream), wanted)
        return None, *grads, *[None] * 5

    @staticmethod
    def heads(softcap: float | None, *tensors: Any) -> tuple[Head, Tensor | None, Head | None]:
        hidden, weight, bias, temperature, targets, ref_hidden, ref_weight, ref_bias = tensors
        head = Head(hidden, weight, bias, temperature, softcap)
        ref = None if ref_hidden is None else Head(ref_hidden, ref_weight, ref_bias, temperature, softcap)
        return head, targets, ref


def linear_token_logprobs(
    head: Head, targets: Tensor, entropy: bool, chunk_rows: int | None, engine: Engine = ENGINE
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logprobs, entropy, logsumexp), each (N,), differentiable in hidden, weight and bias."""
    tensors = head.hidden, head.weight, head.bias, head.temperature, targets, None, None, None
    logprobs, entropies, _, logsumexp = _Measure.apply((engine, head.softcap, entropy, True, chunk_rows), *tensors)
    return logprobs, entropies, logsumexp


def linear_kl(p: Head, q: Head, direction: str, chunk_rows: int | None, engine: Engine = ENGINE) -> Tensor:
    """Exact KL per token (N,), differentiable in p; p and q share temperature and softcap."""
    tensors = p.hidden, p.weight, p.bias, p.temperature, None, q.hidden, q.weight, q.bias
    return _Measure.apply((engine, p.softcap, False, direction == "forward", chunk_rows), *tensors)[2]


# ---- the policy loss: the gradient is taken while the logits are there, 3 products, 4 with a reference --------------


class PolicyPass(NamedTuple):
    """What one pass over the rows found. Per-token tensors are 0 at masked rows."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    kl: Tensor | None  # (N,)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]  # of the loss, in hidden, weight, bias


def linear_policy_pass(
    head: Head, ref: Head | None, batch: PolicyRows, chunk_rows: int | None, wanted: tuple[bool, ...]
) -> PolicyPass:
    """Forward and backward of `batch.loss`. Masked rows take no product, rows that cannot have a gradient only one."""
    policy, reference = _Multiplier(head, head.dtype), None if ref is None else _Multiplier(ref, head.dtype)
    gradients = _HeadGradients(policy, wanted)
    logprobs, entropy = torch.zeros_like(batch.weights), torch.zeros_like(batch.weights)
    kl = None if ref is None else torch.zeros_like(batch.weights)
    learning = batch.learning() & any(wanted)
    for learns, chosen in ((True, learning), (False, batch.live & ~learning)):
        for rows in _split(chosen.nonzero().squeeze(1), chunk_rows, head):
            block = _Block(policy, rows, batch.targets, True, reference)
            found = block.measures
            assert found.logprobs is not None
            assert found.entropy is not None
            logprobs[rows], entropy[rows] = found.logprobs, found.entropy
            if kl is not None and found.kl is not None:
                kl[rows] = found.kl
            if learns:
                upstream = Measures(*batch.slopes(rows, found.logprobs))
                gradients.add(rows, block.gradient(upstream), block.softcap_slope)
            del block  # before the next one is built
    return PolicyPass(logprobs, entropy, kl, gradients.all())
