"""Problems held out of training: a seeded part, equal texts always on one side."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fst_fast.errors import UserError
from fst_fast.records import Problem


def hold_out(
    problems: Sequence[Problem], text: Callable[[Problem], str], fraction: float, rng: random.Random, source: str
) -> tuple[list[Problem], list[Problem]]:
    """(train, validation): train in the order of `problems`, validation `mixed`. UserError when there is but one
    distinct text."""
    texts = list(dict.fromkeys(map(text, problems)))
    if len(texts) < 2:
        raise UserError(f"{source}: one distinct problem cannot be split into training and validation; give more.")
    rng.shuffle(texts)
    held_out = set(texts[: min(max(1, round(len(texts) * fraction)), len(texts) - 1)])
    validation = mixed([p for p in problems if text(p) in held_out], rng)
    return [p for p in problems if text(p) not in held_out], validation


def mixed(problems: Sequence[Problem], rng: random.Random) -> list[Problem]:
    """Held-out problems in an order of no meaning. A run evaluates on the first of them, and those of a file are often
    all of one kind: its subject, its program, its difficulty."""
    return rng.sample(problems, len(problems))
