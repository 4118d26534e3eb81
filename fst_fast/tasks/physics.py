r"""Physics in the format of UGPhysics (Xu et al. 2025): numbers with units, expressions, equations, in \boxed{}.

`physics:SOURCE` has the problems of all domains but `data.unseen`, `physics-ood:SOURCE` those of that one. SOURCE is
the Hub's UGPhysics/ugphysics, a folder with its files (AtomicPhysics/en.jsonl, ...), or one such file. Read are
the fields subject, index, domain, problem, answers, answer_type (NV, EX, EQ, IN, TUP, TF, MC, or several), unit; and
language, if there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError, quoted
from fst_fast.records import Problem, Verdict
from fst_fast.tasks.datasets import records
from fst_fast.tasks.math import LONGEST_ANSWER
from fst_fast.tasks.math import verdict as math_verdict
from fst_fast.tasks.math_check import MathChecker
from fst_fast.tasks.published import PublishedOptions, PublishedTask, boxed, field
from fst_fast.tasks.units import FONT, convert, half_digit, number, plain, unit_of

PROMPT = (
    r"Solve the problem step by step. Put the final answer in \boxed{}; a number with its unit, several answers in the "
    "order asked, separated by commas."
)
SUBJECTS = (
    "AtomicPhysics", "ClassicalElectromagnetism", "ClassicalMechanics", "Electrodynamics", "GeometricalOptics",
    "QuantumMechanics", "Relativity", "SemiconductorPhysics", "Solid-StatePhysics", "StatisticalMechanics",
    "TheoreticalMechanics", "Thermodynamics", "WaveOptics",
)  # fmt: skip
TYPES = ("NV", "EX", "EQ", "IN", "TUP", "TF", "MC")
KINDS = re.compile(r"[^A-Za-z]*((?:TYPE)(?: *, *(?:TYPE))*)(?![A-Za-z])".replace("TYPE", "|".join(TYPES)))
CHOICES = {"yes": "true", "correct": "true", "right": "true", "no": "false", "incorrect": "false", "wrong": "false"}
NAMED = re.compile(r"^.*(?:=|\\approx|\\simeq|\\sim|≈|\\equiv)", re.DOTALL)
UPRIGHT = re.compile(r"\\(?:boldsymbol|bm|mathbf|vec|mathit) ?\{([^{}]*)\}|\\mathrm ?\{ ?~?(d|e|i)\}")
NAMES = re.compile(r"\\(?:mathrm|text|operatorname) ?\{ ?(sin|cos|tan|sinh|cosh|tanh|arctan|exp|ln|log) ?\}")
TAIL = re.compile(rf"{FONT.pattern}|\^? ?\{{? ?\\circ|°|\\?%")  # where the unit of an expression begins
UNIT = re.compile(rf"{FONT.pattern}|\\circ|[°%Ω]|[A-Za-zµ]{{2}}")  # what a unit has where none is asked for
ROUNDING = 0.1  # a rounded right answer leaves at most this much of it open


class PhysicsTask(PublishedTask):
    def __init__(self, source: str, options: PublishedOptions, *, unseen: bool = False):
        super().__init__(f"physics{'-ood' if unseen else ''}:{source}", PROMPT, options)
        self._tolerance, self._checker = options.tolerance, MathChecker(strict=True, units=False)
        self.side_by_side = self._checker.size
        self._value = lru_cache(10_000)(self._checker.value)  # of right answers
        problems = [
            self._problem(row, where)
            for row, where in _rows(source)
            if (field(row, "domain", str, where) == options.unseen) == unseen
        ]
        if not problems:
            raise UserError(
                f"{source}: no problem is {'' if unseen else 'out'}side the domain {options.unseen!r} (data.unseen)."
            )
        if len({p.id for p in problems}) < len(problems):
            raise UserError(f"{source}: two problems have the same subject and index.")
        self.hold_out(problems, source)

    def _problem(self, row: Mapping[str, Any], where: str) -> Problem:
        answers = _answers(row, where)
        units = [unit for _, _, unit in answers if unit]
        posed = field(row, "problem", str, where).strip()
        if len(answers) > 1:
            posed += f"\n\nGive {len(answers)} answers, separated by commas."
        if units:
            posed += f"\n\nUnit: {', '.join(f'${unit}$' if unit else 'none' for _, _, unit in answers)}"
        id = f"{self.name}/{field(row, 'subject', str, where)}/{field(row, 'index', int, where)}"
        language = row.get("language")
        return Problem(f"{id}/{language}" if isinstance(language, str) else id, {"problem": posed, "answers": answers})

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Reward 1 when every answer is right; a number counts with any unit of its kind, and without one in the one
        that is asked for."""
        answers = problem.data["answers"]
        expected = ", ".join(f"{text} {unit}".strip() for text, _, unit in answers)
        parts = {"boxed": 0.0, "read": 0.0, "unit": 0.0, "right": 0.0}
        box = boxed(response)
        if box is None:
            said = r"there is no closed \boxed{} in the response: the final answer must stand in one."
            return Verdict(0.0, f"{said} expected: {expected:.300}", parts)
        parts["boxed"] = 1.0
        given = _split(box) if len(answers) > 1 else [box]
        if len(box) > LONGEST_ANSWER:
            faults = [f"the box holds {len(box)} characters: it should hold the final answer alone."]
        elif len(given) != len(answers):
            faults = [f"the box holds {len(given)} answers, separated by commas, not {len(answers)}."]
        else:
            pairs = zip(answers, given, strict=True)
            faults = [self._fault(right, kind, unit, text, parts) for (right, kind, unit), text in pairs]
            parts["read"] = float(not any("could be read" in fault for fault in faults))
        said = " ".join(filter(None, faults))
        if said:
            return Verdict(0.0, f"{said} expected: {expected:.300}", parts)
        return Verdict(1.0, "correct.", dict.fromkeys(parts, 1.0))

    def _fault(self, expected: str, kind: str, unit: str, answer: str, parts: dict[str, float]) -> str:
        """What is wrong with one answer; "" when it is right."""
        if kind in ("TF", "MC"):
            return "" if _choice(answer) == _choice(expected) else f"the answer {answer:.100} is wrong."
        if kind == "NV" and (right := self._quantity(expected, self._value)) is not None:
            return self._number_fault(right, expected, unit, answer, parts)
        verdict = math_verdict(self._checker, _upright(expected), _upright(answer))
        return "" if verdict.reward == 1 else verdict.feedback.rpartition(" expected: ")[0]

    def _number_fault(
        self, right: tuple[float, str], expected: str, unit: str, answer: str, parts: dict[str, float]
    ) -> str:
        shown = f"the answer {answer:.100}"
        found = self._quantity(answer, self._checker.value)
        if found is None:
            return f"{shown} is no number that could be read."
        (value, its_unit), wanted = found, unit or right[1]
        if not wanted and unit_of(its_unit) == "percent":
            value, its_unit = value / 100, ""
        if not its_unit and "\\pi" in answer and unit_of(wanted) == "degree":
            its_unit = "rad"
        if its_unit and not wanted and not UNIT.search(its_unit):  # 3x for 3
            return f"{shown} was read as {value:g} {its_unit:.50}, where a bare number is right."
        if its_unit and wanted and _spelling(its_unit) != _spelling(wanted):
            mine, target = unit_of(its_unit), unit_of(wanted)
            turned = convert(value, mine, target) if mine and target else None
            if turned is None:
                return f"{shown} was read as {value:g} with the unit {its_unit:.50}, which is not one of {wanted:.50}."
            value = turned
        parts["unit"] = 1.0
        margin = max(
            self._tolerance * abs(right[0]), min(half_digit(_stripped(expected)), ROUNDING * abs(right[0])), 1e-300
        )
        if abs(value - right[0]) <= margin * (1 + 1e-9):
            return ""
        return (
            f"{shown} was read as {value:g} {wanted:.50}, which is not within {self._tolerance:.1%} of the right value."
        )

    def _quantity(self, text: str, evaluate: Any) -> tuple[float, str] | None:
        """(number, text of its unit) of an answer such as v = 2.5 \\times 10^{3} \\text{ m/s} or \\frac{3}{4} \\pi."""
        text = _stripped(text)
        found = number(text)
        if found and (not found[1] or unit_of(found[1]) is not None or _is_text(found[1])):
            return found
        unit = TAIL.search(text)
        head, tail = (text[: unit.start()], text[unit.start() :]) if unit else (text, "")
        if unit_of(tail) is None and not _is_text(tail):
            return None
        value = evaluate(head.strip()) if head.strip() else None
        return None if value is None else (value, tail)


def _rows(source: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(row, where it stands) of all files or configurations that the source has."""
    if Path(source).is_dir():
        parts = sorted(str(path) for path in Path(source).glob("*/en.jsonl"))
        if not parts:
            raise UserError(f"physics:{source}: there is no SUBJECT/en.jsonl in the folder; clone UGPhysics/ugphysics.")
    elif Path(source).suffix or ":" in source:
        parts = [source]
    else:
        parts = [f"{source}:{subject}" for subject in SUBJECTS]
    for part in parts:
        for i, row in enumerate(records(part, "en"), start=1):
            yield row, f"{part}, row {i}"


def _answers(row: Mapping[str, Any], where: str) -> tuple[tuple[str, str, str], ...]:
    """(text, type, unit) of each answer."""
    listed = KINDS.match(field(row, "answer_type", str, where))
    if not listed:
        raise UserError(
            f"{where}: field 'answer_type' is {quoted(row['answer_type'])}; it must be of {', '.join(TYPES)}."
        )
    text = field(row, "answers", str, where)
    kinds, content = re.findall("[A-Z]+", listed[1]), boxed(text)
    content = text.strip() if content is None else content
    unit = row.get("unit")
    if unit is not None and not isinstance(unit, str):
        raise UserError(f"{where}: field 'unit' is {quoted(unit)}; it must be a text or null.")
    texts = _split(content) if len(kinds) > 1 else [content]
    units = [_no_none(part) for part in (unit or "").split(",")]
    if len(texts) != len(kinds):  # what cannot be told apart is compared as a whole
        texts, kinds, units = [content], ["TUP"], [""]
    if len(units) != len(kinds):
        units = [units[0] if len(units) == 1 and len(kinds) == 1 else ""] * len(kinds)
    return tuple(zip(texts, kinds, units, strict=True))


def _no_none(unit: str) -> str:
    """A unit as it is written, "" for "None"."""
    bare = FONT.sub("", unit).replace("{", "").replace("}", "").replace("\\", "").strip(' "')
    return "" if bare in ("", "None") else unit.strip()


def _split(text: str) -> list[str]:
    """At its commas outside of brackets, thousands (1,234 and 1{,}234) not taken for two answers."""
    parts, depth, start = [], 0, 0
    for m in re.finditer(r"\\.|[{}()\[\],]", text):
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(m[0], 0)
        if m[0] == "," and depth == 0:
            parts.append(text[start : m.start()])
            start = m.end()
    return [part.strip() for part in [*parts, text[start:]]]


def _stripped(text: str) -> str:
    """What stands after the last sign of equality, in one spelling."""
    return NAMED.sub("", plain(text)).strip(" .")


def _upright(text: str) -> str:
    """Vectors without their arrows, d and e in italics, no space commands: as math-verify reads them."""
    text = NAMES.sub(r"\\\1 ", plain(text))
    return UPRIGHT.sub(lambda m: m[1] or m[2] or "", text).strip(" .")


def _spelling(unit: str) -> str:
    return re.sub(r"[\s{}]|\\cdot", "", FONT.sub("", plain(unit)))


def _is_text(text: str) -> bool:
    """Whether a number's rest is no more than words: a unit that pint does not know, as \\text{energy}, or m_{0}."""
    return bool(re.fullmatch(r"[A-Za-z_ \\{}()0-9'^-]{1,60}", text)) and not re.search(
        r"\\(?:frac|sqrt|pi|times|cdot|log|ln|exp|sin|cos|tan|pm)(?![a-z])|\^ ?\{?-?[0-9]|[0-9] *$"
        r"|(?<![a-z])(?:or|and|not|either|about)(?![a-z])",
        text,
    )


def _choice(text: str) -> str:
    """The letter or truth value that a choice is, without the brackets and words around it."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\\[a-z]+", " ", text.casefold()))
    words = [w for w in words if w not in ("the", "answer", "is", "option", "choice")]
    return " ".join(CHOICES.get(w, w) for w in words)
