r"""Mathematics in the format of Polaris-Dataset-53K: `problem`, `answer`, `difficulty`; answers in \boxed{}.

`math:SOURCE` trains on nine tenths of a source and holds out the rest; `math-ood:SOURCE` holds out all of another one
in the same format (MATH-500, AIME 2024), in its split "test" where it has one.
"""

from __future__ import annotations

import re

from fst_fast.errors import UserError
from fst_fast.records import Problem, Verdict
from fst_fast.tasks.datasets import records
from fst_fast.tasks.math_check import MathChecker
from fst_fast.tasks.published import PublishedOptions, PublishedTask, boxed, field
from fst_fast.tasks.split import mixed

PROMPT = r"Solve the problem step by step. Put the final answer in \boxed{}."
LONGEST_ANSWER = 2000  # characters of a box that are read
UNFINISHED = re.compile(r"\\(sum|prod|int|iint|oint|lim)(?![a-z])")  # the question handed back


class MathTask(PublishedTask):
    def __init__(self, source: str, options: PublishedOptions, *, unseen: bool = False):
        super().__init__(f"math{'-ood' if unseen else ''}:{source}", PROMPT, options)
        self._checker = MathChecker(strict=True)
        self.side_by_side = self._checker.size
        if unseen:
            self.train, self.validation = [], mixed(self._read(source, "test"))
        else:
            self.hold_out(self._read(source, "train"), source)

    def _read(self, source: str, split: str) -> list[Problem]:
        try:
            rows = list(records(source, split))
        except UserError:
            if split == "train":
                raise
            rows = list(records(source, "train"))  # some sets for evaluation have no other split
        problems = []
        for number, row in enumerate(rows, start=1):
            where = f"{source}, row {number}"
            answer = row.get("answer")
            if isinstance(answer, int | float) and not isinstance(answer, bool):
                row = {**row, "answer": str(answer)}
            data = {name: field(row, name, str, where) for name in ("problem", "answer")}
            problems.append(Problem(f"{self.name}/{number}", data))
        if not problems:
            raise UserError(f"{source}: there are no problems.")
        return problems

    def verify(self, problem: Problem, response: str) -> Verdict:
        return verdict(self._checker, problem.data["answer"], boxed(response))


def verdict(checker: MathChecker, expected: str, answer: str | None) -> Verdict:
    """Reward 1 when what stands in the box equals `expected` mathematically; the feedback says what was read in it."""
    parts = {"boxed": float(answer is not None), "read": 0.0, "right": 0.0}
    if answer is None:
        said = r"there is no closed \boxed{} in the response: the final answer must stand in one."
        return Verdict(0.0, f"{said} expected: {expected:.300}", parts)
    shown = f"\\boxed{{{answer:.200}}}"
    unfinished = UNFINISHED.search(answer)
    if answer and _same(answer) == _same(expected):
        return Verdict(1.0, "correct.", dict.fromkeys(parts, 1.0))
    if len(answer) > LONGEST_ANSWER:
        outcome, said = "wrong", f"the box holds {len(answer)} characters: it should hold the final answer alone."
    elif unfinished and not UNFINISHED.search(expected):
        outcome, said = "wrong", f"the answer {shown} is left unevaluated ({unfinished[0]})."
    else:
        bare = answer.replace("\\displaystyle", "").strip(". ")
        outcome, read = checker.compare(expected, f"\\boxed{{{bare}}}")
        if outcome == "no answer":  # nothing mathematical, so its text is the answer
            outcome, read = ("right" if _same(answer).lower() == _same(expected).lower() else "wrong"), answer[:200]
        parts["read"] = float(outcome in ("right", "wrong"))
        said = {
            "right": "correct.",
            "wrong": f"the answer {shown} was read as {read}, which is wrong.",
            "no response": f"the answer {shown} holds no mathematics that could be read.",
            "stuck": f"the answer {shown} could not be evaluated in time.",
        }[outcome]
    if outcome == "right":
        return Verdict(1.0, "correct.", dict.fromkeys(parts, 1.0))
    return Verdict(0.0, f"{said} expected: {expected:.300}", parts)


def _same(text: str) -> str:
    """The text without what changes nothing in LaTeX: fonts, spaces but between digits, braces around one sign."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|boldsymbol)(?![a-zA-Z])|(?<!\\)\\[ ,;:!]|\$", "", text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"\{(\\[a-zA-Z]+|[^{}\\])\}", r"\1", text)
