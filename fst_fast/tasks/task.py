"""What a task is: problems, a chat format and a verifier that speaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from fst_fast.records import Problem, Verdict

AGNOSTIC_PROMPT = "Solve the problem."  # says nothing of any task

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def chat(system: str, user: str) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


class Task(Protocol):
    """A source of problems with a verifiable reward.

    Both splits are finite, disjoint and in a fixed order; the trainer draws its own seeded order over `train`, and
    evaluates on the first problems of `validation`: they must be as good a sample as any.
    """

    name: str  # as written in --stream, e.g. "glyph:A"
    seed_prompt: str  # the task-agnostic prompt the population starts from
    train: Sequence[Problem]
    validation: Sequence[Problem]

    def messages(self, prompt: str, problem: Problem) -> list[Message]:
        """Chat messages for `problem` under the system prompt `prompt`."""
        ...

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Reward in [0, 1], feedback, named parts. `response` is hostile text: never evaluated nor raised on."""
        ...

    @property
    def phrasebook(self) -> Mapping[str, Sequence[str]]:
        """Topic → instruction sentences, for the offline rule-based reflector; empty when the task has none."""
        ...


def posed(task: Task, problem: Problem) -> str:
    """What the model reads of a problem, its prompt apart."""
    return task.messages("", problem)[-1]["content"]


@runtime_checkable
class VerifiesTogether(Protocol):
    """A task whose verifier waits for other processes: many answers take little longer than one."""

    def verify_all(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """`verify` of each (problem, response), in order."""
        ...


def verdicts(task: Task, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    """What `task` says of each (problem, response), in order."""
    if isinstance(task, VerifiesTogether):
        return task.verify_all(answers)
    return [task.verify(problem, response) for problem, response in answers]
