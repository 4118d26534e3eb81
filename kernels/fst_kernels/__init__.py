"""Fused log-prob, policy-loss and KL kernels for RL on language models: logits are never stored whole.

Needs torch, and triton on a GPU; `fst_kernels._csrc`, compiled at install where there is a compiler, is backend="cpu",
`fst_kernels._cuda`, compiled by nvcc where the install is asked for it (FST_CUDA=1), backend="cuda".
`fst_kernels.reference` holds the plain float64 definitions that every backend is tested against.
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
