"""Fused log-prob, policy-loss and KL kernels for RL on language models: logits are never stored whole.

Needs torch only; `fst_kernels._csrc`, compiled at install where there is a compiler, makes CPUs faster.
`fst_kernels.reference` holds the plain float64 definitions every backend is tested against.
"""

from . import reference
from .api import linear_kl, linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs
from .objective import kl_estimate
from .types import PolicyLoss, TokenLogprobs

__all__ = [
    "PolicyLoss",
    "TokenLogprobs",
    "kl_estimate",
    "linear_kl",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "reference",
    "token_logprobs",
]
