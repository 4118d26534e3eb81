"""The race: who drops out when, and that a blind race chooses a problem's prompts as if that problem were not there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fst_fast.fast.race import Race
from fst_fast.records import Problem, Prompt
from tests.fast.test_evolve import SCORING, TRAINING, counting
from tests.fast.toys import Scripted, cycle, learn_one_word, words


def problems(n: int) -> list[Problem]:
    return [Problem(f"x{i}", {}) for i in range(n)]


class Table:
    """Rewards by prompt and problem, and what was asked for."""

    def __init__(self, rewards: dict[str, Sequence[float]]):
        self.rewards = rewards
        self.calls: list[list[tuple[str, int]]] = []

    def __call__(self, pairs: Sequence[tuple[Prompt, Problem]]) -> list[float]:
        self.calls.append([(prompt.text, int(problem.id[1:])) for prompt, problem in pairs])
        return [self.rewards[prompt][i] for prompt, i in self.calls[-1]]


def prompts(table: Table) -> list[Prompt]:
    return [Prompt(text) for text in table.rewards]


def test_the_better_half_goes_on_after_a_quarter_and_after_half() -> None:
    table = Table({text: [0.1 * i] * 16 for i, text in enumerate("abcdefgh", 1)})
    race = Race(problems(16), table, keep=2, pauses=True, blind=False)
    race.enter(prompts(table))
    assert [({text for text, _ in call}, {i for _, i in call}) for call in table.calls] == [
        (set("abcdefgh"), {0, 1, 2, 3}),
        (set("efgh"), {4, 5, 6, 7}),
        (set("gh"), set(range(8, 16))),
    ]
    assert [len(call) for call in table.calls] == [8 * 4, 4 * 4, 2 * 8]
    assert [race.prompts[i].text for i in race.standing()] == list("hgfedcba")
    assert race.finished() == [6, 7]
    assert list(race.scores_of(0)) == ["x0", "x1", "x2", "x3"]


def test_never_fewer_than_keep_go_on_and_without_pauses_all_do() -> None:
    table = Table({text: np.random.default_rng(i).random(9).tolist() for i, text in enumerate("abcd")})
    race = Race(problems(9), table, keep=4, pauses=True, blind=False)
    race.enter(prompts(table))
    assert len(race.finished()) == 4
    race = Race(problems(9), table, keep=1, pauses=False, blind=False)
    race.enter(prompts(table))
    assert len(race.finished()) == 4
    assert len(table.calls[-1]) == 36


def test_a_specialist_goes_on_where_generalists_of_a_higher_mean_drop_out() -> None:
    table = Table(
        {"all but": [1, 1, 1, 0] * 4, "same": [1, 1, 1, 0] * 4, "weaker": [1, 1, 0, 0] * 4, "other": [0, 0, 0, 1] * 4}
    )
    race = Race(problems(16), table, keep=2, pauses=True, blind=False)
    race.enter(prompts(table))
    assert [race.prompts[i].text for i in race.finished()] == ["all but", "other"]


def test_newcomers_meet_those_before_them_who_are_not_asked_again() -> None:
    table = Table({"old": [0.5] * 8, "fine": [0.4] * 8, "bad": [0.1] * 8, "good": [0.9] * 8})
    race = Race(problems(8), table, keep=1, pauses=True, blind=False)
    race.enter([Prompt("old"), Prompt("fine")])
    race.enter([Prompt("bad"), Prompt("good")])
    asked = [pair for call in table.calls for pair in call]
    assert len(asked) == len(set(asked))
    assert [len(race.scores_of(i)) for i in range(4)] == [8, 2, 2, 8]
    assert [race.prompts[i].text for i in race.standing()] == ["good", "old", "fine", "bad"]


@pytest.mark.parametrize("pauses", [True, False])
def test_each_blind_choice_is_that_of_a_race_without_the_problem_s_scores(pauses: bool) -> None:
    """Whatever a prompt would have scored on problem x, x's group gets the same prompts."""
    rng = np.random.default_rng(7)
    differ = 0
    for _ in range(20):
        n = int(rng.integers(1, 13))
        rewards = {f"p{i}": rng.integers(0, 2, n).astype(float) for i in range(9)}

        def run(rewards: dict[str, np.ndarray], n: int = n) -> tuple[Race, dict[str, tuple[Prompt, ...]]]:
            table = Table({text: row.tolist() for text, row in rewards.items()})
            race = Race(problems(n), table, keep=2, pauses=pauses, blind=True)
            everyone = prompts(table)
            race.enter(everyone[:6])
            race.enter(everyone[6:])
            return race, race.blind_populations(2)

        race, before = run(rewards)
        for x in range(n):
            changed = {text: row.copy() for text, row in rewards.items()}
            for row in changed.values():
                row[x] = rng.integers(0, 2)
            assert run(changed)[1][f"x{x}"] == before[f"x{x}"]
            for prompt in before[f"x{x}"]:
                assert f"x{x}" in race.scores_of(race.prompts.index(prompt))  # there is a rollout to reuse
            chosen = {race.prompts[i] for i in race.standing()[:2]}
            differ += set(before[f"x{x}"]) != chosen
    assert differ > 10  # the worlds are not all one


def test_the_world_that_sees_everything_races_the_same_with_and_without_the_blind_ones() -> None:
    rng = np.random.default_rng(3)
    rewards = {f"p{i}": rng.random(12).tolist() for i in range(8)}
    races = []
    for blind in (False, True):
        races.append(Race(problems(12), Table(rewards), keep=2, pauses=True, blind=blind))
        races[-1].enter([Prompt(text) for text in rewards])
    assert races[0].finished() == races[1].finished()
    assert races[0].standing()[:2] == races[1].standing()[:2]
    assert races[0].blind_populations(2) == {}


def test_a_cycle_races_its_pool_and_its_children() -> None:
    scoring = words(*["red", "green", "blue", "pink"] * 4, prefix="s")
    texts = ["red", "green", "red green", "none", "nothing", "void"]
    evolution, evaluations = cycle(
        texts, scoring, TRAINING, Scripted(learn_one_word), proposals=6, parallel=3, race=True, population=2
    )
    asked = [(p.text, x.id) for call, full in zip(evaluations.calls, evaluations.scoring, strict=True) if full
             for p, x in call]  # fmt: skip
    assert len(asked) == len(set(asked)) < 16 * (6 + sum(c.status == "accepted" for c in evolution.candidates))
    lengths = [len(m.scores) for m in evolution.pool]
    assert set(lengths) <= {4, 8, 16}
    assert lengths[:2] == [16, 16]
    assert min(lengths) == 4
    assert len(evolution.pool) >= 6  # who dropped out is carried on: the policy moves


def test_prompts_that_dropped_out_are_no_parents() -> None:
    scoring = words(*["red"] * 8, prefix="s")
    reflector = Scripted(counting)
    cycle(["red", "none"], scoring, words("blue", "pink"), reflector, proposals=8, race=True, population=1)
    assert {request.prompt.text.split()[0] for request in reflector.requests} == {"red"}


def test_blind_populations_are_as_large_as_there_are_prompts() -> None:
    race = Race(SCORING, lambda pairs: [0.0] * len(pairs), keep=4, pauses=True, blind=True)
    race.enter([Prompt("a"), Prompt("b")])
    assert race.blind_populations(4) == {x.id: (Prompt("a"), Prompt("b")) for x in SCORING}
