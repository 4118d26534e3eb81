"""The glyph world: a hidden rule turns a few letters into an answer; the verifier names every aspect that is wrong.

Small enough for a model of 334 k parameters (see `glyph_base`) to follow its instructions, which is what prompts need.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import product

from fst_fast.errors import UserError
from fst_fast.records import Problem, Verdict
from fst_fast.seeding import stream
from fst_fast.tasks.task import Message, chat

Rule = tuple[str, ...]  # one value per aspect, in the order of ASPECTS

LETTERS = "abcdefghij"
SEED_PROMPT = "transform the letters."

# Aspect → value → wordings. The first value of each aspect is its default. The words of an aspect's name occur in the
# feedback sentences about it (except on "same"), so that a rule-based reflector can tell which aspect one speaks of.
ASPECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "order": {
        "keep": ("keep the order.", "leave the letters in place."),
        "reverse": ("write the letters backwards.", "reverse the order.", "go from the last letter to the first."),
        "sort": ("sort the letters.", "use alphabetical order."),
        "rotate": ("move the first letter to the end.", "rotate the letters left."),
        "swap": ("swap the first and the last letter.", "exchange the two ends."),
    },
    "symbols": {
        "same": ("copy each letter as it is.", "do not change the letters."),
        "upper": ("use upper case.", "write capital letters."),
        "next": ("replace each letter by the next one.", "shift every letter forward."),
        "number": ("write numbers instead of letters.", "give the position in the alphabet."),
    },
    "separator": {
        "space": ("put nothing between items.", "separate by spaces only."),
        "comma": ("put a comma between items.", "separate by commas."),
        "dash": ("put a dash between items.", "join with dashes."),
        "plus": ("put a plus between items.", "join with plus signs."),
    },
    "brackets": {
        "none": ("no brackets.", "give the bare answer."),
        "angle": ("put the answer in angle brackets.", "use angle brackets."),
        "square": ("put the answer in square brackets.", "use square brackets."),
        "round": ("put the answer in round brackets.", "use parentheses."),
    },
    "last sign": {
        "none": ("stop after the answer.", "add no closing sign."),
        "bang": ("finish with an exclamation mark.", "close with an exclamation mark."),
        "question": ("finish with a question mark.", "close with a question mark."),
        "semicolon": ("finish with a semicolon.", "close with a semicolon."),
    },
}
SEPARATORS = {"space": "", "comma": ",", "dash": "-", "plus": "+"}
BRACKETS = {"none": ("", ""), "angle": ("<", ">"), "square": ("[", "]"), "round": ("(", ")")}
SIGNS = {"none": "", "bang": "!", "question": "?", "semicolon": ";"}
LONGEST_ANSWER = 64  # characters; the longest right answer has 28

FEEDBACK: dict[str, dict[str, str]] = {
    "order": {
        "keep": "the items are not in the order of the input: leave them in place.",
        "reverse": "the order of the items is wrong: it should run backwards, from the last to the first.",
        "sort": "the order of the items is wrong: it should be sorted alphabetical.",
        "rotate": "the order of the items is wrong: the first should move to the end, the others left.",
        "swap": "the order of the items is wrong: only the two ends, first and last, should be exchanged.",
    },
    "symbols": {
        "same": "the letters were changed: copy each as it is.",
        "upper": "the symbols are wrong: capital (upper case) expected.",
        "next": "the symbols are wrong: each should be the next one, shifted forward.",
        "number": "the symbols are wrong: numbers, the position in the alphabet, expected.",
    },
    "separator": {
        "space": "the separator is wrong: nothing but spaces expected between items.",
        "comma": "the separator is wrong: a comma expected between items.",
        "dash": "the separator is wrong: a dash expected between items.",
        "plus": "the separator is wrong: a plus sign expected between items.",
    },
    "brackets": {
        "none": "the answer should be bare, with no brackets.",
        "angle": "the answer should stand in angle brackets.",
        "square": "the answer should stand in square brackets.",
        "round": "the answer should stand in round brackets (parentheses).",
    },
    "last sign": {
        "none": "the last sign is wrong: stop after the items, no closing sign.",
        "bang": "the last sign is wrong: should close with an exclamation mark.",
        "question": "the last sign is wrong: should close with a question mark.",
        "semicolon": "the last sign is wrong: should close with a semicolon.",
    },
}


class GlyphTask:
    """`glyph:A` hides the first rule of the run's sequence, `glyph:B` the second, to `glyph:Z`.

    `glyph:A/B` (up to ten letters) is sliced: the problem's first letter, a–e or f–j, decides which rule governs it.
    """

    seed_prompt = SEED_PROMPT
    phrasebook: Mapping[str, Sequence[str]] = {  # of an aspect the wordings of all values, right and wrong
        aspect: [w for wordings in values.values() for w in wordings] for aspect, values in ASPECTS.items()
    }

    def __init__(self, rules: str, seed: int, *, n_train: int = 4096, n_validation: int = 128):
        if not re.fullmatch(r"[A-Z](/[A-Z]){0,9}", rules):
            raise UserError(
                f"task 'glyph:{rules}': the rules must be one letter A to Z, or up to ten separated by '/', "
                "e.g. glyph:A or glyph:A/B."
            )
        self.name = f"glyph:{rules}"
        indices = [ord(letter) - ord("A") for letter in rules.split("/")]
        drawn = rule_sequence(seed, max(indices) + 1)
        self.rules = [drawn[i] for i in indices]  # one per slice
        rng = stream(seed, self.name, "problems")
        letters: dict[str, None] = {}  # an ordered set
        while len(letters) < n_train + n_validation:
            letters[draw_letters(rng)] = None
        problems = [self._problem(x) for x in letters]
        self.train: Sequence[Problem] = problems[:n_train]
        self.validation: Sequence[Problem] = problems[n_train:]

    def _problem(self, letters: str) -> Problem:
        n = len(self.rules)
        bounds = [len(LETTERS) * i // n for i in range(n + 1)]
        i = next(i for i in range(n) if LETTERS.index(letters[0]) < bounds[i + 1])
        visible = f"{LETTERS[bounds[i]]}-{LETTERS[bounds[i + 1] - 1]}" if n > 1 else ""
        return Problem(f"{self.name}/{letters}", {"letters": letters, "rule": self.rules[i]}, slice=visible)

    def messages(self, prompt: str, problem: Problem) -> list[Message]:
        return chat(prompt, " ".join(problem.data["letters"]))

    def verify(self, problem: Problem, response: str) -> Verdict:
        return verify(problem, response)


def instruction_cases(n: int, seed: int) -> list[tuple[str, Problem]]:
    """`n` pairs (prompt, problem): random rules, each fully stated by its prompt.

    What a policy scores on them is how well it still follows instructions. The problems carry their rules: pose and
    verify them with any `GlyphTask`.
    """
    rng = stream(seed, "glyph", "instructions")
    cases = []
    for i in range(n):
        rule, letters = draw_rule(rng), draw_letters(rng)
        cases.append((state(rule, rng), Problem(f"glyph:instruction/{i}", {"letters": letters, "rule": rule})))
    return cases


def rule_sequence(seed: int, n: int) -> list[Rule]:
    """The run's first `n` rules, with no default value in any aspect.

    Greedy: each new rule shares at most one value with every earlier one while a candidate does so (nine rules at
    most can), and at most one with its predecessor always. A longer sequence starts with the shorter ones.
    """
    candidates = list(product(*(list(values)[1:] for values in ASPECTS.values())))
    stream(seed, "glyph", "rules").shuffle(candidates)
    chosen: list[Rule] = []

    def closeness(rule: Rule) -> tuple[int, int]:
        shared = [sum(a == b for a, b in zip(rule, other, strict=True)) for other in chosen]
        return max(1, *shared[-1:]), max(1, *shared)

    for _ in range(n):
        chosen.append(candidates.pop(candidates.index(min(candidates, key=closeness))) if chosen else candidates.pop())
    return chosen


def draw_rule(rng: random.Random) -> Rule:
    """One of all 1280 rules, uniformly."""
    return tuple(rng.choice(list(values)) for values in ASPECTS.values())


def draw_letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(4, 5)))


def state(rule: Rule, rng: random.Random) -> str:
    """The whole rule in words: one wording per aspect, in random order."""
    sentences = [rng.choice(values[value]) for values, value in zip(ASPECTS.values(), rule, strict=True)]
    rng.shuffle(sentences)
    return " ".join(sentences)


def solve(rule: Rule, letters: str) -> str:
    """The right answer, e.g. "[ D , C , B , A ] !" for "abcd"."""
    order, symbols, separator, brackets, sign = rule
    opening, closing = BRACKETS[brackets]
    items = map_letters(symbols, arrange(order, letters))
    between = f" {SEPARATORS[separator]} " if SEPARATORS[separator] else " "
    return " ".join(filter(None, (opening, between.join(items), closing, SIGNS[sign])))


def arrange(order: str, x: str) -> str:
    match order:
        case "reverse":
            return x[::-1]
        case "sort":
            return "".join(sorted(x))
        case "rotate":
            return x[1:] + x[:1]
        case "swap":
            return x[-1] + x[1:-1] + x[0]
        case _:
            return x


def map_letters(symbols: str, x: str) -> list[str]:
    match symbols:
        case "upper":
            return list(x.upper())
        case "next":
            return [chr(ord(c) + 1) for c in x]
        case "number":
            return [str(ord(c) - ord("a") + 1) for c in x]
        case _:
            return list(x)


def verify(problem: Problem, response: str) -> Verdict:
    """Exact match up to surrounding space; `parts` tells for each aspect whether it is right (1) or wrong (0)."""
    rule, letters = tuple(problem.data["rule"]), problem.data["letters"]
    expected, answer = solve(rule, letters), response.strip()
    if answer == expected:
        return Verdict(1.0, "correct.", dict.fromkeys(ASPECTS, 1.0))
    parsed = _parse(answer) if len(answer) <= LONGEST_ANSWER else None
    wrong = set(ASPECTS) if parsed is None else _wrong_aspects(rule, letters, *parsed)
    parts = {aspect: float(aspect not in wrong) for aspect in ASPECTS}
    if parsed is None or not wrong:  # nothing wrong but the spacing
        return Verdict(0.0, f"the answer is malformed. expected: {expected}", parts)
    wanted = dict(zip(ASPECTS, rule, strict=True))
    sentences = [FEEDBACK[aspect][wanted[aspect]] for aspect in _FEEDBACK_ORDER if aspect in wrong]
    return Verdict(0.0, f"{' '.join(sentences)} expected: {expected}", parts)


_FEEDBACK_ORDER = ("separator", "last sign", "brackets", "symbols", "order")


def _wrong_aspects(rule: Rule, letters: str, items: list[str], separator: str, brackets: str, sign: str) -> set[str]:
    order, symbols, *layout = rule
    arranged = arrange(order, letters)
    right = {
        # in the right order under some mapping; the right symbols in some order: the two are judged apart
        "order": any(items == map_letters(any_symbols, arranged) for any_symbols in ASPECTS["symbols"]),
        "symbols": sorted(items) == sorted(map_letters(symbols, letters)),
        "separator": separator == layout[0],
        "brackets": brackets == layout[1],
        "last sign": sign == layout[2],
    }
    return {aspect for aspect, ok in right.items() if not ok}


def _parse(answer: str) -> tuple[list[str], str, str, str] | None:
    """(items, separator, brackets, sign) of an answer, or None when it is malformed."""
    tokens = answer.split()
    sign = next((name for name, c in SIGNS.items() if c and tokens[-1:] == [c]), "none")
    if sign != "none":
        tokens.pop()
    brackets = next((name for name, (opening, _) in BRACKETS.items() if opening and tokens[:1] == [opening]), "none")
    if brackets != "none":
        if tokens[-1] != BRACKETS[brackets][1]:
            return None
        tokens = tokens[1:-1]
    if not tokens:
        return None
    separator = next((name for name, c in SEPARATORS.items() if c and c in tokens), "space")
    if separator == "space":
        return tokens, separator, brackets, sign
    items, between = tokens[::2], tokens[1::2]
    regular = len(items) == len(between) + 1 and set(between) == {SEPARATORS[separator]}
    if not regular or any(item in SEPARATORS.values() for item in items):
        return None
    return items, separator, brackets, sign
