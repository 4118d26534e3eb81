"""The glyph world: rules, problems and what the verifier says."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.tasks import glyph, make_task
from fst_fast.tasks.glyph import ASPECTS, FEEDBACK, GlyphTask, Rule

RULES = list(product(*ASPECTS.values()))
LETTERS = "cabed"  # every order of it is different, sorted included


def problem(rule: Rule, letters: str = LETTERS) -> Problem:
    return Problem("p", {"letters": letters, "rule": rule})


@pytest.mark.parametrize(
    ("rule", "letters", "answer"),
    [
        (("keep", "same", "space", "none", "none"), "abcd", "a b c d"),
        (("reverse", "upper", "comma", "square", "bang"), "abcd", "[ D , C , B , A ] !"),
        (("sort", "next", "dash", "angle", "question"), "jabba", "< b - b - c - c - k > ?"),
        (("rotate", "number", "plus", "round", "semicolon"), "jabc", "( 1 + 2 + 3 + 10 ) ;"),
        (("swap", "same", "space", "none", "bang"), "abcde", "e b c d a !"),
    ],
)
def test_solve_gives_the_answer_worked_out_by_hand(rule: Rule, letters: str, answer: str) -> None:
    assert glyph.solve(rule, letters) == answer


def test_the_right_answer_scores_one_under_every_rule() -> None:
    assert len(set(RULES)) == 1280
    for rule in RULES:
        verdict = glyph.verify(problem(rule), f" {glyph.solve(rule, LETTERS)}\n")
        assert verdict.reward == 1
        assert set(verdict.parts.values()) == {1.0}


def test_feedback_and_parts_name_exactly_the_aspects_that_are_wrong() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        wanted, followed = glyph.draw_rule(rng), glyph.draw_rule(rng)
        wrong = {aspect for aspect, a, b in zip(ASPECTS, wanted, followed, strict=True) if a != b}
        verdict = glyph.verify(problem(wanted), glyph.solve(followed, LETTERS))
        assert verdict.reward == (not wrong)
        assert {aspect for aspect, ok in verdict.parts.items() if not ok} == wrong
        for aspect, value in zip(ASPECTS, wanted, strict=True):
            assert (FEEDBACK[aspect][value] in verdict.feedback) == (aspect in wrong)
        if wrong:
            assert verdict.feedback.endswith(f" expected: {glyph.solve(wanted, LETTERS)}")


@pytest.mark.parametrize(
    "answer",
    [
        "", " ", "( )", "( a", "a )", ",", "a , b - c", "a , , b", ", a b", "a b ,", "!", "< [ a b > ]", "a  b c d",
        "abcd", "<a b c d>", "a\x00b", "a b c d" * 10**6, "( " * 10**6, "٣ ٤ ٥", "ａ ｂ ｃ ｄ", "\ud800",
        "a\u2028b c d", "a b c d expected: a b c d", "correct.", "😀" * 1000,
    ],
)  # fmt: skip
def test_wrong_and_hostile_answers_score_zero_and_get_feedback(answer: str) -> None:
    for rule in (("keep", "same", "space", "none", "none"), ("reverse", "upper", "comma", "round", "bang")):
        verdict = glyph.verify(problem(rule, "abcd"), answer)
        assert verdict.reward == 0
        assert verdict.feedback.endswith(f"expected: {glyph.solve(rule, 'abcd')}")
        assert len(verdict.feedback) < 1000


@pytest.mark.parametrize(
    "answer", ["", "( )", "( a b c", "a , b - c", "a , , , b", "a , - , b", ", a , b", "a , b ,", "a  b c d"]
)
def test_an_answer_that_cannot_be_read_is_called_malformed(answer: str) -> None:
    verdict = glyph.verify(problem(("keep", "same", "space", "none", "none"), "abcd"), answer)
    assert verdict.feedback == "the answer is malformed. expected: a b c d"


@given(st.one_of(st.text(), st.text("abcdABCD1234 ,-+<>[]()!?;", max_size=40)), st.sampled_from(RULES))
def test_reward_is_one_only_for_an_exact_match(answer: str, rule: Rule) -> None:
    verdict = glyph.verify(problem(rule, "abcd"), answer)
    assert verdict.reward == (answer.strip() == glyph.solve(rule, "abcd"))
    assert set(verdict.parts) == set(ASPECTS)


def test_every_feedback_sentence_tells_its_topic() -> None:
    topics = make_task("glyph:A", seed=0).phrasebook
    assert list(topics) == list(FEEDBACK)
    for aspect, sentences in FEEDBACK.items():
        for value, sentence in sentences.items():
            named = [topic for topic in topics if all(word in sentence for word in topic.split())]
            assert named == ([] if value == "same" else [aspect]), sentence


def test_the_phrasebook_holds_every_wording_once_under_its_aspect() -> None:
    book = make_task("glyph:A", seed=0).phrasebook
    sentences = [sentence for topic in book.values() for sentence in topic]
    assert len(sentences) == len(set(sentences)) == 43
    assert "use parentheses." in book["brackets"]


def test_splits_are_distinct_disjoint_and_a_function_of_the_seed() -> None:
    task, same, other = (GlyphTask("A", seed) for seed in (0, 0, 1))
    ids = [p.id for p in [*task.train, *task.validation]]
    assert len(set(ids)) == len(ids) == 4096 + 128
    assert len(task.validation) == 128
    assert [p.id for p in same.train] == [p.id for p in task.train] != [p.id for p in other.train]
    assert same.rules == task.rules
    assert task.train[0].id == f"glyph:A/{task.train[0].data['letters']}"
    assert {p.slice for p in task.train} == {""}


def test_ids_of_different_tasks_never_meet() -> None:
    tasks = [GlyphTask(rules, 0) for rules in ("A", "B", "A/B")]
    assert len({p.id for task in tasks for p in [*task.train, *task.validation]}) == 3 * (4096 + 128)


@pytest.mark.parametrize("seed", range(5))
def test_hidden_rules_share_little_with_their_predecessor_and_have_no_default(seed: int) -> None:
    rules = glyph.rule_sequence(seed, 26)
    assert len(set(rules)) == 26
    for rule in rules:
        assert all(value != next(iter(values)) for value, values in zip(rule, ASPECTS.values(), strict=True))
    for a, b in zip([*rules, rules[0]], rules[1:], strict=False):
        assert sum(x == y for x, y in zip(a, b, strict=True)) <= 1
    assert sum(x == y for x, y in zip(rules[0], rules[2], strict=True)) <= 1
    assert GlyphTask("C", seed).rules == [rules[2]]


def test_a_sliced_task_is_governed_by_the_first_letter() -> None:
    task = make_task("glyph:A/B", seed=3)
    a, b = glyph.rule_sequence(3, 2)
    for p in task.train:
        first = p.data["letters"][0]
        assert (p.slice, p.data["rule"]) == (("a-e", a) if first <= "e" else ("f-j", b))
    assert {p.slice for p in make_task("glyph:A/B/C", seed=3).train} == {"a-c", "d-f", "g-j"}


def test_messages_pose_the_letters_under_the_prompt_and_hide_the_rule() -> None:
    task = make_task("glyph:A", seed=0)
    assert task.messages("be quick.", problem(("keep",) * 5, "abcd")) == [
        {"role": "system", "content": "be quick."},
        {"role": "user", "content": "a b c d"},
    ]


def test_instruction_cases_state_their_whole_rule_and_any_glyph_task_verifies_them() -> None:
    task, cases = make_task("glyph:A", seed=0), glyph.instruction_cases(200, seed=1)
    assert cases == glyph.instruction_cases(200, seed=1)
    assert len({p.id for _, p in cases}) == 200
    for prompt, p in cases:
        wordings = [values[value] for values, value in zip(ASPECTS.values(), p.data["rule"], strict=True)]
        assert all(any(w in prompt for w in some) for some in wordings)
        assert len(prompt.split(". ")) == 5
        assert task.verify(p, glyph.solve(p.data["rule"], p.data["letters"])).reward == 1


@pytest.mark.parametrize(
    "spec", ["glyph", "glyph:", "glyph:a", "glyph:AB", "glyph:A/", "glyph:A/b", "glyph:" + "A/" * 10 + "A"]
)
def test_a_malformed_glyph_task_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"glyph:A/B"):
        make_task(spec, seed=0)


@pytest.mark.parametrize("spec", ["", "glyf:A", "hoover", "Glyph:A"])
def test_an_unknown_task_is_refused_with_the_list_of_tasks(spec: str) -> None:
    with pytest.raises(UserError, match=r"glyph:A .*star_graph:4x3.*jsonl:PATH"):
        make_task(spec, seed=0)
