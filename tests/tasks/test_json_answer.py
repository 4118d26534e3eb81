"""Reading a JSON answer out of any text, and saying where it differs."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.tasks.json_answer import NotJson, difference, last_object, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ('{"output": 5}', 5),
        ('{"output": 5} and {"output": 6}, as {"note": "output"} says', 6),
        ('a {b} c {"output": {"output": [1, {}]}} d}', {"output": [1, {}]}),
        ('{"why": "{\\"output\\": 1}", "output": -0.5e1}', -5.0),
        ('{"output": "two\nlines"}', "two\nlines"),
        ("{'output': ('it\\'s', \"it's\", 'a \"b\"')}", ["it's", "it's", 'a "b"']),
        ("{'output': (True, None, -inf)}", [True, None, -math.inf]),
        ("{'output': {1: 2, 'a:b': 3, None: [4,],},}", {"1": 2, "a:b": 3, "null": [4]}),
        ("{output: 3}", 3),
        ('\\boxed{\\{"output": [1]\\}}', [1]),
    ],
)  # fmt: skip
def test_the_last_outermost_object_with_the_key_is_the_answer(response: str, value: Any) -> None:
    assert last_object(response, "output") == value


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ('{"output": 1, "output": 2}', "names a key twice"),
        ('{"output": 1} {"output": {"output": 2}, "output": 3}', "names a key twice"),
        ("{'output': {1: 1, '1': 2}}", "names a key twice"),
        ('{"output": [1e999]}', "1e999 is larger than any number"),
        ('{"output": ' + "[" * 101 + "]" * 101 + "}", "nested more than 100 levels"),
        # Python 3.13 parses as deep as this, 3.11 does not
        ('{"output": ' + "[" * 9000 + "]" * 9000 + "}", "there is no JSON object|nested more than 100 levels"),
        ('{"output": ' + "9" * 5000 + "}", "there is no JSON object"),
        ("{'output': __import__('os').getpid()}", "there is no JSON object"),
        ("{'output': 2 ** 9}", "there is no JSON object"),
        ("{'output': {(): 5}}", "there is no JSON object"),
        ('{"input": 5}', 'no JSON object with the key "output"'),
        ('["output", 5]', "there is no JSON object"),
        ("", "there is no JSON object"),
    ],
)
def test_what_is_no_answer_is_refused_with_a_reason(response: str, reason: str) -> None:
    with pytest.raises(NotJson, match=reason):
        last_object(response, "output")


@pytest.mark.parametrize(
    "part",
    [
        '{"a":',
        "{",
        "{'output': ",
        "{'output': \"",
        '{"output":{"output":',
        "'",
        '"',
        "\\'",
        "\\{",
        "}",
        "{}",
        '{"a": 1} ',
    ],
)
def test_text_that_repeats_itself_without_end_is_read_in_a_moment(part: str) -> None:
    with pytest.raises(NotJson, match="no JSON object"):
        last_object(part * 10**5, "output")  # it is cut to what is read; quadratic reading would run for minutes here


@given(VALUES)
def test_any_value_is_found_in_text_and_equals_itself(value: Any) -> None:
    text = shown({"output": value})
    if len(text) < 200:
        found = last_object(f"So }} {{ it is {text}.", "output")
        assert difference(found, value, 0.0) == ""


@given(st.text())
def test_any_text_gives_a_value_or_a_reason(text: str) -> None:
    for response in (text, '{"output": ' + text, "{'output': " + text + "}"):
        try:
            value = last_object(response, "output")
        except NotJson:
            continue
        assert difference(value, value, 0.0) == ""


@pytest.mark.parametrize(
    ("found", "expected", "clause"),
    [
        (1, 1.0, ""), (2.0, 2, ""), (10**30, 1e30, ""), (-0.0, 0, ""), (math.nan, math.nan, ""),
        (math.inf, math.inf, ""), ({"a": 1, "b": [2]}, {"b": [2], "a": 1}, ""), (0.1 + 0.2, 0.3, ""),
        (3.142, 3.14159, ""), (1157.63, 1157.625, ""),
        (True, 1, "true where 1 is expected"),
        (0, False, "0 where false is expected"),
        (None, 0, "null where 0 is expected"),
        ("1", 1, 'the text "1" where the number 1 is expected'),
        ([1], 1, "the list [1] where the number 1 is expected"),
        ({}, [], "the object {} where the list [] is expected"),
        (2**53 + 1, 2**53, "9007199254740993 where 9007199254740992 is expected"),
        (2.0000001, 2, "2.0000001 where 2 is expected"),
        (3.15, 3.14159, "3.15 where 3.14159 is expected"),
        (1157, 1157.625, "1157 where 1157.625 is expected"),
        (0.0, 1e-9, "0.0 where 1e-09 is expected"),
        (math.nan, 1.0, "NaN where 1.0 is expected"),
        (10**400, 1.5, f"1{'0' * 99} ... {'0' * 100} where 1.5 is expected"),
        (1.5, math.inf, "1.5 where Infinity is expected"),
        ([1, 2], [1, 2, 3], "2 items where 3 are expected: [1, 2]"),
        ({"a": [{"b": "x"}, 2]}, {"a": [{"b": "y"}, 2]}, '"x" where "y" is expected at ["a"][0]["b"]'),
        ({"a": 1}, {"a": 1, "b": 2}, 'the key "b" is missing'),
        ([{"a": 1, "c": 2}], [{"a": 1}], 'there is no key "c" at [0]'),
        ([2, 1], [1, 2], "2 where 1 is expected at [0]"),
        ("A", "a", '"A" where "a" is expected'),
    ],
)  # fmt: skip
def test_a_difference_is_said_with_its_place(found: Any, expected: Any, clause: str) -> None:
    assert difference(found, expected, 1e-3) == clause
