"""The passes as torch.library ops, which torch.compile carries in a graph as they are, whatever the backend does.

Ops take plain tensors and numbers, and return lists of what was asked for, in the order of `Measures` or `PolicyPass`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import blocks, cpu_backend, cuda_backend, torch_backend
from .autograd import reject_second_order
from .blocks import Measures, PolicyPass, RowStep
from .checks import policy_rules, require, target_rules
from .objective import Objective, PolicyRows
from .types import Head, Logits, arithmetic_dtype


def row_step(backend: str) -> RowStep:
    if backend == "cpu":
        return cpu_backend.row_step
    if backend == "cuda":
        return cuda_backend.row_step
    if backend in ("triton", "triton-matrix"):
        from . import triton_backend

        return triton_backend.row_step
    return torch_backend.row_step


def _present(values: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in values if x is not None]


def tensors(head: Head, ref: Head | None) -> tuple[Any, ...]:
    """The first eight arguments of an op."""
    other = (None, None, None) if ref is None else (ref.hidden, ref.weight, ref.bias)
    return head.hidden, head.weight, head.bias, *other, head.temperature, head.softcap


def heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
) -> tuple[Head, Head | None]:
    ref = None
    if ref_hidden is not None and ref_weight is not None:
        ref = Head(ref_hidden, ref_weight, ref_bias, temperature, softcap)
    return Head(hidden, weight, bias, temperature, softcap), ref


# ---- log-probs, entropy, exact KL, logsumexp -----------------------------------------------------------------------


@torch.library.custom_op("fst_kernels::measure", mutates_args=())
def measure(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    targets: Tensor | None,
    entropy: bool,
    forward_kl: bool,
    chunk_rows: int | None,
    backend: str,
) -> list[Tensor]:
    head, ref = heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap)
    rules = list(target_rules(targets, len(weight), temperature))
    if rules:
        require(*rules)
    if backend == "triton-matrix":
        from . import triton_matrix

        assert targets is not None
        if reason := triton_matrix.refusal(hidden, weight):
            raise ValueError(f"backend='triton-matrix' is not available: {reason}")
        return _present(triton_matrix.measure(head, targets, entropy))
    args = head, targets, ref, entropy, forward_kl, chunk_rows
    return _present(cpu_backend.measure(*args) if backend == "cpu" else blocks.measure(row_step(backend), *args))


def _measured(targets: Any, entropy: bool, ref_hidden: Any) -> tuple[bool, ...]:
    """Which of `Measures` the list holds."""
    return targets is not None, entropy, ref_hidden is not None, True


@measure.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, targets, entropy, *_
):
    n, dtype = hidden.shape[0], arithmetic_dtype(hidden, weight)  # len() would fix the number of tokens in a graph
    return [hidden.new_empty(n, dtype=dtype) for there in _measured(targets, entropy, ref_hidden) if there]


@torch.library.custom_op("fst_kernels::measure_backward", mutates_args=())
def measure_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    targets: Tensor | None,
    upstream: Sequence[Tensor | None],
    forward_kl: bool,
    chunk_rows: int | None,
    backend: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    head, ref = heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap)
    args = head, targets, ref, forward_kl, chunk_rows, Measures(*upstream), wanted
    return _present(blocks.measure_backward(row_step(backend), *args))


@measure_backward.register_fake
def _(hidden, weight, bias, *others):  # type: ignore[no-untyped-def]
    return _present(blocks.zero_gradients(hidden, weight, bias, others[-1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, softcap, targets, entropy, forward_kl, chunk_rows, backend = inputs
    ctx.save_for_backward(*tensors, targets)
    ctx.options = softcap, entropy, forward_kl, chunk_rows, backend


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    reject_second_order("a fused log-prob or KL")
    *tensors, targets = ctx.saved_tensors
    softcap, entropy, forward_kl, chunk_rows, backend = ctx.options
    given = iter(upstream)
    slopes = [next(given) if there else None for there in _measured(targets, entropy, tensors[3])]
    wanted = list(ctx.needs_input_grad[:3])
    args = *tensors, softcap, targets, slopes, forward_kl, chunk_rows, backend, wanted
    found = iter(measure_backward(*args))
    return *(next(found) if w else None for w in wanted), *[None] * 10


measure.register_autograd(_backward, setup_context=_remember)


# ---- the measures of logits that are given -------------------------------------------------------------------------


@torch.library.custom_op("fst_kernels::measure_logits", mutates_args=())
def measure_logits(logits: Tensor, temperature: Tensor, targets: Tensor, entropy: bool, backend: str) -> list[Tensor]:
    given = Logits(logits, None, temperature, None, ours=False)
    found = blocks.measure_logits(row_step(backend), given, targets, entropy)
    require(*target_rules(targets, logits.shape[1], temperature))  # while a GPU works: its queue is not empty meanwhile
    return _present(found)


@measure_logits.register_fake
def _(logits, temperature, targets, entropy, backend):  # type: ignore[no-untyped-def]
    return [logits.new_empty(logits.shape[0], dtype=arithmetic_dtype(logits)) for _ in range(3 if entropy else 2)]


@torch.library.custom_op("fst_kernels::measure_logits_backward", mutates_args=())
def measure_logits_backward(
    logits: Tensor, temperature: Tensor, targets: Tensor, upstream: Sequence[Tensor | None], backend: str
) -> Tensor:
    given = Logits(logits, None, temperature, None, ours=False)
    logprobs, entropy, logsumexp = upstream
    return blocks.measure_logits_backward(
        row_step(backend), given, targets, Measures(logprobs, entropy, None, logsumexp)
    )


@measure_logits_backward.register_fake
def _(logits, *others):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _remember_logits(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    logits, temperature, targets, ctx.entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, temperature, targets)


def _logits_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    reject_second_order("a fused log-prob")
    slopes = upstream if ctx.entropy else [upstream[0], None, upstream[1]]
    return measure_logits_backward(*ctx.saved_tensors, slopes, ctx.backend), *[None] * 4


measure_logits.register_autograd(_logits_backward, setup_context=_remember_logits)


# ---- the policy loss -----------------------------------------------------------------------------------------------


@torch.library.custom_op("fst_kernels::policy_pass", mutates_args=())
def _policy_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float | None,
    targets: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    live: Tensor,
    weights: Tensor,
    kind: str,
    weight_min: float,
    weight_max: float | None,
    clip_low: float,
    clip_high: float,
    entropy_coef: float,
    kl_coef: float,
    chunk_rows: int | None,
    backend: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    head, ref = heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap)
    objective = Objective(kind, weight_min, weight_max, clip_low, clip_high)
    batch = PolicyRows(targets, behavior_logprobs, advantages, live, weights, objective, entropy_coef, kl_coef)
    require(*target_rules(targets, len(weight), temperature, live), *policy_rules(batch))
    found = blocks.policy_pass(row_step(backend), head, ref, batch, chunk_rows, wanted)
    return _present([found.logprobs, found.entropy, found.kl, *found.gradients])


@_policy_pass.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, ref_hidden, s, t, temperature, softcap, targets, behavior, advantages, live, weights, *others
):
    measures = [torch.empty_like(weights) for _ in range(2 if ref_hidden is None else 3)]
    gradients = blocks.zero_gradients(hidden, weight, bias, others[-1])
    return measures + _present(gradients)


def policy_pass(
    head: Head, ref: Head | None, batch: PolicyRows, chunk_rows: int | None, backend: str, wanted: tuple[bool, ...]
) -> PolicyPass:
    """`blocks.policy_pass` as an op."""
    o = batch.objective
    found = iter(
        _policy_pass(
            *tensors(head, ref),
            batch.targets,
            batch.behavior_logprobs,
            batch.advantages,
            batch.live,
            batch.weights,
            o.kind,
            o.weight_min,
            o.weight_max,
            o.clip_low,
            o.clip_high,
            batch.entropy_coef,
            batch.kl_coef,
            chunk_rows,
            backend,
            list(wanted),
        )
    )
    logprobs, entropy, kl = next(found), next(found), None if ref is None else next(found)
    hidden, weight, bias = (next(found) if w else None for w in wanted)
    return PolicyPass(logprobs, entropy, kl, (hidden, weight, bias))
