"""The fast channel end to end on the glyph task: real verifier, phrase-book reflector, a noisy reader of prompts.

The reader follows each stated aspect with probability .88, so the whole rule in words earns about .63: .88⁵, and some
lucky guesses.
"""

from statistics import fmean

import pytest

from fst_fast.fast.evolve import evolve
from fst_fast.fast.phrasebook import PhrasebookReflector
from fst_fast.fast.population import Member
from fst_fast.records import Problem, Prompt, Verdict
from fst_fast.tasks.glyph import GlyphTask
from tests.fast.toys import Answer, Evaluations, NoisyReader, config

SEEDS = range(8)


def run(task: GlyphTask, answer: Answer, proposals: tuple[int, ...], *, seed: int, population: int) -> list[Prompt]:
    """The population after some cycles, each on problems of its own."""
    evaluations, reflector = Evaluations(answer), PhrasebookReflector(task.phrasebook)
    fast = config(minibatch=8, parallel=8, population=population)
    pool: tuple[Member, ...] = (Member(Prompt(task.seed_prompt)),)
    for cycle, n in enumerate(proposals):
        ahead = task.train[cycle * 160 : (cycle + 1) * 160]
        evolution = evolve(pool, ahead[:24], ahead, evaluations, reflector, fast, proposals=n, seed=seed, cycle=cycle)
        pool = evolution.pool
    return list(evolution.population)


def worth(task: GlyphTask, prompt: Prompt, seed: int = 99) -> dict[str, float]:
    """Slice → mean reward of `prompt` on held-out problems."""
    reader = NoisyReader(task, seed)
    slices: dict[str, list[float]] = {}
    for problem in [*task.validation, *task.train[-400:]]:
        slices.setdefault(problem.slice, []).append(reader(prompt, problem)[1].reward)
    return {name: fmean(rewards) for name, rewards in slices.items()}


def test_24_proposals_find_a_prompt_that_states_the_rule() -> None:
    found = []
    for seed in SEEDS:
        task = GlyphTask("A", seed)
        best, *_ = run(task, NoisyReader(task, seed), (24,), seed=seed, population=4)
        found.append(worth(task, best)[""])
    assert fmean(found) > 0.5
    assert sum(reward > 0.55 for reward in found) >= 7


def test_later_cycles_keep_what_was_found() -> None:
    found = []
    for seed in SEEDS:
        task = GlyphTask("A", seed)
        best, *_ = run(task, NoisyReader(task, seed), (24, 8, 8, 8), seed=seed, population=4)
        found.append(worth(task, best)[""])
    assert min(found) > 0.55


def test_without_feedback_nothing_is_learned() -> None:
    task = GlyphTask("A", 0)
    reader = NoisyReader(task, 0)

    def silent(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        response, verdict = reader(prompt, problem)
        return response, Verdict(verdict.reward, "")

    population = run(task, silent, (24, 8), seed=0, population=4)
    assert [p.text for p in population] == [task.seed_prompt]


@pytest.mark.parametrize(("population", "low", "high"), [(1, 0.25, 0.36), (2, 0.48, 0.65)])
def test_on_a_sliced_task_two_prompts_by_coverage_hold_a_specialist_for_each_slice(
    population: int, low: float, high: float
) -> None:
    covered = []
    for seed in SEEDS:
        task = GlyphTask("A/B", seed)
        prompts = run(task, NoisyReader(task, seed), (24, 8, 8, 8, 8, 8), seed=seed, population=population)
        assert len(prompts) == population
        by_slice = [worth(task, prompt) for prompt in prompts]
        covered.append(fmean(max(w[name] for w in by_slice) for name in by_slice[0]))
    assert low < fmean(covered) < high
