"""Groups → advantages: one group per problem, over all its prompts together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fst_fast.records import Group, Rollout

EPSILON = 1e-4  # keeps a nearly constant group finite; as in GRPO implementations


def group_by_problem(rollouts: Sequence[Rollout]) -> list[Group]:
    """Rollouts of one step grouped by the problem's identity, in order of first appearance."""
    members: dict[str, list[Rollout]] = {}
    for r in rollouts:
        members.setdefault(r.problem.id, []).append(r)
    return [Group(m[0].problem, tuple(m)) for m in members.values()]


def has_signal(group: Group) -> bool:
    """A group whose rewards are all equal has advantage 0 everywhere: no policy gradient."""
    return len({r.reward for r in group.rollouts}) > 1


def advantages(group: Group, *, baseline: str = "mean") -> list[float]:
    """A_i = (r_i − b_i) / (std(r) + ε): b the group's mean (paper), or the mean of the others ("leave-one-out"), which
    does not depend on r_i; the two differ by the factor G / (G − 1). std is the group's sample standard deviation."""
    rewards = torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64)
    centred = rewards - rewards.mean()
    if baseline == "leave-one-out":
        centred = centred * len(rewards) / (len(rewards) - 1)
    return (centred / (rewards.std() + EPSILON)).tolist()
