"""What the kernels return: records of tensors. N tokens; per-token tensors are fp32 [N] (fp64 for fp64 inputs)."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Differentiable per-token quantities of softmax(logits / temperature)."""

    logprobs: Tensor  # (N,) log-probability of the target
    entropy: Tensor | None  # (N,) entropy over the whole vocabulary, in nats; None unless asked for
    logsumexp: Tensor  # (N,) of the logits after softcap and temperature


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """A scalar to call `.backward()` on, and detached numbers to log. Per-token tensors are 0 at masked rows."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor] = field(default_factory=dict)  # 0-dim, detached; means are over unmasked tokens
    logprobs: Tensor | None = None  # (N,) detached
    entropy: Tensor | None = None  # (N,) detached
    kl: Tensor | None = None  # (N,) detached exact KL(policy‖ref); None without a reference
