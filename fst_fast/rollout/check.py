"""Whether an engine samples from the distribution that the trainer will differentiate: asked of every engine at the
start of a run, and of what it sampled at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fst_fast.errors import EngineError, UserError
from fst_fast.model import Model
from fst_fast.prefix_tree import Ragged, trie
from fst_fast.records import Rollout, SamplingParams
from fst_fast.rollout.engine import Completion, Request, RolloutEngine
from fst_fast.rollout.reuse import k3

# Mean |Δ log p| a step: engines are 1e-5 off in float32, and in bfloat16 up to .07 for single tokens, .01 on average.
MISMATCH = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_engine(engine: RolloutEngine, model: Model) -> None:
    """Right after `engine.load_weights(model, ...)`: sample a little, before anything is learned from wrong numbers.

    Log-probs off the model's own forward pass by 1e-3 (bf16: 0.2) mean an architecture that the engine runs otherwise
    (ALiBi, chunks, recurrences) or weights that did not reach it; fewer prompt tokens computed than the prompts have,
    that it read KV of older weights, however small the change. Raises UserError.
    """
    length = max(72, model.window + 8 if model.window and model.window <= 512 else 0)  # some of vLLM's blocks
    ids = [(7 * i + 3) % model.config.vocab_size for i in range(min(length, model.context - 8))]
    prompts = [tuple(ids), (*ids[:-4], 5)]  # one is prefilled on top of the other's prefix
    before = engine.stats.computed_prompt_tokens
    try:
        engine.submit([Request(i, prompt, SamplingParams(1.0, 4), seed=i) for i, prompt in enumerate(prompts)])
        done = []
        while engine.busy:
            done += engine.step()
        error = max(worst_error(model, prompts[c.id], c) for c in done)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError) as problem:
        raise UserError(f"model.path: the {engine.name} engine cannot sample from {model.path}: {problem}") from problem
    if not error < (1e-3 if model.dtype == torch.float32 else 0.2):
        raise UserError(
            f"model.path: {model.path}: the {engine.name} engine's log-probs are off by {error:.2g} from the model's "
            "own forward pass: it has other weights or another architecture; Qwen3, Llama, Mistral and Gemma work"
        )
    computed, needed = engine.stats.computed_prompt_tokens - before, trie(Ragged.of(prompts)).tokens
    if computed < needed:
        raise UserError(
            f"rollout.engine: after a change of weights the {engine.name} engine computed {computed} of {needed} "
            "prompt tokens and took the rest from older weights"
        )


@torch.no_grad()
def worst_error(model: Model, prompt: tuple[int, ...], c: Completion) -> float:
    """Largest |Δ log p| of a response's tokens, at temperature 1, from the model's own forward pass."""
    hidden = model.hidden(torch.tensor([prompt + c.response_ids], device=model.device), use_cache=False)
    logprobs = model.logits(hidden[0, len(prompt) - 1 : -1]).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(c.response_ids, device=model.device)[:, None])[:, 0]
    return float((chosen - torch.tensor(c.logprobs, device=model.device)).abs().max())


def mismatch(log_ratios: Sequence[tuple[Rollout, torch.Tensor]], version: int) -> dict[str, float]:
    """How far the engine's log-probs are from the trainer's, which `log_ratios` takes at the weights `version`: token
    means of |Δ log p|, of k3 = ρ − 1 − log ρ, and of ρ > 2.

    Of tokens that these weights sampled, where Δ should be rounding; and as `older_...` of the others, where the
    weights differ too.
    """
    parts: dict[str, list[torch.Tensor]] = {"": [], "older_": []}
    for r, log in log_ratios:
        for (sampled_by, _), piece in zip(r.versions, log.split([n for _, n in r.versions]), strict=True):
            parts["" if sampled_by == version else "older_"].append(piece)
    return {name: value for prefix, logs in parts.items() if logs for name, value in _distance(prefix, logs)}


def _distance(prefix: str, logs: list[torch.Tensor]) -> Iterable[tuple[str, float]]:
    log = torch.cat(logs).double()
    yield f"{prefix}tokens", len(log)
    yield f"{prefix}abs", float(log.abs().mean())
    yield f"{prefix}k3", float(k3(log).mean())
    yield f"{prefix}above_2", float((log.exp() > 2).double().mean())


def check_mismatch(found: dict[str, float], limit: float, engine: str) -> None:
    """EngineError when the mean |Δ log p| of tokens sampled by the present weights is above `limit`, or no number."""
    if "abs" in found and not found["abs"] <= limit:
        raise EngineError(
            f"the {engine} engine's log-probs of {found['tokens']} tokens are {found['abs']:.2g} off the trainer's on "
            f"average (rollout.max_mismatch = {limit:g}): it samples from other weights or computes otherwise; if "
            "it does so again, use another rollout.engine, model.dtype = float32, or a larger rollout.max_mismatch"
        )
