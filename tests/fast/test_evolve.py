"""One GEPA cycle: what it asks for, whom it lets in, and what it writes down; with every trap of gepa that was met."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from gepa.core.state import GEPAState
from gepa.gepa_utils import find_dominator_programs

from fst_fast.fast.evolve import Minibatches, evolve
from fst_fast.fast.lineage import summary
from fst_fast.fast.population import Member
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage
from fst_fast.records import Problem, Prompt, Rollout, Verdict
from fst_fast.seeding import stream
from tests.fast.toys import Evaluations, Scripted, config, cycle, knows, learn_one_word, words

SCORING = words("red", "green", "blue", prefix="s")
TRAINING = words("red", "green", "blue", "red", "green", "blue", prefix="t")


def unchanged(request: ReflectionRequest) -> str:
    return request.prompt.text


def counting(request: ReflectionRequest) -> str:
    return f"{request.prompt.text} {request.seed}"


# ----------------------------------------------------------------------------------------------------- rollouts


def test_the_whole_pool_is_scored_afresh_in_one_call_and_no_rollout_is_made_twice() -> None:
    evolution, evaluations = cycle(["a", "b red", "c"], SCORING, TRAINING, Scripted(unchanged))
    pairs = [(prompt.text, problem.id) for prompt, problem in evaluations.calls[0]]
    assert pairs == [(text, p.id) for text in ("a", "b red", "c") for p in SCORING]
    scored = Counter((prompt, p.id) for call in evaluations.calls for prompt, p in call if p in SCORING)
    assert set(scored.values()) == {1}
    assert evolution.rollouts == sum(map(len, evaluations.calls))


def test_rounds_make_one_call_each_for_parents_for_children_and_for_the_accepted() -> None:
    evolution, evaluations = cycle(["seed"], SCORING, TRAINING, Scripted(learn_one_word), proposals=3, parallel=3)
    accepted = sum(c.status == "accepted" for c in evolution.candidates)
    assert accepted > 0
    tried = sum(c.status in ("accepted", "rejected") for c in evolution.candidates)
    assert [len(call) for call in evaluations.calls] == [3, 3 * 2, tried * 2, accepted * 3]
    assert [{p.id[0] for _, p in call} for call in evaluations.calls] == [{"s"}, {"t"}, {"t"}, {"s"}]


@pytest.mark.parametrize(("proposals", "parallel"), [(1, 4), (4, 4), (7, 3), (24, 8), (5, 1)])
def test_a_cycle_makes_exactly_the_proposals_asked_for(proposals: int, parallel: int) -> None:
    reflector = Scripted(counting)
    evolution, _ = cycle(["seed"], SCORING, TRAINING, reflector, proposals=proposals, parallel=parallel)
    assert len(evolution.candidates) == proposals
    assert [c.index for c in evolution.candidates] == list(range(proposals))
    assert max(map(len, reflector.batches)) == min(proposals, parallel)
    assert evolution.reflection == ReflectionUsage(calls=proposals)
    assert len({request.seed for request in reflector.requests}) == proposals


def test_no_proposals_rescore_the_pool_and_nothing_else() -> None:
    evolution, evaluations = cycle(["a", "b red"], SCORING, TRAINING, Scripted(unchanged), proposals=0)
    assert [len(call) for call in evaluations.calls] == [6]
    assert [(m.prompt.text, sum(m.scores.values())) for m in evolution.pool] == [("b red", 1), ("a", 0)]


def test_parents_that_solve_their_minibatch_are_skipped_and_the_cycle_still_ends() -> None:
    reflector = Scripted(unchanged)
    evolution, evaluations = cycle(["red green blue"], SCORING, words(*["red"] * 99), reflector, proposals=8)
    assert evolution.candidates == ()
    assert reflector.batches == []
    assert evolution.skipped == 16  # twice the proposals at most
    assert evolution.rollouts == sum(map(len, evaluations.calls)) == 3 + 16 * 2


def test_skipped_parents_are_made_up_for() -> None:
    problems = words("red", "red", "red", "green")  # "red" solves two of three minibatches
    evolution, _ = cycle(["red"], SCORING, problems, Scripted(counting), proposals=4, parallel=4, minibatch=1)
    assert evolution.skipped > 0
    assert len(evolution.candidates) > 1


def test_scores_belong_to_the_scoring_problems_whatever_the_training_problems_are_called() -> None:
    scoring, training = words("red", "green", prefix="x"), words("green", "red", "blue", prefix="x")
    evolution, _ = cycle(["red", "blue"], scoring, training, Scripted(counting), newly_solved=9)
    assert {m.prompt.text: dict(m.scores) for m in evolution.pool[:2]} == {
        "red": {"x0:red": 1.0, "x1:green": 0.0},
        "blue": {"x0:red": 0.0, "x1:green": 0.0},
    }


def test_repeated_problems_and_prompts_are_taken_once() -> None:
    evolution, evaluations = cycle(
        ["a", " a\n", "a b"], [*SCORING, *SCORING], TRAINING, Scripted(unchanged), proposals=0
    )
    assert len(evaluations.calls[0]) == 2 * len(SCORING)
    assert len(evolution.pool) == 2


def test_nothing_is_printed_and_no_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cycle(["seed"], SCORING, TRAINING, Scripted(learn_one_word), proposals=8)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- selection


def test_a_child_that_improves_joins_the_pool_with_its_parent_cycle_and_scores() -> None:
    evolution, _ = cycle(["seed"], SCORING, TRAINING, Scripted(learn_one_word), proposals=12, number=3)
    best = evolution.pool[0]
    assert sorted(best.prompt.text.split()[1:]) == ["blue", "green", "red"]
    assert dict(best.scores) == {"s0:red": 1.0, "s1:green": 1.0, "s2:blue": 1.0}
    assert best.cycle == 3
    assert evolution.best == best.prompt == evolution.population[0]
    by_id = {c.to_dict()["id"]: c for c in evolution.candidates if c.status == "accepted"}
    while best.parent is not None:
        candidate = by_id[best.prompt.id]
        assert (candidate.parent, candidate.cycle) == (best.parent, 3)
        assert sum(candidate.child_scores) > sum(candidate.parent_scores)
        best = next(m for m in evolution.pool if m.prompt.id == best.parent)
    assert best.prompt.text == "seed"
    assert best.cycle == 0


def test_a_child_that_is_no_better_is_rejected_after_its_minibatch_only() -> None:
    evolution, evaluations = cycle(["seed"], SCORING, TRAINING, Scripted(counting))
    assert {c.status for c in evolution.candidates} == {"rejected"}
    assert all(c.child_scores == c.parent_scores == (0.0, 0.0) for c in evolution.candidates)
    assert [m.prompt.text for m in evolution.pool] == ["seed"]
    assert len(evaluations.calls) == 3


GRADED = [Problem(name, {"word": name}) for name in ("one", "two", "three", "four")]


def graded(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
    """The parent has .9 everywhere; the child has 1 on two problems and .5 on the others: a lower sum."""
    if prompt.text == "parent":
        return "", Verdict(0.9, "nearly")
    return "", Verdict(1.0, "right") if problem.id in ("one", "two") else Verdict(0.5, "half")


@pytest.mark.parametrize(("newly_solved", "status"), [(2, "accepted"), (3, "rejected")])
def test_a_child_with_a_lower_sum_is_let_in_when_it_newly_solves_enough(newly_solved: int, status: str) -> None:
    evolution, _ = cycle(
        ["parent"],
        GRADED,
        GRADED,
        Scripted(lambda _: "child"),
        graded,
        proposals=1,
        minibatch=4,
        newly_solved=newly_solved,
    )
    (candidate,) = evolution.candidates
    assert sum(candidate.child_scores) < sum(candidate.parent_scores)
    assert candidate.status == status
    assert ("child" in [m.prompt.text for m in evolution.pool]) == (status == "accepted")


def test_problems_that_the_parent_solves_too_are_not_newly_solved() -> None:
    def answer(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        return "", Verdict(float(problem.id != "one"), "")

    evolution, _ = cycle(
        ["parent"], GRADED, GRADED, Scripted(lambda _: "child"), answer, proposals=1, minibatch=4, newly_solved=1
    )
    assert [c.status for c in evolution.candidates] == ["rejected"]


@pytest.mark.parametrize("better", [("one", "two"), ("two", "one")])
def test_the_same_rewards_on_other_problems_are_no_improvement(better: tuple[str, str]) -> None:
    """Added one after the other, .3 + .2 + .1 is less than .1 + .2 + .3."""
    rewards = {
        "parent": dict(zip(better, (0.3, 0.1), strict=True)),
        "child": dict(zip(better, (0.1, 0.3), strict=True)),
    }

    def answer(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        return "", Verdict(rewards[prompt.text].get(problem.id, 0.2), "")

    evolution, _ = cycle(
        ["parent"], GRADED[:3], GRADED[:3], Scripted(lambda _: "child"), answer, proposals=1, minibatch=3
    )
    assert [c.status for c in evolution.candidates] == ["rejected"]


def test_pool_and_population_are_the_greedy_coverage_of_all_members() -> None:
    texts = ["red", "green", "red green", "blue x", "blue y", "none"]
    evolution, _ = cycle(texts, SCORING, TRAINING, Scripted(unchanged), proposals=0, pool=3, population=2)
    assert [m.prompt.text for m in evolution.pool] == ["red green", "blue x", "blue y"]
    assert [p.text for p in evolution.population] == ["red green", "blue x"]
    assert [Member.from_dict(m.to_dict()) for m in evolution.pool] == list(evolution.pool)


def test_parents_are_drawn_from_the_pareto_front_as_often_as_they_are_best() -> None:
    scoring = words("red", "green", "blue", "pink", prefix="s")
    texts = ["red green blue", "pink", "red", "none"]
    reflector = Scripted(counting)
    cycle(texts, scoring, words(*["never"] * 60), reflector, proposals=400, parallel=8, minibatch=1)
    drawn = Counter(request.prompt.text for request in reflector.requests)
    assert set(drawn) == {"red green blue", "pink"}
    assert 0.68 < drawn["red green blue"] / 400 < 0.82
    fronts: dict[str, set[int]] = {"red": {0, 2}, "green": {0}, "blue": {0}, "pink": {1}}
    assert set(find_dominator_programs(fronts, [0.75, 0.25, 0.25, 0])) == {0, 1}  # what gepa's own selector keeps


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (None, "failed"),
        ("", "empty"),
        (" \n\t", "empty"),
        ("\x00\x07\ud800", "empty"),
        ("x" * 101, "too long"),
        ("does not fit", "too long"),
        ("  seed\n", "duplicate"),
        ("other  prompt", "duplicate"),
    ],
)
def test_a_refused_proposal_costs_no_rollout_and_is_written_down(text: str | None, status: str) -> None:
    evolution, evaluations = cycle(
        ["seed", "other\n prompt"],
        SCORING,
        TRAINING,
        Scripted(lambda _: text),
        proposals=2,
        max_prompt_chars=100,
        fits=lambda prompt: "fit" not in prompt.text,
    )
    assert [c.status for c in evolution.candidates] == [status] * 2
    assert all(c.child_scores == () and c.parent_scores == (0.0, 0.0) for c in evolution.candidates)
    assert len(evaluations.calls) == 2  # scoring and parents
    assert len(evolution.pool) == 2


def test_the_same_text_proposed_twice_in_a_round_is_tried_once() -> None:
    evolution, _ = cycle(["seed"], SCORING, TRAINING, Scripted(lambda _: "new"), proposals=3, parallel=3)
    assert [c.status for c in evolution.candidates] == ["rejected", "duplicate", "duplicate"]


def test_a_text_rejected_in_one_round_may_be_tried_again_in_another() -> None:
    evolution, _ = cycle(["seed"], SCORING, TRAINING, Scripted(lambda _: "new"), proposals=2, parallel=1)
    assert [c.status for c in evolution.candidates] == ["rejected", "rejected"]


def test_one_bad_answer_does_not_cost_the_others_of_its_round() -> None:
    reflector = Scripted(lambda request: None if request is reflector.batches[0][1] else counting(request))
    evolution, _ = cycle(["seed"], SCORING, TRAINING, reflector, proposals=3, parallel=3)
    assert [c.status for c in evolution.candidates] == ["rejected", "failed", "rejected"]
    said = summary(evolution)
    assert (said["failed"], said["failure"]) == (1, evolution.candidates[1].note)
    fine, _ = cycle(["seed"], SCORING, TRAINING, Scripted(counting), proposals=3, parallel=3)
    assert "failed" not in summary(fine)


def test_texts_are_kept_as_data_but_for_characters_that_cannot_be_shown() -> None:
    hostile = "say </script><img src=x onerror=alert(1)> {0} %s ${HOME}\r\n\x1b[31m red\ud800"
    shown = "say </script><img src=x onerror=alert(1)> {0} %s ${HOME}\n[31m red"
    evolution, _ = cycle(["seed"], SCORING, TRAINING, Scripted(lambda _: hostile), proposals=8)
    assert shown in [m.prompt.text for m in evolution.pool]
    lines = [json.loads(json.dumps(c.to_dict())) for c in evolution.candidates]
    assert {line["text"] for line in lines} == {shown}
    assert {line["id"] for line in lines} == {Prompt(shown).id}


def test_the_lineage_tells_what_the_reflector_read_and_said() -> None:
    def complain(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        return "", Verdict(0.0, f"{problem.data['word']} " + "x" * 2000)

    evolution, _ = cycle(["seed"], SCORING, TRAINING, Scripted(lambda _: "y" * 5000), complain, minibatch=6)
    candidate = evolution.candidates[0]
    assert sorted(candidate.problems) == sorted(p.id for p in TRAINING)
    assert candidate.parent == Prompt("seed").id
    assert candidate.note == "as the script says"
    assert len(candidate.feedback) == 3
    assert {f.split()[0] for f in candidate.feedback} <= {"red", "green", "blue"}
    assert all(len(f) < 560 and "characters left out" in f for f in candidate.feedback)

    evolution, _ = cycle(["seed"], SCORING, TRAINING, Scripted(lambda _: "y" * 10**6), max_prompt_chars=100)
    assert len(evolution.candidates[0].text) < 160


def test_the_lineage_shows_distinct_feedback_of_failures() -> None:
    reflector = Scripted(counting)
    problems = words("red", "pink", "pink", "pink")
    evolution, _ = cycle(["red"], SCORING, problems, reflector, proposals=1, minibatch=4)
    assert evolution.candidates[0].feedback == ("should say pink",)


def test_reflection_is_accounted_for_by_cycle() -> None:
    reflector = Scripted(counting)
    for _ in range(2):
        evolution, _ = cycle(["seed"], SCORING, TRAINING, reflector, proposals=3)
        assert evolution.reflection == ReflectionUsage(calls=3)
    assert reflector.usage == ReflectionUsage(calls=3)  # of the last cycle


# ------------------------------------------------------------------------------------------------------ slices


def sliced(prefix: str = "", **sizes: int) -> list[Problem]:
    return [Problem(f"{prefix}{s}{i}", {"word": s}, slice=s) for s, n in sizes.items() for i in range(n)]


def test_each_minibatch_of_a_sliced_task_comes_from_one_slice_and_slices_take_turns() -> None:
    reflector = Scripted(counting)
    problems = sliced(a=20, b=8, c=9)
    cycle(["seed"], problems, problems, reflector, proposals=12, minibatch=4)
    seen = [{r.problem.slice for r in request.rollouts} for request in reflector.requests]
    assert Counter(frozenset(s) for s in seen) == {frozenset("a"): 4, frozenset("b"): 4, frozenset("c"): 4}


def test_slices_smaller_than_a_minibatch_share_one() -> None:
    minibatches = Minibatches(sliced(a=8, b=1, c=1, d=2), 4, stream(0))
    drawn = [sorted(p.slice for p in minibatches.draw()) for _ in range(4)]
    assert sorted(drawn) == [["a"] * 4, ["a"] * 4, ["b", "c", "d", "d"], ["b", "c", "d", "d"]]


def test_minibatches_deal_all_problems_before_one_comes_again() -> None:
    problems = words(*"abcdefg")
    minibatches = Minibatches([*problems, *problems], 2, stream(0))
    first = [p.id for _ in range(3) for p in minibatches.draw()]
    assert len(set(first)) == 6
    assert len({p.id for p in minibatches.draw()}) == 2
    assert len(Minibatches(problems, 20, stream(0)).draw()) == 7


def test_minibatches_deal_the_first_ones_before_all_others() -> None:
    problems = words(*"abcdefgh")
    first = {p.id for p in problems[5:]}
    minibatches = Minibatches(problems, 2, stream(0), first)
    drawn = [p.id for _ in range(4) for p in minibatches.draw()]
    assert set(drawn[:3]) == first
    assert len(set(drawn)) == 8


def test_parents_come_from_the_front_of_the_minibatch_s_slice() -> None:
    reflector = Scripted(counting)

    def only_when_scored(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        return "", Verdict(float(problem.slice in prompt.text.split() and problem.id.startswith("s")), "")

    scoring, training = sliced("s", a=6, b=2), sliced("t", a=4, b=4)
    cycle(["knows a", "knows b"], scoring, training, reflector, only_when_scored, proposals=16)
    pairs = {(r.prompt.text.split()[1], r.rollouts[0].problem.slice) for r in reflector.requests}
    assert pairs == {("a", "a"), ("b", "b")}


def test_a_slice_that_nobody_solves_starts_from_anyone() -> None:
    reflector = Scripted(counting)
    cycle(["word a", "seed"], sliced("s", a=6, b=6), sliced("t", b=40), reflector, proposals=16)
    assert {r.prompt.text.split()[0] for r in reflector.requests} == {"word", "seed"}


# ---------------------------------------------------------------------------------------------------- the traps


class Broken(Exception):
    pass


def test_an_error_while_scoring_propagates() -> None:
    def fail(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        raise Broken

    with pytest.raises(Broken):
        cycle(["seed"], SCORING, TRAINING, Scripted(unchanged), fail)


def test_an_error_while_evaluating_a_child_propagates() -> None:
    def fail(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        if prompt.text != "seed":
            raise Broken
        return knows(prompt, problem)

    with pytest.raises(Broken):
        cycle(["seed"], SCORING, TRAINING, Scripted(counting), fail)


def test_an_error_of_the_reflector_propagates_and_it_is_not_called_again() -> None:
    calls: list[int] = []

    def fail(request: ReflectionRequest) -> str:
        calls.append(1)
        raise Broken

    with pytest.raises(Broken):
        cycle(["seed"], SCORING, TRAINING, Scripted(fail))
    assert len(calls) == 1


def test_a_reflector_that_forgets_an_answer_is_an_error() -> None:
    class Forgetful(Scripted):
        def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
            return super().reflect(requests)[1:]

    with pytest.raises(ValueError, match="shorter"):
        cycle(["seed"], SCORING, TRAINING, Forgetful(counting))


def test_an_error_while_the_pool_is_registered_propagates(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise Broken

    monkeypatch.setattr(GEPAState, "update_state_with_new_program", fail)
    reflector = Scripted(unchanged)
    with pytest.raises(Broken):
        cycle(["a", "b"], SCORING, TRAINING, reflector)
    assert reflector.batches == []  # at once


def test_a_gepa_that_loses_the_pool_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GEPAState, "update_state_with_new_program", lambda *_, **__: 1)
    with pytest.raises(AssertionError, match="lost the pool"):
        cycle(["a", "b"], SCORING, TRAINING, Scripted(unchanged))


@pytest.mark.parametrize("wrong", [lambda rollouts: rollouts[1:], lambda rollouts: rollouts[::-1]])
def test_rollouts_that_do_not_match_their_pairs_are_an_error(wrong: object) -> None:
    class Wrong(Evaluations):
        def __call__(self, pairs: Sequence[tuple[Prompt, Problem]], scoring: bool) -> list[Rollout]:
            return wrong(super().__call__(pairs, scoring))  # type: ignore[operator]

    with pytest.raises(ValueError, match="one rollout per pair"):
        evolve(
            [Member(Prompt("a"))],
            SCORING,
            TRAINING,
            Wrong(knows),
            Scripted(unchanged),
            config(),
            proposals=4,
            seed=0,
            cycle=0,
        )


@pytest.mark.parametrize(("pool", "scoring", "training"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_arguments_are_an_error(pool: int, scoring: int, training: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        cycle(["a"][:pool], SCORING[:scoring], TRAINING[:training], Scripted(unchanged))


# -------------------------------------------------------------------------------------------------- determinism


def test_the_same_arguments_give_the_same_evolution_and_the_same_rollouts() -> None:
    first, asked = cycle(["seed", "x"], SCORING, TRAINING, Scripted(learn_one_word), proposals=12, seed=5, number=2)
    second, again = cycle(["seed", "x"], SCORING, TRAINING, Scripted(learn_one_word), proposals=12, seed=5, number=2)
    assert first == second
    assert asked.calls == again.calls


@pytest.mark.parametrize(("seed", "number"), [(6, 2), (5, 3)])
def test_another_seed_or_cycle_draws_other_minibatches(seed: int, number: int) -> None:
    _, asked = cycle(["seed", "x"], SCORING, TRAINING, Scripted(counting), proposals=12, seed=5, number=2)
    _, again = cycle(["seed", "x"], SCORING, TRAINING, Scripted(counting), proposals=12, seed=seed, number=number)
    minibatches = [[p.id for _, p in call] for call in asked.calls]
    assert minibatches != [[p.id for _, p in call] for call in again.calls]


def test_the_evaluations_of_the_pool_and_of_accepted_children_are_full_and_no_minibatch_is() -> None:
    evaluate = Evaluations(knows)
    settings = replace(config(), minibatch=2, parallel=1)
    grow = Scripted(lambda request: f"{request.prompt.text} {request.rollouts[0].problem.data['word']}")
    run = evolve([Member(Prompt("a"))], SCORING, TRAINING, evaluate, grow, settings, proposals=3, seed=0, cycle=0)
    assert any(c.status == "accepted" for c in run.candidates)
    for call, full in zip(evaluate.calls, evaluate.scoring, strict=True):
        assert full == (len(call) % len(SCORING) == 0), call
    assert evaluate.scoring.count(True) == 1 + sum(c.status == "accepted" for c in run.candidates)


def test_scoring_is_told_from_minibatches_even_of_the_same_problems() -> None:
    evaluate = Evaluations(knows)
    evolve(
        [Member(Prompt("a"))], SCORING, SCORING, evaluate, Scripted(counting), config(minibatch=3),
        proposals=2, seed=0, cycle=0,
    )  # fmt: skip
    assert evaluate.scoring == [True, False, False]
