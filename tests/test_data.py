from __future__ import annotations

import pytest

from fst_fast.data import DataOrder
from fst_fast.errors import UserError
from fst_fast.records import Problem

PROBLEMS = [Problem(f"x{i}", {}) for i in range(11)]


def ids(batch: list[Problem]) -> list[str]:
    return [p.id for p in batch]


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    forwards = DataOrder(PROBLEMS, 3, seed=1, name="t")
    expected = [ids(forwards.batch(s)) for s in range(10)]
    jumping = DataOrder(PROBLEMS, 3, seed=1, name="t")
    assert {s: ids(jumping.batch(s)) for s in (9, 0, 5, 2, 9)} == {s: expected[s] for s in (9, 0, 5, 2)}
    assert [ids(DataOrder(PROBLEMS, 3, seed=2, name="t").batch(s)) for s in range(10)] != expected


def test_an_epoch_shows_no_problem_twice_and_epochs_differ() -> None:
    order = DataOrder(PROBLEMS, 3, seed=1, name="t")
    epochs = [[x for s in range(3 * e, 3 * e + 3) for x in ids(order.batch(s))] for e in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert {x for e in epochs for x in e} == {p.id for p in PROBLEMS}  # the skipped remainder changes


def test_the_lookahead_is_what_the_next_steps_will_draw() -> None:
    order = DataOrder(PROBLEMS, 3, seed=1, name="t")
    ahead = ids(order.lookahead(2, 4))
    assert ahead == list(dict.fromkeys(x for s in range(2, 6) for x in ids(order.batch(s))))


def test_more_problems_a_step_than_there_are_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"rollout.problems = 12 .* 11 training problems of t"):
        DataOrder(PROBLEMS, 12, seed=0, name="t")
