"""The policy-gradient objectives, per token: a loss l(log π) and its slope dl/dlog π.

A fused kernel needs only the slope, since d loss / d logits = slope · (onehot − softmax): one pass serves every kind.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .types import arithmetic_dtype

KINDS = ("cispo", "ppo", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3")
# log ρ is capped at 20 before exp, as in verl: ρ stays below 4.9e8, and no sum over tokens overflows fp32.
MAX_LOG_RATIO = 20.0


class TokenTerms(NamedTuple):
    """One objective evaluated at every token; all (N,)."""

    loss: Tensor
    slope: Tensor  # d loss / d logprobs
    ratio: Tensor  # ρ = π / π_behavior
    clipped: Tensor  # bool: the clip changed this token's weight (cispo) or stopped its gradient (ppo)


@dataclass(frozen=True)
class Objective:
    """Which loss, and where its importance ratio ρ is clipped. Raises ValueError on settings that do not fit.

    cispo      −sg(clamp(ρ, weight_min, weight_max)) · A · log π     (MiniMax-M1, arXiv 2506.13585, eq. 4–5)
    ppo        −min(ρ A, clamp(ρ, 1 − clip_low, 1 + clip_high) A)    (arXiv 1707.06347, eq. 7; two ε as in DAPO)
    reinforce  −A · log π
    """

    kind: str
    weight_min: float = 0.0
    weight_max: float | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown: use one of {KINDS}")
        if self.kind == "cispo" and self.weight_max is None:
            raise ValueError(
                "cispo needs weight_max, the cap of the ratio itself (FST uses 4); it is not PPO's ε of 0.2"
            )
        low, high = self.weight_min, self.weight_max
        if self.kind == "cispo" and high is not None and not (0 <= low <= high and high > 0):
            raise ValueError(f"need 0 <= weight_min <= weight_max and weight_max > 0, got {low} and {high}")
        if self.kind == "ppo" and not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {self.clip_low} and {self.clip_high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which ρ is clipped."""
        if self.kind == "ppo":
            return 1 - self.clip_low, 1 + self.clip_high
        if self.kind == "cispo" and self.weight_max is not None:
            return self.weight_min, self.weight_max
        return 0.0, math.inf

    def terms(self, logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor) -> TokenTerms:
        log_ratio = logprobs - behavior_logprobs
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        if self.kind == "ppo":
            surrogate = ratio * advantages
            pessimistic = ratio.clamp(*self.bounds) * advantages
            clipped = surrogate > pessimistic
            flat = clipped | (log_ratio > MAX_LOG_RATIO)  # where ρ is capped it is constant
            return TokenTerms(-torch.minimum(surrogate, pessimistic), torch.where(flat, 0, -surrogate), ratio, clipped)
        weight = ratio.clamp(*self.bounds) if self.kind == "cispo" else torch.ones_like(ratio)
        slope = -weight * advantages
        loss = torch.where(slope == 0, 0, slope * logprobs)  # an impossible token has ρ = 0, log π = −inf
        clipped = weight != ratio if self.kind == "cispo" else torch.zeros_like(ratio, dtype=torch.bool)
        return TokenTerms(loss, slope, ratio, clipped)


@dataclass(frozen=True, eq=False)
class PolicyRows:
    """A batch and what is asked of it: Σ_live weights · (objective − entropy_coef · entropy + kl_coef · KL).

    All tensors (N,): targets int64, live bool, the others in the arithmetic's dtype. Rows not live may hold anything.
    """

    targets: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    live: Tensor  # the mask
    weights: Tensor  # token_weights / denominator
    objective: Objective
    entropy_coef: float
    kl_coef: float

    def learning(self) -> Tensor:
        """Rows that can have a gradient (N,)."""
        can = self.live & (self.weights != 0)
        return can if self.entropy_coef != 0 or self.kl_coef != 0 else can & (self.advantages != 0)

    def at(self, rows: Tensor) -> "PolicyRows":
        """The batch of these rows (n,) alone."""
        return replace(
            self,
            targets=self.targets[rows],
            behavior_logprobs=self.behavior_logprobs[rows],
            advantages=self.advantages[rows],
            live=self.live[rows],
            weights=self.weights[rows],
        )

    def logprob_slopes(self, logprobs: Tensor) -> Tensor:
        """d loss / d logprobs (N,)."""
        return self.weights * self.objective.terms(logprobs, self.behavior_logprobs, self.advantages).slope

    def term_slopes(self) -> tuple[Tensor | None, Tensor | None]:
        """d loss / d (entropy, KL), each (N,); None for a term that is off."""
        return (
            -self.entropy_coef * self.weights if self.entropy_coef != 0 else None,
            self.kl_coef * self.weights if self.kl_coef != 0 else None,
        )

    def loss(self, logprobs: Tensor, entropy: Tensor, kl: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () and the metrics, from per-token measures (N,)."""
        terms = self.objective.terms(logprobs, self.behavior_logprobs, self.advantages)
        per_token = terms.loss
        if self.entropy_coef != 0:
            per_token = per_token - self.entropy_coef * entropy
        if self.kl_coef != 0 and kl is not None:
            per_token = per_token + self.kl_coef * kl
        return live_sum(self.live, self.weights * per_token), {
            **ratio_metrics(self.live, terms, logprobs, self.behavior_logprobs),
            "entropy_mean": live_mean(self.live, entropy),
            **({} if kl is None else {"kl_mean": live_mean(self.live, kl)}),
        }


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy‖ref) from tokens sampled from the policy; differentiable in both arguments.

    With d = log π − log π_ref: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d (Schulman 2020, joschu.net/blog/kl-approx.html).
    k1 and k3 are unbiased, k2 and k3 never negative. k3 clamps d to ±20 so that it stays finite.

    Args: two tensors of one shape. Returns the same shape, in fp32 (fp64 if one is): in bf16 the slope of k3, 1 − e^−d,
    would be 0 for small d, and e^20 is above what fp16 holds. Raises ValueError on an unknown kind or two shapes.
    """
    if logprobs.shape != ref_logprobs.shape:
        shapes = f"{list(logprobs.shape)} and {list(ref_logprobs.shape)}"
        raise ValueError(f"logprobs and ref_logprobs must have the same shape, got {shapes}")
    dtype = arithmetic_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-d) + d
    raise ValueError(f"kind={kind!r} is unknown: use one of {KL_ESTIMATORS}")


def ratio_metrics(live: Tensor, terms: TokenTerms, logprobs: Tensor, behavior_logprobs: Tensor) -> dict[str, Tensor]:
    return {
        "tokens": live.sum().to(logprobs.dtype),
        "ratio_mean": live_mean(live, terms.ratio),
        "ratio_clipped_fraction": live_mean(live, terms.clipped.to(logprobs.dtype)),
        "behavior_k3_mean": live_mean(live, kl_estimate(behavior_logprobs, logprobs, "k3")),
    }


def live_sum(live: Tensor, values: Tensor) -> Tensor:
    return torch.where(live, values, 0).sum()


def live_mean(live: Tensor, values: Tensor) -> Tensor:
    return live_sum(live, values) / live.sum().clamp(min=1)
