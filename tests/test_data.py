from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from fst_fast.config import Stage
from fst_fast.data import DataOrder, MixedOrder
from fst_fast.errors import UserError
from fst_fast.records import Problem
from fst_fast.tasks import make_task
from fst_fast.tasks.mixture import Mixture

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


def mixed(spec: str, *, steps: int = 10, seed: int = 0, size: int = 16) -> MixedOrder:
    task = make_task(spec, seed=seed)
    assert isinstance(task, Mixture)
    return MixedOrder(task, size, Stage(0, spec, 0, steps), seed=seed, name=spec)


def shares(order: MixedOrder, steps: int, task: str) -> list[float]:
    """Of each step, the part of the batch that is drawn from `task`."""
    return [sum(p.id.startswith(f"{task}/") for p in order.batch(s)) / len(order.batch(s)) for s in range(steps)]


def test_a_mixed_batch_is_a_function_of_seed_and_step_alone() -> None:
    expected = [ids(mixed("glyph:A>glyph:B").batch(s)) for s in range(10)]
    jumping = mixed("glyph:A>glyph:B")
    assert {s: ids(jumping.batch(s)) for s in (9, 0, 5, 2, 9)} == {s: expected[s] for s in (9, 0, 5, 2)}
    assert ids(mixed("glyph:A>glyph:B", seed=1).batch(3)) != expected[3]
    assert ids(mixed("glyph:A>glyph:B").lookahead(2, 4)) == [x for batch in expected[2:6] for x in batch]


def test_interleaved_tasks_take_turns_at_random_within_every_batch() -> None:
    even = shares(mixed("glyph:A+glyph:B"), 60, "glyph:A")
    assert sum(even) / 60 == pytest.approx(0.5, abs=0.05)
    assert all(0 < share < 1 for share in even)
    assert sum(shares(mixed("glyph:A+glyph:A+glyph:B"), 60, "glyph:A")) / 60 == pytest.approx(2 / 3, abs=0.05)
    first = [p.id.startswith("glyph:A/") for p in mixed("glyph:A+glyph:B", size=64).batch(0)]
    assert 16 < sum(a != b for a, b in pairwise(first)) < 48  # neither sorted by task nor in turns


def test_a_shift_goes_from_all_of_one_task_to_all_of_the_other() -> None:
    share = shares(mixed("glyph:A>glyph:B", steps=101, size=64), 101, "glyph:B")
    assert (share[0], share[100]) == (0, 1)
    for middle in (25, 50, 75):
        assert sum(share[middle - 5 : middle + 6]) / 11 == pytest.approx(middle / 100, abs=0.08)


def test_a_switch_inside_a_stage_has_one_step_and_the_lookahead_crosses_it() -> None:
    order = mixed("glyph:A>>glyph:B")
    assert shares(order, 12, "glyph:B") == [0] * 5 + [1] * 7
    assert shares(mixed("glyph:A>>glyph:A>glyph:B>>glyph:B", steps=9), 9, "glyph:B")[::4] == pytest.approx(
        [0, 0.5, 1], abs=0.3
    )
    assert {p.id.split("/")[0] for p in order.lookahead(3, 4)} == {"glyph:A", "glyph:B"}


def test_a_part_is_shown_whole_before_any_problem_of_it_comes_again(tmp_path: Path) -> None:
    specs = []
    for name, n in (("a", 40), ("b", 23)):
        rows = [json.dumps({"problem": f"{name}{i}", "answer": "1"}) for i in range(n)]
        (tmp_path / name).write_text("\n".join(rows))
        specs.append(f"jsonl:{tmp_path / name}")
    order = mixed("+".join(specs), size=8)
    seen: dict[str, list[str]] = {spec: [] for spec in specs}
    for s in range(40):
        batch = ids(order.batch(s))
        assert len(set(batch)) == 8
        for x in batch:
            seen[x.rpartition("/")[0]].append(x)
    for spec, n in zip(specs, (36, 21), strict=True):  # a tenth is held out
        assert len(set(seen[spec])) == n
        assert len(set(seen[spec][: n - 8])) == n - 8


def test_a_mixture_needs_a_batch_of_each_of_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "few").write_text("\n".join(json.dumps({"problem": str(i), "answer": "1"}) for i in range(9)))
    with pytest.raises(UserError, match=r"rollout.problems = 16 is more than the 8 training problems of .*few"):
        mixed(f"glyph:A+jsonl:{tmp_path / 'few'}")
