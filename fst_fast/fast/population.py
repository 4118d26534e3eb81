"""The scored pool of prompts: Pareto front per problem, whom to breed from, and whom to keep by greedy coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

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


def coverage(members: Sequence[Member], k: int) -> tuple[Member, ...]:
    """At most `k` members that together solve the most: greedily maximises the sum over problems of the best score.

    Ties go to the higher mean, then to the text. When nothing more can be added the rest is filled by mean score. The
    first one is the member of the highest mean, and a smaller `k` gives a prefix.
    """
    left = list(members)
    chosen: list[Member] = []
    covered: dict[str, float] = {}

    def rank(m: Member) -> tuple[float, float, str]:
        gain = sum(max(0.0, score - covered.get(problem, 0.0)) for problem, score in m.scores.items())
        return -gain, -m.mean, m.prompt.text

    while left and len(chosen) < k:
        best = min(left, key=rank)
        left.remove(best)
        chosen.append(best)
        covered |= {problem: max(score, covered.get(problem, 0.0)) for problem, score in best.scores.items()}
    return tuple(chosen)


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
