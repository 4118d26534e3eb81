"""Who is compared: ours, plain torch and every library that is installed, each called the way its users would.

A contender is made once (that imports it, or says why it cannot run here) and then called on a `Problem`. "CE" ones can
only take a mean cross-entropy, which is less than a policy loss: no ratio, no advantages, no log-probs. Masked rows
carry the label −100 for whoever knows it. CCE's default drops gradients below 2⁻¹²; "exact" is its option without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import DEVICE
from problems import CAP, SEQUENCE, Problem
from torch import Tensor

from fst_kernels import api, linear_kl, linear_policy_loss, linear_token_logprobs, token_logprobs
from fst_kernels.blocks import RowStep
from fst_kernels.objective import Objective
from fst_kernels.ops import row_step

OURS = "fst_kernels"
CISPO = Objective("cispo", 0.0, CAP)
TRL_COLUMNS = 32768  # of a tile, TRL's own choice
QUACK_ROWS = 4096  # of a chunk, its default, which 0.6.5 refuses where it equals H ("m == n"): then half


class Found(NamedTuple):
    loss: Tensor  # ()
    logprobs: Tensor | None = None  # (N,)


Step = Callable[[Problem], Found]  # forward and backward: leaves gradients in hidden and weight


@dataclass(frozen=True)
class Contender:
    make: Callable[[], Callable[..., Any]]
    plain: bool = False  # torch's own operators alone: nothing that could hang or spoil a GPU's context
    only: str = ""  # what it does, if that is less than the others do


# ---- the policy loss, forward and backward -------------------------------------------------------------------------


def ours(backend: str, **options: Any) -> Step:
    def step(p: Problem) -> Found:
        rows = p.targets, p.behavior, p.advantages, p.mask
        out = linear_policy_loss(
            p.hidden, p.weight, *rows, weight_max=CAP, softcap=p.softcap, backend=backend, **options
        )
        out.loss.backward()
        return Found(out.loss, out.logprobs)

    return step


def cispo(logprobs: Tensor, behavior: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Σ over the live rows, from log-probs: what autograd users write."""
    ratio = (logprobs.detach() - behavior).exp().clamp(max=CAP)
    return -(mask * ratio * advantages * logprobs).sum()


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def per_token(logprobs_of: Callable[[Problem], Tensor]) -> Step:
    """A policy loss on top of a library's differentiable log-probs."""

    def step(p: Problem) -> Found:
        logprobs = logprobs_of(p).float()
        loss = cispo(logprobs, p.behavior, p.advantages, p.mask) / p.mask.sum()
        loss.backward()
        return Found(loss, logprobs.detach())

    return step


def cross_entropy(loss_of: Callable[[Problem], Tensor]) -> Step:
    def step(p: Problem) -> Found:
        loss = loss_of(p)
        loss.backward()
        return Found(loss)

    return step


def eager() -> Step:
    return per_token(lambda p: chosen(logits_of(p.hidden, p.weight, p.softcap), p.targets))


def compiled_chunks() -> Step:
    """torch.compile of one chunk's loss; backward at once, so that one chunk of logits exists."""

    def loss_of(
        hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, *rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs = chosen(logits_of(hidden, weight, softcap), targets)
        return cispo(logprobs, *rows), logprobs.detach()

    chunk = torch.compile(loss_of, dynamic=False)

    def step(p: Problem) -> Found:
        total, parts, tokens = torch.zeros((), device=DEVICE), [], p.mask.sum()
        columns = p.hidden, p.targets, p.behavior, p.advantages, p.mask
        for hidden, targets, *rows in zip(*(x.split(chunk_rows(p)) for x in columns), strict=True):
            loss, logprobs = chunk(hidden, p.weight, targets, p.softcap, *rows)
            (loss / tokens).backward()
            total += loss.detach() / tokens
            parts.append(logprobs)
        return Found(total, torch.cat(parts))

    return step


def chunk_rows(p: Problem) -> int:
    return 4096 if DEVICE == "cuda" else max(256, 2**23 // len(p.weight))


def torch_linear_cross_entropy() -> Step:
    function = F.linear_cross_entropy  # from torch 2.12 on

    def logprobs_of(p: Problem) -> Tensor:
        without_softcap(p)
        return -function(p.hidden, p.weight, p.labels, reduction="none", ignore_index=-100)

    return per_token(logprobs_of)


def without_softcap(p: Problem) -> None:
    if p.softcap is not None:
        raise NotImplementedError("has no softcap")


def trl_chunked() -> Step:
    from trl.kernels import ChunkedLogProbFunction

    def logprobs_of(p: Problem) -> Tensor:
        live = p.mask if DEVICE == "cuda" else torch.ones_like(p.mask)  # as its callers do
        args = p.hidden[live], p.weight, None, p.targets[live], 1.0, TRL_COLUMNS, p.softcap, 1.0, ("entropy",)
        found = ChunkedLogProbFunction.apply(*args)[0]
        return found.new_zeros(len(live)).masked_scatter(live, found)

    return per_token(logprobs_of)


def trl_whole() -> Step:
    """`selective_log_softmax` of logits that are stored whole: what TRL does without its chunked path."""
    select = trl_select()

    def logprobs_of(p: Problem) -> Tensor:
        logits = p.hidden @ p.weight.T
        if p.softcap is not None:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        return select(logits, p.targets)

    return per_token(logprobs_of)


def trl_select() -> Callable[[Tensor, Tensor], Tensor]:
    if DEVICE == "cuda":  # what trl.trainer.utils.selective_log_softmax calls there; needs nothing else of TRL
        from trl.kernels import selective_log_softmax_and_entropy as kernel

        return lambda logits, targets: kernel(logits, targets)[0]
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def liger_grpo(compiled: bool) -> Step:
    """`LigerFusedLinearGRPOLoss(loss_type="cispo")`, what a TRL user gets; one sequence a chunk, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options: dict[str, Any] = {"loss_type": "cispo", "epsilon_high": CAP, "beta": 0.0, "use_ref_model": False}
    module = LigerFusedLinearGRPOLoss(compiled=compiled, **options)

    def step(p: Problem) -> Found:
        without_softcap(p)
        shape = len(p.hidden) // SEQUENCE, SEQUENCE
        loss = module(
            p.hidden.view(*shape, -1),
            p.weight,
            p.targets.view(shape),
            p.mask.view(shape).float(),
            p.advantages.view(shape)[:, 0].contiguous(),
            old_per_token_logps=p.behavior.view(shape),
        )[0]
        loss.backward()
        return Found(loss)

    return step


def liger_linear_cross_entropy(reduction: str) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def loss_of(p: Problem) -> Tensor:
        module = LigerFusedLinearCrossEntropyLoss(reduction=reduction, softcap=p.softcap)
        return module(p.weight, p.hidden, p.labels)

    return cross_entropy(loss_of) if reduction == "mean" else per_token(lambda p: -loss_of(p))


def liger_sm90() -> Callable[..., Any]:
    if DEVICE != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("needs a Hopper GPU")
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    return LigerFusedScaledCrossEntropySM90Function.apply


def liger_scaled() -> Step:
    apply = liger_sm90()

    def logprobs_of(p: Problem) -> Tensor:
        without_softcap(p)
        return -apply(p.hidden, p.weight, p.labels)

    return per_token(logprobs_of)


def cut_cross_entropy(filter_eps: str | None) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    options: dict[str, Any] = {"reduction": "none", "filter_eps": filter_eps, "impl": "cce"}
    return per_token(lambda p: -linear_cross_entropy(p.hidden, p.weight, p.labels, softcap=p.softcap, **options))


def quack() -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss_of(p: Problem) -> Tensor:
        without_softcap(p)
        rows = QUACK_ROWS // 2 if p.hidden.shape[1] == QUACK_ROWS else QUACK_ROWS
        return chunked_linear_cross_entropy(p.hidden, p.weight, p.labels, chunk_size=rows)

    return cross_entropy(loss_of)


LOSSES: dict[str, Contender] = {
    **{f"{OURS} {x}": Contender(lambda x=x: ours(x)) for x in api.BACKENDS},
    "eager torch": Contender(eager, plain=True),
    "compiled chunks": Contender(compiled_chunks, plain=True),
    "F.linear_cross_entropy": Contender(torch_linear_cross_entropy, plain=True),
    "TRL chunked": Contender(trl_chunked),
    "TRL, whole logits": Contender(trl_whole),
    "Liger GRPO cispo": Contender(lambda: liger_grpo(False)),
    "Liger GRPO cispo, compiled": Contender(lambda: liger_grpo(True)),
    "Liger FLCE, per token": Contender(lambda: liger_linear_cross_entropy("none")),
    "Liger FLCE": Contender(lambda: liger_linear_cross_entropy("mean"), only="CE"),
    "Liger SM90 scaled CE": Contender(liger_scaled),
    "CCE": Contender(lambda: cut_cross_entropy("high")),
    "CCE exact": Contender(lambda: cut_cross_entropy(None)),
    "QuACK": Contender(quack, only="CE"),
}


# ---- log-probs and entropy without a gradient: (logprobs, entropy) -------------------------------------------------


def our_logprobs(backend: str) -> Callable[[Problem], tuple[Tensor, Tensor | None]]:
    def call(p: Problem) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {"softcap": p.softcap, "entropy": True, "backend": backend}
        out = linear_token_logprobs(p.hidden, p.weight, p.targets, **options)
        return out.logprobs, out.entropy

    return call


def chosen_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    logs = logits_of(hidden, weight, softcap).log_softmax(-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)


def compiled_logprobs() -> Callable[[Problem], tuple[Tensor, Tensor]]:
    chunk = torch.compile(chosen_and_entropy, dynamic=False)

    def call(p: Problem) -> tuple[Tensor, Tensor]:
        n = chunk_rows(p)
        parts = [chunk(h, p.weight, t, p.softcap) for h, t in zip(p.hidden.split(n), p.targets.split(n), strict=True)]
        return torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts])

    return call


def trl_logprobs() -> Callable[[Problem], tuple[Tensor, Tensor]]:
    from trl.kernels import ChunkedLogProbFunction

    def call(p: Problem) -> tuple[Tensor, Tensor]:
        args = p.hidden, p.weight, None, p.targets, 1.0, TRL_COLUMNS, p.softcap, 1.0, ("entropy",)
        return ChunkedLogProbFunction.apply(*args)[:2]

    return call


def liger_logprobs() -> Callable[[Problem], tuple[Tensor, Tensor]]:
    apply = liger_sm90()

    def call(p: Problem) -> tuple[Tensor, Tensor]:
        without_softcap(p)
        nll, entropy = apply(p.hidden, p.weight, p.targets, 1.0, -100, 1, True)
        return -nll, entropy

    return call


def cut_logprobs() -> Callable[[Problem], tuple[Tensor, None]]:
    from cut_cross_entropy import linear_cross_entropy

    options: dict[str, Any] = {"reduction": "none", "impl": "cce"}
    return lambda p: (-linear_cross_entropy(p.hidden, p.weight, p.targets, softcap=p.softcap, **options), None)


LOGPROBS: dict[str, Contender] = {
    **{f"{OURS} {x}": Contender(lambda x=x: our_logprobs(x)) for x in (*api.BACKENDS, "triton-matrix")},
    "eager torch": Contender(
        lambda: lambda p: chosen_and_entropy(p.hidden, p.weight, p.targets, p.softcap), plain=True
    ),
    "compiled chunks": Contender(compiled_logprobs, plain=True),
    "TRL chunked": Contender(trl_logprobs),
    "Liger SM90 scaled CE": Contender(liger_logprobs),
    "CCE": Contender(cut_logprobs, only="no entropy"),
}


# ---- loss + entropy + exact KL -------------------------------------------------------------------------------------

ENTROPY, KL = 0.01, 0.1  # coefficients


def kl_in_one_pass(backend: str) -> Step:
    def step(p: Problem) -> Found:
        ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
        return ours(backend, entropy_coef=ENTROPY, kl_coef=KL, **ref)(p)

    return step


def kl_in_two_passes(backend: str) -> Step:
    """The loss with its entropy, then a pass of the KL alone: 3 + 4 products."""

    def step(p: Problem) -> Found:
        loss = ours(backend, entropy_coef=ENTROPY)(p)
        quiet = replace(p, advantages=torch.zeros_like(p.advantages))
        of_kl = ours(backend, kl_coef=KL, ref_hidden=p.ref_hidden, ref_weight=p.ref_weight)(quiet)
        return Found(loss.loss + of_kl.loss, loss.logprobs)

    return step


def kl_in_two_calls(backend: str) -> Step:
    """`linear_policy_loss`, then `linear_kl`, which computes both logits again in backward: 3 + 6 products."""

    def step(p: Problem) -> Found:
        loss = ours(backend, entropy_coef=ENTROPY)(p)
        options: dict[str, Any] = {"softcap": p.softcap, "backend": backend}
        kl = linear_kl(p.hidden, p.weight, p.ref_hidden, p.ref_weight, **options)
        term = KL * (kl * p.mask).sum() / p.mask.sum()
        term.backward()
        return Found(loss.loss + term.detach(), loss.logprobs)

    return step


def loss_with_kl(
    hidden: Tensor, ref_hidden: Tensor, targets: Tensor, behavior: Tensor, advantages: Tensor, mask: Tensor,
    weight: Tensor, ref_weight: Tensor, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Σ over the live rows, from logits."""
    logs = logits_of(hidden, weight, softcap).log_softmax(-1)
    ref_logs = logits_of(ref_hidden, ref_weight, softcap).log_softmax(-1)
    probs = logs.exp()
    kl, entropy = (probs * (logs - ref_logs)).sum(-1), -(probs * logs).sum(-1)
    loss = cispo(logs.gather(1, targets[:, None]).squeeze(1), behavior, advantages, mask)
    return loss + (mask * (KL * kl - ENTROPY * entropy)).sum()


def autograd_kl(function: Callable[..., Tensor], chunked: bool) -> Step:
    def step(p: Problem) -> Found:
        total, tokens = torch.zeros((), device=DEVICE), p.mask.sum()
        columns = p.hidden, p.ref_hidden, p.targets, p.behavior, p.advantages, p.mask
        size = chunk_rows(p) if chunked else len(p.hidden)
        for rows in zip(*(x.split(size) for x in columns), strict=True):
            loss = function(*rows, p.weight, p.ref_weight, p.softcap) / tokens
            loss.backward()
            total += loss.detach()
        return Found(total)

    return step


LOSSES_WITH_KL: dict[str, Contender] = {
    **{f"{OURS} {x}": Contender(lambda x=x: kl_in_one_pass(x)) for x in api.BACKENDS},
    **{f"{OURS} {x}, 2 passes": Contender(lambda x=x: kl_in_two_passes(x)) for x in api.BACKENDS},
    **{f"{OURS} {x}, 2 calls": Contender(lambda x=x: kl_in_two_calls(x)) for x in api.BACKENDS},
    "eager torch": Contender(lambda: autograd_kl(loss_with_kl, chunked=False), plain=True),
    "compiled chunks": Contender(
        lambda: autograd_kl(torch.compile(loss_with_kl, dynamic=False), chunked=True), plain=True
    ),
}


# ---- logits that are given: log-probs (N,), differentiable ---------------------------------------------------------


def our_rows(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, targets: token_logprobs(logits, targets, backend=backend).logprobs


def liger_rows() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    if DEVICE != "cuda":
        raise RuntimeError("needs a GPU")
    # takes the logits of one position more than it has targets: all rows but the last
    return lambda logits, targets: fused_selective_log_softmax(logits.detach()[None], targets[None, :-1], 1.0)[0]


def quack_rows() -> Callable[[Tensor, Tensor], Tensor]:
    from quack.cross_entropy import cross_entropy

    if DEVICE != "cuda":
        raise RuntimeError("needs a GPU")
    return lambda logits, targets: -cross_entropy(logits, targets, reduction="none")


GIVEN_LOGITS: dict[str, Contender] = {
    **{f"{OURS} {x}": Contender(lambda x=x: our_rows(x)) for x in api.BACKENDS},
    "eager torch": Contender(lambda: lambda logits, targets: chosen(logits.float(), targets), plain=True),
    "torch.compile": Contender(
        lambda: torch.compile(lambda logits, targets: chosen(logits.float(), targets), dynamic=False), plain=True
    ),
    "F.cross_entropy": Contender(
        lambda: lambda logits, targets: -F.cross_entropy(logits, targets, reduction="none"), plain=True
    ),
    "TRL": Contender(trl_select),
    "Liger": Contender(liger_rows, only="forward"),
    "QuACK": Contender(quack_rows),
}

# ---- the row kernel of the loss: (logits, ask, batch, gradient) ----------------------------------------------------


def row_kernel(backend: str) -> RowStep:
    return row_step(api._backend(backend, torch.empty(1, device=DEVICE)))  # refuses tensors that it cannot take


ROW_KERNELS = {f"{OURS} {x}": Contender(lambda x=x: row_kernel(x)) for x in api.BACKENDS}
