"""The order in which problems are drawn: a pure function of seed and step, so the next cycle is known ahead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

from fst_fast.config import Stage
from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.seeding import stream
from fst_fast.tasks.mixture import Mixture
from fst_fast.tasks.task import Task


class Order(ABC):
    @abstractmethod
    def batch(self, step: int) -> list[Problem]:
        """The problems of step `step` of this stage, none of them twice (a group is a problem)."""

    def lookahead(self, step: int, steps: int) -> list[Problem]:
        """The distinct problems of the next `steps` batches, in the order they will be drawn."""
        return list({p.id: p for s in range(step, step + steps) for p in self.batch(s)}.values())


def make_order(task: Task, batch_size: int, stage: Stage, *, seed: int, name: str) -> Order:
    """That of `stage` on `task`; `name` names its random streams."""
    if isinstance(task, Mixture):
        return MixedOrder(task, batch_size, stage, seed=seed, name=name)
    return DataOrder(task.train, batch_size, seed=seed, name=name)


class DataOrder(Order):
    """Shuffled epochs over `problems`, `batch_size` a step."""

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
        """An epoch's remainder that fills no batch is skipped."""
        epoch, place = divmod(step, len(self._problems) // self._batch_size)
        return self.cut(epoch, place * self._batch_size, self._batch_size)

    def cut(self, epoch: int, start: int, n: int) -> list[Problem]:
        """`n` problems of an epoch's order, from place `start`."""
        if epoch not in self._epochs:
            indices = list(range(len(self._problems)))
            stream(self._seed, "data", self._name, epoch).shuffle(indices)
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1} | {epoch: indices}
        return [self._problems[i] for i in self._epochs[epoch][start : start + n]]


class MixedOrder(Order):
    """Draws for each problem of a batch a part of the mixture, by the weights of that step; each part has shuffled
    epochs of its own, and skips the remainder of one that is shorter than what a batch wants of it."""

    def __init__(self, mixture: Mixture, batch_size: int, stage: Stage, *, seed: int, name: str):
        self._mixture, self._batch_size, self._stage = mixture, batch_size, stage
        self._seed, self._name = seed, name
        self._sizes = [len(part.train) for part in mixture.parts]
        self._parts = [
            DataOrder(part.train, batch_size, seed=seed, name=f"{name}/{part.name}") for part in mixture.parts
        ]
        self._places = [[(0, 0)] * len(self._parts)]  # before each step, as far as known: per part (epoch, place in it)

    def batch(self, step: int) -> list[Problem]:
        while len(self._places) <= step:
            s = len(self._places) - 1
            after = [(epoch, place + n) for (epoch, place), n in self._cuts(s, self._draw(s))]
            self._places.append(after)
        drawn = self._draw(step)
        cuts = [
            iter(part.cut(epoch, place, n))
            for part, ((epoch, place), n) in zip(self._parts, self._cuts(step, drawn), strict=True)
        ]
        return [next(cuts[i]) for i in drawn]

    def _draw(self, step: int) -> list[int]:
        """The part of each problem of the batch."""
        weights = self._mixture.weights(self._stage.place(self._stage.start + step))
        rng = stream(self._seed, "mixture", self._name, step)
        return rng.choices(range(len(weights)), weights, k=self._batch_size)

    def _cuts(self, step: int, drawn: Sequence[int]) -> list[tuple[tuple[int, int], int]]:
        """Per part where its problems of the batch begin, and how many they are."""
        wanted = Counter(drawn)
        return [
            ((epoch, place) if place + wanted[i] <= size else (epoch + 1, 0), wanted[i])
            for i, ((epoch, place), size) in enumerate(zip(self._places[step], self._sizes, strict=True))
        ]
