"""Small real parts for the tests of the fast channel: responders that follow their prompt, reflectors, rollouts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from fst_fast.config import FastConfig
from fst_fast.fast.evolve import Evolution, evolve
from fst_fast.fast.population import Member
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.tasks.glyph import ASPECTS, GlyphTask, solve

Answer = Callable[[Prompt, Problem], tuple[str, Verdict]]


def rollout(prompt: Prompt, problem: Problem, response: str, verdict: Verdict) -> Rollout:
    return Rollout(
        prompt, problem, 0, "gepa", (), (), (), (), SamplingParams(), "stop", "toy", response=response, verdict=verdict
    )


class Evaluations:
    """An `Evaluate` that remembers its calls."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.calls: list[list[tuple[Prompt, Problem]]] = []
        self.scoring: list[bool] = []  # of each call

    def __call__(self, pairs: Sequence[tuple[Prompt, Problem]], scoring: bool) -> list[Rollout]:
        self.calls.append(list(pairs))
        self.scoring.append(scoring)
        return [rollout(prompt, problem, *self.answer(prompt, problem)) for prompt, problem in pairs]


def words(*names: str, prefix: str = "p", slice: str = "") -> list[Problem]:
    """Problems that a prompt solves when it contains their word."""
    return [Problem(f"{prefix}{i}:{name}", {"word": name}, slice) for i, name in enumerate(names)]


def knows(prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
    word = problem.data["word"]
    if word in prompt.text.split():
        return word, Verdict(1.0, "right")
    return "?", Verdict(0.0, f"should say {word}")


class Scripted:
    """A reflector that answers with what `write` makes of each request."""

    def __init__(self, write: Callable[[ReflectionRequest], str | None]):
        self.write = write
        self.usage = ReflectionUsage()
        self.batches: list[list[ReflectionRequest]] = []

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        self.batches.append(list(requests))
        self.usage += ReflectionUsage(calls=len(requests))
        return [Reflection(self.write(request), "as the script says") for request in requests]

    @property
    def requests(self) -> list[ReflectionRequest]:
        return [request for batch in self.batches for request in batch]


def learn_one_word(request: ReflectionRequest) -> str:
    """Adds the word that one of the failures, drawn with the request's seed, should have had."""
    missing = [r.problem.data["word"] for r in request.rollouts if r.reward < 1]
    return f"{request.prompt.text} {random.Random(request.seed).choice(missing)}"


def config(**fields: object) -> FastConfig:
    return FastConfig(
        **({"minibatch": 2, "parallel": 4, "population": 2, "pool": 10, "newly_solved": 2, "race": False} | fields)
    )  # type: ignore[arg-type]


def cycle(
    texts: Sequence[str],
    scoring: Sequence[Problem],
    training: Sequence[Problem],
    reflector: Scripted,
    answer: Answer = knows,
    *,
    proposals: int = 4,
    seed: int = 0,
    number: int = 0,
    fits: Callable[[Prompt], bool] = lambda _: True,
    **fields: object,
) -> tuple[Evolution, Evaluations]:
    """One evolve cycle over prompts `texts`, and the rollouts it asked for."""
    evaluations = Evaluations(answer)
    pool = [Member(Prompt(text)) for text in texts]
    evolution = evolve(
        pool,
        scoring,
        training,
        evaluations,
        reflector,
        config(**fields),
        proposals=proposals,
        seed=seed,
        cycle=number,
        fits=fits,
    )
    return evolution, evaluations


MEANING = {w: (aspect, value) for aspect, values in ASPECTS.items() for value, ws in values.items() for w in ws}


class NoisyReader:
    """A policy for the glyph task: follows each stated aspect with probability .88, guesses the others."""

    def __init__(self, task: GlyphTask, seed: int):
        self.task, self.rng = task, random.Random(seed)

    def __call__(self, prompt: Prompt, problem: Problem) -> tuple[str, Verdict]:
        rule = {aspect: self.rng.choice(list(values)) for aspect, values in ASPECTS.items()}
        for sentence in re.split(r"(?<=\.)\s+", prompt.text):
            if sentence in MEANING and self.rng.random() < 0.88:
                aspect, value = MEANING[sentence]
                rule[aspect] = value
        response = solve(tuple(rule.values()), problem.data["letters"])
        return response, self.task.verify(problem, response)
