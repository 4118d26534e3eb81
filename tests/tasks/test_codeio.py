"""codeio: the published format, programs kept together, inputs verified by running them, what differs said in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.tasks import make_task
from fst_fast.tasks.published import PublishedOptions
from fst_fast.tasks.task import Task, verdicts

DATA = Path(__file__).parents[1] / "data/codeio.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
Write = Callable[..., str]


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(f"codeio:{DATA}", seed=0, data=PublishedOptions(seconds=1))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows, each the first one with some fields changed, and returns the file's path."""

    def write(*changes: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({**ROWS[0], **change}) for change in changes))
        return str(path)

    return write


def by_id(task: Task) -> dict[str, Problem]:
    return {p.id.rpartition("/")[2]: p for p in [*task.train, *task.validation]}


def test_every_example_asks_for_its_output_and_for_an_input(task: Task) -> None:
    problems = by_id(task)
    examples = sum(len(row["ios"]) for row in ROWS if row["category"] != "text")
    assert len(problems) == 2 * examples == 66
    assert {p.slice for p in problems.values()} == {"output", "input"}
    for p in problems.values():
        assert task.verify(p, json.dumps({p.slice: p.data[p.slice]})).reward == 1, p.id
    system, user = task.messages("think.", problems["1.0.output"])
    assert system == {"role": "system", "content": "think."}
    for part in (ROWS[0]["problem_description"], ROWS[0]["io_requirements"], ROWS[0]["refcode"].strip()):
        assert part in user["content"]
    assert '{"xs": [1, 2, 3, 4], "k": 2}' in user["content"]
    assert "[3, 5, 7]" not in user["content"]
    assert '{"output": ...}' in user["content"]
    asked = task.messages("", problems["1.0.input"])[1]["content"]
    assert "[3, 5, 7]" in asked
    assert "[1, 2, 3, 4]" not in asked


def test_a_program_stands_on_one_side_of_the_split(task: Task) -> None:
    sides = [{p.data["program"] for p in side} for side in (task.train, task.validation)]
    assert [len(side) for side in sides] == [10, 1]
    assert not sides[0] & sides[1]
    again = make_task(f"codeio:{DATA}", seed=0)
    assert [p.id for p in again.train] == [p.id for p in task.train]


def test_one_category_is_left_out_and_is_what_is_unseen(task: Task) -> None:
    unseen = make_task(f"codeio-ood:{DATA}", seed=0)
    assert (len(unseen.train), len(unseen.validation)) == (0, 6)
    assert not {p.data["program"] for p in unseen.validation} & {p.data["program"] for p in by_id(task).values()}
    logic = PublishedOptions(category="logic")
    assert len(make_task(f"codeio-ood:{DATA}", seed=0, data=logic).validation) == 18
    assert len(by_id(make_task(f"codeio:{DATA}", seed=0, data=logic))) == 54


def test_feedback_says_what_differs_where(task: Task) -> None:
    problems = by_id(task)

    def said(name: str, answer: str) -> str:
        verdict = task.verify(problems[name], answer)
        assert verdict.reward == 0
        return verdict.feedback

    assert said("5.0.output", '{"output": {"mean": 3.0, "max": 5, "min": 1.5, "n": 2}}') == (
        'the output is wrong: 2 where 3 is expected at ["n"]. '
        'expected: {"output": {"mean": 3.0, "max": 5.0, "min": 1.5, "n": 3}}'
    )
    assert said("1.0.input", '{"input": {"xs": [3, 0, 5], "k": 2}}') == (
        'for the input {"xs": [3, 0, 5], "k": 2} the program returns another output: 2 items where 3 are expected: '
        '[3, 5]. the output should be [3, 5, 7], as it is for {"xs": [1, 2, 3, 4], "k": 2}.'
    )
    assert "ends with an error (ZeroDivisionError: division by zero)" in said("5.0.input", '{"input": {"xs": []}}')
    assert "the input is 6, not an object with the names" in said("9.0.input", '{"input": 6}')
    assert "there is no JSON object with the key" in said("9.0.input", "6")
    assert task.verify(problems["9.0.input"], "6").parts == {"form": 0, "right": 0}
    assert task.verify(problems["9.0.input"], '{"input": {"n": 7}}').parts == {"form": 1, "right": 0}


def test_an_input_that_attacks_through_the_program_ends_in_an_error(task: Task) -> None:
    calculator = by_id(task)["7.0.input"]  # it evaluates its input
    for expression, reason in {
        "open('/etc/passwd').read()": "PermissionError",
        "__import__('os').kill(__import__('os').getppid(), 9)": "PermissionError",
        "__import__('os')._exit(0)": "ended itself without a result",
        "[0 for _ in iter(int, 1)]": "no result within 1 seconds",
    }.items():
        verdict = task.verify(calculator, json.dumps({"input": {"expression": expression}}))
        assert (verdict.reward, reason in verdict.feedback) == (0, True), verdict.feedback
    assert task.verify(calculator, '{"input": {"expression": "7 + 7"}}').reward == 1


def test_answers_are_verified_side_by_side_in_a_mixture_too(task: Task) -> None:
    mixture = make_task(f"codeio:{DATA}+glyph:A", seed=0)
    right = [(p, json.dumps({p.slice: p.data[p.slice]})) for p in by_id(task).values()]
    glyph = make_task("glyph:A", seed=0).train[0]
    answers = [*right[:5], (glyph, "?"), (right[0][0], "{}"), *right[5:9]]
    assert [v.reward for v in verdicts(mixture, answers)] == [1] * 5 + [0, 0] + [1] * 4
    assert verdicts(mixture, answers) == [mixture.verify(*answer) for answer in answers]


def test_examples_whose_program_does_something_else_here_are_left_out(write: Write) -> None:
    broken = {"refcode": "import no_such_module\ndef main_solution(xs, k): return 1"}
    forgetful = {"refcode": "def main_solution(xs, k): return [xs]"}
    slow = {"refcode": "def main_solution(xs, k):\n    while True: pass", "ios": ROWS[0]["ios"][:1]}
    with pytest.warns(UserWarning, match="6 of 10 examples are left out: .*in the first of them .*No module named"):
        task = make_task(f"codeio:{write({}, broken, forgetful, slow)}", seed=0, data=PublishedOptions(seconds=0.5))
    assert {p.id.rpartition("/")[2][0] for p in [*task.train, *task.validation]} == {"1", "4"}


def test_only_as_many_programs_are_read_as_asked_for() -> None:
    task = make_task(f"codeio:{DATA}", seed=0, data=PublishedOptions(programs=4, category=""))
    assert {p.id.rpartition("/")[2].partition(".")[0] for p in [*task.train, *task.validation]} <= {"1", "2", "3", "5"}


@pytest.mark.filterwarnings("ignore:codeio")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"refcode": ""}, {}, r"rows\.jsonl, row 1: field 'refcode' is ''; it must be of type str"),
        ({"funcname": None}, {}, "row 1: field 'funcname' is None"),
        ({"ios": {}}, {}, "row 1: field 'ios' is {}; it must be of type list"),
        ({"ios": [3]}, {}, r"row 1: field 'ios' is \[3\]; it must list objects with 'input' and 'output'"),
        ({"ios": [{"input": {}}]}, {}, "it must list objects with 'input' and 'output'"),
        ({"ios": []}, {}, "there is no program with an example"),
        ({"turn_1": "x"}, {}, "these are conversations, without the programs; use hkust-nlp/.*-Raw"),
        ({"refcode": "x = 1"}, {}, "there is no example whose program gives its output here; the first: .*KeyError"),
        ({}, {"category": "logic"}, "data.category: no program of .* is 'logic'; there is: algorithms"),
        ({}, {}, "one distinct problem cannot be split"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_sentence(
    write: Write, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    source = f"codeio:{write(change)}"
    with pytest.raises(UserError, match=message) as e:
        make_task(source, seed=0, data=PublishedOptions(**options))
    assert "\n" not in str(e.value)


def test_nothing_is_unseen_where_there_is_one_category(write: Write) -> None:
    assert len(by_id(make_task(f"codeio-ood:{write({}, {'category': None})}", seed=0))) == 6
    source = f"codeio-ood:{write({}, {})}"
    with pytest.raises(UserError, match="no two categories"):
        make_task(source, seed=0)
