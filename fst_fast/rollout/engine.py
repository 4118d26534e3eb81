"""The protocol of a rollout engine: requests in, finished responses with their behaviour log-probs out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fst_fast.model import Model
from fst_fast.records import FinishReason, SamplingParams, Versions


@dataclass(frozen=True, slots=True)
class Request:
    """One response to sample. The same `seed` gives the same draws whatever else is in the batch."""

    id: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    priority: int = 0  # lower first: the number of the step it is for, or schedule.FILLER
    policy_version: int | None = None  # the weights it is for; None = those the engine holds when it starts
    problem: str = ""  # whose responses are of similar length


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished response. `logprobs` are those of the distribution really sampled from, temperature included, by the
    weights that `versions` names for each token: an engine's own all have one, a Scheduler's may span several."""

    id: int
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: Versions
    finish_reason: FinishReason


@dataclass(slots=True)
class EngineStats:
    """Counted since the engine was made."""

    prompt_tokens: int = 0  # asked for
    computed_prompt_tokens: int = 0  # really run through the model; the rest came from shared prefixes
    generated_tokens: int = 0


class RolloutEngine(Protocol):
    name: str
    version: str  # of the library that samples

    @property
    def policy_version(self) -> int:
        """Of the weights that are sampled from."""
        ...

    @property
    def cache_tokens(self) -> int | None:
        """Tokens of its KV cache, which keeps prefixes for requests to come; None: it shares prefixes only among those
        that start together."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. A prompt that leaves no room in the context raises ValueError before any work."""
        ...

    def step(self) -> list[Completion]:
        """Advance by one token (and admit waiting requests); the responses that finished."""
        ...

    def abort(self, ids: Iterable[int]) -> list[Completion]:
        """Stop these requests; what they have so far, with finish_reason "aborted"."""
        ...

    def load_weights(self, model: Model, version: int) -> None:
        """Sample from these weights from now on; every cached prefix of older ones is dropped. Needs an idle engine."""
        ...

    def sleep(self) -> None:
        """Leave the memory to a training step, as far as there is any to give; `load_weights` ends it. Needs an idle
        engine."""
        ...

    @property
    def busy(self) -> bool:
        """Whether requests wait or run."""
        ...


def check_lengths(requests: Sequence[Request], context: int) -> None:
    """ValueError for a prompt that leaves no room for its longest response."""
    for r in requests:
        if len(r.prompt_ids) + r.sampling.max_new_tokens > context:
            raise ValueError(
                f"a prompt of {len(r.prompt_ids)} tokens and max_new_tokens = {r.sampling.max_new_tokens} do not "
                f"fit the model's context of {context} tokens"
            )


def check_completion(c: Completion, request: Request) -> None:
    """ValueError for a response that does not have, for each of at most `max_new_tokens` tokens, a log-prob and the
    version of the weights that sampled it."""
    tokens, longest = len(c.response_ids), request.sampling.max_new_tokens
    if not tokens == len(c.logprobs) == sum(n for _, n in c.versions):
        raise ValueError(f"{len(c.logprobs)} log-probs for {tokens} tokens by weights {c.versions}")
    if tokens > longest or (not tokens and c.finish_reason != "aborted"):
        raise ValueError(f"{tokens} tokens where 1 to {longest} were asked for")
    if not all(math.isfinite(p) for p in c.logprobs):
        raise ValueError("a log-prob that is no number")
