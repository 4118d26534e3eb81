"""What a reflection LM is told, and how its answers are read."""

from dataclasses import replace

import pytest

from fst_fast.fast.reflection import Reflection, ReflectionRequest
from fst_fast.fast.template import instruction, parse
from fst_fast.fast.text import cut_middle, printable
from fst_fast.records import Problem, Prompt, Verdict
from tests.fast.toys import rollout

PROMPT = Prompt("Answer briefly.")


def told(response: str = "5", feedback: str = "2 + 2 is 4", reward: float = 0.25) -> str:
    trace = rollout(PROMPT, Problem("p", {"sum": "2 + 2"}), response, Verdict(reward, feedback))
    other = rollout(PROMPT, Problem("q", {"sum": "1 + 1"}), "2", Verdict(1.0, "correct."))
    request = ReflectionRequest(PROMPT, (trace, other), 0)
    return instruction(request, lambda p: f"How much is {p.data['sum']}?", max_prompt_chars=777, max_trace_chars=100)


def test_the_instruction_holds_whole_traces_and_asks_for_small_edits_in_a_fence() -> None:
    text = told()
    for part in ("Answer briefly.", "How much is 2 + 2?", "<response>\n5\n", "2 + 2 is 4", 'reward="0.25"', "777"):
        assert part in text
    assert text.count("<trace ") == 2
    assert 'number="2" reward="1"' in text
    assert "small, incremental edits" in text
    assert text.endswith("````\nthe new prompt\n````")


def test_a_response_that_was_cut_off_is_told_from_one_that_ended() -> None:
    """Its text does not show it: a verifier that finds no answer says so of both."""
    ended = rollout(PROMPT, Problem("p", {}), "3, then", Verdict(0.0, "no answer"))
    cut = replace(ended, response_ids=(7, 8, 9), finish_reason="length")
    limits = {"max_prompt_chars": 777, "max_trace_chars": 100}
    text = instruction(ReflectionRequest(PROMPT, (ended, cut), 0), lambda p: "Count.", **limits)
    assert '<trace number="1" reward="0">' in text
    assert '<trace number="2" reward="0" cut_off="after 3 tokens">' in text


def test_long_traces_are_cut_in_the_middle_with_a_mark() -> None:
    text = told(response="HEAD" + "x" * 10_000 + "TAIL", feedback="BEGIN" + "y" * 10_000 + "END")
    assert len(text) < 2500
    for part in ("HEADx", "xTAIL", "BEGINy", "yEND", "[... 9908 characters left out ...]"):
        assert part in text


def test_what_models_wrote_is_sent_without_characters_that_break_the_wire() -> None:
    text = told(response="a\x00b\ud800c\x1b[0m{0}%s", feedback="\udfff")
    assert "abc[0m{0}%s" in text
    text.encode()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("I add a rule.\n\n````\nBe brief.\nUse digits.\n````\n", "Be brief.\nUse digits."),
        ("```\nfirst try\n```\nNo:\n```\nsecond try\n```", "second try"),
        ("````text\nShow code:\n```python\n1\n```\nThen stop.\n````", "Show code:\n```python\n1\n```\nThen stop."),
        ("~~~\nwaves\n~~~", "waves"),
        ("  ```\n  indented\n  ```  ", "indented"),
        ("```\nnever closed\nbut whole", "never closed\nbut whole"),
        ("  Just the prompt.\n", "Just the prompt."),
        ("Say `x` and ``y``.", "Say `x` and ``y``."),
        ("<think>\n```\nno\n```\n</think>\nBe brief.", "Be brief."),
        ("Write <think> before </think> thinking.", "Write <think> before </think> thinking."),
        ("```\r\nline\r\nends\r\n```", "line\nends"),
        ("```\nnul\x00 and \ud800 surrogate\n```", "nul and  surrogate"),
        ("```\n</script><b>{0}</b>\n```", "</script><b>{0}</b>"),
        ("", None),
        ("\x00\x01 \n", None),
        ("Nothing to say:\n```\n\n```", None),
        ("<think>thought until the tokens ran out", None),
    ],
)
def test_the_new_prompt_is_found_in_the_answer(answer: str, text: str | None) -> None:
    assert parse(answer).text == text


def test_what_stands_before_the_block_is_the_note() -> None:
    assert parse("I add a rule.\n```\nBe brief.\n```\nDone.") == Reflection("Be brief.", "I add a rule.")
    assert parse("") == Reflection(None, "an empty answer")


@pytest.mark.parametrize("piece", ["`", "```\n", "~~~", " ", "\n", "<think>", "a\n```"])
def test_a_huge_answer_of_anything_is_read_in_no_time(piece: str) -> None:
    parse(piece * (2**20 // len(piece)))


def test_cutting_keeps_short_texts_and_says_what_it_left_out() -> None:
    assert cut_middle("abcdef", 6) == "abcdef"
    assert cut_middle("abcdefg", 3) == "ab\n[... 4 characters left out ...]\ng"
    assert cut_middle("abc", 0) == "\n[... 3 characters left out ...]\n"


def test_printable_text_keeps_languages_and_drops_controls() -> None:
    assert printable("naïve 日本語 🙂\tx\r\ny\rz") == "naïve 日本語 🙂\tx\ny\nz"
    assert printable("\x00\x1b\x7f\x85\ud800\udc00") == ""
