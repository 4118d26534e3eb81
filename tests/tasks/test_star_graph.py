"""Star graphs: the problem has one answer, the verifier reads it tolerantly and says where a path broke."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.fast.phrasebook import PhrasebookReflector
from fst_fast.records import Problem
from fst_fast.tasks import make_task
from fst_fast.tasks.star_graph import PHRASES

TASK = make_task("star_graph:4x3", seed=0)
#        7 > 8 > 9 and 7 > 18 > 19
PROBLEM = Problem("p", {"edges": [[8, 9], [7, 18], [18, 19], [7, 8]], "path": [7, 18, 19]})


def test_a_problem_is_a_star_with_one_path_to_the_goal() -> None:
    for p in TASK.validation:
        edges, path = p.data["edges"], p.data["path"]
        assert len(edges) == len(set(edges)) == 12
        assert len({node for edge in edges for node in edge}) == 13
        assert len(path) == 4
        assert set(pairwise(path)) <= set(edges)
        assert sum(a == path[0] for a, _ in edges) == 4
        assert all(a != path[-1] for a, _ in edges)


def test_the_goal_is_not_told_by_the_order_of_edges() -> None:
    goal_edge = [p.data["edges"].index(tuple(p.data["path"][-2:])) for p in TASK.train]
    first_edge = [p.data["edges"].index(tuple(p.data["path"][:2])) for p in TASK.train]
    for position in range(12):
        assert goal_edge.count(position) == pytest.approx(4096 / 12, rel=0.3)
        assert first_edge.count(position) == pytest.approx(4096 / 12, rel=0.3)


def test_splits_are_distinct_disjoint_and_a_function_of_the_seed() -> None:
    def question(p: Problem) -> str:
        return TASK.messages("", p)[1]["content"]

    everything = [*TASK.train, *TASK.validation]
    assert len({p.id for p in everything}) == len({question(p) for p in everything}) == 4096 + 128
    assert (
        TASK.train[:9] == make_task("star_graph:4x3", seed=0).train[:9] != make_task("star_graph:4x3", seed=1).train[:9]
    )


def test_the_question_shows_every_edge_the_start_and_the_goal_but_not_the_path() -> None:
    system, user = TASK.messages("think.", PROBLEM)
    assert system == {"role": "system", "content": "think."}
    assert user["content"].startswith("Edges: 8>9, 7>18, 18>19, 7>8. Find the path from 7 to 19.")


@pytest.mark.parametrize(
    "response",
    [
        "7,18,19", "7, 18, 19.", "Answer: 7, 18, 19", "**Answer:** 7 -> 18 -> 19", "7 → 18 → 19",
        "ANSWER:\n[7,18,19]\nbye", "8, 9 leads nowhere\nThe path of 2 edges is 7, 18, 19",
        "answer: 7,8,9\nno, answer: 7,18,19",
    ],
)  # fmt: skip
def test_the_path_scores_one_however_it_is_written(response: str) -> None:
    verdict = TASK.verify(PROBLEM, response)
    assert (verdict.reward, verdict.feedback) == (1.0, "correct.")
    assert verdict.parts == {"start": 1.0, "edges": 1.0, "goal": 1.0}


@pytest.mark.parametrize(
    ("response", "said", "wrong"),
    [
        ("7,8,9", "the path ends at 9, not at 19", {"goal"}),
        ("18,19", "the path starts at 18, not at 7", {"start"}),
        ("7,19", "there is no edge 7>19", {"edges"}),
        ("7,18,9,19", "there is no edge 18>9", {"edges"}),
        (
            "19,18,7",
            "starts at 19, not at 7. there is no edge 19>18. the path ends at 7, not at 19",
            {"start", "edges", "goal"},
        ),
        ("7,18,19,20", "there is no edge 19>20. the path ends at 20", {"edges", "goal"}),
        ("7,18", "the path ends at 18", {"goal"}),
        ("7,18,19\nI am not sure", "there is no path in the final answer", {"start", "edges", "goal"}),
        ("", "there is no path", {"start", "edges", "goal"}),
        ("answer:", "there is no path", {"start", "edges", "goal"}),
        ("٧,١٨,١٩", "there is no path", {"start", "edges", "goal"}),
        ("07,18,19", "starts at 07", {"start", "edges"}),
        ("1" * 10**6, "starts at 1111", {"start", "goal"}),
        ("7," * 10**6, "no edge 7>7", {"edges", "goal"}),
    ],
)
def test_feedback_says_where_the_path_broke(response: str, said: str, wrong: set[str]) -> None:
    verdict = TASK.verify(PROBLEM, response)
    assert verdict.reward == 0
    assert said in verdict.feedback
    assert verdict.feedback.endswith("expected: 7, 18, 19")
    assert len(verdict.feedback) < 300
    assert {part for part, ok in verdict.parts.items() if not ok} == wrong


def test_every_fault_is_found_in_the_phrase_book_but_not_which_of_its_sentences_is_right() -> None:
    reflector = PhrasebookReflector(TASK.phrasebook)
    for said, topic in {
        "19,18,7": ["direction", "edges", "direction", None],
        "7,19": ["edges", None],
        "7; 18; 19": ["final answer", None],
    }.items():
        feedback = TASK.verify(PROBLEM, said).feedback.split(". ")
        assert [reflector.topic(sentence) for sentence in feedback] == topic
        for sentence, of in zip(feedback, topic, strict=True):
            right, wrong = PHRASES[of].values() if of else ((), ())
            wordings = reflector.wordings(of, sentence) if of else []
            assert sum(w in right for w in wordings) == sum(w in wrong for w in wordings)


@given(st.one_of(st.text(), st.text("7189,-> \nanswer:")))
def test_any_text_gets_a_verdict(response: str) -> None:
    assert TASK.verify(PROBLEM, response).reward in (0.0, 1.0)


@pytest.mark.parametrize("shape", ["", "4", "1x3", "4x0", "-4x3", "999x999", "4x3x2", "٤x٣", "4x3 "])
def test_a_malformed_star_graph_is_refused(shape: str) -> None:
    with pytest.raises(UserError, match="ARMSxLENGTH"):
        make_task(f"star_graph:{shape}", seed=0)
