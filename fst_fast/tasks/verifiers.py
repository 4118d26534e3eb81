"""Verifiers for problems from a file: exact, numeric, regex, math, or a function of the user's."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

from fst_fast.errors import UserError, quoted
from fst_fast.records import Verdict
from fst_fast.tasks.math_check import PATIENCE, MathChecker
from fst_fast.tasks.workers import Workers

Row = Mapping[str, Any]  # one problem's JSON object
KNOWN = "exact, numeric, regex, math or python:MODULE:FUNCTION"


class Verifier(Protocol):
    def check(self, row: Row) -> None:
        """Raises UserError when the problem cannot be verified, before any work is done on it."""
        ...

    def __call__(self, row: Row, response: str) -> Verdict: ...


def make_verifier(name: str, answer_field: str, tolerance: float) -> Verifier:
    """The verifier called `name`; UserError when there is none or the user's function cannot be imported."""
    match name:
        case "exact":
            return Exact(answer_field)
        case "numeric":
            return Numeric(answer_field, tolerance)
        case "regex":
            return Regex(answer_field)
        case "math":
            return Math(answer_field)
    if name.startswith("python:"):
        return UserFunction(name)
    raise UserError(f"jsonl.verifier: {name!r} is not known; choose {KNOWN}.")


def spoken(response: str) -> str:
    """Without what was thought before </think>, or in a thought that was cut off."""
    return response.rpartition("</think>")[2].partition("<think>")[0]


def final_answer(response: str) -> str:
    """The rest of the line after the last "answer:", or the line after it; without one, the last line with text."""
    tail = re.split(r"answer\W{0,4}:", spoken(response), flags=re.IGNORECASE)
    lines = [line.strip("* \t") for line in tail[-1].splitlines() if line.strip("* \t")]  # "**Answer:** 5"
    if not lines:
        return ""
    return lines[0 if len(tail) > 1 else -1]


class Exact:
    """The whole response, or its final answer, equals the answer up to surrounding space."""

    def __init__(self, answer_field: str):
        self.answer_field = answer_field

    def check(self, row: Row) -> None:
        """The answer is a text or a number."""
        if self.answer_field not in row:
            raise UserError(
                f"there is no field '{self.answer_field}', only {quoted(sorted(row), 200)}; add it or set "
                "jsonl.answer_field."
            )
        value = row[self.answer_field]
        if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
            raise UserError(f"field '{self.answer_field}' is {quoted(value)}; it must be a text or a number.")

    def answer(self, row: Row) -> str:
        return str(row[self.answer_field]).strip()

    def __call__(self, row: Row, response: str) -> Verdict:
        return _compared(final_answer(response), self.answer(row), response.strip() == self.answer(row))


class Numeric(Exact):
    """The last number of the final answer lies within the tolerance of the answer."""

    NUMBER = re.compile(
        r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?"
    )
    LONGEST = 2000  # characters of a final answer that are read

    def __init__(self, answer_field: str, tolerance: float):
        super().__init__(answer_field)
        self.tolerance = tolerance

    def check(self, row: Row) -> None:
        super().check(row)
        text = self.answer(row)
        if not self.NUMBER.fullmatch(text) or not math.isfinite(_number(text)):
            raise UserError(
                f"field '{self.answer_field}' is {quoted(text)}; the verifier numeric needs a finite number "
                "and nothing else (regex or python:MODULE:FUNCTION reads other answers)."
            )

    def __call__(self, row: Row, response: str) -> Verdict:
        expected = self.answer(row)
        found = self.NUMBER.findall(final_answer(response)[-self.LONGEST :].replace("−", "-"))
        if not found:
            return Verdict(0.0, f"there is no number in the final answer. expected: {expected}")
        close = math.isclose(_number(found[-1]), _number(expected), rel_tol=self.tolerance, abs_tol=self.tolerance)
        return _compared(found[-1], expected, close)


class Regex(Exact):
    """The pattern is found somewhere in the response; ^ and $ anchor it to the whole."""

    LONGEST = 10_000  # characters of a response that are searched
    SECONDS = 2.0  # of CPU time for a search, after which nothing is found

    def __init__(self, answer_field: str):
        super().__init__(answer_field)
        script = str(Path(__file__).with_name("regex_serve.py"))
        # -P: its folder is no place to import from; -W: `check` has told of the pattern already
        self._workers = Workers("regex", lambda: [sys.executable, "-P", "-W", "ignore", script])

    def check(self, row: Row) -> None:
        super().check(row)
        try:
            re.compile(self.answer(row))
        except (re.error, OverflowError, RecursionError) as e:
            raise UserError(
                f"field '{self.answer_field}' is no regular expression ({e}): {quoted(self.answer(row))}."
            ) from None

    def __call__(self, row: Row, response: str) -> Verdict:
        question = [self.SECONDS, self.answer(row), response.strip()[-self.LONGEST :]]
        found = self._workers.ask(question, PATIENCE * self.SECONDS)
        if found is None:
            return Verdict(0.0, f"the search for the pattern {self.answer(row)} was given up, it takes too long")
        if found:
            return Verdict(1.0, "correct.")
        return Verdict(0.0, f"the response does not match the pattern {self.answer(row)}")


class Math(Exact):
    """The final expression equals the answer mathematically, by math-verify: 0.5 is \\frac{1}{2}."""

    MARK = re.compile(r"\$|\\\(|\\\[|\\boxed")  # of LaTeX, behind which there may be nothing
    FORMULA = re.compile(r"(\$+|\\\(|\\\[|\\boxed\{)[^$\n]*\w[^$\n]*(\$+|\\\)|\\\]|\})")  # in a pair of them

    def __init__(self, answer_field: str):
        super().__init__(answer_field)
        self.checker = MathChecker()

    def check(self, row: Row) -> None:
        """Asks math-verify, which takes 4 to 40 ms, of the few answers that may hold no mathematics."""
        super().check(row)
        answer = self.answer(row)
        usual = len(answer) <= 1000 and (self.FORMULA.fullmatch(answer) or not self.MARK.search(answer))
        if not (usual and re.search(r"\w", answer)) and self.checker.compare(answer, "0")[0] == "no answer":
            raise UserError(f"field '{self.answer_field}' is {quoted(answer)}; math-verify finds no mathematics in it.")

    def __call__(self, row: Row, response: str) -> Verdict:
        expected = self.answer(row)
        outcome, _ = self.checker.compare(expected, spoken(response))
        if outcome == "no answer":  # so its text is the answer
            return _compared(final_answer(response), expected, False)
        feedback = {
            "right": "correct.",
            "wrong": f"the answer {final_answer(response)[:200]!r} is wrong. expected: {expected}",
            "no response": f"there is no mathematical answer. expected: {expected}",
            "stuck": f"the answer could not be evaluated. expected: {expected}",
        }
        return Verdict(float(outcome == "right"), feedback[outcome])


class UserFunction:
    """`python:MODULE:FUNCTION`, called with (row, response)."""

    def __init__(self, name: str):
        self.name = name
        self.function = _import(name)

    def check(self, row: Row) -> None:
        """The function reads what it likes."""

    def __call__(self, row: Row, response: str) -> Verdict:
        try:
            with contextlib.chdir("."):  # and back: the run's paths may be relative
                result = self.function(deepcopy(dict(row)), response)  # its to change: the next response has the same
        except (Exception, SystemExit) as e:
            where = traceback.extract_tb(e.__traceback__)[:2][-1]  # in the function itself, where it got that far
            raise UserError(
                f"jsonl.verifier: {self.name} raised {_named(e)} in {where.filename}, line {where.lineno}, on the "
                f"problem {quoted(dict(row), 300)} and the response {quoted(response, 300)}; mend it, then --resume."
            ) from e
        verdict = _verdict(result)
        if verdict is None:
            raise UserError(
                f"jsonl.verifier: {self.name} returned {quoted(result)}; "
                "it must return a reward from 0 to 1, (reward, feedback) or a Verdict."
            )
        if not 0 <= verdict.reward <= 1:
            raise UserError(f"jsonl.verifier: {self.name} returned the reward {verdict.reward}; it must lie in [0, 1].")
        return verdict


def _verdict(result: object) -> Verdict | None:
    """Of what a user's function returned, its numbers of any type that is one; None when it is nothing of the kind."""
    feedback: object = None
    parts: object = {}
    match result:
        case Verdict(reward, feedback, parts):
            alone = False
        case (reward, feedback):
            alone = False
        case reward:
            alone = True
    if not isinstance(parts, Mapping) or not all(isinstance(name, str) for name in parts):
        return None
    numbers = [reward, *parts.values()]
    if not all(hasattr(x, "__float__") for x in numbers):
        return None
    try:
        found, *others = map(float, numbers)
    except Exception:  # arrays, huge integers, tensors of several, what a type of the user's may do
        return None
    if alone:
        feedback = "correct." if found == 1 else f"the reward is {found:g}."
    if not isinstance(feedback, str) or not all(map(math.isfinite, others)):
        return None
    return Verdict(found, feedback, dict(zip(parts, others, strict=True)))


def _named(error: BaseException) -> str:
    """An exception on one line, of a text that may have any."""
    return f"{type(error).__name__} ({' '.join(str(error).split()):.300})"


def _import(name: str) -> Callable[[dict[str, Any], str], Any]:
    parts = name.split(":")
    if len(parts) != 3 or not all(parts):
        raise UserError(f"jsonl.verifier: {name!r} must have the form python:MODULE:FUNCTION.")
    _, module, function = parts
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as e:  # whatever a module's code may raise
        raise UserError(
            f"jsonl.verifier: {name!r} cannot be imported: {_named(e)}; MODULE must be on PYTHONPATH or in the current "
            "directory, and define FUNCTION."
        ) from e
    if not callable(found) or inspect.iscoroutinefunction(found):
        what = "coroutine function" if callable(found) else type(found).__name__
        raise UserError(f"jsonl.verifier: {name!r} is a {what}, not a function.")
    try:
        inspect.signature(found).bind({}, "")
    except TypeError as e:
        raise UserError(
            f"jsonl.verifier: {name!r} cannot be called with a problem's object and a response ({e}); it is "
            f"{function}{inspect.signature(found)}."
        ) from None
    except ValueError:  # one in C may not say what it takes
        pass
    return found


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _compared(found: str, expected: str, right: bool) -> Verdict:
    if right or found == expected:
        return Verdict(1.0, "correct.")
    return Verdict(0.0, f"the answer {found[:200]!r} is wrong. expected: {expected}")
