"""The scored pool of prompts: Pareto front per problem, whom to breed from, and whom to keep by greedy coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from fst_fast.records import Prompt


@dataclass(frozen=True, slots=True)
class Member:
    """A prompt in the pool, with where it came from and its rewards on the scoring problems of the last cycle."""

    prompt: Prompt
    parent: str | None = None  # id of the prompt it was edited from; None for a seed prompt
    cycle: int = 0  # the cycle that made it
    scores: Mapping[str, float] = field(default_factory=dict)  # problem id → reward; empty until first scored

    @property
    def mean(self) -> float:
        return fmean(self.scores.values()) if self.scores else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"text": self.prompt.text, "parent": self.parent, "cycle": self.cycle, "scores": dict(self.scores)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Member:
        return cls(Prompt(data["text"]), data["parent"], data["cycle"], dict(data["scores"]))


def normalised(text: str) -> str:
    """What two prompts share when they differ in white space only: duplicates are told by it."""
    return " ".join(text.split())


def distinct(members: Sequence[Member]) -> list[Member]:
    """The first member of each normalised text."""
    first: dict[str, Member] = {}
    for m in members:
        first.setdefault(normalised(m.prompt.text), m)
    return list(first.values())


def greedy_coverage(scores: np.ndarray, k: int, seen: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The members that together solve the most, once for each of several worlds.

    scores [members, problems]; seen [worlds, problems] bool, the problems that count in a world; among
    [worlds, members] bool, who stands for choice there. Returns members [worlds, k] in the order chosen, −1 where
    nobody is left.

    Greedily maximises the sum over problems of the best score; ties go to the higher mean, then to the earlier row.
    When nothing more can be added the rest is filled by mean score. The first is the one of the highest mean, and a
    smaller `k` gives a prefix.
    """
    worlds, members = among.shape
    rows = np.arange(worlds)
    sums = (seen @ scores.T).round(9)  # equal ones must tie, in whatever order they were added
    order = np.lexsort((np.broadcast_to(np.arange(members), sums.shape), -sums), axis=1)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(members), order.shape), axis=1)
    covered, left = np.zeros(seen.shape), among.copy()
    chosen = np.full((worlds, min(k, members)), -1)
    for place in range(chosen.shape[1]):
        gains = (np.maximum(scores - covered[:, None], 0) * seen[:, None]).sum(2).round(9)
        gains[~left] = -1
        best = np.where(gains == gains.max(1, keepdims=True), rank, members).argmin(1)
        chosen[:, place] = np.where(left[rows, best], best, -1)
        left[rows, best] = False
        covered = np.maximum(covered, scores[best])
    return chosen


Scores = Mapping[str, float]


def front(members: Sequence[Scores]) -> dict[str, list[int]]:
    """Problem → indices of the members that are best on it; problems that nobody scores on are left out."""
    best: dict[str, list[int]] = {}
    for problem in members[0] if members else ():
        top = max(scores[problem] for scores in members)
        if top > 0:
            best[problem] = [i for i, scores in enumerate(members) if scores[problem] == top]
    return best


def dominates(a: Scores, b: Scores) -> bool:
    """`a` is at least as good on every problem, and better on one."""
    return all(a[problem] >= score for problem, score in b.items()) and any(a[problem] > b[problem] for problem in b)


def breeding_weights(members: Sequence[Scores]) -> list[int]:
    """How often each member is drawn as a parent: the problems it is best on, 0 when it is dominated.

    While nobody scores on anything all are equal.
    """
    wins = [0] * len(members)
    for best in front(members).values():
        for i in best:
            wins[i] += 1
    if not any(wins):
        return [1] * len(members)
    return [0 if any(dominates(other, m) for other in members) else w for m, w in zip(members, wins, strict=True)]
