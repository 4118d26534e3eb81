"""The definitions: float64, whole logits, plain autograd. Slow on purpose; every backend is tested against them.

Names and meaning are the package's, without chunk_rows and backend. Nothing is shared with the kernels but the records.
"""

from typing import Any

import torch
from torch import Tensor

from .types import PolicyLoss, TokenLogprobs


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False
) -> TokenLogprobs:
    logprobs, entropies, logsumexp = _measure(logits, targets, temperature)
    return TokenLogprobs(logprobs, entropies if entropy else None, logsumexp)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> TokenLogprobs:
    return token_logprobs(_logits(hidden, weight, bias, softcap), targets, temperature=temperature, entropy=entropy)


def policy_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "cispo",
    weight_min: float = 0.0,
    weight_max: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    token_weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    live = _live(mask, logprobs)
    logp, behavior, advantage = (x.double()[live] for x in (logprobs, behavior_logprobs, advantages))
    ratio = torch.exp(torch.clamp(logp - behavior, max=20))
    if kind == "cispo":
        assert weight_max is not None
        weight = torch.clamp(ratio, weight_min, weight_max).detach()
        per_token = -weight * advantage * logp
        clipped = ratio != weight
    elif kind == "ppo":
        bounded = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
        per_token = -torch.minimum(ratio * advantage, bounded * advantage)
        clipped = ratio * advantage > bounded * advantage
    else:
        assert kind == "reinforce"
        per_token = -advantage * logp
        clipped = torch.zeros_like(live[live])
    if token_weights is not None:
        per_token = per_token * token_weights.double()[live]
    tokens = max(1, int(live.sum()))
    d = torch.clamp(behavior - logp.detach(), -20, 20)  # k3 of KL(behavior‖policy)
    metrics = {
        "tokens": live.sum().double(),
        "ratio_mean": ratio.detach().sum() / tokens,
        "ratio_clipped_fraction": clipped.double().sum() / tokens,
        "behavior_k3_mean": (torch.exp(-d) - 1 + d).sum() / tokens,
    }
    return PolicyLoss(per_token.sum() / (tokens if denominator is None else denominator), metrics)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    **objective: Any,  # of policy_loss
) -> PolicyLoss:
    live = _live(mask, hidden)
    tokens = max(1, int(live.sum()))
    denominator = tokens if denominator is None else denominator
    weights = (torch.ones_like(live) if token_weights is None else token_weights)[live].double()
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(len(live))[live]

    z = _logits(hidden[live], weight, bias, softcap)
    logprobs, entropy, _ = _measure(z, targets[live], temperature)
    common: dict[str, Any] = {"token_weights": weights, "denominator": denominator}
    policy = policy_loss(logprobs, behavior_logprobs[live], advantages[live], **common, **objective)
    loss, metrics = policy.loss, {**policy.metrics, "entropy_mean": entropy.detach().sum() / tokens}
    if entropy_coef != 0:
        loss = loss - entropy_coef * (weights * entropy).sum() / denominator
    kl = None
    if ref_hidden is not None and ref_weight is not None:
        ref_z = _logits(ref_hidden[live], ref_weight, ref_bias, softcap).detach()
        kl = _kl(z / _column(temperature), ref_z / _column(temperature))
        metrics["kl_mean"] = kl.detach().sum() / tokens
        if kl_coef != 0:
            loss = loss + kl_coef * (weights * kl).sum() / denominator

    def spread(x: Tensor) -> Tensor:
        return torch.zeros(len(live), dtype=x.dtype, device=x.device).masked_scatter(live, x.detach())

    return PolicyLoss(loss, metrics, spread(logprobs), spread(entropy), None if kl is None else spread(kl))


def linear_kl(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    direction: str = "forward",
    temperature: float | Tensor = 1.0,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    p = _logits(hidden_p, weight_p, bias_p, softcap) / _column(temperature)
    q = _logits(hidden_q, weight_q, bias_q, softcap).detach() / _column(temperature)
    return _kl(p, q) if direction == "forward" else _kl(q, p)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    d = logprobs.double() - ref_logprobs.double()
    bounded = torch.clamp(d, -20, 20)
    return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-bounded) - 1 + bounded}[kind]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _measure(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.double() / _column(temperature)  # (N, V)
    logs = torch.log_softmax(z, -1)
    return logs.gather(1, targets[:, None]).squeeze(1), -_expectation(logs, logs), torch.logsumexp(z, -1)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    p, q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return _expectation(p, p - q)


def _expectation(logs: Tensor, values: Tensor) -> Tensor:
    """Σ exp(logs) · values over the vocabulary; tokens of probability 0 count 0, in the derivative too."""
    return (logs.exp() * values.masked_fill(logs == -torch.inf, 0)).sum(-1)


def _column(temperature: float | Tensor) -> float | Tensor:
    return temperature.double()[..., None] if isinstance(temperature, Tensor) else temperature


def _live(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones(len(like), dtype=torch.bool, device=like.device) if mask is None else mask != 0
