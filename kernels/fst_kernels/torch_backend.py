"""The chunked torch backend: any device, logits of one block of rows at a time, never [N,V].

Each op: the algorithm over blocks, then its autograd wrapper, then its functional face.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .autograd import reject_second_order
from .objective import Objective

P = ParamSpec("P")
R = TypeVar("R")


# ---- the language-model head --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What makes the logits z = softcap(hidden · weightᵀ + bias) / temperature."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    temperature: float | Tensor = 1.0  # a number or (N,)
    softcap: float | None = None  # c · tanh(z / c), Gemma 2, arXiv 2408.00118


class _Blocks:
    """A head ready to multiply: bf16 operands on a GPU go as they are into an fp32 product, others are upcast first."""

    def __init__(self, head: Head, dtype: torch.dtype | None = None) -> None:
        self.head = head
        both_bf16 = head.hidden.dtype == head.weight.dtype == torch.bfloat16
        self.dtype = dtype or accumulator_dtype(head.hidden, head.weight)
        self.operand_dtype = torch.bfloat16 if both_bf16 and head.hidden.is_cuda else self.dtype
        self.weight = head.weight.to(self.operand_dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.operand_dtype == self.dtype:
            return a @ b
        return torch.mm(a, b, out_dtype=self.dtype)

    def inputs(self, rows: Tensor) -> Tensor:
        return self.head.hidden[rows].to(self.operand_dtype)  # (n, H)

    def temperature(self, rows: Tensor) -> float | Tensor:
        t = self.head.temperature
        return t[rows, None].to(self.dtype) if isinstance(t, Tensor) else t

    def logits(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of these rows (n, V), and the softcap's derivative there."""
        z = self.product(self.inputs(rows), self.weight.T)
        if self.head.bias is not None:
            z += self.head.bias
        slope = None
        if self.head.softcap is not None:
            z.div_(self.head.softcap).tanh_()
            slope = 1 - z.square()
            z.mul_(self.head.softcap)
        return z.div_(self.temperature(rows)), slope


class _HeadGradients:
    """Sums d loss / d (hidden, weight, bias) over blocks; weight and bias in fp32, None where not wanted."""

    def __init__(self, blocks: _Blocks, wanted: tuple[bool, ...]) -> None:
        head, self.blocks = blocks.head, blocks
        # bf16 has fp32's range; in fp16 the small gradients would be lost before a loss scaler can lift them.
        row_dtype = torch.bfloat16 if head.hidden.dtype == torch.bfloat16 else blocks.dtype
        self.hidden = torch.zeros_like(head.hidden, dtype=row_dtype) if wanted[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=blocks.dtype) if wanted[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=blocks.dtype) if wanted[2] and head.bias is not None else None

    def add(self, rows: Tensor, logits_grad: Tensor, softcap_slope: Tensor | None) -> None:
        """Carry a gradient (n, V) of the logits, which is overwritten, back through temperature, softcap and head."""
        grad = logits_grad.div_(self.blocks.temperature(rows))
        if softcap_slope is not None:
            grad.mul_(softcap_slope)
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(self.blocks.operand_dtype)
        if self.hidden is not None:
            self.hidden[rows] = self.blocks.product(grad, self.blocks.weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight += self.blocks.product(grad.T, self.blocks.inputs(rows))

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _split(rows: Tensor, chunk_rows: int | None, head: Head) -> Iterator[Tensor]:
    """Blocks of row numbers. Large ones keep the read and write of the weight gradient small beside its product."""
    if chunk_rows is None:
        chunk_rows = 4096 if head.weight.is_cuda else max(256, 2**23 // head.weight.shape[0])
    return (block for block in rows.split(chunk_rows) if len(block))


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Autocast would round the fp32 logits to bf16: the error kernels.md measures as 3.4 % of ρ."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = {type for type in ("cpu", "cuda") if torch.is_autocast_enabled(type)}
        if not devices:
            return function(*args, **kwargs)
        with torch.autocast(devices.pop(), enabled=False):
            return wrapped(*args, **kwargs)

    return wrapped


# ---- one block of rows --------------------------------------------------------------------------------------------


class _Softmax(NamedTuple):
    """A block's softmax. `logs` is scratch: callers overwrite it."""

    probs: Tensor  # (n, V)
    logs: Tensor  # (n, V)
    logsumexp: Tensor  # (n,)


def _softmax(z: Tensor) -> _Softmax:
    """In place on z. Not torch.log_softmax: its sequential fp32 sum is off by 1.5e-5 at V = 151936 on a CPU."""
    peak = z.amax(-1, keepdim=True)
    probs = z.sub_(peak).exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return _Softmax(probs.div_(total), z.sub_(log_total), (peak + log_total).squeeze(-1))


def _weighted(probs: Tensor, logs: Tensor) -> Tensor:
    """probs · logs, in place on logs, where a token of probability 0 counts 0 even if its log is −inf."""
    return logs.mul_(probs).masked_fill_(probs == 0, 0)


def _at(block: Tensor, targets: Tensor) -> Tensor:
    return block.gather(1, targets[:, None]).squeeze(1)


def _add_at(block: Tensor, targets: Tensor, values: Tensor) -> None:
    rows = torch.arange(len(targets), device=targets.device)
    block[rows, targets] += values  # one element a row: no two writes meet


# ---- log-probs, entropy, logsumexp ---------------------------------------------------------------------------------


@_without_autocast
def _token_logprobs(
    head: Head, targets: Tensor, entropy: bool, chunk_rows: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    blocks = _Blocks(head)
    logprobs = torch.zeros(len(targets), dtype=blocks.dtype, device=targets.device)
    logsumexp = torch.zeros_like(logprobs)
    entropies = torch.zeros_like(logprobs) if entropy else None
    for rows in _split(torch.arange(len(targets), device=targets.device), chunk_rows, head):
        softmax = _softmax(blocks.logits(rows)[0])
        logprobs[rows] = _at(softmax.logs, targets[rows])
        logsumexp[rows] = softmax.logsumexp
        if entropies is not None:
            entropies[rows] = -_weighted(softmax.probs, softmax.logs).sum(-1)
    return logprobs, entropies, logsumexp


@_without_autocast
def _token_logprobs_backward(
    head: Head,
    targets: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    chunk_rows: int | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    blocks = _Blocks(head)
    total = _HeadGradients(blocks, wanted)
    zero = torch.zeros(len(targets), dtype=blocks.dtype, device=targets.device)
    of_logprob, of_entropy, of_logsumexp = (zero if g is None else g for g in grads)
    used = (of_logprob != 0) | (of_entropy != 0) | (of_logsumexp != 0)
    for rows in _split(used.nonzero().squeeze(1), chunk_rows, head):
        z, slope = blocks.logits(rows)
        probs, logs, _ = _softmax(z)
        on_probs = of_logsumexp[rows] - of_logprob[rows]
        if grads[1] is None:
            grad = probs.mul_(on_probs[:, None])
        else:  # dH/dz = −p (log p + H)
            p_log_p = _weighted(probs, logs)
            on_probs += of_entropy[rows] * p_log_p.sum(-1)
            grad = probs.mul_(on_probs[:, None]).addcmul_(p_log_p, of_entropy[rows, None], value=-1)
        _add_at(grad, targets[rows], of_logprob[rows])
        total.add(rows, grad, slope)
    return total.all()


class _LinearTokenLogprobs(torch.autograd.Function):
    """Keeps no logits: backward computes them again (4 products in all)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        hidden, weight, bias, temperature, softcap, targets, entropy, chunk_rows = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.rest = temperature, softcap, chunk_rows
        return _token_logprobs(Head(hidden, weight, bias, temperature, softcap), targets, entropy, chunk_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        reject_second_order("linear_token_logprobs")
        hidden, weight, bias, targets = ctx.saved_tensors
        temperature, softcap, chunk_rows = ctx.rest
        head = Head(hidden, weight, bias, temperature, softcap)
        of_head = _token_logprobs_backward(head, targets, grads, chunk_rows, ctx.needs_input_grad[:3])
        return *of_head, None, None, None, None, None


def linear_token_logprobs(
    head: Head, targets: Tensor, entropy: bool, chunk_rows: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logprobs, entropy, logsumexp), each (N,), differentiable in hidden, weight and bias."""
    h = head
    return _LinearTokenLogprobs.apply(
        h.hidden, h.weight, h.bias, h.temperature, h.softcap, targets, entropy, chunk_rows
    )


# ---- the policy loss -----------------------------------------------------------------------------------------------


class PolicyPass(NamedTuple):
    """What one pass over the rows found. Per-token tensors are 0 at masked rows."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    kl: Tensor | None  # (N,)
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]  # of the loss, in hidden, weight, bias


@_without_autocast
def linear_policy_pass(
    head: Head,
    ref: Head | None,
    targets: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    live: Tensor,
    weights: Tensor,
    objective: Objective,
    entropy_coef: float,
    kl_coef: float,
    chunk_rows: int | None,
    wanted: tuple[bool, ...],
) -> PolicyPass:
    """Forward and backward of Σ weights · (objective − entropy_coef · entropy + kl_coef · KL) over the live rows.

    The gradient is taken while a block's logits are there (3 products in all, 4 with a reference). Rows that cannot
    have one take the forward product only: `live` and `weights` (N,) are the mask and token_weights / denominator.
    """
    blocks = _Blocks(head)
    ref_blocks = None if ref is None else _Blocks(ref, blocks.dtype)
    gradients = _HeadGradients(blocks, wanted)
    logprobs = torch.zeros(len(targets), dtype=blocks.dtype, device=targets.device)
    entropies = torch.zeros_like(logprobs)
    kls = None if ref is None else torch.zeros_like(logprobs)

    learning = live & (weights != 0) & any(wanted)
    if entropy_coef == 0 and kl_coef == 0:
        learning = learning & (advantages != 0)
    for learns, chosen in ((True, learning), (False, live & ~learning)):
        for rows in _split(chosen.nonzero().squeeze(1), chunk_rows, head):
            z, slope = blocks.logits(rows)
            probs, logs, _ = _softmax(z)
            logprobs[rows] = _at(logs, targets[rows])
            divergence = None
            if ref_blocks is not None and kls is not None:
                ref_logs = _softmax(ref_blocks.logits(rows)[0]).logs
                divergence = _weighted(probs, torch.sub(logs, ref_logs, out=ref_logs))  # p (log p − log q)
                kls[rows] = divergence.sum(-1)
            p_log_p = _weighted(probs, logs)
            entropies[rows] = -p_log_p.sum(-1)
            if not learns:
                continue
            terms = objective.terms(logprobs[rows], behavior_logprobs[rows], advantages[rows])
            on_target, weight = terms.slope * weights[rows], weights[rows]
            on_probs = -on_target
            if entropy_coef != 0:
                on_probs += entropy_coef * weight * entropies[rows]
            if divergence is not None and kls is not None and kl_coef != 0:
                on_probs -= kl_coef * weight * kls[rows]
            grad = probs.mul_(on_probs[:, None])
            if entropy_coef != 0:
                grad.addcmul_(p_log_p, weight[:, None], value=entropy_coef)
            if divergence is not None and kl_coef != 0:
                grad.addcmul_(divergence, weight[:, None], value=kl_coef)
            _add_at(grad, targets[rows], on_target)
            gradients.add(rows, grad, slope)
    return PolicyPass(logprobs, entropies, kls, gradients.all())


# ---- exact KL ------------------------------------------------------------------------------------------------------


def _divergence(p: _Softmax, q: _Softmax, direction: str) -> Tensor:
    """The summands (n, V) of KL(p‖q), or of KL(q‖p) for direction "reverse"; in place on q.logs."""
    if direction == "forward":
        return _weighted(p.probs, torch.sub(p.logs, q.logs, out=q.logs))
    return _weighted(q.probs, q.logs.sub_(p.logs))


@_without_autocast
def _linear_kl(p: Head, q: Head, direction: str, chunk_rows: int | None) -> Tensor:
    p_blocks = _Blocks(p)
    q_blocks = _Blocks(q, p_blocks.dtype)
    kl = torch.zeros(len(p.hidden), dtype=p_blocks.dtype, device=p.hidden.device)
    for rows in _split(torch.arange(len(kl), device=kl.device), chunk_rows, p):
        p_softmax, q_softmax = _softmax(p_blocks.logits(rows)[0]), _softmax(q_blocks.logits(rows)[0])
        kl[rows] = _divergence(p_softmax, q_softmax, direction).sum(-1)
    return kl


@_without_autocast
def _linear_kl_backward(
    p: Head, q: Head, of_kl: Tensor, direction: str, chunk_rows: int | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    p_blocks = _Blocks(p)
    q_blocks = _Blocks(q, p_blocks.dtype)
    total = _HeadGradients(p_blocks, wanted)
    for rows in _split(of_kl.nonzero().squeeze(1), chunk_rows, p):
        z, slope = p_blocks.logits(rows)
        p_softmax, q_softmax = _softmax(z), _softmax(q_blocks.logits(rows)[0])
        if direction == "forward":  # p (log p − log q − KL)
            divergence = _divergence(p_softmax, q_softmax, direction)
            grad = divergence.addcmul_(p_softmax.probs, divergence.sum(-1, keepdim=True), value=-1)
        else:
            grad = p_softmax.probs.sub_(q_softmax.probs)
        total.add(rows, grad.mul_(of_kl[rows, None]), slope)
    return total.all()


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q, temperature, softcap, direction, chunk_rows = args
        ctx.save_for_backward(hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q)
        ctx.rest = temperature, softcap, direction, chunk_rows
        p = Head(hidden_p, weight_p, bias_p, temperature, softcap)
        q = Head(hidden_q, weight_q, bias_q, temperature, softcap)
        return _linear_kl(p, q, direction, chunk_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        reject_second_order("linear_kl")
        temperature, softcap, direction, chunk_rows = ctx.rest
        hidden_p, weight_p, bias_p, hidden_q, weight_q, bias_q = ctx.saved_tensors
        p = Head(hidden_p, weight_p, bias_p, temperature, softcap)
        q = Head(hidden_q, weight_q, bias_q, temperature, softcap)
        of_p = _linear_kl_backward(p, q, grads[0], direction, chunk_rows, ctx.needs_input_grad[:3])
        return *of_p, *[None] * 7


def linear_kl(p: Head, q: Head, direction: str, chunk_rows: int | None) -> Tensor:
    """Exact KL per token (N,), differentiable in p; p and q share temperature and softcap."""
    rest = p.temperature, p.softcap, direction, chunk_rows
    return _LinearKL.apply(
        p.hidden,
        p.weight,
        p.bias,
        q.hidden.detach(),
        q.weight.detach(),
        None if q.bias is None else q.bias.detach(),
        *rest,
    )
