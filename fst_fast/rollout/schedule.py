"""Planning of rollouts, pure: in what order requests start, on which engine, and whether one more fits its KV cache.

Data in, data out; `dispatch.py` keeps the queues and `benchmarks/rollouts.py` simulates what this is worth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fst_fast.prefix_tree import Ragged, Trie, trie

PREFILL = 0.2  # time of a prefilled token in decoded tokens (Qwen3-8B on an H100 at a batch of 64: .03 against .16 ms)
SIGMAS = 3.0  # of safety at admission: least makespan in benchmarks/rollouts.py; 0 pre-empts as much as no admission
PREFIXES = 1 / 8  # of the cache for shared prefixes: beyond it, longest first costs more room than it saves tail
FILLER = 1 << 20  # priority of GEPA's evaluations: behind the requests of every step, whose priority is its number


class Unit(NamedTuple):
    """The requests that share one whole prompt: they start side by side, on one engine."""

    requests: tuple[int, ...]  # indices into what was planned
    path: tuple[int, ...]  # trie nodes from the top to the prompt's end
    priority: int
    predicted: float  # response tokens of all its requests


@dataclass(frozen=True, slots=True)
class Plan:
    """Units in the order in which they should start; `node_tokens` are the tokens of each trie node."""

    units: list[Unit]
    node_tokens: list[int]


def plan(
    prompts: Ragged | Sequence[Sequence[int]],
    priority: Sequence[int],
    predicted: Sequence[float] | None = None,
    *,
    cache_tokens: int = 0,
) -> Plan:
    """Units of the requests, by priority class. Within a class longest predicted response first (a long one started
    last is what a step waits for), unless the prefixes that units share would take too much of a cache of
    `cache_tokens`: then depth-first, which needs one of them at a time, the longest first among siblings. Without
    predictions, depth-first by token ids.
    """
    sequences = prompts if isinstance(prompts, Ragged) else Ragged.of(prompts)
    tree = trie(sequences)
    lengths = np.zeros(len(sequences)) if predicted is None else np.asarray(predicted, np.float64)
    deep = tree.order if predicted is None else tree.by_cost(lengths)
    classes = np.asarray(priority, np.int64)
    node_tokens = tree.end - tree.start
    members: dict[tuple[int, int], list[int]] = {}
    for i, c, leaf in zip(deep.tolist(), classes[deep].tolist(), tree.leaf[deep].tolist(), strict=True):
        members.setdefault((c, leaf), []).append(i)
    paths: list[tuple[int, ...]] = []
    for k, above in enumerate(tree.parent.tolist()):
        paths.append((*paths[above], k) if above >= 0 else (k,))
    paths.append(())  # of empty sequences, whose leaf is -1
    of = lengths.tolist().__getitem__
    units = [Unit(tuple(m), paths[leaf], c, sum(map(of, m))) for (c, leaf), m in members.items()]
    if predicted is not None and node_tokens[_shared(tree)].sum() <= PREFIXES * cache_tokens:
        units.sort(key=lambda u: -u.predicted / len(u.requests))
    units.sort(key=lambda u: u.priority)
    return Plan(units, node_tokens.tolist())


def _shared(tree: Trie) -> np.ndarray:
    """bool [nodes]: whether several units pass the node."""
    ends = np.zeros(len(tree) + 1, np.int64)
    ends[tree.leaf[tree.leaf >= 0]] = 1
    before = np.concatenate([[0], np.cumsum(ends)])
    return before[np.arange(len(tree)) + tree.size] - before[: len(tree)] > 1


def place(plan: Plan, loads: Sequence[float]) -> list[int]:
    """The engine of each unit: longest processing time first, each onto the engine that would be done soonest.

    `loads` are the decoded tokens each engine still has to make. A prefix counts as work only where it is not yet, so
    a unit joins its siblings when that is worth more than an even load.
    """
    finish = list(loads)
    if len(finish) == 1:
        return [0] * len(plan.units)
    others = [tuple(e for e in range(len(finish)) if e != here) for here in range(len(finish))]
    lacking: list[tuple[int, ...] | None] = [None] * len(plan.node_tokens)  # engines without a trie node; None: all
    chosen = [0] * len(plan.units)
    # equals shuffled: in the order of the trie, one problem under all prompts could fall to one engine
    shuffled = random.Random(0).sample(range(len(chosen)), len(chosen))
    for u in sorted(shuffled, key=lambda u: (plan.units[u].priority, -plan.units[u].predicted)):
        unit, done, new = plan.units[u], finish.copy(), 0
        for k in unit.path:
            if (without := lacking[k]) is None:
                new += plan.node_tokens[k]
            else:
                for e in without:
                    done[e] += PREFILL * plan.node_tokens[k]
        best = chosen[u] = done.index(min(done))
        finish[best] = done[best] + PREFILL * new + unit.predicted
        for k in unit.path:
            if (without := lacking[k]) is None:
                lacking[k] = others[best]
            elif best in without:
                lacking[k] = tuple(e for e in without if e != best)
    return chosen


class LengthPredictor:
    """Response lengths by problem, lognormal: from siblings that have finished and from earlier steps, drawn towards
    the mean of all problems. Recent responses count more: lengths drift while the policy learns."""

    PRIOR = 2.0  # how many responses of the problem itself weigh as much as those of all

    def __init__(self) -> None:
        self._all = Recent(0.999, 1e-3 * math.log(256), 1e-3)  # a guess, until there are any
        self._square = Recent(0.999, 1.0, 1.0)  # of the error of a prediction, in the logarithm
        self._by_problem: dict[str, Recent] = {}

    def observe(self, problem: str, tokens: int) -> None:
        """One finished response of `tokens` tokens."""
        log = math.log(max(1, tokens))
        self._square.add((log - self._log(problem)) ** 2)
        self._all.add(log)
        self._by_problem.setdefault(problem, Recent(0.9)).add(log)

    def expected(self, problem: str) -> float:
        """Tokens of a response that has not begun."""
        return math.exp(self._log(problem) + self._square.mean / 2)

    def survival(self, problems: Sequence[str], so_far: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        """float [n, t]: the chance that a response of each problem that has `so_far` [n] tokens gets more than `ahead`
        [t] others."""
        middle = np.array([self._log(p) for p in problems])[:, None]
        steep = 1.702 / self._square.mean**0.5  # the logistic curve nearest to the normal one

        def log_beyond(tokens: np.ndarray) -> np.ndarray:
            return -np.logaddexp(0.0, steep * (np.log(np.maximum(tokens, 1.0)) - middle))

        return np.exp(log_beyond(so_far[:, None] + ahead[None, :]) - log_beyond(so_far[:, None]))

    def _log(self, problem: str) -> float:
        known = self._by_problem.get(problem)
        if known is None:
            return self._all.mean
        return (known.total + self.PRIOR * self._all.mean) / (known.weight + self.PRIOR)


@dataclass(slots=True)
class Recent:
    """A mean in which every new value makes the earlier ones count `keep` times."""

    keep: float
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        self.total, self.weight = self.keep * self.total + value, self.keep * self.weight + 1

    @property
    def mean(self) -> float:
        return self.total / self.weight


# Decode steps ahead at which the cache is looked at: dense where short responses end.
AHEAD = np.unique(np.geomspace(1, 1 << 17, 48).astype(np.int64)).astype(np.float64)


def peak_tokens(survival: np.ndarray, held: np.ndarray, limit: np.ndarray) -> float:
    """The most KV tokens that running sequences are expected to hold at once, with SIGMAS standard deviations.

    `survival` [n, len(AHEAD)] is the chance that each still runs after so many steps, `held` [n] its tokens now,
    `limit` [n] the steps it can make at most.
    """
    size = (held[:, None] + AHEAD) * (limit[:, None] >= AHEAD)
    mean = (survival * size).sum(0)
    spread = np.sqrt((survival * (1 - survival) * size**2).sum(0))
    return float((mean + SIGMAS * spread).max())
