"""Scoring as a race: prompts are scored on a growing part of the problems, and those that fall behind drop out.

Rollouts of the prompts that stay can fill groups of the same problems only if they were not chosen by their own
outcomes. So a blind race makes every choice once more for each problem, as if that problem had not been there: its
group takes the prompts of the world that never saw its scores (leave-one-out; rollouts are shared by all worlds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from fst_fast.fast.population import greedy_coverage
from fst_fast.records import Problem, Prompt

Score = Callable[[Sequence[tuple[Prompt, Problem]]], Sequence[float]]
"""Rewards of one rollout per pair. One call is one batch for the engine."""

PARTS = (4, 2, 1)  # the race pauses after a quarter and after half of the problems


class Race:
    """Scores of all who entered, and who finished. At a pause the better half goes on, and never fewer than `keep`.

    The better half is chosen as the population is: by greedy coverage, over all who got as far. Newcomers meet the
    standing of those before them, whose own race is not run again. Not `pauses`: everybody finishes.
    """

    def __init__(self, problems: Sequence[Problem], score: Score, *, keep: int, pauses: bool, blind: bool):
        n = len(problems)
        self.problems, self._score, self._keep = list(problems), score, keep
        self._ends = sorted({-(-n // part) for part in PARTS}) if pauses else [n]
        self.prompts: list[Prompt] = []
        self.scores = np.empty((0, n))  # NaN: not asked
        # world 0 sees every problem, world 1 + i all but problem i
        self._sees = np.vstack([np.ones((1, n), bool), ~np.eye(n, dtype=bool)]) if blind else np.ones((1, n), bool)
        self._cleared = np.empty((0, len(self._sees)), int)  # parts each world has let each prompt clear

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Score `prompts`, all together, as far as any world wants them to go."""
        first = len(self.prompts)
        self.prompts += prompts
        self.scores = np.vstack([self.scores, np.full((len(prompts), len(self.problems)), np.nan)])
        self._cleared = np.vstack([self._cleared, np.zeros((len(prompts), len(self._sees)), int)])
        for part, (start, end) in enumerate(pairwise([0, *self._ends])):
            running = [i for i in range(first, len(self.prompts)) if (self._cleared[i] == part).any()]
            pairs = [(self.prompts[i], problem) for i in running for problem in self.problems[start:end]]
            self.scores[running, start:end] = np.reshape(self._score(pairs), (len(running), end - start))
            for world in range(len(self._sees)):
                here = [i for i in range(len(self.prompts)) if self._cleared[i, world] >= part]
                most = len(here) if end == len(self.problems) else max(self._keep, -(-len(here) // 2))
                on = set(self._best(here, world, end, most))
                going = [i for i in running if self._cleared[i, world] == part and i in on]
                self._cleared[going, world] = part + 1

    def finished(self, world: int = 0) -> list[int]:
        """Numbers of the prompts that `world` scored to the end."""
        return [i for i in range(len(self.prompts)) if self._cleared[i, world] == len(self._ends)]

    def scores_of(self, i: int) -> dict[str, float]:
        """Problem id → reward of prompt number `i`, as far as it ran."""
        rewards = zip(self.problems, self.scores[i].tolist(), strict=True)
        return {problem.id: reward for problem, reward in rewards if reward == reward}

    def standing(self) -> list[int]:
        """Numbers of all prompts: the finished by greedy coverage, then the others by how far they got and by mean."""
        order = self._best(self.finished(), 0, len(self.problems), len(self.prompts))
        means = np.nanmean(self.scores, 1)
        dropped = sorted(
            set(range(len(self.prompts))) - set(order),
            key=lambda i: (-self._cleared[i, 0], -means[i], self.prompts[i].text),
        )
        return [*order, *dropped]

    def blind_populations(self, k: int) -> dict[str, tuple[Prompt, ...]]:
        """Problem id → the `k` prompts chosen without that problem's scores."""
        end = len(self.problems)
        return {
            problem.id: tuple(self.prompts[i] for i in self._best(self.finished(world), world, end, k))
            for world, problem in enumerate(self.problems[: len(self._sees) - 1], start=1)
        }

    def _best(self, which: Sequence[int], world: int, end: int, k: int) -> list[int]:
        by_text = sorted(which, key=lambda i: self.prompts[i].text)
        seen = np.flatnonzero(self._sees[world, :end])
        return [by_text[i] for i in greedy_coverage(self.scores[np.ix_(by_text, seen)], k)]
