"""Problems held out of training: a seeded part, equal texts always on one side."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fst_fast.errors import UserError
from fst_fast.records import Problem


def hold_out(
    problems: Sequence[Problem], text: Callable[[Problem], str], fraction: float, rng: random.Random, source: str
) -> tuple[list[Problem], list[Problem]]:
    """(train, validation), each in the order of `problems`. UserError when there is but one distinct text."""
    texts = list(dict.fromkeys(map(text, problems)))
    if len(texts) < 2:
        raise UserError(f"{source}: one distinct problem cannot be split into training and validation; give more.")
    rng.shuffle(texts)
    held_out = set(texts[: min(max(1, round(len(texts) * fraction)), len(texts) - 1)])
    return [p for p in problems if text(p) not in held_out], [p for p in problems if text(p) in held_out]
