"""This machine's speed at a run's own work: some ten seconds of the embedded model's engine and learner."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import fmean

import torch

from fst_fast import checkpoint
from fst_fast.config import Config, stages
from fst_fast.model import load_model
from fst_fast.ranks import ALONE
from fst_fast.rates import Lengths
from fst_fast.records import Prompt, Rollout, SamplingParams, Verdict
from fst_fast.rollout import make_engine
from fst_fast.rollout.collect import Ask, Collector, Totals
from fst_fast.rollout.dispatch import Scheduler
from fst_fast.rollout.reuse import RolloutStore
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner
from fst_fast.slow.policy import Policy
from fst_fast.tasks import task_maker
from fst_fast.tasks.glyph import GlyphTask, state
from fst_fast.tasks.task import Task

SMALL, LARGE = 24, 256  # rollouts asked together, between which the line is drawn
ROUNDS = 6  # of all pieces in turn: what else the machine does in these seconds slows each of them alike


@dataclass(frozen=True)
class Line:
    """Seconds of a piece of work, linear in its size."""

    fixed: float
    each: float

    def __call__(self, size: float) -> float:
        return self.fixed + self.each * size if size else 0.0


@dataclass(frozen=True)
class Measured:
    """Seconds as measured here; the same questions as rates.Roofline answers."""

    lengths: Lengths
    rollouts: Line
    learning: Line
    loading: float
    gate: float
    saving: float

    def forward(self, count: float) -> float:
        return self.gate * count

    def learn(self, count: float, updates: int) -> float:
        return self.learning(count)

    def sync(self) -> float:
        return self.loading

    def checkpoint(self) -> float:
        return self.saving

    def reflect(self, proposals: float, at_once: float) -> float:
        return 0.0


def calibrate(config: Config) -> Measured:
    """Samples and learns with the embedded model as `config` would, under prompts like those GEPA finds (glyph)."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    model, base = load_model(""), load_model("")
    tasks = list(map(task_maker(config), (stage.task for stage in stages(config.stream))))
    policy = Policy(model, replace(config.slow, lr=0.0))  # learning changes nothing: every round samples alike
    learner, calls, versions, rng = Learner(policy, base, config.slow), count(), count(1), random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        scheduler = Scheduler([make_engine(config.rollout, model)])
        sampling = SamplingParams(config.rollout.temperature, config.rollout.max_new_tokens)
        collector = Collector(model, scheduler, RolloutStore(Path(scratch)), Totals(), sampling, config.seed)

        def sample(task: Task, n: int) -> list[Rollout]:
            prompts, each = _prompts(task, config, rng), config.rollout.group_size
            asks = [
                Ask(prompts[i % len(prompts)], task.train[i // each % len(task.train)], i // len(prompts))
                for i in range(n)
            ]
            return collector.collect(task, asks, purpose="eval", step=0, key=(next(calls),))

        saver = checkpoint.Saver(Path(scratch), ALONE, keep=1, background=False)
        every = [r for task in tasks for r in sample(task, LARGE)]  # also a warm-up
        # every group is given a gradient
        batch = every[: config.rollout.problems * config.rollout.group_size]
        groups = group_by_problem([replace(r, verdict=Verdict(float(i % 2), "")) for i, r in enumerate(batch)])
        few = max(1, len(groups) // 8)
        learner.step(groups[:few], rng)  # warm-up
        collector.engine.load_weights(model, next(versions))
        sampled_few, sampled_many, learned_few, learned_many, loading, gate, saving = _seconds(
            lambda: sample(tasks[0], SMALL),
            lambda: sample(tasks[0], LARGE),
            lambda: learner.step(groups[:few], rng),
            lambda: learner.step(groups, rng),
            lambda: collector.engine.load_weights(model, next(versions)),
            lambda: learner.log_ratios(every),
            lambda: saver.save(policy, {"step": 0, "best": "", "population": []}),
        )
    sampling_line = _line(SMALL, sampled_few, LARGE, sampled_many)
    each = len(batch) / len(groups)  # rollouts of a group
    learning_line = _line(few * each, learned_few, len(batch), learned_many)
    context = fmean(len(r.prompt_ids) for r in every)
    lengths = Lengths(context, context, fmean(len(r.response_ids) for r in every), config.rollout.max_new_tokens)
    return Measured(lengths, sampling_line, learning_line, loading, gate / len(every), saving)


def _prompts(task: Task, config: Config, rng: random.Random) -> list[Prompt]:
    """What the run will sample under: in the end a glyph task's rules in words; else the seed prompt stands for all."""
    if isinstance(task, GlyphTask) and config.mode in ("fst", "gepa"):
        rules = (task.rules * config.fast.population)[: config.fast.population]
        return [Prompt(state(rule, rng)) for rule in rules]
    return [Prompt(task.seed_prompt)]


def _line(small: float, a: float, large: float, b: float) -> Line:
    """Through `a` seconds at the size `small` and `b` at `large`."""
    each = (b - a) / max(1, large - small)
    return Line(max(0.0, a - each * small), each)


def _seconds(*pieces: Callable[[], object]) -> list[float]:
    """Mean seconds of each."""
    took: list[list[float]] = [[] for _ in pieces]
    for _ in range(ROUNDS):
        for seconds, work in zip(took, pieces, strict=True):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return [fmean(seconds) for seconds in took]
