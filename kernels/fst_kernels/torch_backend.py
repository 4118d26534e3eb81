"""The row step in plain torch, for any device and dtype."""

import torch
from torch import Tensor

from .blocks import Ask, Measures, slopes_of
from .objective import PolicyRows
from .types import Logits, arithmetic_dtype


def row_step(logits: Logits, ask: Ask, upstream: Measures | PolicyRows | None, grad: Tensor | None) -> Measures:
    block = _Block(logits, ask)
    if upstream is None or grad is None:
        return block.measures
    upstream = slopes_of(upstream, block.measures)
    found = block.gradient(upstream).div_(_column(logits.temperature))
    if block.softcap_slope is not None:
        found.mul_(block.softcap_slope)
    idle = torch.ones(len(found), dtype=torch.bool, device=found.device)
    for g in upstream:
        idle = idle if g is None else idle & (g == 0)
    grad.copy_(found.masked_fill_(idle[:, None], 0))
    return block.measures


def _column(temperature: Tensor) -> Tensor:
    return temperature[:, None] if temperature.ndim else temperature


def _shaped(logits: Logits, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Logits after bias, softcap and temperature (n, V), and the softcap's derivative there."""
    z, slope = logits.products, None
    if keep or not logits.ours:
        z = z.to(arithmetic_dtype(z), copy=True)
    if logits.bias is not None:
        z += logits.bias
    if logits.softcap is not None:
        z.div_(logits.softcap)
        slope = z.cosh().square_().reciprocal_()  # 1 − tanh² would lose its digits where the cap saturates
        z.tanh_().mul_(logits.softcap)
    return z.div_(_column(logits.temperature)), slope


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(softmax (n, V), its log (n, V), logsumexp (n,)), in place on z.

    On a CPU torch.log_softmax was off by 1.5e-5 at V = 151936 (it sums in fp32, one after the other), this by 4e-6.
    """
    peak = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # if all are −inf, so is their logsumexp
    probs = z.sub_(peak).exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return probs.div_(total), z.sub_(log_total), (peak + log_total).squeeze(-1)


def _weighted(probs: Tensor, logs: Tensor) -> Tensor:
    """probs · logs, in place on logs; an item of probability 0 counts 0 even if its log is −inf."""
    return logs.mul_(probs).masked_fill_(probs == 0, 0)


class _Block:
    """The softmax of some rows, its measures (n,), and the way back from them to the logits."""

    def __init__(self, logits: Logits, ask: Ask) -> None:
        z, self.softcap_slope = _shaped(logits, ask.keep)
        self.probs, logs, logsumexp = _softmax(z)
        logprobs = entropies = kl = None
        if ask.targets is not None:
            self.targets = ask.targets
            place = self.targets.clamp(0, logs.shape[1] - 1)  # what lies outside is refused once all is launched
            logprobs = logs.gather(1, place[:, None]).squeeze(1)
        if ask.ref is not None:
            ref_probs, ref_logs, _ = _softmax(_shaped(ask.ref, ask.keep)[0])
            if ask.forward_kl:  # Σ p (log p − log q); slope p (log p − log q) − p KL
                self.kl_slope = _weighted(self.probs, torch.sub(logs, ref_logs, out=ref_logs))
                kl = self.kl_center = self.kl_slope.sum(-1)
            else:  # Σ q (log q − log p); slope −q + p
                kl = _weighted(ref_probs, ref_logs.sub_(logs)).sum(-1)
                self.kl_slope, self.kl_center = ref_probs.neg_(), -torch.ones_like(kl)
        if ask.entropy:
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
