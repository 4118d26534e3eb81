"""More than 200 answers that try the verifier of codeio: right ones in odd formats, wrong ones in tempting formats.

What is right was decided by reading, not by the verifier: it is what a person who knows the program would accept.
`pytest -s` prints the rates that docs/tasks.md states.
"""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fst_fast.records import Problem
from fst_fast.tasks.codeio import CodeioTask
from fst_fast.tasks.published import PublishedOptions

DATA = Path(__file__).parents[1] / "data/codeio.jsonl"


def said(value: Any) -> str:
    return json.dumps({"output": value})


# Ways to say that the output is v, and ways to seem to.
RIGHT: dict[str, Callable[[Any], str]] = {
    "bare": said,
    "in prose": lambda v: f"Let me see {{step by step}}. It's {said(v)}. That is because of the loop.",
    "fenced": lambda v: f"So:\n\n```json\n{said(v)}\n```\n",
    "fenced without a language, indented": lambda v: f"```\n{json.dumps({'output': v}, indent=4)}\n```\nDone.",
    "as Python shows it": lambda v: "**Final answer:** `" + repr({"output": v}) + "`",
    "as Python, tuples for lists": lambda v: repr({"output": tupled(v)}),
    "in a box": lambda v: "$\\boxed{" + said(v).replace("{", "\\{").replace("}", "\\}") + "}$",
    "after another one that is taken back": lambda v: f'At first {{"output": "?"}}, but no: {said(v)}',
    "after the thinking": lambda v: f'<think>maybe {{"output": [0, 0]}} hm {{</think>\n{said(v)}',
    "with its reasoning": lambda v: json.dumps({"reasoning": 'xs[0] } {"output": 1', "output": v, "sure": True}),
    "raw characters": lambda v: json.dumps({"output": v}, ensure_ascii=False) + "\n\n\n",
    "before an example of the form": lambda v: f'{said(v)} (the form was {{"output": <the output>}})',
    "floats for whole numbers": lambda v: said(floated(v)),
    "keys in another order": lambda v: said(reordered(v)),
    "no space": lambda v: json.dumps({"output": v}, separators=(",", ":")),
}
WRONG: dict[str, Callable[[Any, Any], str]] = {
    "another value": lambda v, other: said(other),
    "right, then wrong": lambda v, other: f"{said(v)} no, wait: {said(other)}",
    "two under one key": lambda v, other: f'{{"output": {json.dumps(other)}, "output": {json.dumps(v)}}}',
    "as text": lambda v, other: said(json.dumps(v)),
    "in a list": lambda v, other: said([v]),
    "in itself": lambda v, other: said({"output": v}),
    "under another key": lambda v, other: json.dumps({"input": v}),
    "inside another object": lambda v, other: json.dumps({"answer": {"output": v}}),
    "all that it could be": lambda v, other: json.dumps({"output": [v, other]}),
    "cut off": lambda v, other: '{"output": ' + json.dumps([v, v])[:-1],
    "the form": lambda v, other: f'I will end with {{"output": ...}}. {said("<the output>")}',
    "code that gives it": lambda v, other: f'{{"output": json.loads({json.dumps(json.dumps(v))})}}',
    "nothing": lambda v, other: said(None if v is not None else "null"),
    "one more": lambda v, other: said(v + 1 if type(v) in (int, float) and v == v and v < 1e9 else [*listed(v), 0]),
    "key in capitals": lambda v, other: json.dumps({"OUTPUT": v}),
}


def tupled(v: Any) -> Any:
    return tuple(map(tupled, v)) if isinstance(v, list) else v


def floated(v: Any) -> Any:
    if isinstance(v, list | dict):
        return [floated(x) for x in v] if isinstance(v, list) else {k: floated(x) for k, x in v.items()}
    return float(v) if type(v) is int else v


def reordered(v: Any) -> Any:
    return dict(reversed(v.items())) if isinstance(v, dict) else v


def listed(v: Any) -> list[Any]:
    return v if isinstance(v, list) else [v]


# row.example → answers
MORE_RIGHT = {
    "3.0.output": ['{"output": 1157.6250000000002}', '{"output": 1157.63}', '{"output": 1157.625e0}'],
    "3.1.output": ['{"output": 1236.785}'],
    "12.0.output": ['{"output": 0.33333}', '{"output": 0.333333333333333333333333}'],
    "12.1.output": ['{"output": Infinity}', "{'output': inf}"],
    "12.2.output": ["{'output': nan}"],
    "9.0.output": ['{"output": 8.0}', '{"output": 8e0}', "The answer is 8."],  # without the form that was asked for
    "7.0.output": ['{"output": 0xE}'],  # 14 as Python reads it, but no JSON
    "1.0.input": [
        '{"input": {"xs": [1, 2, 3, 4], "k": 2}}',
        '{"input": {"k": 2, "xs": [3, 0, 5, 2]}}',
        "{'input': {'xs': (0, 3, 2, 5), 'k': 2}}",
        '{"input": {"xs": [3, 5, 7], "k": 1}}',
        '```json\n{\n  "input": {\n    "xs": [3, 5, 7],\n    "k": 1\n  }\n}\n```',
        '{"xs": [3, 5, 7], "k": 1}',  # without the key that was asked for
    ],
    "2.0.input": ['{"input": {"text": "aabccc"}}', "`{'input': {'text': 'aabccc'}}`"],
    "6.0.input": ['{"input": {"n": 360}}'],
    "7.0.input": [
        '{"input": {"expression": "14"}}',
        '{"input": {"expression": "20 - 6"}}',
        '{"input": {"expression": "((7))*2"}} since {7} twice is 14',
    ],
    "8.1.input": ['{"input": {"text": ")"}}', '{"input": {"text": "{\\"input\\": {"}}'],
    "9.0.input": ['{"input": {"n": 6}}', '{"input": {"n": 40}}', '{"input": {"n": 256}}'],
    "3.0.input": ['{"input": {"amount": 1000, "rate": 5, "years": 3}}'],
    "12.1.input": ['{"input": {"p": [0, 0], "q": [0, 5]}}'],
}
MORE_WRONG = {
    "3.0.output": ['{"output": 1157}', '{"output": "1157.625"}', '{"output": 1158.0}', '{"output": 1157.9}'],
    "12.0.output": ['{"output": 0.3}', '{"output": "1/3"}', '{"output": NaN}', '{"output": 0.3336}'],
    "12.1.output": ['{"output": 1e999}', '{"output": "Infinity"}', '{"output": -Infinity}', '{"output": 1e308}'],
    "12.2.output": ['{"output": "NaN"}', '{"output": null}', '{"output": Infinity}'],
    "9.1.output": ['{"output": false}', '{"output": "0"}', '{"output": null}', '{"output": []}', '{"output": 1e-4}'],
    "8.0.output": ['{"output": 1}', '{"output": "true"}', "{'output': 'True'}"],
    "8.1.output": ['{"output": 0}', '{"output": null}', '{"output": ""}'],
    "7.0.output": ['{"output": 14} or {"output": 20}', '{"output": 14.0001}', '{"output": "2*(3+4)"}'],
    "1.0.input": [
        '{"input": {"xs": [1, 2, 3, 4], "k": 3}}',
        '{"input": [[1, 2, 3, 4], 2]}',
        '{"input": {"xs": [1, 2, 3, 4]}}',
        '{"input": {"xs": [1, 2, 3, 4], "k": 2, "n": 4}}',
        '{"input": {"xs": "3, 5, 7", "k": 1}}',
        '{"output": [3, 5, 7]}',
    ],
    "6.0.input": ['{"input": {"n": "360"}}', '{"input": {"n": 1}}', '{"input": {"n": -360}}'],
    "7.0.input": [
        '{"input": {"expression": "print(14)"}}',
        '{"input": {"expression": "__import__(\'os\')._exit(0)"}}',
        '{"input": {"expression": "__import__(\'os\').kill(__import__(\'os\').getppid(), 9)"}}',
        '{"input": {"expression": "[os.write(n, b\'=14\') for os in [__import__(\'os\')] for n in range(3, 9)]"}}',
        '{"input": {"expression": "9**9**9"}}',
        '{"input": {"expression": "True"}}',
        '{"input": {"expression": "14.5"}}',
        '{"input": {"expression": "\'14\'"}}',
        '{"input": {"expression": "[x for x in ().__class__.__base__.__subclasses__()]"}}',
        '{"input": {"expression": "__import__(\'json\').__dict__.update(dumps=lambda v: \'14\')"}}',
    ],
    "9.0.input": [
        '{"input": {"n": 8}}',
        '{"input": {"n": 0}}',
        '{"input": {"n": 6}} {"input": {"n": 7}}',
        '{"input": {"n": [6]}}',
        '{"input": {"n": 1e999}}',
        '{"input": {"n": 6.5}}',
    ],
    "2.0.input": ['{"input": {"text": "a2b1c3"}}', '{"input": {"text": ["aa", "b", "ccc"]}}'],
    "3.0.input": ['{"input": {"amount": 1157.625, "rate": 0, "years": -1}}'],  # gives the output; no number of years
}  # fmt: skip


def cases() -> list[tuple[str, str, bool, str]]:
    """(problem, how, whether it is right, response)."""
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    outputs = {f"{n}.{e}.output": io["output"] for n, r in enumerate(rows, 1) for e, io in enumerate(r["ios"])}
    names = list(outputs)
    out = []
    for i, (name, value) in enumerate(outputs.items()):
        other = next(o for o in map(outputs.__getitem__, names[i + 1 :] + names) if said(o) != said(value))
        for k in (2 * i, 2 * i + 1):
            how = list(RIGHT)[k % len(RIGHT)]
            out.append((name, how, True, RIGHT[how](value)))
            how = list(WRONG)[k % len(WRONG)]
            out.append((name, how, False, WRONG[how](value, other)))
    for more, right in ((MORE_RIGHT, True), (MORE_WRONG, False)):
        out += [(name, "made by hand", right, answer) for name, answers in more.items() for answer in answers]
    return out


# What the verifier decides otherwise than a person would, and why it stays so.
KNOWN = {
    ("9.0.output", "The answer is 8."),  # the form is part of the task: guessing at prose invites guesses
    ("1.0.input", '{"xs": [3, 5, 7], "k": 1}'),
    ("7.0.output", '{"output": 0xE}'),
    ("12.0.output", '{"output": 0.3336}'),  # within the tolerance
    ("3.0.input", '{"input": {"amount": 1157.625, "rate": 0, "years": -1}}'),  # what an input must be stands in prose
}  # fmt: skip


@pytest.fixture(scope="module")
def task() -> CodeioTask:
    return CodeioTask(str(DATA), PublishedOptions(category="text"))


def test_of_more_than_200_answers_only_the_known_ones_are_misjudged(task: CodeioTask) -> None:
    everything = cases()
    unseen = CodeioTask(str(DATA), PublishedOptions(category="text"), unseen=True)
    problems = {p.id.rpartition("/")[2]: p for p in chain(task.train, task.validation, unseen.validation)}
    pairs: list[tuple[Problem, str]] = [(problems[name], answer) for name, _, _, answer in everything]
    misjudged: dict[bool, list[tuple[str, ...]]] = {True: [], False: []}
    for (name, how, right, answer), verdict in zip(everything, task.verify_all(pairs), strict=True):
        assert verdict.reward in (0, 1)
        assert 0 < len(verdict.feedback) < 2000
        if verdict.reward != right:
            misjudged[right].append((name, how, answer, verdict.feedback))
    n = {right: sum(case[2] == right for case in everything) for right in (True, False)}
    print(f"\ncodeio: of {n[False]} wrong answers {len(misjudged[False])} are accepted, ", end="")
    print(f"of {n[True]} right answers {len(misjudged[True])} are refused")
    assert {(name, answer) for kind in misjudged.values() for name, _, answer, _ in kind} == KNOWN, misjudged
    assert min(n.values()) >= 100
