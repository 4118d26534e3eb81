"""The public functions: check the arguments, choose a backend, put the pieces of a loss together.

N tokens, H hidden size, V vocabulary. hidden [N,H] and weight [V,H] are fp32, bf16, fp16 or fp64, targets int64 [N];
the arithmetic is fp32, or fp64 if an operand is. The definitions, plain and in float64, are `fst_kernels.reference`.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import torch_backend
from .autograd import attach_gradients
from .objective import Objective, TokenTerms, kl_estimate
from .torch_backend import Head, accumulator_dtype
from .types import PolicyLoss, TokenLogprobs

BACKENDS = {"torch": torch_backend}


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False
) -> TokenLogprobs:
    """Log-prob of each target under softmax(logits / temperature), for logits [N,V] that already exist.

    Differentiable in logits. temperature: a number or [N]. entropy=True adds the entropy over the vocabulary.
    """
    _check_floating(logits=logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N,V], got {list(logits.shape)}")
    _check_rows(len(logits), targets=targets)
    _check_targets(targets)
    _check_temperature(temperature, len(logits))
    t = temperature[:, None] if isinstance(temperature, Tensor) and temperature.ndim else temperature
    z = logits.to(accumulator_dtype(logits)) / t
    logsumexp = z.logsumexp(-1)
    # Subtract the maximum before the logsumexp: −log p keeps its digits when all logits are large.
    peak = z.detach().amax(-1, keepdim=True)
    logs = z - peak
    logs = logs - logs.exp().sum(-1, keepdim=True).log()
    entropies = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1) if entropy else None
    return TokenLogprobs(logs.gather(1, targets[:, None]).squeeze(1), entropies, logsumexp)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """`token_logprobs` of the logits softcap(hidden · weightᵀ + bias), which are never stored whole.

    Args:
        hidden [N,H], weight [V,H], bias [V] or None, targets int64 [N].
        temperature: a number or [N], dividing the logits after the softcap.
        softcap: c in c · tanh(logits / c).
        chunk_rows: rows of logits that exist at a time; by default 4096 on a GPU and about 2²³ logits on a CPU.

    Differentiable in hidden, weight, bias (the backward pass computes the logits again). Raises ValueError on shapes,
    dtypes or a backend that do not fit.
    """
    chosen = _backend(backend)
    head = _head(hidden, weight, bias, temperature, softcap, chunk_rows)
    _check_rows(len(hidden), targets=targets)
    _check_targets(targets)
    return TokenLogprobs(*chosen.linear_token_logprobs(head, targets, entropy, chunk_rows))


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
    """The policy-gradient loss from log-probs [N] that are given; differentiable in logprobs.

    `linear_policy_loss` says what the arguments and metrics are. Only loss and metrics of PolicyLoss are filled.
    """
    objective = Objective(kind, weight_min, weight_max, clip_low, clip_high)
    _check_floating(logprobs=logprobs)
    n = len(logprobs)
    live, weights = _rows(n, logprobs, mask, token_weights, denominator)
    _check_rows(n, logprobs=logprobs, behavior_logprobs=behavior_logprobs, advantages=advantages)
    values = logprobs.detach().to(weights.dtype)
    terms = objective.terms(values, behavior_logprobs.detach().to(values.dtype), advantages.detach().to(values.dtype))
    loss = _live_sum(live, weights * terms.loss)
    if torch.is_grad_enabled() and logprobs.requires_grad:
        loss = attach_gradients(loss, (logprobs,), (torch.where(live, weights * terms.slope, 0),))
    return PolicyLoss(loss, _metrics(live, values, behavior_logprobs, terms))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
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
    entropy_coef: float = 0.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """The policy-gradient loss straight from the last hidden states; one pass gives its value and its gradients.

        loss = Σ_t mask_t · token_weights_t · (l_t − entropy_coef · H_t + kl_coef · KL_t) / denominator

    l_t is `Objective`'s: −sg(clamp(ρ_t, weight_min, weight_max)) · A_t · log π_t for cispo (MiniMax-M1), the two-sided
    clip for ppo, −A_t · log π_t for reinforce, with ρ = π / π_behavior and log ρ clamped to ±20. H_t is the entropy and
    KL_t the exact KL(policy‖ref), both over the whole vocabulary at the same temperature and softcap.

    Args:
        hidden [N,H], weight [V,H], bias [V] or None, targets int64 [N]; temperature, softcap, chunk_rows, backend as in
            `linear_token_logprobs`.
        behavior_logprobs, advantages [N].
        mask: [N], bool or 0/1; rows at 0 contribute exactly 0 whatever they contain (NaN, inf, targets of −100).
        weight_max: the cap of ρ itself, required for cispo (values above e²⁰ = 4.9e8 act as that).
        clip_low, clip_high: for ppo, ρ is clipped to [1 − clip_low, 1 + clip_high].
        token_weights: [N], default 1. FST, where every problem weighs the same: 1 / (tokens of the problem's group)
            and denominator = the number of problems.
        denominator: default the number of unmasked tokens, at least 1. Pass the global count, so that the losses (and
            gradients) of ranks and micro-batches add up to the loss of the whole batch.
        ref_hidden [N,H'], ref_weight [V,H'], ref_bias [V]: the reference of the KL; constants.

    Returns PolicyLoss: loss (); logprobs, entropy and kl [N], detached, 0 at masked rows; metrics, detached, ():
    tokens (number unmasked), and over those ratio_mean, ratio_clipped_fraction (tokens the clip changed),
    behavior_k3_mean (estimates KL(behavior‖policy)), entropy_mean and, with a reference, kl_mean. The means of parts of
    a batch combine weighted by tokens.

    Gradients flow to hidden, weight, bias; a frozen one costs no product. Rows that are masked, or have advantage 0
    while there is no entropy or KL term, skip theirs. There is no second derivative: create_graph=True raises
    RuntimeError in backward. Raises ValueError on arguments that do not fit.
    """
    objective = Objective(kind, weight_min, weight_max, clip_low, clip_high)
    chosen = _backend(backend)
    head = _head(hidden, weight, bias, temperature, softcap, chunk_rows)
    n = len(hidden)
    _check_rows(n, targets=targets, behavior_logprobs=behavior_logprobs, advantages=advantages)
    _check_targets(targets)
    live, weights = _rows(
        n,
        torch.empty(0, dtype=accumulator_dtype(hidden, weight), device=hidden.device),
        mask,
        token_weights,
        denominator,
    )
    ref = None
    if ref_hidden is not None and ref_weight is not None:
        ref = _head(ref_hidden.detach(), ref_weight.detach(), ref_bias, temperature, softcap, chunk_rows)
        _check_same_tokens(head, ref)
    elif ref_hidden is not None or ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_hidden and ref_weight must be given together")
    elif kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs ref_hidden and ref_weight")

    inputs = (hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    behavior, advantages = (x.detach().to(weights.dtype) for x in (behavior_logprobs, advantages))
    with torch.no_grad():
        found = chosen.linear_policy_pass(
            head,
            ref,
            targets,
            behavior,
            advantages,
            live,
            weights,
            objective,
            entropy_coef,
            kl_coef,
            chunk_rows,
            wanted,
        )
        terms = objective.terms(found.logprobs, behavior, advantages)
        per_token = terms.loss - entropy_coef * found.entropy
        if found.kl is not None:
            per_token += kl_coef * found.kl
        loss = _live_sum(live, weights * per_token)
        metrics = _metrics(live, found.logprobs, behavior, terms, entropy_mean=found.entropy, kl_mean=found.kl)
    if any(wanted):
        loss = attach_gradients(loss, inputs, found.gradients)
    return PolicyLoss(loss, metrics, found.logprobs, found.entropy, found.kl)


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
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact KL over the whole vocabulary, per token [N]; "forward" is KL(p‖q), "reverse" is KL(q‖p).

    hidden_p [N,H], weight_p [V,H], hidden_q [N,H'], weight_q [V,H'], biases [V]; temperature, softcap, chunk_rows as in
    `linear_token_logprobs`. Differentiable in p, while q is a constant. Raises ValueError on arguments that do not fit.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction={direction!r} is unknown: use "forward" or "reverse"')
    chosen = _backend(backend)
    p = _head(hidden_p, weight_p, bias_p, temperature, softcap, chunk_rows)
    q = _head(hidden_q, weight_q, bias_q, temperature, softcap, chunk_rows)
    _check_same_tokens(p, q)
    return chosen.linear_kl(p, q, direction, chunk_rows)


# ---- helpers ------------------------------------------------------------------------------------------------------


def _rows(
    n: int, like: Tensor, mask: Tensor | None, token_weights: Tensor | None, denominator: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which rows count, and token_weights / denominator there (0 elsewhere); both (N,)."""
    dtype, device = accumulator_dtype(like), like.device
    _check_rows(n, mask=mask, token_weights=token_weights)
    live = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask != 0
    if denominator is None:
        denominator = live.sum().clamp(min=1)
    elif not isinstance(denominator, Tensor) and denominator <= 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    weights = torch.ones(n, dtype=dtype, device=device) if token_weights is None else token_weights.detach().to(dtype)
    return live, torch.where(live, weights, 0) / denominator


def _live_sum(live: Tensor, values: Tensor) -> Tensor:
    return torch.where(live, values, 0).sum()


def _metrics(
    live: Tensor, logprobs: Tensor, behavior: Tensor, terms: TokenTerms, **per_token: Tensor | None
) -> dict[str, Tensor]:
    tokens = live.sum().to(logprobs.dtype)
    means = {
        "ratio_mean": terms.ratio,
        "ratio_clipped_fraction": terms.clipped.to(logprobs.dtype),
        "behavior_k3_mean": kl_estimate(behavior.detach().to(logprobs.dtype), logprobs, "k3"),
        **per_token,
    }
    averaged = {name: _live_sum(live, x) / tokens.clamp(min=1) for name, x in means.items() if x is not None}
    return {"tokens": tokens, **averaged}


def _backend(name: str) -> ModuleType:
    chosen = BACKENDS.get("torch" if name == "auto" else name)
    if chosen is None:
        raise ValueError(f"backend={name!r} is not available: use one of {('auto', *BACKENDS)}")
    return chosen


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    chunk_rows: int | None,
) -> Head:
    _check_floating(hidden=hidden, weight=weight)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden [N,H] and weight [V,H], got {list(hidden.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {list(bias.shape)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    return Head(hidden, weight, bias, _check_temperature(temperature, len(hidden)), softcap)


def _check_temperature(temperature: float | Tensor, n: int) -> float | Tensor:
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (n,)):
            raise ValueError(f"temperature must be a number or [{n}], got {list(temperature.shape)}")
        return temperature.detach().expand(n)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return temperature


def _check_same_tokens(p: Head, q: Head) -> None:
    if len(p.hidden) != len(q.hidden) or len(p.weight) != len(q.weight):
        raise ValueError(
            f"both distributions need the same tokens and vocabulary, got {len(p.hidden)} x {len(p.weight)}"
            f" and {len(q.hidden)} x {len(q.weight)}"
        )


def _check_rows(n: int, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name} must be [{n}], one entry a token, got {list(vector.shape)}")


def _check_targets(targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")


def _check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
