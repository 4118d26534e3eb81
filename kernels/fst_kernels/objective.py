"""The policy-gradient objectives, per token: a loss l(log π) and its slope dl/dlog π.

A fused kernel needs only the slope, for d loss / d logits = slope · (onehot − softmax): one pass serves every kind.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("cispo", "ppo", "reinforce")
KL_ESTIMATORS = ("k1", "k2", "k3")
# log ρ is clamped to ±20 before exp, as in verl: ρ stays within [2e-9, 4.9e8], so no sum over tokens overflows fp32.
MAX_LOG_RATIO = 20.0


class TokenTerms(NamedTuple):
    """One objective evaluated at every token; all (N,)."""

    loss: Tensor
    slope: Tensor  # d loss / d logprobs
    ratio: Tensor  # ρ = π / π_behavior
    clipped: Tensor  # bool: the clip changed this token's weight (cispo) or stopped its gradient (ppo)


@dataclass(frozen=True)
class Objective:
    """Which loss, and where its importance ratio ρ is clipped.

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
        if self.kind == "cispo":
            if self.weight_max is None:
                raise ValueError(
                    "cispo needs weight_max, the largest importance ratio a token may be weighted with (the FST paper"
                    " uses 4); it is not PPO's epsilon of 0.2"
                )
            if not 0 <= self.weight_min <= self.weight_max or self.weight_max == 0:
                raise ValueError(
                    f"cispo needs 0 <= weight_min <= weight_max and weight_max > 0,"
                    f" got weight_min={self.weight_min}, weight_max={self.weight_max}"
                )
        if self.kind == "ppo" and not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(
                f"ppo needs 0 <= clip_low <= 1 and clip_high >= 0,"
                f" got clip_low={self.clip_low}, clip_high={self.clip_high}"
            )

    def terms(self, logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor) -> TokenTerms:
        log_ratio = logprobs - behavior_logprobs
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.kind == "ppo":
            surrogate = ratio * advantages
            pessimistic = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
            clipped = surrogate > pessimistic
            flat = clipped | (log_ratio.abs() > MAX_LOG_RATIO)  # exp(clamp(.)) has slope 0 beyond the clamp
            return TokenTerms(-torch.minimum(surrogate, pessimistic), torch.where(flat, 0, -surrogate), ratio, clipped)
        if self.kind == "cispo":
            weight = ratio.clamp(self.weight_min, self.weight_max)
            slope = -weight * advantages
        else:
            weight = ratio
            slope = -advantages
        loss = torch.where(slope == 0, 0, slope * logprobs)  # 0 even where log π = −inf
        return TokenTerms(loss, slope, ratio, ratio != weight)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy‖ref) from tokens sampled from the policy; differentiable in both arguments.

    With d = log π − log π_ref: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d (Schulman 2020, joschu.net/blog/kl-approx.html).
    k1 and k3 are unbiased, k2 and k3 never negative. k3 clamps d to ±20 so that it stays finite.

    Args: two tensors of one shape. Returns the same shape. Raises ValueError on an unknown kind.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-d) + d
    raise ValueError(f"kind={kind!r} is unknown: use one of {KL_ESTIMATORS}")
