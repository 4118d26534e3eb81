"""What a page shows of prompts and rollouts, where no page is needed to see it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fst_fast.excerpts import matrix, tree, word_diff


def test_the_matrix_tells_shared_wins_from_lone_ones_and_orders_problems_by_winner() -> None:
    scores = [{"p": 1.0, "q": 1.0, "r": 0.0, "t": 0.0}, {"p": 1.0, "q": 0.0, "r": 0.5, "t": 0.0}, {"p": 0.0, "q": 0.0}]
    shown = [{"id": str(i), "scores": of} for i, of in enumerate(scores)]
    found = matrix(shown, {"members": shown}, {})
    assert [row["cells"] for row in found["rows"]] == [
        [(1.0, "alone", "q"), (1.0, "best", "p"), (0.0, "", "r"), (0.0, "", "t")],
        [(0.0, "", "q"), (1.0, "best", "p"), (0.5, "alone", "r"), (0.0, "", "t")],
        [(0.0, "", "q"), (0.0, "", "p"), (None, "", "r"), (None, "", "t")],
    ]
    assert [(row["best"], row["alone"]) for row in found["rows"]] == [(2, 1), (2, 1), (0, 0)]
    assert [score for score, *_ in found["together"]] == [1.0, 1.0, 0.5, 0.0]
    assert (found["problems"], found["solved"]) == (4, 3)
    sliced = matrix(shown, {"members": shown}, {"p": "f-j", "q": "f-j", "r": "a-e", "t": "a-e"})
    assert [x for *_, x in sliced["together"]] == ["r", "t", "q", "p"]
    assert sliced["slices"] == [("a-e", 2), ("f-j", 2)]


def test_odd_parents_neither_hang_nor_hide_a_prompt() -> None:
    parents = {"a": None, "b": "a", "c": "b", "d": "gone", "x": "y", "y": "x", "e": "a"}
    rows = tree([{"id": name, "parent": parent} for name, parent in parents.items()])
    assert [(depth, row["id"]) for depth, row in rows] == [
        (0, "a"), (1, "b"), (2, "c"), (1, "e"), (0, "d"), (0, "y"), (1, "x")
    ]  # fmt: skip


@given(st.text("ab .\n", max_size=40), st.text("ab .\n", max_size=40))
def test_a_word_diff_holds_both_texts(old: str, new: str) -> None:
    parts = word_diff(old, new, 1000)
    assert "".join(text for op, text in parts if op != "del") == new
    assert "".join(text for op, text in parts if op != "ins").split() == old.split()


def test_a_word_diff_keeps_words_whole() -> None:
    assert word_diff("Answer. Be brief.", "First think. Answer.", 100) == (
        ("ins", "First think."), ("same", " Answer."), ("del", " Be brief.")
    )  # fmt: skip
