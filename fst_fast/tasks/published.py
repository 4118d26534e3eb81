"""What tasks on published data share: options, the split, the chat format, and reading an answer in a box."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fst_fast.errors import UserError, quoted
from fst_fast.records import Problem, Verdict
from fst_fast.tasks.split import hold_out
from fst_fast.tasks.task import AGNOSTIC_PROMPT, Message, chat

LONGEST = 50_000  # characters of a response that are read, from its end
HELD_OUT = 0.1  # of the problems, where the data has no validation split of its own


@dataclass(frozen=True)
class PublishedOptions:
    prompt: Literal["task", "agnostic"] = "task"
    """Seed prompt of tasks on published data: one that states the form of the answer, or "Solve the problem.", which
    leaves that to be found out (the paper's streams of several tasks)."""
    hops: Annotated[tuple[Annotated[int, Field(ge=2, le=4)], ...], Field(min_length=1, max_length=2)] = (3, 4)
    """hover: claims of so many hops; hover-ood has the others."""
    wiki: str = ""
    """hover: the published wiki_wo_links.db, from which each claim gets the articles that decide it; empty = a claim
    comes with the text that its row holds in a field 'context', if any, else alone."""
    category: str = ""
    """codeio: the category of programs that is left out, and is what codeio-ood has; empty = the rarest one that has a
    twentieth of the programs."""
    programs: Annotated[int, Field(ge=1, le=10**7)] = 2000
    """codeio: programs that are read, from the source's beginning; three examples of each make six problems."""
    seconds: Annotated[float, Field(gt=0, le=600)] = 2.0
    """codeio: CPU time a program may take; on the clock three times as long."""
    unseen: str = "Modern Physics"
    """physics: the domain that is left out, and is what physics-ood has."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """physics: relative error that a number may have."""


class PublishedTask:
    """A task whose problems have a text in `data["problem"]`; subclasses read them and verify."""

    phrasebook: Mapping[str, Sequence[str]] = {}
    side_by_side = 1  # answers that are verified at once: as many as the verifier has processes
    train: Sequence[Problem]
    validation: Sequence[Problem]

    def __init__(self, name: str, prompt: str, options: PublishedOptions):
        self.name = name
        self.seed_prompt = prompt if options.prompt == "task" else AGNOSTIC_PROMPT

    def messages(self, prompt: str, problem: Problem) -> list[Message]:
        return chat(prompt, problem.data["problem"])

    def verify(self, problem: Problem, response: str) -> Verdict:
        raise NotImplementedError

    def verify_all(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        with ThreadPoolExecutor(self.side_by_side) as pool:
            return list(pool.map(lambda answer: self.verify(*answer), answers))

    def hold_out(self, problems: Sequence[Problem], source: str, by: str = "problem") -> None:
        """Splits `problems` into train and validation; those of the same text `data[by]` are on one side."""
        self.train, self.validation = hold_out(problems, lambda p: p.data[by], HELD_OUT, source)


def field(row: Mapping[str, Any], name: str, kind: type[Any], where: str) -> Any:
    """The field of a row; UserError when it is missing, of another type or an empty text."""
    if name not in row:
        raise UserError(f"{where}: there is no field '{name}', only {sorted(map(str, row))!s:.200}.")
    value = row[name]
    if not isinstance(value, kind) or (kind is str and not value.strip()):
        raise UserError(
            f"{where}: field '{name}' is {quoted(value)}; it must be of type {kind.__name__}, and not empty."
        )
    return value


def boxed(response: str) -> str | None:
    r"""What the \boxed{...} (or \fbox{...}) holds that is closed last; None when there is none. In linear time."""
    response = response[-LONGEST:]
    opened: list[int | None] = []  # of every brace that is open: where its box's content starts, if it is one
    found = None
    for token in BRACES.finditer(response):
        if token["close"]:
            start = opened.pop() if opened else None
            if start is not None:
                found = response[start : token.start()].strip()
        elif token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
    return found


BRACES = re.compile(r"(?P<box>\\\\?(?:boxed|fbox|framebox) ?\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
