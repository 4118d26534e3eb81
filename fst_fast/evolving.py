"""A GEPA cycle under way among the steps of the loop: what it asks of the collector, and what it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fst_fast.fast.cycle import Cycle
from fst_fast.records import Prompt
from fst_fast.rollout.collect import Ask, Asked, Collector
from fst_fast.tasks.task import Task


@dataclass
class Evolving:
    """Cycle `number` of a run, on `task`, which comes before its step `step`. `phase(name)` is entered while a part of
    it takes the loop's time (meter.py)."""

    cycle: Cycle
    number: int
    step: int
    task: Task
    collector: Collector
    phase: Callable[[str], AbstractContextManager[object]]
    begin: int  # byte and
    first: int  # number in the store of its first rollout
    asked: Asked | None = None  # the call it waits for

    @property
    def over(self) -> bool:
        return not (self.asked or self.cycle.reflecting)

    def ready(self) -> bool:
        """Whether it can go on: all ranks have the rollouts it waits for, or a reflector works elsewhere and is given
        a step's time."""
        if self.cycle.reflecting:
            return True
        collector = self.collector
        return self.asked is not None and all(collector.ranks.join([collector.ready(self.asked)]))

    def advance(self, now: int, *, beside: bool = False) -> None:
        """Give it the rollouts or the edits it waits for, and ask for the next, at step `now`. `beside`: edits may come
        later."""
        with self.phase("reflect"):
            if self.asked:
                with self.phase("scoring" if self.asked.scoring else "minibatch"):
                    rollouts = self.collector.finish(self.asked)
                self.cycle.give(rollouts, beside=beside)
            else:
                self.cycle.listen()
            self.ask(now)

    def ask(self, now: int) -> None:
        """Queue what the cycle wants, for the weights of step `now` and those that follow until it ends."""
        wanted, self.asked = self.cycle.wanted, None
        if wanted is None:
            return
        samples: Counter[tuple[Prompt, str]] = Counter()
        asks = []
        for prompt, problem in wanted.pairs:
            asks.append(Ask(prompt, problem, samples[prompt, problem.id]))
            samples[prompt, problem.id] += 1
        with self.phase("scoring" if wanted.scoring else "minibatch"):
            self.asked = self.collector.submit(
                self.task,
                asks,
                purpose="gepa",
                step=now,
                key=(self.number, self.cycle.calls),
                scoring=wanted.scoring,
                age=self.step - now,
            )
