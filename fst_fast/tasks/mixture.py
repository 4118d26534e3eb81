"""Several tasks as one, without labels: interleaved, gradually shifting, or switching inside a stage.

`A+B` draws every problem from A or B with equal chance (`A+A+B`: from A twice as often), `A>B` shifts from A to B over
the stage, `A>>B` gives both half of it, one after the other; `+` binds tightest, `>>` loosest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest

from fst_fast.records import Problem, Verdict
from fst_fast.tasks.task import AGNOSTIC_PROMPT, Message, Task, verdicts

# Only before a task's name: a path or a dataset's name may hold these signs.
BLOCKS, PHASES, TASKS = (re.compile(sign + r"(?=[a-z_-]+:)") for sign in (">>", ">", r"\+"))


class Mixture:
    """The tasks named in `spec`, each made by `make`. The loop is never told which of them a problem is from."""

    def __init__(self, spec: str, make: Callable[[str], Task]):
        self.name = spec
        phases = [[TASKS.split(phase) for phase in PHASES.split(block)] for block in BLOCKS.split(spec)]
        specs = list(dict.fromkeys(tasks_in(spec)))
        self.parts: Sequence[Task] = [make(s) for s in specs]
        self._phases = [[Counter(specs.index(s) for s in phase) for phase in block] for block in phases]
        prompts = {part.seed_prompt for part in self.parts}
        self.seed_prompt = prompts.pop() if len(prompts) == 1 else AGNOSTIC_PROMPT
        self.train: Sequence[Problem] = [p for part in self.parts for p in part.train]
        by_turns = chain.from_iterable(zip_longest(*(part.validation for part in self.parts)))
        self.validation: Sequence[Problem] = [p for p in by_turns if p]
        self._of = {p.id: part for part in self.parts for p in (*part.train, *part.validation)}

    def weights(self, at: float) -> list[float]:
        """Chance of each part at the place `at` of the stage, from 0 (its first step) to 1 (its last)."""
        block = min(int(at * len(self._phases)), len(self._phases) - 1)
        phases = self._phases[block]
        place = (at * len(self._phases) - block) * (len(phases) - 1)
        before = min(int(place), len(phases) - 1)
        after = min(before + 1, len(phases) - 1)
        share = place - before  # of the phase that comes
        ends = ((phases[before], 1 - share), (phases[after], share))
        return [sum(s * phase[i] / phase.total() for phase, s in ends) for i in range(len(self.parts))]

    def messages(self, prompt: str, problem: Problem) -> list[Message]:
        return self._of[problem.id].messages(prompt, problem)

    def verify(self, problem: Problem, response: str) -> Verdict:
        return self._of[problem.id].verify(problem, response)

    def verify_all(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        out: dict[int, Verdict] = {}
        for part in self.parts:
            mine = [i for i, (problem, _) in enumerate(answers) if self._of[problem.id] is part]
            out |= zip(mine, verdicts(part, [answers[i] for i in mine]), strict=True)
        return [out[i] for i in range(len(answers))]

    @property
    def phrasebook(self) -> Mapping[str, Sequence[str]]:
        """Those of the parts together."""
        books = [part.phrasebook for part in self.parts]
        topics = dict.fromkeys(topic for book in books for topic in book)
        return {t: list(dict.fromkeys(s for book in books for s in book.get(t, ()))) for t in topics}


def parts_of(task: Task) -> Sequence[Task]:
    """The tasks that a problem of `task` may be from: itself, unless it is a mixture."""
    return task.parts if isinstance(task, Mixture) else [task]


def tasks_in(spec: str) -> list[str]:
    """The tasks that a mixture names; of another task, itself."""
    return [s for block in BLOCKS.split(spec) for phase in PHASES.split(block) for s in TASKS.split(phase)]


def is_mixture(spec: str) -> bool:
    return bool(PHASES.search(spec) or TASKS.search(spec))


def drifts(spec: str) -> bool:
    """Whether it depends on how many steps it has."""
    return bool(PHASES.search(spec))
