"""The order in which problems are drawn: a pure function of seed and step, so the next cycle is known ahead."""

from __future__ import annotations

from collections.abc import Sequence

from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.seeding import stream


class DataOrder:
    """Shuffled epochs over `problems`, `batch_size` a step. No problem twice in a batch (a group is a problem)."""

    def __init__(self, problems: Sequence[Problem], batch_size: int, *, seed: int, name: str):
        if len(problems) < batch_size:
            raise UserError(
                f"rollout.problems = {batch_size} is more than the {len(problems)} training problems of {name}; "
                f"use --rollout.problems {len(problems)} or fewer"
            )
        self._problems, self._batch_size = problems, batch_size
        self._seed, self._name = seed, name
        self._epochs: dict[int, list[int]] = {}

    def batch(self, step: int) -> list[Problem]:
        """The problems of step `step` of this stage (an epoch's remainder that fills no batch is skipped)."""
        epoch, place = divmod(step, len(self._problems) // self._batch_size)
        if epoch not in self._epochs:
            indices = list(range(len(self._problems)))
            stream(self._seed, "data", self._name, epoch).shuffle(indices)
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1} | {epoch: indices}
        start = place * self._batch_size
        return [self._problems[i] for i in self._epochs[epoch][start : start + self._batch_size]]

    def lookahead(self, step: int, steps: int) -> list[Problem]:
        """The distinct problems of the next `steps` batches, in the order they will be drawn."""
        return list({p.id: p for s in range(step, step + steps) for p in self.batch(s)}.values())
