"""The rule-based reflector: it edits what the feedback complains of, with the noise it was measured with."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fst_fast.fast.phrasebook import PhrasebookReflector
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage
from fst_fast.records import Problem, Prompt, Verdict
from fst_fast.tasks.glyph import ASPECTS, FEEDBACK, GlyphTask
from tests.fast.toys import rollout

REFLECTOR = PhrasebookReflector(GlyphTask("A", 0).phrasebook)
COMPLAINTS = [(aspect, value, text) for aspect, values in FEEDBACK.items() for value, text in values.items()]
KITCHEN = PhrasebookReflector(
    {
        "salt": ["Use no salt.", "Use a pinch of salt."],
        "heat": ["Fry hot!", "Simmer on low heat."],
        "a pinch of salt missing": [],
    }
)


PINCH = "a pinch of salt was missing."


def request(prompt: str, *feedback: str, reward: float = 0.0, seed: int = 0) -> ReflectionRequest:
    rollouts = [rollout(Prompt(prompt), Problem(str(i), {}), "", Verdict(reward, f)) for i, f in enumerate(feedback)]
    return ReflectionRequest(Prompt(prompt), tuple(rollouts), seed)


def edits(reflector: PhrasebookReflector, prompt: str, *feedback: str, n: int = 2000) -> list[str]:
    answers = reflector.reflect([request(prompt, *feedback, seed=seed) for seed in range(n)])
    return [answer.text or "" for answer in answers]


@pytest.mark.parametrize(("aspect", "value", "text"), COMPLAINTS)
def test_every_glyph_complaint_is_understood(aspect: str, value: str, text: str) -> None:
    assert REFLECTOR.topic(text) == aspect
    right = ASPECTS[aspect][value]
    wordings = REFLECTOR.wordings(aspect, text)
    # As in the experiment: two complaints share as many words with a wrong wording as with a right one.
    expected = 0.5 if (aspect, value) in (("order", "reverse"), ("symbols", "same")) else 1.0
    assert sum(w in right for w in wordings) / len(wordings) == expected


@pytest.mark.parametrize("text", ["correct.", "the answer is malformed. expected: < a - b >", "expected: 1 + 10 !", ""])
def test_feedback_about_nothing_in_the_phrase_book_edits_nothing(text: str) -> None:
    assert set(edits(REFLECTOR, "transform the letters.", text)) == {"transform the letters."}


def test_a_wrong_sentence_is_replaced_and_the_others_stay() -> None:
    ((text, times),) = Counter(edits(KITCHEN, "Cook. Use no salt. Fry hot!", PINCH)).most_common(1)
    assert text == "Cook. Fry hot! Use a pinch of salt."
    assert times > 600


def test_edits_and_slips_are_as_frequent_as_in_the_experiment() -> None:
    texts = edits(KITCHEN, "One. Two. Three.", PINCH, n=4000)
    edited = [t for t in texts if "salt" in t]
    slipped = [t for t in edited if "no salt" in t]
    assert len(edited) / len(texts) == pytest.approx(0.7 * (1 - 0.15 / 4), abs=0.025)  # less those dropped at once
    assert len(slipped) / len(edited) == pytest.approx(0.25 / 2, abs=0.025)  # half of the slips hit the right wording


def test_drops_and_shuffles_are_as_frequent_as_in_the_experiment() -> None:
    texts = edits(KITCHEN, "One. Two. Three.", "correct.", n=4000)
    whole = [t for t in texts if t.count(".") == 3]
    reordered = [t for t in whole if t != "One. Two. Three."]
    assert 1 - len(whole) / len(texts) == pytest.approx(0.15, abs=0.025)
    assert len(reordered) / len(whole) == pytest.approx(0.3 * 5 / 6, abs=0.025)


def test_the_last_sentence_is_never_dropped() -> None:
    assert "" not in edits(REFLECTOR, "transform the letters.", "nothing to see")


def test_solved_problems_are_not_complained_of() -> None:
    (answer,) = KITCHEN.reflect([request("Cook.", "no salt", reward=1.0, seed=1)])
    assert "salt" not in (answer.text or "")


def test_the_same_request_gets_the_same_answer_in_any_process() -> None:
    requests = [request("transform the letters.", *[c[2] for c in COMPLAINTS], seed=seed) for seed in range(20)]
    assert REFLECTOR.reflect(requests) == PhrasebookReflector(GlyphTask("A", 0).phrasebook).reflect(requests)
    program = (
        "from tests.fast.test_phrasebook import *\n"
        "print([REFLECTOR.topic(c[2]) for c in COMPLAINTS], edits(REFLECTOR, 'x.', *[c[2] for c in COMPLAINTS], n=20))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_it_says_what_it_did() -> None:
    reflector = PhrasebookReflector({"salt": ["Use a pinch of salt."]})
    answers = reflector.reflect([request("Cook.", "no salt!", seed=seed) for seed in range(50)])
    notes = {answer.note for answer in answers}
    assert 'salt: "Use a pinch of salt." because "no salt!"' in notes
    assert Reflection("Cook.", "no change") in answers
    assert reflector.usage == ReflectionUsage(calls=50)


def test_hostile_feedback_and_prompts_are_only_text() -> None:
    rng = random.Random(0)
    junk = "".join(chr(rng.choice([*range(0x300), 0xFFFF, 0x1F600])) for _ in range(20000))
    for text in (junk, "." * 50000, "a " * 50000, "salt " * 50000):
        (answer,) = KITCHEN.reflect([request(text, text, seed=3)])
        assert isinstance(answer.text, str)
