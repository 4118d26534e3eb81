"""How much a run does, from its configuration, and how long that takes at a given speed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, Protocol

from fst_fast.config import INSTRUCTIONS, Config, Stage, evolves, pauses, proposals_of, stages
from fst_fast.rates import Lengths

# Measured in the default run, seed 0 (python -m fst_fast.train): 21 of 88 proposals, 606 of 1920 groups.
ACCEPTED = 0.24
LIVE = 0.32


@dataclass(frozen=True)
class Batch:
    """Rollouts asked together, so many times in the run; `beside`: in the room that the steps' own leave."""

    phase: Literal["rollout", "scoring", "minibatch", "eval"]
    rollouts: float
    times: float = 1
    beside: bool = False


@dataclass
class Work:
    """Everything a run does, as far as its configuration says."""

    steps: int = 0
    learned: float = 0  # rollouts a step trains on
    gated: float = 0  # rollouts checked for reuse
    reused: float = 0
    cycles: int = 0
    rounds: float = 0  # of proposals made together
    rounds_beside: float = 0  # of these, edited elsewhere while a step is done
    asked_ahead: int = 0  # steps whose rollouts start in the tail of those before
    proposals: float = 0
    evaluations: int = 0
    checkpoints: int = 0
    batches: list[Batch] = field(default_factory=list)

    def rollouts(self, *phases: str) -> float:
        return sum(b.rollouts * b.times for b in self.batches if b.phase in phases)


def work_of(config: Config, live: float) -> Work:
    """What the loop of train.py does, with an average cycle's luck: ACCEPTED of the proposals, dice for rewards."""
    work, pool = Work(), 0.0
    each = config.rollout.problems * config.rollout.group_size
    for stage in stages(config.stream):
        work.steps += stage.steps
        work.evaluations += -(-stage.steps // config.eval.every) + 1
        work.checkpoints += -(-stage.steps // config.checkpoint_every)
        fresh = pool == 0 or config.fast.at_switch == "reset"
        pool = 1.0 if fresh else pool + 1
        if evolves(config):
            for start in range(0, stage.steps, config.fast.every):
                pool = _cycle(work, config, pool, proposals_of(config, first=not start), stage, start)
        if config.mode != "gepa":
            work.batches.append(Batch("rollout", each, stage.steps))
            work.asked_ahead += asked_ahead(config, stage.steps)
    if config.mode == "rl-then-gepa":
        last = stages(config.stream)[-1]
        later = -(-last.steps // config.fast.every) - 1
        _cycle(work, config, pool, config.fast.first_proposals + later * config.fast.proposals, last, 0)
    if work.reused:  # they are not asked for
        work.batches.append(Batch("rollout", -work.reused / work.steps, work.steps))
    if config.mode != "gepa":
        work.learned = each * (1.0 if config.mode == "fst-distill" else live)
    alone = config.mode in ("rl", "rl-then-gepa", "fst-distill")  # one prompt is evaluated, the seed
    prompts = 1 if alone else config.fast.population + 1
    others = INSTRUCTIONS if "glyph" in config.stream and not config.model.path else 0
    size = config.eval.problems * config.eval.samples
    work.batches += [
        Batch("eval", size + others, 1),  # before the first cycle there is the seed prompt alone
        Batch("eval", prompts * size + others, work.evaluations - 1),
    ]
    work.checkpoints += 1
    return work


def _cycle(work: Work, config: Config, pool: float, proposals: int, stage: Stage, start: int) -> float:
    """Adds one GEPA cycle; the size of the pool after it."""
    fast = config.fast
    ahead = min(fast.every, stage.steps - start) * config.rollout.problems
    problems = min(fast.scoring_problems, ahead)
    rounds = -(-proposals // fast.parallel)
    accepted = ACCEPTED * proposals
    reuses = fast.reuse and config.mode == "fst"
    heats = 3 if fast.race else 1
    first, all_of_them = (scored(newcomers, problems, config) for newcomers in ((pool,), (pool, accepted)))
    pool_scores = Batch("scoring", first / heats)
    child_scores = Batch("scoring", (all_of_them - first) / heats / rounds)
    minibatch = Batch("minibatch", proposals / rounds * fast.minibatch)  # of the parents, and of their children
    elsewhere = [None] if fast.reflector == "openai" else []  # its edits take a step's time, too
    turns = [pool_scores] * heats + [minibatch, *elsewhere, minibatch, *[child_scores] * heats] * rounds
    beside = fast.every if fast.filler and config.mode == "fst" and start else 0  # a turn a step
    work.batches += [replace(turn, beside=i < beside) for i, turn in enumerate(turns) if turn]
    work.rounds_beside += turns[:beside].count(None)
    work.cycles += 1
    work.rounds += rounds
    work.proposals += proposals
    if reuses:
        reused = problems * min(int(fast.reuse_cap * config.rollout.group_size + 1e-9), fast.population)
        work.gated += reused
        work.reused += reused
    return min(float(max(fast.pool, fast.population)), pool + accepted)


def asked_ahead(config: Config, steps: int) -> int:
    """Of a stage's steps, those that rollout.lookahead lets begin before: not over a pause."""
    if not config.rollout.lookahead:
        return 0
    return sum(all(step % every for every in pauses(config)) for step in range(steps))


@cache  # most cycles of a run are alike
def scored(newcomers: tuple[float, ...], problems: int, config: Config) -> float:
    """Rollouts of the race that so many prompts enter, group after group: the real one, with dice for rewards."""
    from fst_fast.fast.race import Race
    from fst_fast.records import Problem, Prompt

    dice, asked, played = random.Random(0), 0, min(problems, 256)  # more differ in nothing but their number
    crowd = max(1.0, sum(newcomers) / 256)  # nor do more prompts

    def score(pairs: Sequence[tuple[Prompt, Problem]]) -> list[float]:
        nonlocal asked
        asked += len(pairs)
        return [float(dice.random() < 0.5) for _ in pairs]

    blind = config.fast.reuse and config.mode == "fst"
    race = Race([Problem(str(i), {}) for i in range(played)], score, keep=config.fast.population,
                pauses=config.fast.race, blind=blind)  # fmt: skip
    for group, size in enumerate(newcomers):
        if entering := round(size / crowd):
            race.enter([Prompt(f"{group} {i}") for i in range(entering)])
    return asked * problems / played * crowd


class Speed(Protocol):
    """Seconds of a run's pieces: rates.Roofline by arithmetic, calibrate.Measured by the clock."""

    @property
    def lengths(self) -> Lengths: ...
    def rollouts(self, count: float, /) -> float: ...
    def forward(self, count: float) -> float: ...
    def learn(self, count: float, updates: int) -> float: ...
    def sync(self) -> float: ...
    def checkpoint(self) -> float: ...
    def reflect(self, proposals: float, at_once: float) -> float: ...


def phases(work: Work, speed: Speed, config: Config) -> dict[str, float]:
    """Seconds of the whole run by the names the trainer's own records have (meter.py)."""
    seconds = dict.fromkeys(("rollout", "scoring", "minibatch", "eval"), 0.0)
    each = sum(b.rollouts * b.times for b in work.batches if b.phase == "rollout" or b.beside) / work.steps
    # two steps' rollouts side by side end about together; simulated, they take as long to 1 % (benchmarks/rollouts.py)
    ahead = min(speed.rollouts(each), speed.rollouts(2 * each) / 2)
    seconds["rollout"] = (work.steps - work.asked_ahead) * speed.rollouts(each) + work.asked_ahead * ahead
    for b in work.batches:
        if b.phase != "rollout" and not b.beside:
            seconds[b.phase] += b.times * speed.rollouts(b.rollouts)
    seconds["eval"] += work.evaluations * 2 * speed.forward(config.eval.problems)  # the exact KL
    seconds["gate"] = speed.forward(work.gated)
    seconds["learn"] = work.steps * speed.learn(work.learned, config.slow.minibatches) if work.learned else 0.0
    seconds["sync"] = work.steps * speed.sync()
    seconds["checkpoint"] = work.checkpoints * speed.checkpoint()
    each_round = work.proposals / work.rounds if work.rounds else 0
    if config.fast.reflector == "policy":
        edit = min(1.0, config.reflector.max_new_tokens / speed.lengths.longest)  # of a call's iterations
        seconds["reflect"] = work.rounds * edit * speed.rollouts(each_round)
    elif config.fast.reflector == "openai":
        reflect = speed.reflect(each_round, config.reflector.concurrency)
        step = sum(seconds[phase] for phase in ("rollout", "learn", "sync")) / work.steps
        left = max(0.0, reflect - step)  # to wait for when the step is done
        seconds["reflect"] = (work.rounds - work.rounds_beside) * reflect + work.rounds_beside * left
    return {phase: s for phase, s in seconds.items() if s}
