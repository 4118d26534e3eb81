"""Problems held out of training, chosen by their own texts: the same ones in every run, wherever the file lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.seeding import derive


def hold_out(
    problems: Sequence[Problem], text: Callable[[Problem], str], fraction: float, source: str
) -> tuple[list[Problem], list[Problem]]:
    """(train, validation): equal texts on one side, train in the order of `problems`, validation `mixed`. UserError
    when there is but one distinct text."""
    texts = sorted(set(map(text, problems)), key=lambda t: derive(0, "split", t))
    if len(texts) < 2:
        raise UserError(f"{source}: one distinct problem cannot be split into training and validation; give more.")
    held_out = set(texts[: min(max(1, round(len(texts) * fraction)), len(texts) - 1)])
    validation = mixed([p for p in problems if text(p) in held_out])
    return [p for p in problems if text(p) not in held_out], validation


def mixed(problems: Sequence[Problem]) -> list[Problem]:
    """Held-out problems in an order of no meaning. A run evaluates on the first of them, and those of a file are often
    all of one kind: its subject, its program, its difficulty."""
    return sorted(problems, key=lambda p: derive(0, "order", repr(sorted(p.data.items()))))
