"""Any file of problems as a task: one JSON object a line, and a verifier of the user's choice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_fast.errors import UserError, quoted
from fst_fast.records import Problem, Verdict
from fst_fast.tasks.datasets import json_lines
from fst_fast.tasks.split import hold_out, mixed
from fst_fast.tasks.task import Message, chat
from fst_fast.tasks.verifiers import make_verifier


@dataclass(frozen=True)
class JsonlOptions:
    verifier: str = "exact"
    """What compares a response with the answer: exact, numeric, regex, math (math-verify), or python:MODULE:FUNCTION:
    called with (the problem's JSON object, response), returns a reward in [0, 1], (reward, feedback) or a Verdict."""
    problem_field: str = "problem"
    """Field with the text posed to the model."""
    answer_field: str = "answer"
    """Field with the right answer, a text or a number (for regex: the pattern; not read for python)."""
    id_field: str = ""
    """Field with a problem's identity; empty = its line number."""
    slice_field: str = ""
    """Field with a visible property by which results are broken down; empty = none."""
    seed_prompt: str = "Solve the problem. End with a line 'answer:' and your final answer."
    """The task-agnostic system prompt the population starts from."""
    validation_path: str = ""
    """File of validation problems; empty = hold out a part of the one file, chosen by the problems' texts: the same in
    every run."""
    validation_fraction: float = 0.1
    """Part held out for validation, at least one problem; not used with a validation_path."""
    tolerance: float = 1e-6
    """For numeric: largest error taken as right, absolute or relative to the answer."""


class JsonlTask:
    """`jsonl:PATH`. Problems of equal text never stand on both sides of the split. With `trained`, the texts that a run
    trains on, the file is for evaluation: all of it is held out but those."""

    phrasebook: Mapping[str, Sequence[str]] = {}

    def __init__(self, path: str, options: JsonlOptions, trained: Collection[str] | None = None):
        if not 0 < options.validation_fraction < 1:
            raise UserError(f"jsonl.validation_fraction: {options.validation_fraction} must lie between 0 and 1.")
        if not options.tolerance >= 0:
            raise UserError(f"jsonl.tolerance: {options.tolerance} must not be negative.")
        self.name = f"jsonl:{path}"
        self.seed_prompt = options.seed_prompt
        self._options = options
        self._verify = make_verifier(options.verifier, options.answer_field, options.tolerance)
        self.train: Sequence[Problem]
        self.validation: Sequence[Problem]
        problems = self._read(path, self.name)
        if trained is not None:
            self.train, self.validation = [], mixed([p for p in problems if self._text(p) not in trained])
            if not self.validation:
                raise UserError(f"{path}: the run trains on all of its problems; evaluate on others.")
        elif options.validation_path:
            self.train = problems
            self.validation = mixed(self._read(options.validation_path, f"{self.name}/validation"))
            self._check_disjoint(path)
        else:
            self.train, self.validation = hold_out(problems, self._text, options.validation_fraction, path)

    def messages(self, prompt: str, problem: Problem) -> list[Message]:
        return chat(prompt, self._text(problem))

    def verify(self, problem: Problem, response: str) -> Verdict:
        return self._verify(problem.data, response)

    def _text(self, problem: Problem) -> str:
        return problem.data[self._options.problem_field]

    def _read(self, path: str, id_prefix: str) -> list[Problem]:
        first_line: dict[str, int] = {}  # of each id
        problems = []
        for number, row in json_lines(path, name=f"jsonl:{path}"):
            where = f"{path}, line {number}"
            text = _field(row, self._options.problem_field, "jsonl.problem_field", where)
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: field '{self._options.problem_field}' is {quoted(text)}; it must be a text.")
            try:
                self._verify.check(row)
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
            name = _label(row, self._options.id_field, "jsonl.id_field", where) or str(number)
            if name in first_line:
                raise UserError(
                    f"{where}: the id {name!r} stands on line {first_line[name]} already; "
                    f"make the values of '{self._options.id_field}' unique."
                )
            first_line[name] = number
            visible = _label(row, self._options.slice_field, "jsonl.slice_field", where)
            problems.append(Problem(f"{id_prefix}/{name}", row, visible))
        if not problems:
            raise UserError(f"{path}: the file has no problems; give one JSON object a line.")
        return problems

    def _check_disjoint(self, path: str) -> None:
        train = {self._text(p) for p in self.train}
        for p in self.validation:
            if self._text(p) in train:
                raise UserError(
                    f"{self._options.validation_path}: the problem {quoted(self._text(p))} is in {path} too; "
                    "remove it from one of them."
                )


def _field(row: Mapping[str, Any], name: str, option: str, where: str) -> Any:
    if name not in row:
        raise UserError(
            f"{where}: there is no field '{name}', only {quoted(sorted(row), 200)}; add it or set {option}."
        )
    return row[name]


def _label(row: Mapping[str, Any], name: str, option: str, where: str) -> str:
    """An id or slice as text; "" when no field is named."""
    if not name:
        return ""
    value = _field(row, name, option, where)
    if not isinstance(value, str | int) or value == "":
        raise UserError(f"{where}: field '{name}' is {quoted(value)}; it must be a text or a whole number.")
    return str(value)
