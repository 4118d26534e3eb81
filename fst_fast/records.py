"""Plain data that flows through the project: problems, prompts, rollouts, groups. Imports nothing of the project."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "aborted"]
Purpose = Literal["rl", "gepa", "eval"]
Versions = tuple[tuple[int, int], ...]  # (number of the weights, tokens they sampled), in the order of the tokens


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to solve. `id` is its identity: the advantage group's key, unique over all tasks of a run."""

    id: str
    data: Mapping[str, Any]  # what the task needs to pose and to verify it
    slice: str = ""  # a visible property by which results are broken down ("" = none)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response. `feedback` is text for the reflector; `parts` are named sub-rewards."""

    reward: float
    feedback: str
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A member of the population (a fast weight): the text of the system prompt."""

    text: str

    @property
    def id(self) -> str:
        """12 hex digits of the text's SHA-256: the name used in files, metrics and reports."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Pure temperature sampling: top-k or top-p would bias the importance ratio. The temperature is above 0."""

    temperature: float = 1.0
    max_new_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response of the policy to one problem under one prompt, scored.

    `logprobs[t]` is the behaviour log-prob: that of `response_ids[t]` under the distribution it was really sampled
    from (temperature included), by the weights that `versions` names for it.
    """

    prompt: Prompt
    problem: Problem
    sample: int  # index among the samples of this (prompt, problem)
    purpose: Purpose
    prompt_ids: tuple[int, ...]  # the whole context: chat template of prompt and problem
    response_ids: tuple[int, ...]  # with the end token, when the response reached it
    logprobs: tuple[float, ...]
    versions: Versions
    sampling: SamplingParams
    finish_reason: FinishReason
    engine: str  # name and version
    response: str  # decoded for verifiers and people; never tokenised again
    verdict: Verdict
    scoring: bool = False  # it scored its prompt on GEPA's scoring set; not on a minibatch

    @property
    def reward(self) -> float:
        return self.verdict.reward

    @property
    def policy_version(self) -> int:
        """Number of the oldest weights that sampled a token of it."""
        return min(version for version, _ in self.versions)

    @property
    def newest_version(self) -> int:
        """Of the newest: another where the weights changed on the way."""
        return max(version for version, _ in self.versions)


@dataclass(frozen=True, slots=True)
class Answer:
    """A plain chat answer of the policy, outside training; `fault` says why it is not a whole one ("" = it is)."""

    text: str
    fault: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """All rollouts of one problem in one step, over all its prompts: the unit of the advantage."""

    problem: Problem
    rollouts: tuple[Rollout, ...]
