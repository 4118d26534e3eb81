"""Tasks by name: `make_task("glyph:A", seed=0)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fst_fast.errors import UserError
from fst_fast.tasks.codeio import CodeioTask
from fst_fast.tasks.glyph import GlyphTask
from fst_fast.tasks.hover import HoverTask
from fst_fast.tasks.jsonl import JsonlOptions, JsonlTask
from fst_fast.tasks.math import MathTask
from fst_fast.tasks.mixture import Mixture, is_mixture
from fst_fast.tasks.physics import PhysicsTask
from fst_fast.tasks.published import PublishedOptions
from fst_fast.tasks.star_graph import StarGraphTask
from fst_fast.tasks.task import Task, posed

if TYPE_CHECKING:
    from fst_fast.config import Config

FORMS = (
    "glyph:A (rule A to Z of the run's seed), glyph:A/B (sliced), star_graph:ARMSxLENGTH (e.g. star_graph:4x3), "
    "jsonl:PATH (a file of problems), codeio:SOURCE, math:SOURCE, hover:SOURCE, physics:SOURCE (published data: a "
    "file, a folder or a dataset; codeio-ood, math-ood, hover-ood, physics-ood: what they do not train on); or a "
    "mixture of them, A+B, A>B or A>>B"
)
PUBLISHED = {"codeio": CodeioTask, "hover": HoverTask, "math": MathTask, "physics": PhysicsTask}


def task_maker(config: Config) -> Callable[..., Task]:
    """`make_task` by a run's settings."""
    return partial(make_task, seed=config.seed, jsonl=config.jsonl, data=config.data)


def make_task(
    spec: str,
    *,
    seed: int,
    jsonl: JsonlOptions | None = None,
    data: PublishedOptions | None = None,
    trained: Sequence[Task] | None = None,
) -> Task:
    """The task written `spec`, drawn from the run's `seed` where it is random; UserError when there is no such task.

    `trained`: it is only evaluated on, by a run that trains on those. Of a user's file that is all that they do not
    have in training, not a part of it.
    """
    if trained is not None and (same := [task for task in trained if task.name == spec]):
        return same[0]
    if is_mixture(spec):
        return Mixture(spec, lambda part: make_task(part, seed=seed, jsonl=jsonl, data=data, trained=trained))
    kind, _, rest = spec.partition(":")
    match kind:
        case "glyph":
            return GlyphTask(rest, seed)
        case "star_graph":
            return StarGraphTask(rest, seed)
        case "jsonl":
            known = None if trained is None else {posed(task, p) for task in trained for p in task.train}
            return JsonlTask(rest, jsonl or JsonlOptions(), known)
    if published := PUBLISHED.get(kind.removesuffix("-ood")):
        return published(rest, data or PublishedOptions(), unseen=kind.endswith("-ood"))
    raise UserError(f"task {spec!r}: there is no such task; known are {FORMS}.")
