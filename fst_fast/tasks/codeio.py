"""Programs to run in the head, in the format of CodeIO-PyEdu-Reasoning-Raw (CodeI/O, arXiv 2502.07316).

Each example gives two problems: what does the program return for this input; and for which input does it return this.
An input is verified by running the program on it, in the sandbox. `codeio:SOURCE` leaves one category of programs out,
which is what `codeio-ood:SOURCE` has.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fst_fast.errors import UserError, quoted
from fst_fast.records import Problem, Verdict
from fst_fast.tasks.datasets import records
from fst_fast.tasks.json_answer import NotJson, difference, last_object, shown
from fst_fast.tasks.published import PublishedOptions, PublishedTask, field
from fst_fast.tasks.sandbox import Sandbox
from fst_fast.tasks.split import mixed

PROMPT = 'Follow the program step by step. End with a JSON object: {"output": ...} or {"input": {...}}, as asked.'
EXAMPLES = 3  # of a program that are used, as in the paper
TOLERANCE = 1e-3  # of a float, relative: that of the published checker
SHARE = 0.05  # of the programs that a category has at least to be left out by default
SLOW = "no result within"  # what the sandbox says of a program that was stopped

# The published programs were written for these names; those of Python itself stay what they are.
PREAMBLE = """
import builtins, random
import numpy as np
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, re, string, sys, typing
_modules = [itertools, collections, functools, heapq, bisect, copy, datetime, math, operator, string, random, typing]
for _module in _modules:
    globals().update({k: v for k, v in vars(_module).items() if not k.startswith("_") and not hasattr(builtins, k)})
for _module in _modules:
    globals()[_module.__name__] = _module
random.seed(0)
np.random.seed(0)
"""

GIVEN = {"output": "input", "input": "output"}  # what is asked for → what is given
ASKED = {
    "output": 'Which output does the program give? Reason without running code. End with a JSON object {"output": ...} '
    "that holds the output exactly as required.",
    "input": "For which input does the program give it? Any input that does is right. Reason without running code. End "
    'with a JSON object {"input": {...}} that holds an object with the names of all input variables as keys, even if '
    "there is only one.",
}


class CodeioTask(PublishedTask):
    """Half of the problems ask for an output, half for an input: their `slice`. A split never divides a program's."""

    def __init__(self, source: str, options: PublishedOptions, *, unseen: bool = False):
        super().__init__(f"codeio{'-ood' if unseen else ''}:{source}", PROMPT, options)
        self._sandbox = Sandbox(preamble=PREAMBLE, seconds=options.seconds)
        self.side_by_side = self._sandbox.size
        rows = _rows(source, options.programs)
        category = options.category or _rarest(rows)
        if options.category and not any(row["category"] == category for row in rows):
            there = sorted({row["category"] for row in rows})
            raise UserError(
                f"data.category: no program of {source} is {category!r}; there is: {', '.join(there)!s:.200}."
            )
        if unseen and not category:
            raise UserError(f"{self.name}: the programs have no two categories of which one could be left out.")
        chosen = [row for row in rows if (row["category"] == category) == unseen]
        problems = self._problems(chosen, source)
        if unseen:
            self.train, self.validation = [], mixed(problems)
        else:
            self.hold_out(problems, source, by="program")

    def verify(self, problem: Problem, response: str) -> Verdict:
        kind, expected = problem.slice, problem.data["output"]
        parts = {"form": 0.0, "right": 0.0}
        wanted = f"expected: {shown({kind: problem.data[kind]})}"
        try:
            answer = last_object(response, kind)
            if kind == "input" and not isinstance(answer, dict):
                raise NotJson(f"the input is {shown(answer)}, not an object with the names of the input variables")
        except NotJson as e:
            return Verdict(0.0, f"{e}. {wanted}", parts)
        wrong = difference(answer, expected, TOLERANCE) if kind == "output" else self._run(problem, answer)
        if not wrong:
            return Verdict(1.0, "correct.", dict.fromkeys(parts, 1.0))
        if kind == "output":
            return Verdict(0.0, f"the output is wrong: {wrong}. {wanted}", {**parts, "form": 1.0})
        said = f"for the input {shown(answer)} {wrong}. the output should be {shown(expected)}"
        return Verdict(0.0, f"{said}, as it is for {shown(problem.data['input'])}.", {**parts, "form": 1.0})

    def _run(self, problem: Problem, argument: Any) -> str:
        """What is wrong with what the program makes of `argument`, in one clause; "" when that is the output."""
        outcome = self._sandbox.call(problem.data["program"], problem.data["function"], argument)
        if outcome.error:
            return f"the program ends with an error ({outcome.error})"
        try:
            result = json.loads(outcome.result)
        except (ValueError, RecursionError):
            return "the program returns what cannot be read"
        wrong = difference(result, problem.data["output"], TOLERANCE)
        return wrong and f"the program returns another output: {wrong}"

    def _problems(self, rows: list[dict[str, Any]], source: str) -> list[Problem]:
        """Two of every example whose program really gives its output here."""
        pairs = []
        for row in rows:
            for example, io in enumerate(row["ios"][:EXAMPLES]):
                data = {"program": row["refcode"], "function": row["funcname"], **io}
                pairs.append(
                    [
                        Problem(f"{self.name}/{row['number']}.{example}.{kind}", {**data, "problem": text}, slice=kind)
                        for kind in GIVEN
                        for text in [_text(row, kind, io[GIVEN[kind]])]
                    ]
                )
        with ThreadPoolExecutor(self.side_by_side) as pool:
            faults = list(pool.map(lambda pair: self._run(pair[0], pair[0].data["input"]), pairs))
        # A slow program stays: whether it is in time may differ from run to run, and the problems must not.
        faults = ["" if SLOW in fault else fault for fault in faults]
        if wrong := [fault for fault in faults if fault]:
            said = f"{len(wrong)} of {len(faults)} examples are left out: here the program does something else"
            warnings.warn(f"{self.name}: {said}, as in the first of them {wrong[0]}.", stacklevel=3)
        if not all(faults):
            return [p for pair, fault in zip(pairs, faults, strict=True) if not fault for p in pair]
        raise UserError(f"{source}: there is no example whose program gives its output here; the first: {faults[0]}.")


def _rows(source: str, programs: int) -> list[dict[str, Any]]:
    """The first `programs` of the source that have examples, checked."""
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(records(source), start=1):
        if len(rows) == programs:
            break
        where = f"{source}, row {number}"
        if "turn_1" in row:
            raise UserError(
                f"{where}: these are conversations, without the programs; use hkust-nlp/CodeIO-PyEdu-Reasoning-Raw."
            )
        ios = field(row, "ios", list, where)  # published without, where they were too large
        if not all(isinstance(io, dict) and {"input", "output"} <= io.keys() for io in ios):
            raise UserError(f"{where}: field 'ios' is {quoted(ios)}; it must list objects with 'input' and 'output'.")
        names = ("problem_description", "io_requirements", "refcode", "funcname")
        texts = {name: field(row, name, str, where) for name in names}
        if ios := [{k: io[k] for k in ("input", "output")} for io in ios if isinstance(io["input"], dict)]:
            rows.append({**texts, "ios": ios, "category": str(row.get("category") or ""), "number": number})
    if not rows:
        raise UserError(f"{source}: there is no program with an example.")
    return rows


def _rarest(rows: list[dict[str, Any]]) -> str:
    """The category with the fewest programs, of those that have a fair share; "" when all have one category."""
    counts = Counter(row["category"] for row in rows)
    fair = [c for c in counts if c and counts[c] >= SHARE * len(rows)]
    return min(fair, key=lambda c: (counts[c], c)) if len(counts) > 1 and fair else ""


def _text(row: dict[str, Any], kind: str, given: Any) -> str:
    return (
        f"{row['problem_description']}\n\nInput and output:\n\n{row['io_requirements']}\n\nThe program, in which "
        f"{row['funcname']} is called with the input:\n\n```python\n{row['refcode'].strip()}\n```\n\n"
        f"The {GIVEN[kind]} is:\n\n{json.dumps(given, ensure_ascii=False)}\n\n{ASKED[kind]}"
    )
