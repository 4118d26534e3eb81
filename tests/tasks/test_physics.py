"""physics: the published format, numbers in any unit of their kind, tolerance, expressions; unit and number bombs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.tasks import make_task
from fst_fast.tasks.published import PublishedOptions
from fst_fast.tasks.task import Task
from fst_fast.tasks.units import convert, half_digit, number, plain, unit_of

FOLDER = Path(__file__).parents[1] / "data" / "ugphysics"
ROWS = [json.loads(line) for path in sorted(FOLDER.glob("*/en.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(f"physics:{FOLDER}", seed=0)


def problem(answer: str, kind: str = "NV", unit: str = "") -> Problem:
    return Problem("p", {"problem": "?", "answers": ((answer, kind, unit),)})


def test_the_unseen_domain_is_left_out_and_is_what_ood_has(task: Task) -> None:
    ood = make_task(f"physics-ood:{FOLDER}", seed=0)
    for part, domain in ((task, {"Mechanics and Thermodynamics", "Electromagnetism"}), (ood, {"Modern Physics"})):
        ids = {p.id.partition("/Cl" if part is task else "/Qu")[2] for p in [*part.train, *part.validation]}
        assert len(ids) == sum(r["domain"] in domain for r in ROWS)
    seen = make_task(f"physics:{FOLDER}", seed=0, data=PublishedOptions(unseen="Electromagnetism"))
    assert len([*seen.train, *seen.validation]) == sum(r["domain"] != "Electromagnetism" for r in ROWS)


def test_the_first_held_out_problems_are_of_all_subjects(tmp_path: Path) -> None:
    """A run evaluates on 64 of them, and the files come one after the other."""
    subjects = ("ClassicalElectromagnetism", "ClassicalMechanics", "WaveOptics")
    for subject in subjects:
        (tmp_path / subject).mkdir()
        posed = [{**ROWS[0], "subject": subject, "index": i, "problem": f"{subject} {i}"} for i in range(800)]
        (tmp_path / subject / "en.jsonl").write_text("\n".join(map(json.dumps, posed)))
    first = make_task(f"physics:{tmp_path}", seed=0).validation[:64]
    found = Counter(p.data["problem"].split()[0] for p in first)
    assert all(found[subject] > 4 for subject in subjects)  # 21 on average; 4.5 standard deviations


def test_every_row_is_right_for_itself_and_its_units_are_told(task: Task) -> None:
    everything = {p.id.rpartition("Classical ")[2]: p for p in [*task.train, *task.validation]}
    for row in ROWS:
        if row["domain"] != "Modern Physics":
            p = everything[f"{row['subject'].removeprefix('Classical ')}/{row['index']}/EN"]
            assert p.data["problem"].startswith(row["problem"])
            assert task.verify(p, f"So it is {row['answers']}.").reward == 1, row
    two = everything["Mechanics/16/EN"].data
    assert two["problem"].endswith("Give 2 answers, separated by commas.\n\nUnit: $\\mathrm{km/s}$, $\\mathrm{min}$")
    assert two["answers"] == (("7.9", "NV", "\\mathrm{km/s}"), ("84", "NV", "\\mathrm{min}"))


@pytest.mark.parametrize(
    ("expected", "unit", "right", "wrong"),
    [
        (
            "19.6",
            "\\text{m}",
            ["19.6", "19.6 \\text{ m}", "h = 19.6\\,\\mathrm{m}", "1960 cm", "0.0196\\ \\text{km}", "19.55"],
            ["19.6 \\text{ s}", "19.6 km", "196", "-19.6", "19.9", "9.6", "19,6", "19.6 \\text{ m/s}", "\\text{m}"],
        ),
        (
            "4.05 \\times 10^{-7}",
            "\\text{C/m}",
            [
                "4.05e-7",
                "4.05×10⁻⁷",
                "\\lambda \\approx 4.05 \\cdot 10^{-7} \\text{ C/m}",
                "0.405 \\mathrm{\\mu C/m}",
                "405 \\text{ nC m}^{-1}",
            ],
            ["4.05 \\times 10^{7}", "4.05", "4.05 \\times 10^{-7} \\text{ C}"],
        ),
        (
            "45^\\circ",
            "",
            ["45", "45°", "45^{\\circ}", "\\theta = 45 \\text{ degrees}", "\\frac{\\pi}{4} \\text{ rad}"],
            ["45 \\text{ rad}", "54^\\circ", "\\frac{\\pi}{4}^\\circ"],
        ),
        (
            "\\frac{3}{4}",
            "",
            ["0.75", "3/4", "\\frac{6}{8}", "0.75 \\text{ (ratio)}", "75\\times 10^{-2}"],
            ["4/3", "0.75x", "7.5"],
        ),
        ("0.03", "", ["0.0286", "0.03", "3 \\times 10^{-2}"], ["0.02", "0.0349", "0.3"]),
        ("0", "\\text{J}", ["0", "0 \\text{ J}", "0.0"], ["0.001", "10^{-9}", "1e-200"]),
        (
            "-13.6",
            "\\text{eV}",
            ["−13.6 eV", "-2.18 \\times 10^{-18} \\text{ J}", "-0.0136\\,\\mathrm{keV}"],
            ["13.6", "-13.6 \\text{ V}"],
        ),
        (
            "540.4",
            "\\mathrm{MeV} / c",
            ["540 \\text{ MeV}/c", "0.540 \\mathrm{GeV}/c", "2.88 \\times 10^{-19} \\text{ kg m/s}"],
            ["540 \\text{ MeV}"],
        ),
        ("2", "\\text{energy}", ["2", "2 \\text{ energy}"], ["2 \\text{ J}", "3"]),
    ],
)
def test_a_number_counts_with_any_unit_of_its_kind(
    task: Task, expected: str, unit: str, right: list[str], wrong: list[str]
) -> None:
    for answer in right:
        verdict = task.verify(problem(expected, unit=unit), f"\\boxed{{{answer}}}")
        assert verdict.reward == 1, (answer, verdict)
    for answer in wrong:
        verdict = task.verify(problem(expected, unit=unit), f"\\boxed{{{answer}}}")
        assert verdict.reward == 0, answer
        assert f"expected: {expected}" in verdict.feedback


def test_feedback_says_what_was_read_and_which_part_failed(task: Task) -> None:
    p = problem("19.6", unit="\\text{m}")
    assert "was read as 19.6 with the unit \\text{ s}, which is not one of \\text{m}" in task.verify(
        p, "\\boxed{19.6 \\text{ s}}"
    ).feedback  # fmt: skip
    assert (
        "was read as 18 \\text{m}, which is not within 1.0% of the right value"
        in task.verify(p, "\\boxed{18}").feedback
    )
    assert "is no number that could be read" in task.verify(p, "\\boxed{x + y}").feedback
    assert "there is no closed \\boxed{}" in task.verify(p, "19.6 m").feedback
    two = Problem("p", {"problem": "?", "answers": (("7.9", "NV", "\\mathrm{km/s}"), ("84", "NV", ""))})
    assert task.verify(two, "\\boxed{7900 \\text{ m/s}, 84}").reward == 1
    assert "holds 1 answers, separated by commas, not 2" in task.verify(two, "\\boxed{7.9}").feedback
    assert task.verify(two, "\\boxed{84, 7.9}").reward == 0


def test_the_tolerance_is_a_setting() -> None:
    for tolerance, reward in ((0.1, 1), (0.001, 0)):
        task = make_task(f"physics:{FOLDER}", seed=0, data=PublishedOptions(tolerance=tolerance))
        assert task.verify(problem("200"), "\\boxed{210}").reward == reward


@pytest.mark.parametrize(
    ("kind", "expected", "right", "wrong"),
    [
        (
            "EX",
            "\\frac{v_{0}^{2} \\sin 2\\theta}{g}",
            ["\\frac{2 v_0^2 \\sin\\theta\\cos\\theta}{g}", "R = \\frac{v_0^2}{g}\\sin(2\\theta)"],
            ["\\frac{v_0^2 \\sin \\theta}{g}", "1"],
        ),
        (
            "EQ",
            "E = \\frac{1}{2} m v^{2}",
            ["\\frac{m v^2}{2}", "E = 0.5 \\boldsymbol{v}^2 m"],
            ["E = m v^2", "m = \\frac{1}{2} E v^2"],
        ),
        ("EX", "c_v \\propto T", ["c_v\\propto T"], ["c_v \\propto T^2", "0"]),
        (
            "EX",
            "\\pi^{-} \\rightarrow \\mu^{-}+\\bar{\\nu}_{\\mu}",
            ["\\pi^- \\rightarrow \\mu^- + \\bar{\\nu}_\\mu"],
            ["\\mu^{-}"],
        ),
        ("NV", "^{4} S_{3 / 2}", ["^{4}S_{3/2}"], ["2.0", "3/2"]),
        ("TF", "Yes", ["yes", "\\text{True}", "Yes."], ["no", "yes and no", "\\text{False}", ""]),
        ("MC", "B", ["\\text{B}", "(B)", "b", "\\text{Option B}"], ["A", "A, B", "AB", "not B"]),
    ],
)
def test_expressions_equations_and_choices(
    task: Task, kind: str, expected: str, right: list[str], wrong: list[str]
) -> None:
    for answer in right:
        verdict = task.verify(problem(expected, kind), f"\\boxed{{{answer}}}")
        assert verdict.reward == 1, (answer, verdict)
    for answer in wrong:
        assert task.verify(problem(expected, kind), f"\\boxed{{{answer}}}").reward == 0, answer


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("\\mathrm{MeV}/c^{2}", "megaelectron_volt / speed_of_light ** 2"),
        ("J/kg K", "joule / kelvin / kilogram"),
        ("(\\Omega\\mathrm{cm})^{-1}", "1 / centimeter / ohm"),
        ("\\text{Joules per Kelvin}", "joule / kelvin"),
        ("kΩ", "kiloohm"),
        ("m/s²", "meter / second ** 2"),
        ("\\mu C", "microcoulomb"),
        ("\\text{None}", ""),
        ("10**10**10 m", None),
        ("m^99999", None),
        ("((m^9)^9)^9", None),
        ("m" * 70, None),
        ("m/", None),
        ("m**", None),
        ("(m", None),
        ("^2", None),
        ("*" * 60, None),
        ("__import__('os')", None),
        ("", ""),
        ("\x00", None),
        ("m\ud800", None),
    ],
)
def test_units_are_read_and_bombs_are_none(text: str, unit: str | None) -> None:
    assert unit_of(text) == unit


def test_conversions_that_make_no_sense_are_none() -> None:
    assert convert(25, "degree_Celsius", "kelvin") == pytest.approx(298.15)
    assert convert(1, "kilogram", "meter") is None
    assert convert(1e300, "meter ** 99", "millimeter ** 99") in (None, float("inf"))


@pytest.mark.parametrize(
    ("text", "value", "half"),
    [("2.1×10⁷ Hz", 2.1e7, 5e5), ("10^{5}", 1e5, 0), ("-10^{-5}", -1e-5, 0), ("1,234.5", 1234.5, 0.05),
     (".5", 0.5, 0.05), ("7{,}000", 7000, 0), ("1e999", None, 0), ("9" * 400, None, 0), ("x", None, 0), ("3.", 3, 0)],
)  # fmt: skip
def test_numbers_are_read(text: str, value: float | None, half: float) -> None:
    found = number(plain(text))
    assert (found and found[0]) == value
    assert half_digit(plain(text)) == pytest.approx(half)


BOMBS = ["10^{10^{10^{10}}}", "9^{9^{9^{9}}} \\text{ m}", "1e99999999", "5" * 1900, "\\frac{" * 300, "(" * 1900,
         "," * 1900, "6 \\text{" + "m^{9}" * 300 + "}", "6 " + "kg " * 600, "\x00", "\ud800", "6 m^{10^{10}}", "٦",
         ]  # fmt: skip


def test_bombs_are_wrong_in_bounded_time(task: Task) -> None:
    task._checker.seconds = 1.0  # type: ignore[attr-defined]
    for bomb in BOMBS:
        verdict = task.verify(problem("6", unit="\\text{m}"), f"\\boxed{{{bomb}}}")
        assert verdict.reward == 0, bomb
        assert len(verdict.feedback) < 1000
    task._checker.seconds = 10.0  # type: ignore[attr-defined]
    assert task.verify(problem("6", unit="\\text{m}"), "\\boxed{\\frac{12}{2} \\text{ m}}").reward == 1


@given(st.text(" 0123456789.,-+eE×10^{}mskgN/\\µ°()"))
def test_any_text_is_a_number_and_a_unit_or_not(text: str) -> None:
    number(plain(text))
    unit_of(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_type": "XX"}, r"row 1: field 'answer_type' is 'XX'; it must be of NV, EX"),
        ({"unit": 3}, "field 'unit' is 3; it must be a text or null"),
        ({"answers": ""}, "field 'answers' is ''"),
        ({"index": "1"}, "field 'index' is '1'; it must be of type int"),
        ({"domain": "Modern Physics"}, r"no problem is outside the domain 'Modern Physics' \(data\.unseen\)"),
        ({}, "one distinct problem cannot be split"),
    ],
)
def test_rows_that_are_not_in_the_format_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "en.jsonl").write_text(json.dumps(ROWS[0] | change))
    with pytest.raises(UserError, match=message) as e:
        make_task(f"physics:{tmp_path / 'en.jsonl'}", seed=0)
    assert "\n" not in str(e.value)


def test_a_folder_without_subjects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no SUBJECT/en\.jsonl in the folder"):
        make_task(f"physics:{tmp_path}", seed=0)
