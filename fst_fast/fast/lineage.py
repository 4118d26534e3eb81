"""What a GEPA cycle leaves on disk: every proposal with its parent and the feedback behind it, and the new pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fst_fast.fast.evolve import Evolution
from fst_fast.records import Prompt


def lineage(evolution: Evolution, seed_prompt: Prompt | None) -> list[dict[str, Any]]:
    """Lines of population.jsonl. `seed_prompt` is named when it joined the pool with this cycle."""
    means = {m.prompt.id: m.mean for m in evolution.pool}
    lines: list[dict[str, Any]] = []
    if seed_prompt:
        lines.append(
            {"kind": "candidate", "id": seed_prompt.id, "text": seed_prompt.text, "parent": None, "status": "seed"}
            | {"reason": "the task's seed prompt", "parent_score": None, "child_score": None, "feedback": []}
            | {"mean_score": means.get(seed_prompt.id)}
        )
    for c in evolution.candidates:
        judged = c.status in ("accepted", "rejected")
        data = c.to_dict()
        lines.append(
            {
                "kind": "candidate",
                **data,
                "status": c.status if judged else "refused",
                "reason": c.note if judged else f"{c.status}: {c.note}" if c.note else c.status,
                "parent_score": _mean(c.parent_scores),
                "child_score": _mean(c.child_scores),
                "mean_score": means.get(data["id"]),
            }
        )
    members = [{"id": m.prompt.id, "mean_score": m.mean, "scores": dict(m.scores)} for m in evolution.pool]
    return [*lines, {"kind": "population", "members": members, "best": evolution.best.id}]


def summary(evolution: Evolution) -> dict[str, Any]:
    """The numbers of an "evolve" line in metrics.jsonl. `coverage`: mean over problems of the population's best.
    Where edits failed, how many, and of what most of them."""
    chosen = evolution.pool[: len(evolution.population)]
    problems = list(evolution.pool[0].scores)
    failures = Counter(c.note for c in evolution.candidates if c.status == "failed")
    failed = {"failed": failures.total(), "failure": failures.most_common(1)[0][0]} if failures else {}
    return failed | {
        "proposals": len(evolution.candidates),
        "accepted": sum(c.status == "accepted" for c in evolution.candidates),
        "rollouts": evolution.rollouts,
        "best": evolution.pool[0].mean,
        "coverage": sum(max(m.scores[x] for m in chosen) for x in problems) / len(problems),
        "population": [p.id for p in evolution.population],
        "reflection": asdict(evolution.reflection),
    }


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None
