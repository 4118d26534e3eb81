"""math: the published format, what stands in the box and nothing else counts, feedback that says what was read."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.config import GLYPH, Config, check, to_toml
from fst_fast.errors import UserError
from fst_fast.records import Problem, Verdict
from fst_fast.tasks import make_task
from fst_fast.tasks.math_check import MathChecker
from fst_fast.tasks.published import PublishedOptions, boxed
from fst_fast.tasks.task import Task

POLARIS = Path(__file__).parents[1] / "data" / "polaris.jsonl"
ROWS = [json.loads(line) for line in POLARIS.read_text().splitlines()]


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(f"math:{POLARIS}", seed=0)


def problem(answer: str) -> Problem:
    return Problem("p", {"problem": "?", "answer": answer})


def test_every_row_is_posed_as_it_is_and_a_tenth_is_held_out(task: Task) -> None:
    everything = [*task.train, *task.validation]
    assert (len(task.train), len(task.validation)) == (11, 1)
    assert {p.data["problem"] for p in everything} == {row["problem"] for row in ROWS}
    assert len({p.id for p in everything}) == 12
    system, user = task.messages("think.", everything[0])
    assert (system["content"], user["content"]) == ("think.", everything[0].data["problem"])
    assert "boxed" in task.seed_prompt
    for p in everything:
        assert task.verify(p, f"So it is \\boxed{{{p.data['answer']}}}.").reward == 1


def test_the_same_rows_come_from_parquet(tmp_path: Path, task: Task) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    other = make_task(f"math:{tmp_path / 'train.parquet'}", seed=0)
    assert sorted(p.data["problem"] for p in [*other.train, *other.validation]) == sorted(r["problem"] for r in ROWS)


def test_the_agnostic_seed_prompt_says_nothing_of_the_task() -> None:
    agnostic = make_task(f"math:{POLARIS}", seed=0, data=PublishedOptions(prompt="agnostic"))
    assert agnostic.seed_prompt == make_task("star_graph:2x2", seed=0).seed_prompt == "Solve the problem."


def test_out_of_distribution_is_another_source_held_out_whole() -> None:
    ood = make_task(f"math-ood:{POLARIS}", seed=0)
    assert (len(ood.train), len(ood.validation)) == (0, 12)
    assert ood.validation[0].id.startswith("math-ood:")


@pytest.mark.parametrize(
    ("answer", "response", "reward", "said"),
    [
        ("\\frac{3}{4}", "\\boxed{0.75}", 1, "correct."),
        ("102", "first \\boxed{100}, no: $\\boxed{102}$", 1, "correct."),
        ("102", "\\boxed{102}, or rather \\boxed{100}", 0, r"the answer \boxed{100} was read as 100, which is wrong."),
        ("102", "It is 102.", 0, r"there is no closed \boxed{} in the response"),
        ("102", "\\boxed{102", 0, r"there is no closed \boxed{}"),
        ("102", "\\boxed{}", 0, r"\boxed{} holds no mathematics"),
        ("102", "\\boxed{1, 2, 3, 102}", 0, "which is wrong"),
        ("45", "\\boxed{\\sum_{k=1}^{9} k}", 0, r"is left unevaluated (\sum)"),
        ("102", "\\boxed{" + "1+" * 2000 + "1}", 0, "the box holds 4001 characters"),
        ("\\text{B}", "\\boxed{\\textbf{B}}", 1, "correct."),
        ("c_v \\propto T", "\\boxed{c_{v}\\propto T}", 1, "correct."),
        ("\\frac{1}{23}", "\\boxed{\\frac{12}{3}}", 0, "was read as 4"),
        ("12", "\\boxed{1 2}", 0, "which is wrong"),
        ("12", "\\boxed{one could think of 12}", 0, "expected: 12"),
        ("\\text{B}", "\\boxed{\\text{A}}", 0, "which is wrong"),
    ],
)  # fmt: skip
def test_only_the_last_box_counts_and_feedback_says_what_was_read(
    task: Task, answer: str, response: str, reward: float, said: str
) -> None:
    verdict = task.verify(problem(answer), response)
    assert verdict.reward == reward
    assert said in verdict.feedback
    assert (f"expected: {answer}" in verdict.feedback) == (not reward)
    assert set(verdict.parts) == {"boxed", "read", "right"}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{a}", "a"), ("\\boxed{\\frac{1}{2}} \\boxed{", "\\frac{1}{2}"), ("\\fbox {x}", "x"),
        ("}}\\boxed{b}", "b"), ("\\\\boxed{b}", "b"), ("\\\\\\boxed{b}", "b"),
        ("\\boxed{a\\}b}", "a\\}b"), ("\\boxed", None), ("boxed{a}", None), ("\\boxed{" * 20_000, None),
        ("{" * 40_000 + "\\boxed{c}", "c"), ("\\boxed{a\\boxed{b}}", "a\\boxed{b}"),
    ],
)  # fmt: skip
def test_the_box_is_found_between_any_braces(response: str, answer: str | None) -> None:
    assert boxed(response) == answer


@given(st.text("\\boxedf{}1 "))
def test_a_box_is_balanced(response: str) -> None:
    content = boxed(response + "\\boxed{1}")
    assert content is not None
    assert boxed(f"\\boxed{{{content}}}") == content


BOMBS = [
    "9^{9^{9^{9}}}", "100000000!", "\\frac{" * 300 + "1" + "}{1}" * 300, "(" * 900, "9" * 1900, "1" + "+1" * 900,
    "\x00", "\ud800", "\\" * 998, "a_{" * 300, "$" * 1000, "٣", "\\input{/etc/passwd}", "__import__('os')",
]  # fmt: skip


def test_bombs_are_wrong_in_bounded_time_and_the_checker_works_afterwards(task: Task) -> None:
    task._checker.seconds = 1.0  # type: ignore[attr-defined]
    for bomb in BOMBS:
        verdict = task.verify(problem("7"), f"\\boxed{{{bomb}}}")
        assert verdict.reward == 0, bomb
        assert len(verdict.feedback) < 900
    assert task.verify(problem("7"), "\\boxed{7}") == Verdict(1.0, "correct.", {"boxed": 1, "read": 1, "right": 1})


def test_what_was_read_is_told_and_cut() -> None:
    checker = MathChecker()
    assert checker.compare("7", "\\boxed{\\frac{6}{8}}") == ("wrong", "3/4")
    outcome, read = checker.compare("7", "\\boxed{" + "9" * 1000 + "}")
    assert outcome == "wrong"
    assert read == "9" * 200


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "p"}], r"row 1: there is no field 'answer', only \['problem'\]"),
        ([{"problem": "p", "answer": "1"}, {"problem": "", "answer": "1"}], "row 2: field 'problem' is ''; it must be"),
        ([{"problem": "p", "answer": ["1"]}], "field 'answer' is"),
        ([{"problem": "p", "answer": "1"}], "one distinct problem cannot be split"),
        ([], "there are no problems"),
    ],
)
def test_rows_that_are_not_in_the_format_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message) as e:
        make_task(f"math:{path}", seed=0)
    assert "\n" not in str(e.value)


def test_a_source_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"no such file"):
        make_task("math:absent.jsonl", seed=0)


def test_the_settings_go_through_the_config(tmp_path: Path) -> None:
    from dataclasses import replace

    config = replace(GLYPH, data=PublishedOptions(prompt="agnostic"), run_dir=str(tmp_path))
    assert 'prompt = "agnostic"' in to_toml(config)
    with pytest.raises(UserError, match=r"data\.prompt"):
        check(replace(Config(), data=PublishedOptions(prompt="other")))  # type: ignore[arg-type]
