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


def heats(problems: int, *, pauses: bool) -> list[int]:
    """How many of so many problems are behind a prompt at each pause and at the end."""
    return sorted({-(-problems // part) for part in PARTS}) if pauses else [problems]


class Race:
    """Scores of all who entered, and who finished. At a pause the better half goes on, and never fewer than `keep`.

    The better half is chosen as the population is: by greedy coverage, over all who got as far. Newcomers meet the
    standing of those before them, whose own race is not run again. Not `pauses`: everybody finishes.
    """

    def __init__(self, problems: Sequence[Problem], score: Score, *, keep: int, pauses: bool, blind: bool):
        n = len(problems)
        self.problems, self._score, self._keep = list(problems), score, keep
        self._ends = heats(n, pauses=pauses)
        self.prompts: list[Prompt] = []
        self.scores = np.empty((0, n))  # [prompts, problems], NaN: not asked
        # world 0 sees every problem, world 1 + i all but problem i
        self._sees = np.vstack([np.ones((1, n), bool), ~np.eye(n, dtype=bool)]) if blind else np.ones((1, n), bool)
        self._cleared = np.empty((len(self._sees), 0), int)  # [worlds, prompts]: parts that the world saw them through

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Score `prompts`, all together, as far as any world wants them to go."""
        first, n = len(self.prompts), len(self.problems)
        self.prompts += prompts
        self.scores = np.vstack([self.scores, np.full((len(prompts), n), np.nan)])
        self._cleared = np.hstack([self._cleared, np.zeros((len(self._sees), len(prompts)), int)])
        for part, (start, end) in enumerate(pairwise([0, *self._ends])):
            here = self._cleared == part
            here[:, :first] = False
            running = np.flatnonzero(here.any(0))
            pairs = [(self.prompts[i], problem) for i in running for problem in self.problems[start:end]]
            self.scores[running, start:end] = np.reshape(self._score(pairs), (len(running), end - start))
            on = here
            if end < n:
                rivals = self._cleared >= part
                most = np.maximum(self._keep, -(-rivals.sum(1) // 2))
                on = here & self._ahead(end, rivals, most)
            self._cleared += on

    def finished(self) -> list[int]:
        """Numbers of the prompts that were scored to the end."""
        return np.flatnonzero(self._cleared[0] == len(self._ends)).tolist()

    def scores_of(self, i: int) -> dict[str, float]:
        """Problem id → reward of prompt number `i`, as far as it ran."""
        rewards = zip(self.problems, self.scores[i].tolist(), strict=True)
        return {problem.id: reward for problem, reward in rewards if reward == reward}

    def standing(self) -> list[int]:
        """Numbers of all prompts: the finished by greedy coverage, then the others by how far they got and by mean."""
        order = [i for i in self._coverage(len(self.problems), len(self.prompts), self._done())[0].tolist() if i >= 0]
        means = np.nanmean(self.scores, 1)
        dropped = sorted(
            set(range(len(self.prompts))) - set(order),
            key=lambda i: (-self._cleared[0, i], -means[i], self.prompts[i].text),
        )
        return [*order, *dropped]

    def blind_populations(self, k: int) -> dict[str, tuple[Prompt, ...]]:
        """Problem id → the `k` prompts chosen without that problem's scores; empty when the race is not blind."""
        chosen = self._coverage(len(self.problems), k, self._done())[1:].tolist()
        prompts = [tuple(self.prompts[i] for i in row if i >= 0) for row in chosen]
        return dict(zip([problem.id for problem in self.problems], prompts, strict=False))

    def _done(self) -> np.ndarray:
        return self._cleared == len(self._ends)

    def _ahead(self, end: int, rivals: np.ndarray, most: np.ndarray) -> np.ndarray:
        """[worlds, prompts]: the first `most` [worlds] of `rivals` [worlds, prompts] on the problems before `end`."""
        chosen = self._coverage(end, int(most.max()), rivals)
        chosen[np.arange(chosen.shape[1]) >= most[:, None]] = -1
        ahead = np.zeros_like(rivals)
        world, place = np.nonzero(chosen >= 0)
        ahead[world, chosen[world, place]] = True
        return ahead

    def _coverage(self, end: int, k: int, among: np.ndarray) -> np.ndarray:
        """`greedy_coverage` of prompts [worlds, k] on the problems before `end`; last ties go by text."""
        by_text = np.array(sorted(range(len(self.prompts)), key=lambda i: self.prompts[i].text))
        rows = np.nan_to_num(self.scores[by_text, :end])
        chosen = greedy_coverage(rows, k, self._sees[:, :end], among[:, by_text])
        return np.where(chosen >= 0, by_text[chosen], -1)
