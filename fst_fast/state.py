"""Where a run stands: what a checkpoint holds beside weights and optimizer, as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError
from fst_fast.fast.population import Member
from fst_fast.fast.reflection import ReflectionUsage
from fst_fast.model import Model
from fst_fast.records import Prompt
from fst_fast.rollout.collect import Totals
from fst_fast.rollout.reuse import Reused
from fst_fast.tasks.task import Task


def fingerprint(tasks: Sequence[Task], ood: Task | None, base: Model) -> list[str]:
    """Digests of what a run was begun with: a sample of the base model's weights with the problems of `ood`, then the
    problems of each stage, of which a run may be given more."""

    def digest(parts: Iterable[str]) -> str:
        found = hashlib.sha256()
        for part in parts:
            found.update(part.encode("utf-8", "replace"))
        return found.hexdigest()

    def problems(task: Task) -> Iterator[str]:
        for problem in (*task.train, *task.validation):
            yield repr((problem.id, problem.slice, sorted(problem.data.items())))

    weights = (f"{name} {list(p.shape)} {p.detach().flatten()[:64].tolist()}" for name, p in base.lm.named_parameters())
    return [digest([*weights, *(problems(ood) if ood else ())]), *(digest(problems(task)) for task in tasks)]


def check_inputs(saved: list[str] | str, own: list[str], run: Path) -> None:
    """UserError unless `own` is the fingerprint that `run` was begun with, or that with more stages behind."""
    if isinstance(saved, str):
        raise UserError(f"{run} was begun by an older version of fst-fast, whose runs this one does not go on from")
    if saved != own[: len(saved)]:
        raise UserError(
            f"the problems, those of eval.ood among them, or the base model are not those that {run} was begun with; "
            "put the old ones back, or start a new run"
        )


@dataclass
class State:
    """Random streams are not here: they are functions of the seed and of these counters (seeding.py)."""

    step: int = 0  # steps finished
    cycle: int = 0  # GEPA cycles finished
    evolved: int = -1  # step before which the last of them was
    entered: int = -1  # stage whose prompts are in the pool
    ended_stages: int = 0  # stages whose last evaluation is written
    complete: bool = False
    pool: list[Member] = field(default_factory=list)
    population: list[Prompt] = field(default_factory=list)  # the K prompts that share a group's rollouts
    failed: list[str] = field(default_factory=list)  # ids of problems whose group failed since the last cycle
    blind: dict[str, tuple[Prompt, ...]] = field(default_factory=dict)  # by problem: chosen without its scores
    best: Prompt = field(default_factory=lambda: Prompt(""))
    totals: Totals = field(default_factory=Totals)
    reused: Reused = field(default_factory=Reused)
    reflection: ReflectionUsage = field(default_factory=ReflectionUsage)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        prompts = list(dict.fromkeys(p for chosen in self.blind.values() for p in chosen))
        number = {p: i for i, p in enumerate(prompts)}
        return {
            **asdict(self),
            "pool": [m.to_dict() for m in self.pool],
            "population": [p.text for p in self.population],
            "blind_prompts": [p.text for p in prompts],
            "blind": {problem: [number[p] for p in chosen] for problem, chosen in self.blind.items()},
            "best": self.best.text,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> State:
        blind = [Prompt(text) for text in data["blind_prompts"]]
        return cls(
            **{name: data[name] for name in ("step", "cycle", "evolved", "entered", "ended_stages", "complete")},
            pool=[Member.from_dict(m) for m in data["pool"]],
            population=[Prompt(text) for text in data["population"]],
            failed=data["failed"],
            blind={problem: tuple(blind[i] for i in chosen) for problem, chosen in data["blind"].items()},
            best=Prompt(data["best"]),
            totals=Totals(**data["totals"]),
            reused=Reused(**data["reused"]),
            reflection=ReflectionUsage(**data["reflection"]),
        )
