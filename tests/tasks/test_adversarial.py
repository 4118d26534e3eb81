"""200 answers a task that try its verifier: right ones in odd formats, wrong ones in tempting formats.

What is right was decided by reading, not by the verifier. `pytest -s` prints the rates that docs/tasks.md states.
"""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import pytest

from fst_fast.records import Problem
from fst_fast.tasks import make_task
from fst_fast.tasks.task import verdicts

DATA = Path(__file__).parents[1] / "data"
Case = tuple[Problem, str, bool]  # problem, response, whether it is right

# ------------------------------------------------------------------------------------------- math and physics: in a box

# Ways to put the answer A in a box, and ways to seem to.
BOXED: list[Callable[[str], str]] = [
    lambda a: f"\\boxed{{{a}}}",
    lambda a: f"Thus the result is $\\boxed{{{a}}}$.",
    lambda a: f"\\[\n\\boxed{{ {a} }}\n\\]",
    lambda a: f"**Final answer:** \\boxed{{{a}}}\n\n",
    lambda a: f"At first \\boxed{{0}}. But no: \\boxed{{{a}}}",
    lambda a: f"<think>\\boxed{{77}}? hm \\boxed{{</think>\n\\boxed{{{a}}}",
    lambda a: f"\\fbox{{{a}}}",
    lambda a: f"\\boxed{{{a}.}}",
    lambda a: f"\\boxed{{${a}$}} That is it. {{",
    lambda a: f"\\( \\boxed {{\\displaystyle {a}}} \\)",
]
MISBOXED: list[Callable[[str], str]] = [
    lambda a: f"The answer is ${a}$.",
    lambda a: f"\\boxed{{{a}}} or else \\boxed{{77}}",
    lambda a: f"\\boxed{{{a}",
    lambda a: f"boxed{{{a}}}",
    lambda a: f"\\boxed{{{a}}} \\boxed{{}}",
    lambda a: f"\\boxed{{{a} \\text{{ or }} 77}}",
    lambda a: f"\\boxed{{77, {a}}}",
    lambda a: f"\\boxed{{\\text{{see above}}}} where I found {a}",
    lambda a: f"\\boxed{{\\{{{a}, 77, 78\\}}}}",
    lambda a: f"\\text{{boxed}}{{{a}}} \\boxed{{x}}",
]

# Right answer → (ways to write it, answers that are wrong).
MATH: dict[str, tuple[list[str], list[str]]] = {
    "102": (
        ["102.0", "+102", "\\frac{204}{2}", "1.02 \\times 10^{2}", "102 \\text{ apples}", "x = 102"],
        ["120", "-102", "10.2", "102x", "100 < x < 104", "102, 103", "102 \\ne x", "0x66"],
    ),
    "\\frac{3}{4}": (
        ["3/4", "0.75", "\\frac34", "\\dfrac{6}{8}", "\\tfrac{3}{4}", "3 \\div 4"],
        ["\\frac43", "0.7", "0.74", "\\frac{3}{4}x", "34", "3, 4"],
    ),
    "2, 3": (
        ["3, 2", "\\{2, 3\\}", "x = 2, x = 3", "x=2 \\text{ or } x=3", "2 \\text{ and } 3"],
        ["2", "3", "2, 3, 4", "2, -3", "23", "2.3"],
    ),
    "9\\pi": (
        ["\\pi \\cdot 9", "3^2 \\pi", "9 \\times \\pi", "28.274333882", "9\\pi \\text{ cm}^2"],
        ["9", "28", "6\\pi", "9\\pi^2", "9+\\pi", "\\pi"],
    ),
    "(-1,3)": (
        ["(-1, 3)", "-1 < x < 3", "\\left(-1,3\\right)", "x \\in (-1,3)"],
        ["[-1,3]", "(-1,3]", "(3,-1)", "(-1, 2)", "-1 \\le x \\le 3", "\\{-1, 3\\}"],
    ),
    "a^2+2ab+b^2": (
        ["(a+b)^2", "b^2 + 2 b a + a^2", "(a+b)(a+b)", "a^{2}+2\\cdot a\\cdot b+b^{2}"],
        ["a^2+b^2", "a^2-2ab+b^2", "(a-b)^2", "a^2+ab+b^2", "a^2+2ab+c^2"],
    ),
    "1024": (
        ["1,024", "2^{10}", "4^5", "1024.00", "1{,}024"],
        ["1000", "1024^{2}", "2^{11}", "10.24", "1{,}023", "\\sum_{k=0}^{10}\\binom{10}{k}"],
    ),
    "\\text{B}": (
        ["B", "(B)", "\\textbf{B}", "\\mathrm{B}", "\\text{(B)}", "\\text{B) 23}"],
        ["A", "C", "\\text{A or B}", "AB", "23", "\\text{not B}"],
    ),
    "(2,3)": (
        ["\\left(2, 3\\right)", "(2, \\frac{6}{2})", "(2.0, 3.0)", "(x,y) = (2,3)"],
        ["(3,2)", "2", "5", "(2,3,0)", "(2,-3)", "\\frac{2}{3}"],
    ),
    "\\sqrt{2}": (
        ["\\sqrt2", "2^{1/2}", "\\frac{2}{\\sqrt{2}}", "1.41421356237", "\\sqrt{\\frac{4}{2}}"],
        ["2", "1.4", "-\\sqrt{2}", "\\pm\\sqrt{2}", "\\sqrt{3}", "\\sqrt[3]{2}"],
    ),
    "-\\frac{1}{2}": (
        ["-0.5", "\\frac{-1}{2}", "-\\frac12", "-1/2", "\\frac{1}{-2}"],
        ["\\frac12", "0.5", "-2", "-\\frac{1}{3}", "-\\frac{1}{2}i"],
    ),
    "\\infty": (["+\\infty", "\\text{infinity}"], ["-\\infty", "0", "10^{100}", "\\text{none}"]),
}

# (right answer, type, unit) → the same.
PHYSICS: dict[tuple[str, str, str], tuple[list[str], list[str]]] = {
    ("19.6", "NV", "\\text{m}"): (
        [
            "19.6 \\text{ m}",
            "h = 19.6\\,\\mathrm{m}",
            "1960 cm",
            "0.0196\\ \\text{km}",
            "\\frac{98}{5} \\text{ m}",
            "19.6 meters",
        ],
        ["19.6 \\text{ s}", "19.6 km", "196", "-19.6", "19.9", "19,6", "19.6 \\text{ m/s}", "19.6 m^{2}", "\\text{m}"],
    ),
    ("4.05 \\times 10^{-7}", "NV", "\\text{C/m}"): (
        [
            "4.05e-7",
            "4.05×10⁻⁷ C/m",
            "\\lambda \\approx 4.05 \\cdot 10^{-7}",
            "0.405 \\text{ µC/m}",
            "405 \\text{ nC m}^{-1}",
            "4.05 \\times 10^{-9} \\text{ C/cm}",
        ],
        [
            "4.05 \\times 10^{7}",
            "4.05",
            "4.05 \\times 10^{-7} \\text{ C}",
            "10^{-7}",
            "4.05^{-7}",
            "4.05 \\times 10^{-6}",
            "4.05 \\times 10^{-7} \\text{ N/m}",
        ],
    ),
    ("45^\\circ", "NV", ""): (
        ["45", "45°", "\\theta = 45 \\text{ degrees}", "\\frac{\\pi}{4} \\text{ rad}", "45^{\\circ}", "\\pi/4"],
        ["45 \\text{ rad}", "54^\\circ", "\\frac{\\pi}{4}^\\circ", "-45^\\circ", "135^\\circ", "0.45"],
    ),
    ("0.03", "NV", ""): (
        ["0.0286", "3\\%", "3 \\times 10^{-2}", "\\frac{3}{100}", "\\eta = 0.030"],
        ["0.02", "0.0349", "0.3", "3", "30\\%", "0.03x"],
    ),
    ("-13.6", "NV", "\\text{eV}"): (
        ["−13.6 eV", "-2.18 \\times 10^{-18} \\text{ J}", "-0.0136\\,\\mathrm{keV}", "E_1 = -13.6\\ \\mathrm{eV}"],
        ["13.6", "-13.6 \\text{ V}", "-13.6 \\text{ J}", "-13.6 \\text{ keV}", "-1.36", "\\pm 13.6"],
    ),
    ("540.4", "NV", "\\mathrm{MeV} / c"): (
        ["540 \\text{ MeV}/c", "0.540 \\mathrm{GeV}/c", "2.88 \\times 10^{-19} \\text{ kg m/s}", "p = 540.4"],
        ["540 \\text{ MeV}", "540 \\text{ MeV}/c^2", "540 \\text{ GeV}/c", "504.4"],
    ),
    ("\\frac{11}{24} \\sqrt{6}", "NV", ""): (
        ["1.12", "\\frac{11\\sqrt{6}}{24}", "1.1227", "\\frac{11}{4\\sqrt{6}}"],
        ["\\frac{11}{24}", "\\frac{11}{24}\\sqrt{5}", "1.2", "6"],
    ),
    ("\\frac{v_{0}^{2} \\sin 2\\theta}{g}", "EX", ""): (
        [
            "\\frac{2 v_0^2 \\sin\\theta\\cos\\theta}{g}",
            "R = \\frac{v_0^2}{g}\\sin(2\\theta)",
            "v_0^2 \\sin(2\\theta) / g",
            "\\frac{v_0^2 \\, \\mathrm{sin}\\, 2\\theta}{g}",
        ],
        ["\\frac{v_0^2 \\sin \\theta}{g}", "\\frac{v_0 \\sin 2\\theta}{g}", "\\frac{v_0^2 \\cos 2\\theta}{g}", "v_0^2"],
    ),
    ("E = \\frac{1}{2} m v^{2}", "EQ", ""): (
        ["\\frac{m v^2}{2}", "E = 0.5 \\boldsymbol{v}^2 m", "E=\\frac12 m v^2", "\\frac{1}{2}mv^2 = E"],
        ["E = m v^2", "m = \\frac{1}{2} E v^2", "\\frac{1}{2} m v", "E = \\frac{1}{2} m v^{3}", "E"],
    ),
    ("\\hbar \\omega", "EX", ""): (
        ["\\omega \\hbar", "\\Delta E = \\hbar\\omega", "\\frac{h}{2\\pi}\\omega", "\\hbar \\cdot \\omega"],
        ["h \\omega", "\\frac{1}{2} \\hbar \\omega", "\\hbar", "\\hbar \\omega^2"],
    ),
    ("Yes", "TF", ""): (
        ["yes", "\\text{True}", "\\text{Yes}", "YES"],
        ["no", "\\text{yes and no}", "\\text{False}", "?"],
    ),
    ("B", "MC", ""): (["\\text{B}", "(B)", "\\text{Option B}", "\\mathrm{B}"], ["A", "A, B", "AB", "\\text{not B}"]),
}


def in_boxes(answers: dict[Problem, tuple[str, Sequence[str], Sequence[str]]]) -> list[Case]:
    """Each way to write an answer, in one way to box it; the answer itself in five, and in four that but seem to."""
    ways, seeming = cycle(BOXED), cycle(MISBOXED)
    cases: list[Case] = []
    for problem, (expected, right, wrong) in answers.items():
        cases += [(problem, next(ways)(a), True) for a in [*right, *[expected] * 5]]
        cases += [(problem, next(ways)(a), False) for a in wrong]
        cases += [(problem, next(seeming)(expected), False) for _ in range(4)]
    return cases


def math() -> list[Case]:
    return in_boxes({Frozen("p", {"problem": "?", "answer": a}): (a, *both) for a, both in MATH.items()})


def physics() -> list[Case]:
    return in_boxes({Frozen("p", {"problem": "?", "answers": (a,)}): (a[0], *both) for a, both in PHYSICS.items()})


class Frozen(Problem):
    """A problem as a key."""

    __hash__ = object.__hash__


# ------------------------------------------------------------------------------------------------------------- hover

LABELS = {
    "SUPPORTED": ["SUPPORTED", "Supported.", "supported", "**SUPPORTED**", "\\boxed{\\text{SUPPORTED}}", '"Supported"'],
    "NOT_SUPPORTED": [
        "NOT_SUPPORTED",
        "Not supported.",
        "unsupported",
        "**NOT SUPPORTED**",
        "\\boxed{NOT\\_SUPPORTED}",
        "not-supported",
    ],
}
STATED: list[Callable[[str], str]] = [
    lambda a: f"answer: {a}",
    lambda a: f"Ida Moreau came from Lyon, on the Rhône.\n**Answer:** {a}",
    lambda a: f"ANSWER:\n\n{a}\n\nI checked every hop.",
    lambda a: f"So the claim is {a}",
    lambda a: f"answer: maybe\nNo. Final answer: {a}",
    lambda a: f"<think>answer: partly</think>\nTherefore:\n{a}",
    lambda a: f"answer: The claim is {a} by the given evidence",
    lambda a: f"The final answer is: {a}",
]
FREELY = {  # right, and said in words of their own
    "SUPPORTED": [
        "The evidence supports the claim.",
        "answer: SUPPORTED because Lyon is on the Rhône",
        "answer: SUPPORTED (true)",
        "I conclude that it is supported",
    ],
    "NOT_SUPPORTED": [
        "It isn't supported.",
        "answer: The claim is not supported by the evidence.",
        "answer: NOT SUPPORTED!",
        "The evidence does not support the claim.",
    ],
}
HEDGES = [
    "SUPPORTED or NOT_SUPPORTED",
    "SUPPORTED / NOT_SUPPORTED",
    "SUPPORTED?",
    "NOT_SUPPORTED?",
    "not not supported",
    "partially supported",
    "mostly supported",
    "half supported, half not supported",
    "true",
    "yes",
    "no",
    "REFUTED",
    "1",
    "neither supported nor unsupported",
    "I cannot tell",
    "SUPPORT",
    "supporting",
    "SUPPORTED NOT_SUPPORTED",
    "",
    "it depends",
    "the label",
    "<label>",
    "SUPPORTED or not",
    "not sure",
    "supported, unless it is not",
    "not supportable",
    "SUPPORTED, I guess not",
    "SUPPORTED 50%",
    "a supported claim would say Lyon",
    "NOT (SUPPORTED or not)",
    "either SUPPORTED or NOT",
    "SUPPORTED if Lyon is on the Rhône",
    "could be supported",
    "hardly supported",
    "NOT",
]


def hover() -> list[Case]:
    cases: list[Case] = []
    for label, forms in LABELS.items():
        problem = Problem("p", {"problem": "?", "claim": "?", "label": label, "titles": ("Ida Moreau", "Lyon")})
        others = [form for other, forms in LABELS.items() if other != label for form in forms]
        cases += [(problem, state(form), True) for form in forms for state in STATED]
        cases += [(problem, said, True) for said in FREELY[label]]
        cases += [(problem, STATED[i % len(STATED)](form), False) for i, form in enumerate([*others, *HEDGES])]
        cases += [
            (problem, f"answer: {forms[0]}\nanswer: {others[0]}", False),
            (problem, f"{label} is what I doubt", False),
        ]
        cases += [(problem, said, False) for other in FREELY if other != label for said in FREELY[other]]
        cases += [(problem, f"answer: {label}{tail}", False) for tail in ("_NOT", "LY", "?!", " ... or is it?", " not")]
    return cases


# -------------------------------------------------------------------------------------------------------- star graphs

JOINS: list[Callable[[list[int]], str]] = [
    lambda p: ", ".join(map(str, p)),
    lambda p: ",".join(map(str, p)),
    lambda p: " -> ".join(map(str, p)),
    lambda p: "→".join(map(str, p)),
    lambda p: f"[{', '.join(map(str, p))}]",
    lambda p: f"({','.join(map(str, p))})",
    lambda p: f"`{' => '.join(map(str, p))}`",
    lambda p: ", ".join(map(str, p)) + ".",
    lambda p: f"the path of {len(p) - 1} edges is {', '.join(map(str, p))}",
    lambda p: f"**{', '.join(map(str, p))}**",
    lambda p: " ".join(map(str, p)),
    lambda p: " > ".join(map(str, p)),
]
FRAMES: list[Callable[[str], str]] = [
    lambda s: f"answer: {s}",
    lambda s: f"7 leads to 8, and 8 to 9: a dead end.\n**Answer:** {s}",
    lambda s: f"answer: 7, 8, 9\nno: that misses the goal. Answer:\n{s}\n(checked)",
    lambda s: f"Going back from the goal, 19 < 18 < 7.\n{s}",
    lambda s: f"<think>answer: 7, 8, 9, 10? No.</think>{s}",
]


def star_graph() -> list[Case]:
    problem = Problem("p", {"edges": [[8, 9], [7, 18], [18, 19], [7, 8], [9, 10], [19, 21]], "path": [7, 18, 19, 21]})
    path = [7, 18, 19, 21]
    wrong = [
        [7, 8, 9, 10],
        [18, 19, 21],
        [7, 18, 19],
        [7, 19, 21],
        [21, 19, 18, 7],
        [7, 18, 19, 21, 7],
        [7, 18, 19, 21, 21],
        [7, 8, 9, 10, 7, 18, 19, 21],
        [77, 18, 19, 21],
        [7],
        [7, 18, 18, 19, 21],
        [7, 18, 19, 20],
        [8, 18, 19, 21],
    ]
    cases: list[Case] = [(problem, frame(join(path)), True) for join in JOINS for frame in FRAMES]
    cases += [
        (problem, frame(join(path)), True) for join in JOINS for frame in (lambda s: s, lambda s: f"Path:\n\n{s}\n")
    ]
    cases += [(problem, f"answer: {join(path)} <eos>", True) for join in JOINS]
    cases += [(problem, f"answer: 7, 8, 9, 10\nanswer: {join(path)}", True) for join in JOINS[:4]]
    for i, p in enumerate(wrong * 6):
        cases.append((problem, FRAMES[i % len(FRAMES)](JOINS[i % len(JOINS)](p)), False))
    cases += [
        (problem, f"answer: {a}, or {b}", False) for a in ("7, 18, 19, 21", "8, 18, 19, 21") for b in ("7, 8, 9, 10",)
    ]
    cases += [
        (problem, said, False)
        for said in [
            "",
            "answer:",
            "7, 18, 19, 21\nI am not sure",
            "answer: 7,18,19,21\nanswer: none",
            "answer: 7181921",
            "answer: seven, eighteen, nineteen, twenty-one",
            "answer: the path from 7 to 21",
            "answer: 7, ..., 21",
            "answer: 7-21",
            "answer: 7, 18, 19, 2 1",
            "answer: 7.18.19.21",
            "answer: -7, 18, 19, 21",
            "answer: 7, 18, 19, 210",
            "answer: 07, 18, 19, 21",
            "answer: 7, 18, 19, 21, 8, 9",
            "answer: edges 7>18, 18>19, 19>21",
            "answer: ٧, ١٨",
            "answer: 7 or 18 or 19 or 21",
            "answer: {7: 18, 19: 21}",
            "answer: 7, 18; 19, 21",
        ]
    ]
    return cases


# ------------------------------------------------------------------------------------------------------------- verdicts

SPECS = {
    "math": f"math:{DATA / 'polaris.jsonl'}",
    "physics": f"physics:{DATA / 'ugphysics'}",
    "hover": f"hover:{DATA / 'hover'}",
    "star_graph": "star_graph:2x3",
}
CASES = {"math": math, "physics": physics, "hover": hover, "star_graph": star_graph}
# What the verifier decides otherwise than a person would.
KNOWN: dict[str, set[tuple[str, str]]] = {
    "math": {
        ("(-1,3)", "\\[\n\\boxed{ \\{-1, 3\\} }\n\\]"),  # math-verify takes the interval for the set of its ends
        ("(-1,3)", "\\( \\boxed {\\displaystyle -1 < x < 3} \\)"),
        ("\\infty", "\\boxed{\\text{infinity}.}"),
        ("\\text{B}", "\\boxed{$\\text{B) 23}$} That is it. {"),
    },
    "physics": {("\\hbar \\omega", "Thus the result is $\\boxed{\\frac{h}{2\\pi}\\omega}$.")},
    "hover": {("SUPPORTED", "answer: SUPPORTED (true)")},  # words beside the label invite hedging
    "star_graph": set(),
}


@pytest.mark.parametrize("name", CASES)
def test_of_200_answers_only_the_known_ones_are_misjudged(name: str) -> None:
    task, cases = make_task(SPECS[name], seed=0), CASES[name]()
    misjudged: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    said = verdicts(task, [(problem, response) for problem, response, _ in cases])
    for (problem, response, right), verdict in zip(cases, said, strict=True):
        assert 0 < len(verdict.feedback) < 2000
        if verdict.reward != right:
            expected = (
                problem.data.get("answer") or problem.data.get("label") or problem.data.get("answers", [[""]])[0][0]
            )
            misjudged[right].add((expected, response))
    n = {right: sum(case[2] == right for case in cases) for right in (True, False)}
    print(f"\n{name}: {len(misjudged[False])} of {n[False]} wrong ones accepted, ", end="")
    print(f"{len(misjudged[True])} of {n[True]} right ones refused")
    assert min(n.values()) >= 100
    assert misjudged[True] | misjudged[False] == KNOWN[name], misjudged
