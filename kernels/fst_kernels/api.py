"""The public functions: check the arguments, choose a backend, put the pieces of a loss together.

N tokens, H hidden size, V vocabulary. hidden [N,H] and weight [V,H] are fp32, bf16, fp16 or fp64, targets int64 [N];
the arithmetic is fp32, or fp64 if an operand is. The definitions, plain and in float64, are `fst_kernels.reference`.
"""

import math
import os
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu_backend, cuda_backend, ops
from .autograd import attach_gradients, reject_forward_mode, reject_vmap
from .checks import denominator_rules, mask_rules, policy_rules, require
from .objective import Objective, PolicyRows, live_sum, ratio_metrics
from .types import OPERANDS, Head, PolicyLoss, TokenLogprobs, arithmetic_dtype

HAS_TRITON = find_spec("triton") is not None
BACKENDS = ("cuda", *(("triton",) if HAS_TRITON else ()), "cpu", "torch")


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-prob of each target under softmax(logits / temperature), for logits [N,V] that already exist.

    Differentiable in logits, whose gradient (of their dtype) is made in one more pass over them; a row without a slope
    gets exactly 0, whatever it holds. temperature: a number or [N]. entropy=True adds the entropy over the vocabulary.
    backend as in `linear_token_logprobs`. Raises ValueError on arguments that do not fit.
    """
    if logits.ndim != 2 or len(logits) > logits.numel() or logits.dtype not in OPERANDS:
        got = f"{list(logits.shape)} {logits.dtype}"
        raise ValueError(f"logits must be [N,V] with V ≥ 1 and one of {OPERANDS}, got {got}")
    reject_forward_mode(logits)
    scale = _temperature(temperature, logits)
    _check_rows(logits, targets=targets)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    found = ops.measure_logits(logits, scale, targets, entropy, _backend(backend, logits))
    return TokenLogprobs(found[0], found[1] if entropy else None, found[-1])


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
        chunk_rows: rows of logits that exist at a time; by default 4096 on a GPU and about 2²⁴ logits on a CPU.
        backend: "cuda" (rows in clusters' shared memory on a Hopper GPU, where the install built it with FST_CUDA=1),
            "triton" (fp32 arithmetic on a GPU), "cpu" (compiled), "torch" (any device and dtype), or "auto": the first
            of them that can take these tensors ("cuda" not in torch.compile). Here only, "triton-matrix" stores no
            logit in the forward pass and goes backward like "triton": "auto" for bf16 or fp16 on a Hopper GPU, not
            in torch.compile.

    Differentiable in hidden, weight, bias (the backward pass computes the logits again). Raises ValueError on shapes,
    dtypes or a backend that do not fit, and on targets or temperatures out of range. In a graph of torch.compile the
    values of a mask, a 0-dim temperature, a tensor denominator and of `policy_loss`'s arguments are not checked, and
    numbers but the denominator are constants: another temperature, softcap, coefficient or bound of the ratio compiles
    again (8 times by default, then fullgraph=True raises). A temperature that changes may be a 0-dim tensor.

    Heads may be DTensors, here, in `linear_policy_loss` and in `linear_kl`; what hidden is says what is meant, and all
    ranks call and go backward alike, also one whose rows are all masked:
        Data parallel: hidden, targets and so on are this rank's own tokens, plain tensors, and weight (bias) a DTensor,
            as FSDP2 leaves it outside a module's forward. It is gathered, in its dtype, once for the pass; its
            gradient is summed over ranks in fp32, not averaged. FSDP2 averages those it reduces itself unless each of
            its modules, not the root alone, is told `set_gradient_divide_factor(1.0)`. Inside forward the weight is a
            plain tensor, and FSDP2's affair.
        Vocabulary parallel: hidden is a DTensor, replicated or sharded, and weight (bias) Shard(0) on the same
            one-dimensional mesh; all else is plain, of all N tokens, the same on every rank. Each rank multiplies its
            own rows of the head, the results are the same on all, and no gradient of the weight is communicated.
    """
    head = Head(hidden, weight, bias, _temperature(temperature, hidden), softcap)
    _check_rows(hidden, targets=targets)
    _check_chunk(chunk_rows)
    sharded = _sharded(head, None) is not None
    matrix = HAS_TRITON and backend == "triton-matrix"
    if matrix and sharded:
        raise ValueError("backend='triton-matrix' takes plain tensors: use 'triton' for heads that are DTensors")
    if backend == "auto" and not sharded:
        matrix = _suits_matrix(hidden, weight)
    chosen = "triton-matrix" if matrix else _backend(backend, hidden, weight)
    found = _measure(head, None, targets, entropy, True, chunk_rows, chosen)
    return TokenLogprobs(found[0], found[1] if entropy else None, found[-1])


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
    reject_forward_mode(logprobs)
    reject_vmap(logprobs)
    dtype = arithmetic_dtype(logprobs)
    _check_rows(logprobs, logprobs=logprobs, behavior_logprobs=behavior_logprobs, advantages=advantages)
    live, weights = _weigh(logprobs, dtype, mask, token_weights, denominator)
    values, behavior, advantages = (x.detach().to(dtype) for x in (logprobs, behavior_logprobs, advantages))
    require(*policy_rules(PolicyRows(values, behavior, advantages, live, weights, objective, 0.0, 0.0)))
    terms = objective.terms(values, behavior, advantages)
    loss = live_sum(live, weights * terms.loss)
    if torch.is_grad_enabled() and logprobs.requires_grad:
        loss = attach_gradients(loss, (logprobs,), (torch.where(live, weights * terms.slope, 0),))
    return PolicyLoss(loss, ratio_metrics(live, terms, values, behavior))


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
    clip for ppo, −A_t · log π_t for reinforce, with ρ = π / π_behavior and log ρ capped at 20. H_t is the entropy and
    KL_t the exact KL(policy‖ref), both over the whole vocabulary at the same temperature and softcap.

    Args:
        hidden [N,H], weight [V,H], bias [V] or None, targets int64 [N]; temperature, softcap, chunk_rows, backend, and
            heads that are DTensors, as in `linear_token_logprobs`.
        behavior_logprobs, advantages [N].
        mask: [N], bool or 0/1; rows at 0 contribute exactly 0 whatever they contain (NaN, inf, targets of −100).
        weight_max: the cap of ρ itself, required for cispo (values above e²⁰ = 4.9e8 act as that).
        clip_low, clip_high: for ppo, ρ is clipped to [1 − clip_low, 1 + clip_high].
        token_weights: [N], default 1. FST, where every problem weighs the same: 1 / (tokens of the problem's group)
            and denominator = the number of problems.
        denominator: a number, or a tensor of one; default the number of unmasked tokens, at least 1. Pass the global
            count, so that the losses (and gradients) of ranks and micro-batches add up to the loss of the whole batch.
        ref_hidden [N,H'], ref_weight [V,H'], ref_bias [V]: the reference of the KL; constants.

    Returns PolicyLoss: loss (); logprobs, entropy and kl [N], detached, 0 at masked rows; metrics, detached, ():
    tokens (number unmasked), and over those ratio_mean, ratio_clipped_fraction (tokens the clip changed),
    behavior_k3_mean (estimates KL(behavior‖policy)), entropy_mean and, with a reference, kl_mean. The means of parts of
    a batch combine weighted by tokens.

    Gradients flow to hidden, weight, bias; a frozen one costs no product. Rows that are masked, or have advantage 0
    while there is no entropy or KL term, skip theirs. There is no second derivative: create_graph=True raises
    RuntimeError in backward. Weight and bias gradients are summed in fp32 and rounded once, to the parameter's dtype
    (to its `grad_dtype` where that is set, which torch.compile does not see). Raises ValueError on arguments that do
    not fit.
    """
    objective = Objective(kind, weight_min, weight_max, clip_low, clip_high)
    for name, value in (("entropy_coef", entropy_coef), ("kl_coef", kl_coef)):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
    head = Head(hidden, weight, bias, _temperature(temperature, hidden), softcap)
    _check_chunk(chunk_rows)
    chosen, dtype = _backend(backend, hidden, weight), head.dtype
    _check_rows(hidden, targets=targets, behavior_logprobs=behavior_logprobs, advantages=advantages)
    ref = None
    if ref_hidden is not None and ref_weight is not None:
        ref = _reference(head, ref_hidden, ref_weight, ref_bias)
    elif kl_coef != 0 or not (ref_hidden is ref_weight is ref_bias is None):
        raise ValueError("a KL term needs both ref_hidden and ref_weight")

    live, weights = _weigh(hidden, dtype, mask, token_weights, denominator)
    behavior, advantages = (x.detach().to(dtype) for x in (behavior_logprobs, advantages))
    batch = PolicyRows(targets, behavior, advantages, live, weights, objective, entropy_coef, kl_coef)
    inputs = hidden, weight, bias
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    sharded = _sharded(head, ref)
    with torch.no_grad():
        found = (sharded or ops).policy_pass(head, ref, batch, chunk_rows, chosen, wanted)
        loss, metrics = batch.loss(found.logprobs, found.entropy, found.kl)
    if any(wanted):
        loss = attach_gradients(loss, inputs, found.gradients, None if sharded is None else sharded.placement(head))
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

    hidden_p [N,H], weight_p [V,H], hidden_q [N,H'], weight_q [V,H'], biases [V]; temperature, softcap, chunk_rows and
    DTensors as in `linear_token_logprobs`. Differentiable in p, while q is a constant. Raises ValueError on arguments
    that do not fit.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction={direction!r} is unknown: use "forward" or "reverse"')
    p = Head(hidden_p, weight_p, bias_p, _temperature(temperature, hidden_p), softcap)
    q = _reference(p, hidden_q, weight_q, bias_q)
    _check_chunk(chunk_rows)
    chosen = _backend(backend, hidden_p, weight_p)
    return _measure(p, q, None, False, direction == "forward", chunk_rows, chosen)[0]


# ---- arguments -----------------------------------------------------------------------------------------------------


def _backend(name: str, *operands: Tensor) -> str:
    """The name of a backend that can take these tensors."""
    if name == "auto":
        return _best(*operands)
    if name == "triton" and not HAS_TRITON:
        raise ValueError(
            "backend='triton' is not available: triton is not installed (pip install triton; it needs a GPU)"
        )
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not available: use one of {('auto', *BACKENDS)}")
    if name == "triton" and arithmetic_dtype(*operands) != torch.float32:
        raise ValueError("backend='triton' computes in fp32: use 'torch' for fp64 operands")
    if name == "triton" and not (operands[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1, set before triton is imported),"
            f" got {operands[0].device}"
        )
    if name == "cpu" and (reason := cpu_backend.refusal(*operands)):
        raise ValueError(f"backend='cpu' is not available: {reason}")
    if name == "cuda" and (reason := cuda_backend.refusal(*operands)):
        raise ValueError(f"backend='cuda' is not available: {reason}")
    return name


def _best(*operands: Tensor) -> str:
    if operands[0].is_cuda and cuda_backend.suits(*operands):
        return "cuda"
    if HAS_TRITON and operands[0].is_cuda and arithmetic_dtype(*operands) == torch.float32:
        return "triton"
    reason = cpu_backend.refusal(*operands)
    if reason == cpu_backend.NOT_BUILT:
        warnings.warn(f"{reason}: slower torch code runs instead", stacklevel=4)
    return "torch" if reason else "cpu"


def _suits_matrix(hidden: Tensor, weight: Tensor) -> bool:
    """Whether "auto" is the matrix kernel for this head; not in a graph, whose tensors have no addresses to look at."""
    if not (HAS_TRITON and hidden.is_cuda) or torch.compiler.is_compiling():
        return False
    from . import triton_matrix

    return triton_matrix.refusal(hidden, weight) is None


def _check_chunk(chunk_rows: int | None) -> None:
    if chunk_rows is not None and not (isinstance(chunk_rows, int) and chunk_rows >= 1):
        raise ValueError(f"chunk_rows must be a whole number, at least 1, got {chunk_rows}")


def _temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            _check_rows(like, temperature=temperature)
            return temperature.detach()
        if torch.compiler.is_compiling():
            return temperature.detach()
        temperature = float(temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    return torch.tensor(temperature, dtype=torch.float64, device="cpu")


def _reference(policy: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """The other distribution of a KL: a constant, over the same tokens, vocabulary, temperature and softcap."""
    if len(hidden) != len(policy.hidden) or len(weight) != len(policy.weight):
        raise ValueError(
            f"a KL needs two distributions over the same N tokens and V items, got N, V ="
            f" {len(policy.hidden)}, {len(policy.weight)} and {len(hidden)}, {len(weight)}"
        )
    if hidden.device != policy.hidden.device:
        raise ValueError(f"both distributions must be on {policy.hidden.device}, got one on {hidden.device}")
    bias = None if bias is None else bias.detach()
    return Head(hidden.detach(), weight.detach(), bias, policy.temperature, policy.softcap)


def _sharded(head: Head, ref: Head | None) -> ModuleType | None:
    """The module for heads with DTensors; plain tensors never import it, nor torch.distributed.tensor."""
    if not any(_is_dtensor(x) for x in ops.tensors(head, ref)):
        return None
    from . import sharded

    return sharded


def _is_dtensor(x: Any) -> bool:
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _measure(head: Head, ref: Head | None, *options: Any) -> list[Tensor]:
    if sharded := _sharded(head, ref):
        return sharded.measure(head, ref, *options)
    return ops.measure(*ops.tensors(head, ref), *options)


def _weigh(
    like: Tensor,
    dtype: torch.dtype,
    mask: Tensor | None,
    token_weights: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Which rows count, and token_weights / denominator, which means nothing where they do not; both (N,)."""
    _check_rows(like, mask=mask, token_weights=token_weights)
    if mask is not None and mask.dtype != torch.bool:
        require(*mask_rules(mask))
    n, device = len(like), like.device
    live = torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask != 0
    if denominator is None:
        denominator = live.sum().clamp(min=1)
    elif isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, got a tensor {list(denominator.shape)}")
        denominator = denominator.detach().reshape(()).to(device=device, dtype=dtype)
        require(*denominator_rules(denominator[None]))
    elif not 0 < denominator < math.inf:
        raise ValueError(f"denominator must be above 0 and finite, got {denominator}")
    weights = torch.ones(n, dtype=dtype, device=device) if token_weights is None else token_weights.detach().to(dtype)
    return live, weights / denominator


def _check_rows(like: Tensor, **vectors: Tensor | None) -> None:
    """Each has an entry for every row of `like`, on its device, of a dtype that its name asks for."""
    for name, vector in vectors.items():
        if vector is None and name in ("mask", "token_weights"):
            continue
        if not isinstance(vector, Tensor) or not like.ndim:
            raise ValueError(f"{name} must be a tensor [N], one entry a token, got {vector}")
        if _is_dtensor(vector):
            raise ValueError(f"{name} must be a plain tensor: only hidden states, weights and biases can be DTensors")
        if vector.shape != like.shape[:1]:
            raise ValueError(f"{name} must be [{len(like)}], one entry a token, got {list(vector.shape)}")
        if name == "targets" and vector.dtype != torch.int64:
            raise ValueError(f"targets must be int64, got {vector.dtype}")
        if name not in ("targets", "mask") and not vector.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {vector.dtype}")
        if vector.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the other tensors, got {vector.device}")
