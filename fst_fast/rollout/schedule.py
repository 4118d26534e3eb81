"""Planning of rollouts, pure: in what order requests start, on which engine, and whether one more fits its KV cache.

Data in, data out; `dispatch.py` keeps the queues and `benchmarks/rollouts.py` simulates what this is worth.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fst_fast.prefix_tree import Ragged, Trie, trie
from fst_fast.rollout.engine import Request

PREFILL = 0.2  # time of a prefilled token in decoded tokens (Qwen3-8B on an H100 at a batch of 64: .03 against .16 ms)
FILLER = 1 << 20  # priority of GEPA's evaluations: behind the requests of every step, whose priority is its number


@dataclass(frozen=True, slots=True)
class Unit:
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


def order(requests: Sequence[Request]) -> list[Request]:
    """Requests by priority and then depth-first along the trie of their prompts."""
    found = plan([r.prompt_ids for r in requests], [r.priority for r in requests])
    return [requests[i] for unit in found.units for i in unit.requests]


def plan(
    prompts: Ragged | Sequence[Sequence[int]],
    priority: Sequence[int],
    predicted: Sequence[float] | None = None,
    *,
    cache_tokens: int = 0,
) -> Plan:
    """Units of the requests, by priority class. Within a class longest predicted response first (a long one started
    last is what a step waits for), unless that would make a cache of `cache_tokens` lose prefixes that depth-first
    order keeps: then depth-first, the longest first among siblings. Without predictions, depth-first by token ids.
    """
    sequences = prompts if isinstance(prompts, Ragged) else Ragged.of(prompts)
    tree = trie(sequences)
    lengths = None if predicted is None else np.asarray(predicted, np.float64)
    ranked = tree.order if lengths is None else _by_length(tree, lengths, cache_tokens)
    classes = np.asarray(priority, np.int64)
    ranked = ranked[np.argsort(classes[ranked], kind="stable")]
    members: dict[tuple[int, int], list[int]] = {}  # (class, leaf); the first request puts a unit into its place
    for i, c, leaf in zip(ranked.tolist(), classes[ranked].tolist(), tree.leaf[ranked].tolist(), strict=True):
        members.setdefault((c, leaf), []).append(i)
    parent = tree.parent.tolist()
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for k, above in enumerate(parent):
        paths[k] = (*paths[above], k)
    total = np.zeros(len(sequences)) if lengths is None else lengths
    return Plan(
        [Unit(tuple(m), paths[leaf], c, float(total[m].sum())) for (c, leaf), m in members.items()],
        (tree.end - tree.start).tolist(),
    )


def _by_length(tree: Trie, predicted: np.ndarray, cache_tokens: int) -> np.ndarray:
    """Requests longest first, if the cache bears it, else depth-first."""
    deep = tree.by_cost(predicted)
    longest = deep[np.argsort(-predicted[deep], kind="stable")]
    cost = [prefill_tokens(tree, ranked, cache_tokens, predicted) for ranked in (longest, deep)]
    return longest if cost[0] <= 1.01 * cost[1] else deep


def prefill_tokens(tree: Trie, ranked: np.ndarray, cache_tokens: int, responses: np.ndarray | None = None) -> int:
    """Prompt tokens computed when requests are served in the order `ranked` by an engine whose cache holds
    `cache_tokens`, drops what was used longest ago, and must hold each response (float [n], tokens) too."""
    parent, tokens = tree.parent.tolist(), (tree.end - tree.start).tolist()
    cache: OrderedDict[int, float] = OrderedDict()  # trie node, or a negative number: a response
    held, computed = 0.0, 0
    for i in ranked.tolist():
        node, path = int(tree.leaf[i]), []
        while node >= 0:
            path.append(node)
            node = parent[node]
        for node in path:  # the tail first: it will be dropped before the heads
            if node in cache:
                cache.move_to_end(node)
            else:
                computed += tokens[node]
                cache[node] = tokens[node]
                held += tokens[node]
        if responses is not None:
            cache[~i] = float(responses[i])
            cache.move_to_end(~i, last=True)
            held += cache[~i]
        while held > cache_tokens and cache:
            held -= cache.popitem(last=False)[1]
    return computed


def place(plan: Plan, loads: Sequence[float]) -> list[int]:
    """The engine of each unit: longest processing time first, each onto the engine that would be done soonest.

    `loads` are the decoded tokens each engine still has to make. A prefix counts as work only where it is not yet, so
    a unit joins its siblings when that is worth more than an even load.
    """
    finish = list(loads)
    engines = range(len(finish))
    if len(finish) == 1:
        return [0] * len(plan.units)
    held: list[set[int]] = [set() for _ in engines]
    chosen = [0] * len(plan.units)
    by_class_and_cost = sorted(range(len(plan.units)), key=lambda u: (plan.units[u].priority, -plan.units[u].predicted))
    for u in by_class_and_cost:
        unit = plan.units[u]
        best, soonest = 0, float("inf")
        for e in engines:
            done = finish[e]
            if done < soonest:
                done += PREFILL * sum(plan.node_tokens[k] for k in unit.path if k not in held[e])
                if done < soonest:
                    best, soonest = e, done
        finish[best] = soonest + unit.predicted
        held[best].update(unit.path)
        chosen[u] = best
    return chosen


def peak_tokens(current: Sequence[float], remaining: Sequence[float]) -> float:
    """The most KV tokens that sequences hold at once, each growing by one a step from `current` by `remaining` and
    then letting go."""
    if not len(current):
        return 0.0
    held, left = np.asarray(current, np.float64), np.asarray(remaining, np.float64)
    last = np.argsort(-left)  # just before one ends, all with more left are there, grown by as much
    grown = np.cumsum(held[last]) + left[last] * np.arange(1, len(last) + 1)
    return float(grown.max())


class LengthPredictor:
    """Response length by problem, from siblings that have finished and from earlier steps; the mean of all where there
    are none. Recent responses count more: lengths drift while the policy learns."""

    PRIOR = 2.0  # how many responses of the problem itself weigh as much as the mean of all

    def __init__(self, first_guess: float = 1.0) -> None:
        self._all = (first_guess * 1e-3, 1e-3)  # sum of lengths, sum of weights
        self._by_problem: dict[str, tuple[float, float]] = {}

    def observe(self, problem: str, tokens: int) -> None:
        """One finished response of `tokens` tokens."""
        total, weight = self._all
        self._all = (0.999 * total + tokens, 0.999 * weight + 1)
        total, weight = self._by_problem.get(problem, (0.0, 0.0))
        self._by_problem[problem] = (0.9 * total + tokens, 0.9 * weight + 1)

    def predict(self, problem: str) -> float:
        """Tokens of a response that has not begun."""
        prior = self._all[0] / self._all[1]
        total, weight = self._by_problem.get(problem, (0.0, 0.0))
        return (total + self.PRIOR * prior) / (weight + self.PRIOR)

    def remaining(self, problem: str, so_far: int, limit: int) -> float:
        """Tokens still to come of one that has `so_far`. One that outlived its prediction is expected to go on for
        half as long again: lengths have heavy tails."""
        return min(max(self.predict(problem) - so_far, so_far / 2), limit - so_far)
