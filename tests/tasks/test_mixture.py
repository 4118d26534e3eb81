"""Mixtures: what the sign between two tasks means, and that every problem goes to the task it is from."""

import json
from pathlib import Path

import pytest

from fst_fast.errors import UserError
from fst_fast.tasks import glyph, make_task
from fst_fast.tasks.mixture import Mixture


def mixture(spec: str) -> Mixture:
    task = make_task(spec, seed=0)
    assert isinstance(task, Mixture)
    return task


@pytest.mark.parametrize(
    ("spec", "at", "weights"),
    [
        ("glyph:A+glyph:B", 0.3, [0.5, 0.5]),
        ("glyph:A+glyph:B+glyph:A", 1.0, [2 / 3, 1 / 3]),
        ("glyph:A>glyph:B", 0.0, [1, 0]),
        ("glyph:A>glyph:B", 0.25, [0.75, 0.25]),
        ("glyph:A>glyph:B", 1.0, [0, 1]),
        ("glyph:A>glyph:B>glyph:C", 0.25, [0.5, 0.5, 0]),
        ("glyph:A>glyph:B>glyph:C", 0.5, [0, 1, 0]),
        ("glyph:A+glyph:B>glyph:C", 0.5, [0.25, 0.25, 0.5]),
        ("glyph:A>>glyph:B", 0.499, [1, 0]),
        ("glyph:A>>glyph:B", 0.5, [0, 1]),
        ("glyph:A>>glyph:B>glyph:C", 0.75, [0, 0.5, 0.5]),
        ("glyph:A>>glyph:B>glyph:C", 1.0, [0, 0, 1]),
    ],
)
def test_the_signs_say_who_is_drawn_when(spec: str, at: float, weights: list[float]) -> None:
    assert mixture(spec).weights(at) == pytest.approx(weights)


def test_every_problem_is_posed_and_verified_by_its_own_task() -> None:
    both, star = mixture("glyph:A+star_graph:2x2"), make_task("star_graph:2x2", seed=0)
    for part in both.parts:
        for p in part.validation[:3]:
            assert both.messages("hi.", p) == part.messages("hi.", p)
    p = star.validation[0]
    assert both.verify(p, ",".join(map(str, p.data["path"]))).reward == 1
    assert both.verify(p, "no").feedback == star.verify(p, "no").feedback


def test_a_mixture_holds_all_problems_of_its_tasks_and_holds_out_by_turns() -> None:
    both, a, b = mixture("glyph:A>glyph:B"), make_task("glyph:A", seed=0), make_task("glyph:B", seed=0)
    assert both.train == [*a.train, *b.train]
    assert both.validation[:4] == [a.validation[0], b.validation[0], a.validation[1], b.validation[1]]
    assert len(both.validation) == 256


def test_the_seed_prompt_names_no_task_unless_all_share_it() -> None:
    assert mixture("glyph:A+glyph:B").seed_prompt == glyph.SEED_PROMPT
    assert mixture("glyph:A+star_graph:2x2").seed_prompt == "Solve the problem."
    assert mixture("glyph:A+glyph:B").phrasebook == make_task("glyph:A", seed=0).phrasebook


def test_a_path_may_hold_the_signs(tmp_path: Path) -> None:
    path = tmp_path / "c++ >> d>e.jsonl"
    path.write_text("\n".join(json.dumps({"problem": str(i), "answer": "1"}) for i in range(3)))
    assert make_task(f"jsonl:{path}", seed=0).name == f"jsonl:{path}"
    assert [part.name for part in mixture(f"jsonl:{path}+glyph:A").parts] == [f"jsonl:{path}", "glyph:A"]


def test_an_unknown_part_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="task 'clyph:B': there is no such task"):
        make_task("glyph:A+clyph:B", seed=0)
