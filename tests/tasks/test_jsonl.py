"""Problems from files: the split, the verifiers, and an error that says what is wrong on which line."""

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fst_fast import tasks
from fst_fast.errors import UserError
from fst_fast.records import Verdict
from fst_fast.tasks import make_task
from fst_fast.tasks.jsonl import JsonlOptions, JsonlTask
from fst_fast.tasks.math_check import MathChecker
from fst_fast.tasks.mixture import Mixture
from fst_fast.tasks.verifiers import Exact, Math, Numeric, Regex, Verifier, final_answer, make_verifier

Write = Callable[..., str]
HOSTILE = [
    "", "\x00", "\ud800", "answer:" * 10**5, "9" * 10**6, "1," * 10**5, "\n" * 10**6, "(" * 10**5, "\\frac{" * 10**4,
    "$" * 10**5, "٣", "1e999999999", "nan", "-inf", "\\boxed{", "-" * 10**5, "𝟟",
]  # fmt: skip
QUICK = (Exact("answer"), Numeric("answer", 1e-6), Regex("answer"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows (or raw lines) to a file and returns its path."""

    def write(*rows: dict[str, Any] | str | bytes, name: str = "data.jsonl") -> str:
        lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines))
        return str(tmp_path / name)

    return write


def rows(n: int) -> list[dict[str, Any]]:
    return [
        {"problem": f"{i} + 1?", "answer": i + 1, "name": f"n{i}", "kind": "odd" if i % 2 else "even"} for i in range(n)
    ]


def test_problems_keep_the_files_rows_ids_and_slices(write: Write) -> None:
    path = write(*rows(20))
    task = JsonlTask(path, JsonlOptions(id_field="name", slice_field="kind", seed_prompt="add."))
    assert (task.name, task.seed_prompt, task.phrasebook) == (f"jsonl:{path}", "add.", {})
    everything = {p.id: p for p in [*task.train, *task.validation]}
    assert len(everything) == 20
    assert everything[f"jsonl:{path}/n3"].slice == "odd"
    assert task.messages("hi.", everything[f"jsonl:{path}/n3"]) == [
        {"role": "system", "content": "hi."},
        {"role": "user", "content": "3 + 1?"},
    ]
    assert task.verify(everything[f"jsonl:{path}/n3"], "4").reward == 1


def test_the_split_is_disjoint_and_as_large_as_asked(write: Write) -> None:
    path = write(*rows(100))

    def validation(fraction: float = 0.1) -> list[str]:
        task = JsonlTask(path, JsonlOptions(validation_fraction=fraction))
        ids = [p.id for p in [*task.train, *task.validation]]
        assert len(set(ids)) == len(ids) == 100
        return [p.id for p in task.validation]

    assert [len(validation(f)) for f in (0.001, 0.1, 0.25, 0.999)] == [1, 10, 25, 99]


def test_the_same_problems_are_held_out_wherever_the_file_lies_and_in_every_run(write: Write) -> None:
    """Or a run that goes on from another's weights would be evaluated on what that one was trained on."""

    def held_out(*lines: dict[str, Any], name: str = "data.jsonl") -> set[str]:
        return {p.data["problem"] for p in JsonlTask(write(*lines, name=name), JsonlOptions()).validation}

    first = held_out(*rows(100))
    assert held_out(*reversed(rows(100)), name="other.jsonl") == first
    assert len(held_out(*rows(110)) & first) >= 9  # most of them, when more are written
    specs = [f"jsonl:{write(*rows(100))}", f"jsonl:{Path(write(*rows(100))).parent}/./data.jsonl"]
    tasks = [make_task(spec, seed=seed) for spec in specs for seed in (0, 1)]
    assert {tuple(p.data["problem"] for p in task.validation) for task in tasks} == {
        tuple(p.data["problem"] for p in tasks[0].validation)
    }


def test_a_file_that_is_only_evaluated_on_is_used_whole_but_for_what_is_trained_on(write: Write) -> None:
    stream = write(*rows(20), name="stream.jsonl")
    options = JsonlOptions(validation_path=write(*rows(25)[20:], name="held out.jsonl"))
    trained = [make_task(f"jsonl:{stream}", seed=0, jsonl=options)]

    def evaluated(*lines: dict[str, Any]) -> list[str]:
        task = make_task(f"jsonl:{write(*lines)}", seed=0, jsonl=options, trained=trained)
        assert not task.train
        return sorted(p.data["problem"] for p in task.validation)

    assert evaluated(*rows(100)[90:]) == [f"{i} + 1?" for i in range(90, 100)]
    assert evaluated(*rows(22)[10:]) == ["20 + 1?", "21 + 1?"]
    assert evaluated(*rows(21)[20:]) == ["20 + 1?"]
    with pytest.raises(UserError, match=r"data\.jsonl: the run trains on all of its problems"):
        evaluated(*rows(20))
    assert make_task(trained[0].name, seed=0, jsonl=options, trained=trained) is trained[0]
    mixture = make_task(f"jsonl:{write(*rows(30)[20:])}+glyph:A", seed=0, jsonl=options, trained=trained)
    assert isinstance(mixture, Mixture)
    assert len(mixture.parts[0].validation) == 10


@pytest.mark.parametrize("apart", [False, True])
def test_held_out_problems_come_in_an_order_of_no_meaning(apart: bool, write: Write) -> None:
    """The first of them are evaluated on, and a file may be sorted."""
    posed = [{"problem": f"{i} + {random.random()}?", "answer": i} for i in range(1000)]
    held_out = {"validation_path": write(*posed[500:], name="v.jsonl")} if apart else {"validation_fraction": 0.5}
    answers = [p.data["answer"] for p in JsonlTask(write(*posed[:500]), JsonlOptions(**held_out)).validation]
    assert answers != sorted(answers)
    late = [a > sorted(answers)[len(answers) // 2] for a in answers[: len(answers) // 2]]
    assert 0.35 < sum(late) / len(late) < 0.65  # 4.7 standard deviations


def test_problems_of_equal_text_stay_on_one_side_of_the_split(write: Write) -> None:
    task = JsonlTask(write(*rows(10), *rows(10), *rows(10)), JsonlOptions(validation_fraction=0.5))
    assert len(task.train) == len(task.validation) == 15
    assert not {p.data["problem"] for p in task.train} & {p.data["problem"] for p in task.validation}


def test_a_validation_file_is_used_whole_and_must_not_overlap(write: Write) -> None:
    train, held_out = write(*rows(10)), write(*rows(15)[10:], name="v.jsonl")
    task = JsonlTask(train, JsonlOptions(validation_path=held_out))
    assert (len(task.train), len(task.validation)) == (10, 5)
    assert len({p.id for p in [*task.train, *task.validation]}) == 15
    with pytest.raises(UserError, match=r"v\.jsonl: the problem '9 \+ 1\?' is in .*data\.jsonl too; remove it"):
        JsonlTask(train, JsonlOptions(validation_path=write(*rows(15)[9:], name="v.jsonl")))


def test_blank_lines_a_bom_and_windows_line_ends_are_fine_and_lines_keep_their_numbers(write: Write) -> None:
    lines = [
        b"\xef\xbb\xbf" + json.dumps(rows(1)[0]).encode() + b"\r",
        b"",
        b"  ",
        json.dumps(rows(2)[1]).encode(),
        b"",
    ]
    path = write(*lines)
    task = JsonlTask(path, JsonlOptions())
    assert {p.id for p in [*task.train, *task.validation]} == {f"jsonl:{path}/1", f"jsonl:{path}/4"}


def test_unicode_line_separators_inside_a_text_do_not_split_it(write: Write) -> None:
    texts = ["one\u2028two", "three\x85four", "five\x0csix"]
    path = write(*(json.dumps({"problem": t, "answer": t}, ensure_ascii=False) for t in texts[:2]),
                 json.dumps({"problem": texts[2], "answer": "5"}))  # fmt: skip
    task = JsonlTask(path, JsonlOptions())
    assert {p.data["problem"] for p in [*task.train, *task.validation]} == set(texts)


GOOD = {"problem": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, r"data\.jsonl: the file has no problems; give one JSON object a line"),
        ([" ", ""], {}, "no problems"),
        ([GOOD], {}, "one distinct problem cannot be split into training and validation; give more"),
        ([GOOD, "{'problem': 1}"], {}, r"line 2: not JSON \(Expecting property name"),
        ([GOOD, '{"problem": "p"'], {}, "line 2: not JSON"),
        ([GOOD, "1" * 5000], {}, "line 2: not JSON"),
        ([GOOD, "[" * 100_000], {}, "line 2: not JSON"),
        ([GOOD, b'{"problem": "caf\xe9"}'], {}, "line 2: not UTF-8 at byte 17; save the file as UTF-8"),
        ([GOOD, "[1, 2]"], {}, r"^[^(]*line 2: \[1, 2\] is a list, not an object; write it as"),
        (["null"], {}, "line 1: None is a NoneType, not an object"),
        ([GOOD, {"question": "?"}], {}, r"there is no field 'problem', only \['question'\]; .*jsonl\.problem_field"),
        ([{"k" * 10_000: 1}], {}, r"there is no field 'problem', only \['kkkk.*…\]; add it"),
        ([{"problem": "p", "k" * 10_000: 1}], {}, r"there is no field 'answer', only \['kkkk.*…\]; add it"),
        ([{"problem": "p"}], {}, r"line 1: there is no field 'answer', only \['problem'\]; .*jsonl\.answer_field"),
        ([{"problem": 3, "answer": "a"}], {}, "line 1: field 'problem' is 3; it must be a text"),
        ([{"problem": " ", "answer": "a"}], {}, "field 'problem' is ' '; it must be a text"),
        ([{"problem": "p", "answer": None}], {}, "field 'answer' is None; it must be a text or a number"),
        ([{"problem": "p", "answer": ["a"]}], {}, "field 'answer' is"),
        ([{"problem": "p", "answer": ""}], {}, "field 'answer' is ''"),
        ([GOOD], {"id_field": "id"}, r"line 1: there is no field 'id', .*jsonl\.id_field"),
        ([{**GOOD, "id": 7}] * 2, {"id_field": "id"}, "line 2: the id '7' stands on line 1 already; make"),
        ([{**GOOD, "id": {}}], {"id_field": "id"}, "field 'id' is {}; it must be a text or a whole number"),
        ([GOOD], {"slice_field": "kind"}, r"there is no field 'kind', .*jsonl\.slice_field"),
        ([GOOD], {"verifier": "exakt"}, r"jsonl\.verifier: 'exakt' is not known; choose exact, numeric,"),
        ([GOOD], {"verifier": "python:os"}, "must have the form python:MODULE:FUNCTION"),
        ([GOOD], {"verifier": "python:no_such_module:f"}, "cannot be imported: .*No module named 'no_such_module'"),
        ([GOOD], {"verifier": "python:os:no_such_function"}, "cannot be imported: .*no_such_function"),
        ([GOOD], {"verifier": "python:os:sep"}, "is a str, not a function"),
        ([GOOD], {"verifier": "python:asyncio:sleep"}, "is a coroutine function, not a function"),
        ([GOOD], {"verifier": "python:..os:sep"}, "cannot be imported: TypeError"),
        ([GOOD], {"verifier": "python:os.path:normcase"}, r"cannot be called .*response \(.*; it is normcase\(s\)"),
        ([GOOD], {"verifier": "numeric"}, "line 1: field 'answer' is 'a'; the verifier numeric needs a finite number"),
        ([{"problem": "p", "answer": "1e999"}], {"verifier": "numeric"}, "needs a finite number"),
        (["{\"problem\": \"p\", \"answer\": NaN}"], {"verifier": "numeric"}, "needs a finite number"),
        ([{"problem": "p", "answer": "(a"}], {"verifier": "regex"}, "field 'answer' is no regular expression"),
        ([GOOD], {"validation_fraction": 0.0}, r"jsonl\.validation_fraction: 0\.0 must lie between 0 and 1"),
        ([GOOD], {"validation_fraction": float("nan")}, "validation_fraction: nan"),
        ([GOOD], {"tolerance": -1.0}, r"jsonl\.tolerance: -1\.0 must not be negative"),
        ([GOOD], {"validation_path": "/no/such.jsonl"}, r"cannot read the file \(No such file"),
    ],
)  # fmt: skip
def test_a_bad_file_or_option_is_refused_in_one_sentence(
    write: Write, lines: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as e:
        JsonlTask(write(*lines), JsonlOptions(**options))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("spec", ["jsonl:", "jsonl:/no/such/file.jsonl", "jsonl:/"])
def test_a_file_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"jsonl:.*: cannot read the file \(.*\); give a file of JSON lines"):
        make_task(spec, seed=0, jsonl=JsonlOptions())


def test_options_are_validated_by_pydantic() -> None:
    adapter = TypeAdapter(JsonlOptions)
    assert adapter.validate_python({"verifier": "math"}) == JsonlOptions(verifier="math")
    with pytest.raises(ValidationError):
        adapter.validate_python({"validation_fraction": "most"})


@pytest.mark.parametrize(
    ("response", "answer"),
    [("5", "5"), ("so it is\n 5 \n", "5"), ("x\nAnswer: 5\nbecause 6", "5"), ("**Answer**: 5", "5"),
     ("answer:\n\n5", "5"), ("answer: 4 no, answer: 5", "5"), ("", ""), ("answer:", ""), ("\n", ""),
     ("<think>\nanswer: 4?\n</think>\n5", "5"), ("<think>\nanswer: 5? or", ""), ("<think>\nmaybe it is 5", "")],
)  # fmt: skip
def test_the_final_answer_is_what_follows_answer_or_the_last_line(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("verifier", "answer", "right", "wrong"),
    [
        (Exact("answer"), "Paris", ["Paris", " Paris\n", "I think\nanswer: Paris"], ["paris", "in Paris", ""]),
        (Exact("answer"), "two\nlines", ["two\nlines"], ["two", "lines"]),
        (Exact("answer"), 5, ["5"], ["5.0", "55"]),
        (Numeric("answer", 1e-6), "1,234.5", ["it is 1,234.50.", "1.2345e3", "$1234.5"], ["1234", "1,234,5"]),
        (Numeric("answer", 1e-6), -3, ["-3", "−3", "so x = -3", "2\n-3.0"], ["3", "-3 or 4", "-3\nwith 7", ""]),
        (Numeric("answer", 0.01), 0, ["0", "0.009", ".001"], ["0.02"]),
        (Numeric("answer", 0.01), 1000, ["1009"], ["1011"]),
        (Regex("answer"), "^[Yy]es[.!]?$", ["yes", " Yes. "], ["yes, no", "no"]),
        (Regex("answer"), "b+", ["abbc"], ["ac"]),
    ],
)  # fmt: skip
def test_verifiers_tell_right_from_wrong(verifier: Verifier, answer: Any, right: list[str], wrong: list[str]) -> None:
    row = {"answer": answer}
    verifier.check(row)
    for response in right:
        assert verifier(row, response) == Verdict(1.0, "correct."), response
    for response in wrong:
        verdict = verifier(row, response)
        assert verdict.reward == 0, response
        assert str(answer) in verdict.feedback


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_and_never_raised_on(response: str) -> None:
    for verifier in QUICK:
        verdict = verifier({"answer": "7"}, response)
        assert verdict.reward == 0
        assert len(verdict.feedback) < 400


def test_a_pattern_is_looked_for_at_the_end_of_a_response() -> None:
    regex = Regex("answer")
    assert [regex({"answer": "a"}, "a" + n * "b").reward for n in (9_999, 10_000)] == [1, 0]


def test_a_pattern_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    regex, slow = Regex("answer"), {"answer": "^(a+)+$"}
    assert regex(slow, "aaa").reward == 1
    with monkeypatch.context() as hurry:
        hurry.setattr(Regex, "SECONDS", 0.2)
        verdict = regex(slow, "a" * 60 + "!")
    assert (verdict.reward, "it takes too long" in verdict.feedback) == (0, True)
    assert regex(slow, "aaa").reward == 1


def test_the_process_that_looks_for_a_pattern_ends_by_itself_when_its_time_is_up() -> None:
    """By CPU time, so that a busy machine changes no verdict, and also where nobody is left to end it."""
    script = Path(tasks.__file__).with_name("regex_serve.py")
    question = json.dumps([0.2, "^(a+)+$", "a" * 60 + "!"])
    with subprocess.Popen(
        [sys.executable, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as it:
        try:
            it.communicate(question + "\n", timeout=60)
        finally:
            it.kill()
    assert it.returncode == -signal.SIGPROF


@given(st.text())
def test_any_text_gets_a_verdict(response: str) -> None:
    for verifier in QUICK:
        assert verifier({"answer": "7"}, response).reward in (0.0, 1.0)


# -- math-verify --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def math() -> Math:
    return Math("answer")


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("\\frac{1}{2}", "so it is $0.5$", 1),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", 1),
        ("$\\frac{1}{2}$", "\\boxed{1/2}", 1),
        (42, "The answer is 42.", 1),
        ("x^2+2x+1", "$(x+1)^2$", 1),
        ("42", "\\boxed{43}", 0),
        ("42", "I do not know", 0),
        ("42", "<think>so 42?</think> I do not know", 0),
        ("42", "<think>43?</think> It is 42.", 1),
        ("42", "", 0),
    ],
)
def test_math_compares_values_not_strings(math: Math, answer: Any, response: str, reward: float) -> None:
    verdict = math({"answer": answer}, response)
    assert verdict.reward == reward
    assert (str(answer) in verdict.feedback) == (not reward)


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_math_never_raises_on_hostile_text(math: Math, response: str) -> None:
    assert math({"answer": "41"}, response).reward == 0


def test_math_survives_an_answer_that_hangs_and_works_afterwards() -> None:
    checker = MathChecker(seconds=2)
    assert checker.compare("7", "$7$")[0] == "right"
    assert checker.compare("7", "$9^{9^{9^{9}}}$")[0] == "stuck"
    assert checker.compare("7", "$7$")[0] == "right"


def test_math_works_from_any_thread(math: Math) -> None:
    outcomes: list[float] = []
    threads = [threading.Thread(target=lambda: outcomes.append(math({"answer": "7"}, "$7$").reward)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [1.0] * 4


def test_an_answer_without_mathematics_is_named_before_the_run_and_never_ends_it(math: Math, write: Write) -> None:
    for answer in ("$ $", "it is $x", "\\\\", "\\boxed{", "9" * 100_000):
        with pytest.raises(UserError, match=r"line 2: field 'answer' is .*math-verify finds no mathematics"):
            JsonlTask(write(GOOD, {"problem": "p", "answer": answer}), JsonlOptions(verifier="math"))
        assert math({"answer": answer}, "7").reward == 0


def test_usual_answers_wait_for_no_math_verify_before_the_run(math: Math, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ("7", r"\frac{1}{2}", "$x$", "$$x^2 + 1$$", r"$\frac{1}{2}$", r"\boxed{\frac{1}{2}}", r"\(x\)", r"\[x\]")
    assert {math.checker.compare(answer, "0")[0] for answer in answers} == {"wrong"}
    monkeypatch.setattr(math.checker, "compare", lambda *_: pytest.fail("it was asked"))
    for answer in answers:
        math.check({"answer": answer})


# -- the user's own function --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Verifier]:
    """Makes a verifier from the body of f(problem, response)."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def own(body: str) -> Verifier:
        name = f"own_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(
            f"from fst_fast.records import Verdict\ndef f(problem, response): {body}\n"
        )
        return make_verifier(f"python:{name}:f", "answer", 0)

    return own


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("return problem['extra'] == response", Verdict(1.0, "correct.")),
        ("return False", Verdict(0.0, "the reward is 0.")),
        ("return 0.25", Verdict(0.25, "the reward is 0.25.")),
        ("return 0.5, 'half of ' + response", Verdict(0.5, "half of yes")),
        ("return Verdict(1.0, 'good', {'a': 1.0})", Verdict(1.0, "good", {"a": 1.0})),
        ("import numpy; return numpy.float32(0.5)", Verdict(0.5, "the reward is 0.5.")),
        ("import numpy; return numpy.bool_(True), 'yes'", Verdict(1.0, "yes")),
        ("import torch; return Verdict(torch.tensor(0.5), '', {'a': torch.tensor(2)})", Verdict(0.5, "", {"a": 2.0})),
    ],
)
def test_a_users_function_may_return_a_reward_feedback_or_a_verdict(
    own: Callable[[str], Verifier], body: str, verdict: Verdict
) -> None:
    assert own(body)({"problem": "p", "extra": "yes"}, "yes") == verdict


@pytest.mark.parametrize(
    "body",
    [
        "return None",
        "return 'yes'",
        "return 1, 2",
        "return 2",
        "return -0.1",
        "return float('nan')",
        "return 10 ** 400",
        "return 1j",
        "import numpy; return numpy.ones(2)",
        "import torch; return torch.ones(3)",
        "return '0.5', 'well'",
        "return Verdict('1', 'x')",
        "return Verdict(1.0, b'x')",
        "return Verdict(1.0, None)",
        "return Verdict(1.0, 'x', None)",
        "return Verdict(1.0, 'x', {'a': {1}})",
        "return Verdict(1.0, 'x', {'a': float('nan')})",
        "return Verdict(1.0, 'x', {1: 1.0})",
    ],
)
def test_a_wrong_return_value_is_refused(own: Callable[[str], Verifier], body: str) -> None:
    with pytest.raises(UserError, match=r"jsonl\.verifier: python:own_.*:f returned .*; it must"):
        own(body)({"problem": "p"}, "yes")


def test_what_a_users_function_raises_is_told_with_its_line_the_problem_and_the_response(
    own: Callable[[str], Verifier],
) -> None:
    said = (
        r"python:own_.*:f raised KeyError \('absent'\) in .*own_.*\.py, line 2, .*'problem': 'what\?'.*'the response'"
    )
    with pytest.raises(UserError, match=said):
        own("return problem['absent']")({"problem": "what?"}, "the response")
    with pytest.raises(UserError, match=r"JSONDecodeError .*own_.*\.py, line 2"):  # not the library's line
        own("import json; return json.loads(response)")({"problem": "what?"}, "no JSON")
    with pytest.raises(UserError, match=r"raised SystemExit \(3\) in .*own_.*\.py, line 2"):
        own("raise SystemExit(3)")({"problem": "what?"}, "the response")
    with pytest.raises(UserError, match=r"raised ValueError \(two lines\) in"):
        own("raise ValueError('two\\nlines')")({"problem": "what?"}, "the response")
    with pytest.raises(UserError, match=r"cannot be imported: SyntaxError \(.*own_.*\.py, line 2\)"):
        own("return (")


def test_a_users_function_that_uses_its_row_up_gets_it_whole_the_next_time(own: Callable[[str], Verifier]) -> None:
    verify, row = own("return float(problem['cases'].pop() == response)"), {"problem": "p", "cases": ["a", "b"]}
    assert [verify(row, "b").reward for _ in range(3)] == [1, 1, 1]
    assert row["cases"] == ["a", "b"]


@pytest.mark.parametrize(
    "body", ["import os; os.chdir('/'); return 1.0", "import os; os.chdir('/'); return problem['absent']"]
)
def test_a_users_function_that_changes_the_directory_takes_the_run_nowhere(
    own: Callable[[str], Verifier], body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with suppress(UserError):
        own(body)({"problem": "p"}, "yes")
    assert Path.cwd() == tmp_path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(answer=st.text(min_size=1).filter(lambda s: s.strip()), problem=st.text(min_size=1).filter(lambda s: s.strip()))
def test_any_answer_in_a_file_is_right_for_itself(write: Write, answer: str, problem: str) -> None:
    path = write({"problem": problem, "answer": answer}, {"problem": problem + "!", "answer": answer})
    task = JsonlTask(path, JsonlOptions())
    for p in [*task.train, *task.validation]:
        assert task.verify(p, answer).reward == 1
