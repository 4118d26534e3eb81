"""Heads that lie as DTensors over ranks. What hidden is says which of two ways they are multiplied.

Plain hidden, data parallel: every rank has tokens of its own and gathers the head, whose gradient is summed over ranks.
DTensor hidden, vocabulary parallel: every rank has all tokens and multiplies its own rows of the head.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import blocks, ops
from .autograd import Place, reject_second_order
from .blocks import Ask, Measures, PolicyPass, RowStep, slopes_of
from .checks import policy_rules, require, target_rules
from .objective import PolicyRows
from .types import Head, Logits


@torch.compiler.disable
def policy_pass(
    head: Head, ref: Head | None, batch: PolicyRows, chunk_rows: int | None, backend: str, wanted: tuple[bool, ...]
) -> PolicyPass:
    """`blocks.policy_pass`; the gradients are this rank's, for `placement` to sum and shard."""
    local = _local(head, ref, chunk_rows, backend)
    require(*target_rules(batch.targets, len(head.weight), head.temperature, batch.live), *policy_rules(batch))
    return blocks.policy_pass(local.step, local.head, local.ref, batch, local.chunk_rows, wanted)


@torch.compiler.disable
def measure(
    head: Head,
    ref: Head | None,
    targets: Tensor | None,
    entropy: bool,
    forward_kl: bool,
    chunk_rows: int | None,
    backend: str,
) -> list[Tensor]:
    """`blocks.measure`, differentiable in the head; what was asked for, in the order of `Measures`."""
    local = _local(head, ref, chunk_rows, backend)
    rules = list(target_rules(targets, len(head.weight), head.temperature))
    if rules:
        require(*rules)
    found = _Measure.apply(local, placement(head), targets, entropy, forward_kl, head.hidden, head.weight, head.bias)
    return [x for x in found if x is not None]


def placement(head: Head) -> Place:
    """Takes this rank's gradients of a head to its tensors': summed over ranks, DTensors that lie as the tensors do.

    Only a replicated hidden gets a Partial one, as from torch's own products: it is summed where it came from.
    """
    if isinstance(head.hidden, DTensor):
        of_hidden = [Partial() if x.is_replicate() else x for x in head.hidden.placements]
        ways = [_way(head.hidden, [Partial()], of_hidden)]
        ways += [_way(x, [Shard(0)], [Shard(0)]) for x in (head.weight, head.bias)]
    else:
        ways = [_way(x) for x in (head.hidden, head.weight, head.bias)]
    return lambda gradients: tuple(None if g is None else way(g) for way, g in zip(ways, gradients, strict=True))


def _way(
    x: Tensor | None, start: Sequence[Placement] | None = None, end: Sequence[Placement] | None = None
) -> Callable[[Tensor], Tensor]:
    """From a rank's gradient of x, lying as `start` says (to be summed), to a DTensor lying as `end` says (as x)."""
    if not isinstance(x, DTensor):
        return lambda g: g
    mesh, shape, stride = x.device_mesh, x.shape, x.stride()  # nothing that keeps x alive
    lies, ends = list(start or [Partial()] * mesh.ndim), list(end or x.placements)

    def place(g: Tensor) -> Tensor:
        found = DTensor.from_local(g, mesh, lies, run_check=False, shape=shape, stride=stride)
        for i in reversed(range(mesh.ndim)):  # shards, the last dimension, first: the others sum only a shard
            found = found.redistribute(placements=lies[:i] + ends[i:])
        return found

    return place


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: "_Local",
        place: Place,
        targets: Tensor | None,
        entropy: bool,
        forward_kl: bool,
        *inputs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        *tensors, softcap = ops.tensors(local.head, local.ref)
        ctx.save_for_backward(*tensors, targets, *inputs)  # the DTensors so that a change in place is noticed
        ctx.options = softcap, local.step, forward_kl, local.chunk_rows, place
        return blocks.measure(local.step, local.head, targets, local.ref, entropy, forward_kl, local.chunk_rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        reject_second_order("a fused log-prob or KL")
        softcap, step, forward_kl, chunk_rows, place = ctx.options
        h, w, b, ref_h, ref_w, ref_b, temperature, targets, *_ = ctx.saved_tensors
        head, ref = ops.heads(h, w, b, ref_h, ref_w, ref_b, temperature, softcap)
        args = targets, ref, forward_kl, chunk_rows, Measures(*upstream), ctx.needs_input_grad[-3:]
        return *[None] * 5, *place(blocks.measure_backward(step, head, *args))


# ---- what a rank multiplies ----------------------------------------------------------------------------------------


class _Local(NamedTuple):
    head: Head  # plain tensors
    ref: Head | None
    step: RowStep
    chunk_rows: int | None


@torch.no_grad()
def _local(head: Head, ref: Head | None, chunk_rows: int | None, backend: str) -> _Local:
    """Raises ValueError on DTensors that lie in neither of the two ways."""
    step, mesh = ops.row_step(backend), _mesh(head)
    if ref is not None and _mesh(ref) != mesh:
        raise ValueError(
            f"hidden states of the policy and of its reference must both be plain or both DTensors on one mesh,"
            f" got {_layout(head.hidden)} and {_layout(ref.hidden)}"
        )
    if mesh is None:
        return _Local(_gathered(head), None if ref is None else _gathered(ref), step, chunk_rows)
    own, own_ref = _own_part(head, mesh), None if ref is None else _own_part(ref, mesh)
    width = -(-len(head.weight) // mesh.size())  # of DTensor's shards; the last may be smaller or empty
    chunk_rows = chunk_rows or blocks.default_rows(width, head.hidden.is_cuda)  # the same on all ranks
    return _Local(own, own_ref, VocabParallelStep(step, mesh, width), chunk_rows)


def _mesh(head: Head) -> DeviceMesh | None:
    return head.hidden.device_mesh if isinstance(head.hidden, DTensor) else None


def _layout(x: Tensor) -> str:
    return f"{x.placements} on {x.device_mesh}" if isinstance(x, DTensor) else "a plain tensor"


def _gathered(head: Head) -> Head:
    def whole(name: str, x: Tensor) -> Tensor:
        if isinstance(x, DTensor) != isinstance(head.weight, DTensor):
            raise ValueError(f"weight and bias must both be plain or both DTensors, got {_layout(x)} as {name}")
        if not isinstance(x, DTensor):
            return x
        if any(type(p) not in (Shard, Replicate) for p in x.placements):
            raise ValueError(f"with a plain hidden, {name} must be sharded or replicated, got {_layout(x)}")
        return x.full_tensor()

    bias = None if head.bias is None else whole("bias", head.bias)
    return replace(head, weight=whole("weight", head.weight), bias=bias)


def _own_part(head: Head, mesh: DeviceMesh) -> Head:
    def own(name: str, x: Tensor) -> Tensor:
        if isinstance(x, DTensor) and x.device_mesh == mesh and x.placements == (Shard(0),):
            return x.to_local()
        raise ValueError(f"with a DTensor hidden, {name} must be (Shard(0),) on its {mesh}, got {_layout(x)}")

    hidden = head.hidden
    assert isinstance(hidden, DTensor)
    if mesh.ndim != 1 or type(hidden.placements[0]) not in (Shard, Replicate):
        raise ValueError(f"a DTensor hidden must be replicated or sharded over one dimension, got {_layout(hidden)}")
    weight, bias = own("weight", head.weight), None if head.bias is None else own("bias", head.bias)
    return replace(head, hidden=hidden.redistribute(placements=[Replicate()]).to_local(), weight=weight, bias=bias)


# ---- a softmax over the parts of several ranks ---------------------------------------------------------------------


class VocabParallelStep:
    """A row step over this rank's columns of the logits, whose measures are those of the whole vocabulary.

    A part's probability is P_r = exp(L_r − L), from the logsumexp L_r of its logits and L of all. One all-gather of a
    few numbers a row, joined in the same order everywhere, gives all ranks the same bits. The gradient in a part's
    logits is that of its own measures, with slopes that follow from theirs in the joint ones.
    """

    def __init__(self, step: RowStep, mesh: DeviceMesh, width: int) -> None:
        self.step, self.mesh, self.width, self.rank = step, mesh, width, mesh.get_local_rank()

    def __call__(
        self, logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None, grad: Tensor | None
    ) -> Measures:
        own, owner = ask._replace(keep=grad is not None), None
        if ask.targets is not None:
            owner = ask.targets // self.width
            own = own._replace(targets=torch.where(owner == self.rank, ask.targets % self.width, 0))
        joint = _Joint(*self._gather(logits, own), owner, ask.forward_kl)
        if upstream is not None and grad is not None and grad.shape[1]:
            slopes = joint.slopes(slopes_of(upstream, joint.measures), self.rank)
            self.step(logits, own._replace(keep=False), slopes, grad)
        return joint.measures

    def _gather(self, logits: Logits, own: Ask) -> tuple[Measures, Tensor | None]:
        """The measures of every rank's part, and the logsumexp of the reference's (R, n)."""
        n, v = logits.products.shape
        if v == 0:  # no shard for this rank: a part of probability 0, whatever else is said of it
            nothing = logits.products.new_full((n,), -math.inf)
            asked = own.targets is not None, own.entropy, own.ref is not None, True, own.ref is not None
            found = [nothing if x else None for x in asked]
        else:
            of_ref = None if own.ref is None else self.step(own.ref, Ask(None, False, keep=True), None, None).logsumexp
            found = [*self.step(logits, own, None, None), of_ref]
        sent = torch.stack([x for x in found if x is not None])
        received = DTensor.from_local(sent[None], self.mesh, [Shard(0)], run_check=False).full_tensor()
        present = iter(received.unbind(1))
        *parts, of_ref = [None if x is None else next(present) for x in found]
        return Measures(*parts), of_ref


class _Joint:
    """The measures (n,) of the whole vocabulary from those of its parts (R, n), and the way back to one part's."""

    def __init__(self, parts: Measures, ref_logsumexp: Tensor | None, owner: Tensor | None, forward_kl: bool) -> None:
        assert parts.logsumexp is not None
        log_share = parts.logsumexp.log_softmax(0)  # never above 0, so no log-prob is
        self.share = log_share.exp()
        logprobs = entropy = kl = None
        if parts.logprobs is not None and owner is not None:
            self.owner = owner
            logprobs = (parts.logprobs + log_share).gather(0, owner[None])[0]
        if parts.entropy is not None:
            self.entropy_terms = parts.entropy - log_share
            self.entropy = entropy = _product(self.share, self.entropy_terms).sum(0)
        if parts.kl is not None and ref_logsumexp is not None:
            log_ref_share = ref_logsumexp.log_softmax(0)
            self.ref_share, self.forward_kl = log_ref_share.exp(), forward_kl
            gap = log_share - log_ref_share
            self.kl_terms = torch.where(gap.isinf(), math.inf, parts.kl + (gap if forward_kl else -gap))
            self.kl = kl = _product(self.share if forward_kl else self.ref_share, self.kl_terms).sum(0)
        self.measures = Measures(logprobs, entropy, kl, parts.logsumexp.logsumexp(0))

    def slopes(self, upstream: Measures, rank: int) -> Measures:
        """Of the loss in the measures of this rank's part, from those in the joint ones."""
        share = self.share[rank]
        on_logprobs = on_entropy = on_kl = None
        on_logsumexp = torch.zeros_like(share)
        if upstream.logsumexp is not None:
            on_logsumexp += upstream.logsumexp * share
        if upstream.logprobs is not None:
            on_logprobs = torch.where(self.owner == rank, upstream.logprobs, 0)
            on_logsumexp += on_logprobs - upstream.logprobs * share
        if upstream.entropy is not None:
            on_entropy = upstream.entropy * share
            on_logsumexp += _product(on_entropy, self.entropy_terms[rank] - self.entropy)
        if upstream.kl is not None and self.forward_kl:
            on_kl = upstream.kl * share
            on_logsumexp += _product(on_kl, self.kl_terms[rank] - self.kl)
        elif upstream.kl is not None:
            on_kl = upstream.kl * self.ref_share[rank]
            on_logsumexp += upstream.kl * share - on_kl
        return Measures(on_logprobs, on_entropy, on_kl, on_logsumexp)


def _product(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value, 0 where the weight is 0 whatever the value: parts of probability 0 count nothing."""
    return torch.where(weight == 0, 0, weight * value)
