"""`python -m fst_fast.train`: the loop. Config in, run directory out.

Every step: problems × prompts → rollouts → groups → one slow step. Every T steps before that: one GEPA cycle on the
problems of the next T batches. Evaluation and checkpoints in between. Not here: several ranks, reuse of GEPA's
rollouts, vLLM (later parts replace pieces of this working system).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fst_fast import checkpoint
from fst_fast.cli import parse_train, read_config, run
from fst_fast.config import Config, Stage, check, stages, to_toml
from fst_fast.data import DataOrder
from fst_fast.errors import UserError
from fst_fast.evaluate import evaluate, held_out, retention_asks
from fst_fast.fast.evolve import Evolution, evolve
from fst_fast.fast.population import Member, distinct
from fst_fast.fast.reflection import ReflectionUsage
from fst_fast.fast.reflectors import make_reflector
from fst_fast.files import Appender, write_atomic
from fst_fast.model import load_model
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams
from fst_fast.report import write_report
from fst_fast.rollout.collect import Ask, Collector, Totals
from fst_fast.rollout.reuse import RolloutStore
from fst_fast.rollout.torch_engine import TorchEngine
from fst_fast.seeding import stream
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner, StepReport
from fst_fast.slow.policy import Policy
from fst_fast.tasks import make_task
from fst_fast.tasks.task import Message, Task
from fst_fast.telemetry import Telemetry, print_summary, read_run


def main(argv: Sequence[str]) -> None:
    command = parse_train(argv)
    if command.resume:
        run_dir = Path(command.resume)
        config = read_config(run_dir)
    else:
        config = command.config
        run_dir = Path(config.run_dir or f"runs/{config.mode}-{datetime.now():%Y%m%d-%H%M%S}")
        config = replace(config, run_dir=str(run_dir), threads=config.threads or os.cpu_count() or 1)
    train(config, run_dir, resume=bool(command.resume))


def train(config: Config, run_dir: Path, *, resume: bool = False) -> None:
    """One run from its configuration (or its last checkpoint) to its report."""
    trainer = Trainer(config, run_dir)  # everything that can be wrong is wrong here, before a file is written
    with checkpoint.locked(run_dir):
        with trainer.open(resume=resume):
            for stage in trainer.stages:
                trainer.enter(stage)
                while trainer.step < stage.end:
                    if trainer.due(config.checkpoint_every):
                        trainer.save()
                    if trainer.due(config.eval.every):
                        trainer.evaluate()
                    if trainer.evolves and trainer.due(config.fast.every):
                        trainer.evolve()
                    trainer.learn()
                if stage.index >= trainer.ended_stages:
                    trainer.finish_stage()
            trainer.finish()
        write_report([run_dir], run_dir / "report.html")
        print_summary(run_dir)


class Trainer:
    """The state of a run and the verbs of the loop."""

    def __init__(self, config: Config, run_dir: Path):
        check(config)
        torch.set_num_threads(config.threads)
        self.config, self.run_dir = config, run_dir
        self.stages = stages(config.stream)
        self.tasks = [make_task(s.task, seed=config.seed, jsonl=config.jsonl) for s in self.stages]
        size = config.rollout.problems
        self.orders = [DataOrder(t.train, size, seed=config.seed, name=t.name) for t in self.tasks]
        for task in self.tasks:
            held_out(task, config.eval.problems)
        self.model = load_model(config.model.path, dtype=config.model.dtype, device=config.model.device)
        self.base = load_model(config.model.path, dtype=config.model.dtype, device=config.model.device)
        self.base.lm.requires_grad_(False)
        answer = config.reflector.max_new_tokens
        if self.evolves_ever and config.fast.reflector == "policy" and answer >= self.model.context:
            raise UserError(
                f"reflector.max_new_tokens = {answer} leaves no room for a question in the model's context of "
                f"{self.model.context} tokens; use far less than that"
            )
        self.longest = [self.check_room(t, [Prompt(t.seed_prompt)]) for t in self.tasks]  # problem of each task
        self.policy = Policy(self.model, config.slow)
        self.learner = Learner(self.policy, self.base, config.slow)
        self.engine = TorchEngine(self.model, max_batch=config.rollout.max_batch)
        self.totals = Totals()
        self.step = 0  # steps finished
        self.cycle = 0  # GEPA cycles finished
        self.ended_stages = 0  # stages whose last evaluation is written
        self.complete = False
        self.saved = -1  # step of the newest checkpoint
        self.pool: list[Member] = []
        self.population: list[Prompt] = []
        self.best = Prompt(self.tasks[0].seed_prompt)
        self.entered = -1  # stage whose prompts are in the pool
        self.reflection = ReflectionUsage()

    # ------------------------------------------------------------------------------------------ opening and saving

    def open(self, *, resume: bool) -> AbstractContextManager[object]:
        """Start the run directory, or go back to its last good checkpoint; a run that was complete stays as it is."""
        config, run_dir = self.config, self.run_dir
        if not resume and any(not p.name.startswith(".") for p in run_dir.iterdir()):
            raise UserError(f"run_dir: {run_dir} is not empty; choose another, or continue it with --resume {run_dir}")
        self.reflectors = [
            make_reflector(config.fast, config.reflector, t, self._generate) if self.evolves_ever else None
            for t in self.tasks
        ]
        if not resume:
            write_atomic(run_dir / "config.toml", to_toml(config).encode())
        state = self.restore() if resume else {}
        if self.complete:
            return nullcontext()
        offsets = state.get("offsets", {"metrics": 0, "population": 0, "rollouts": 0, "rollout_count": 0})
        self.telemetry = Telemetry(run_dir, config, self.stages[-1].end, offset=offsets["metrics"], step=self.step)
        self.lineage = Appender(run_dir / "population.jsonl", offset=offsets["population"])
        self.store = RolloutStore(run_dir, offset=offsets["rollouts"], count=offsets["rollout_count"])
        self.serve(self.store)
        if resume:
            self.telemetry.log(f"resumed {run_dir} at step {self.step}")
        return self.telemetry

    def save(self) -> None:
        """Checkpoint: a run resumed from here does, bit for bit, what this one does next."""
        if self.saved == self.step and not self.complete:  # just resumed from it
            return
        self.lineage.sync()
        self.store.sync()
        state = {
            "step": self.step,
            "cycle": self.cycle,
            "ended_stages": self.ended_stages,
            "entered": self.entered,
            "complete": self.complete,
            "pool": [m.to_dict() for m in self.pool],
            "population": [p.text for p in self.population],
            "best": self.best.text,
            "totals": asdict(self.totals),
            "reflection": asdict(self.reflection),
            "offsets": {
                "metrics": self.telemetry.offset(),
                "population": self.lineage.offset,
                "rollouts": self.store.offset,
                "rollout_count": self.store.count,
            },
        }
        checkpoint.save(self.run_dir, self.policy, state, keep=self.config.keep_checkpoints)
        self.saved = self.step

    def restore(self) -> dict[str, Any]:
        """Weights, optimizer and the loop's state from the newest good checkpoint; {} when there is none yet."""
        folder = checkpoint.latest(self.run_dir)
        if folder is None:
            return {}
        checkpoint.load_policy(folder, self.policy)
        state = checkpoint.read_state(folder)
        self.saved = self.step = state["step"]
        self.cycle, self.entered = state["cycle"], state["entered"]
        self.ended_stages, self.complete = state["ended_stages"], state["complete"]
        self.pool = [Member.from_dict(m) for m in state["pool"]]
        self.population = [Prompt(text) for text in state["population"]]
        self.best = Prompt(state["best"])
        self.totals = Totals(**state["totals"])
        self.reflection = ReflectionUsage(**state["reflection"])
        return state

    def serve(self, store: RolloutStore) -> None:
        """Open the door to rollouts by the present weights."""
        sampling = SamplingParams(self.config.rollout.temperature, self.config.rollout.max_new_tokens)
        self.collector = Collector(self.model, self.engine, store, self.totals, sampling, self.config.seed)
        self.engine.load_weights(self.model, self.step)

    # -------------------------------------------------------------------------------------------------- the verbs

    def enter(self, stage: Stage) -> None:
        """Make `stage` the current one; when it is new, its seed prompt joins (or replaces) the pool."""
        self.stage, self.task, self.order = stage, self.tasks[stage.index], self.orders[stage.index]
        if self.entered >= stage.index:
            return
        seed = Member(Prompt(self.task.seed_prompt), cycle=self.cycle)
        if self.entered < 0 or self.config.fast.at_switch == "reset" or not self.evolves:
            self.pool, self.population, self.best = [seed], [seed.prompt], seed.prompt
        else:
            self.pool = distinct([*self.pool, seed])
        self.entered = stage.index

    def due(self, every: int) -> bool:
        """Whether something done every `every` steps of a stage comes before the next step."""
        return (self.step - self.stage.start) % every == 0

    @property
    def evolves(self) -> bool:
        """Whether GEPA cycles are interleaved with the steps."""
        return self.config.mode in ("fst", "gepa", "fst-distill")

    @property
    def evolves_ever(self) -> bool:
        return self.config.mode != "rl"

    def evolve(self, *, proposals: int | None = None) -> None:
        """One GEPA cycle with the weights as they are, on the problems of the next T batches."""
        config, started = self.config.fast, time.monotonic()
        if proposals is None:
            proposals = config.first_proposals if self.step == self.stage.start else config.proposals
            if self.config.mode == "gepa":
                # the rollouts that the steps would take, at what a proposal costs: two minibatches, and a scoring
                # for the third of them that is accepted (measured on glyph)
                steps = config.every * self.config.rollout.problems * self.config.rollout.group_size
                proposals += steps // (2 * config.minibatch + config.scoring_problems // 3)
        if self.config.mode == "fst-distill":  # the prompts are the teacher's: the frozen base
            self.engine.load_weights(self.base, self.step)
        ahead = self.order.lookahead(self.step - self.stage.start, config.every)
        calls = self.generated = 0  # within this cycle: names of random streams

        def rollouts_of(pairs: Sequence[tuple[Prompt, Problem]]) -> list[Rollout]:
            nonlocal calls
            calls += 1
            asks = [Ask(prompt, problem, i) for i, (prompt, problem) in enumerate(pairs)]
            key = (self.cycle, calls)
            return self.collector.collect(self.task, asks, purpose="gepa", step=self.step, key=key)

        reflector = self.reflectors[self.stage.index]
        assert reflector is not None
        evolution = evolve(
            self.pool,
            ahead[: config.scoring_problems],
            ahead,
            rollouts_of,
            reflector,
            config,
            proposals=proposals,
            seed=self.config.seed,
            cycle=self.cycle,
            fits=self._fits,
        )
        if self.config.mode == "fst-distill":
            self.engine.load_weights(self.model, self.step)
        self.pool, self.population = list(evolution.pool), list(evolution.population)
        self.best = evolution.best
        self.reflection += evolution.reflection
        self._record_evolution(evolution, time.monotonic() - started)
        self.cycle += 1

    def learn(self) -> None:
        """One step: rollouts of the next batch, spread over the prompts, and one slow step on their groups."""
        started = time.monotonic()
        report, rollouts, sampled = StepReport(0, 0, {}), [], started
        computed = self.engine.stats.computed_prompt_tokens
        if self.config.mode != "gepa":
            rollouts = self._batch_rollouts()
            sampled = time.monotonic()
            rng = stream(self.config.seed, "minibatches", self.step)
            if self.config.mode == "fst-distill":
                contexts = [self.model.encode_chat(self.task.messages(self.best.text, r.problem)) for r in rollouts]
                report = self.learner.distill(rollouts, contexts, rng)
            else:
                report = self.learner.step(group_by_problem(rollouts), rng)
        self.step += 1
        self.engine.load_weights(self.model, self.step)
        tokens = sum(len(r.response_ids) for r in rollouts)
        prompt_tokens = sum(len(r.prompt_ids) for r in rollouts)
        now = time.monotonic()
        record: dict[str, Any] = {"kind": "step", **self._where()}
        if rollouts:
            record |= {
                "reward": sum(r.reward for r in rollouts) / len(rollouts),
                "groups": report.groups,
                "live_groups": report.live_groups,
                **report.metrics,
                "lr": self.policy.lr,
                # the mean surprise of sampled tokens is an unbiased estimate of the policy's entropy per token
                "entropy": -sum(lp for r in rollouts for lp in r.logprobs) / tokens,
                "response_tokens": tokens / len(rollouts),
                "prompt_tokens": prompt_tokens,
                "cached_prompt_tokens": prompt_tokens - (self.engine.stats.computed_prompt_tokens - computed),
            }
        record |= {
            **asdict(self.totals),
            "time": {
                "seconds": now - started,
                "rollout": sampled - started,
                "learn": now - sampled,
                "tokens_per_second": tokens / max(now - started, 1e-9),
            },
        }
        self.telemetry.write(record, prompt=self.best.text)

    def evaluate(self) -> None:
        """Held-out reward and KL of what the run would deploy now."""
        started = time.monotonic()
        record = {"kind": "eval", **self._where(), **self.held_out(self.task), **asdict(self.totals)}
        record["time"] = {"seconds": time.monotonic() - started}
        self.telemetry.write(record, prompt=self.best.text)

    def held_out(self, task: Task, others: Sequence[Prompt] = ()) -> dict[str, Any]:
        """Metrics of the present weights and prompts on `task`; fst-distill deploys the weights alone."""
        seed = Prompt(task.seed_prompt)
        alone = self.config.mode == "fst-distill"
        return evaluate(
            self.collector,
            task,
            self.model,
            self.base,
            [seed] if alone else self.population,
            seed if alone else self.best,
            self.config.eval,
            step=self.step,
            micro_tokens=self.config.slow.micro_tokens,
            key=(self.step, task.name, self.cycle),
            others=others,
        )

    def finish_stage(self) -> None:
        """Last evaluation of a stage; rl-then-gepa first evolves prompts for the finished weights."""
        if self.config.mode == "rl-then-gepa" and self.stage.index == len(self.stages) - 1:
            cycles = -(-self.stage.steps // self.config.fast.every)  # what fst would have spent on this stage
            self.evolve(proposals=self.config.fast.first_proposals + (cycles - 1) * self.config.fast.proposals)
        self.evaluate()
        self.ended_stages = self.stage.index + 1

    def finish(self) -> None:
        """The run's last line and checkpoint. A run that was complete before stays as it is."""
        if self.complete:
            return
        levels = read_run(self.run_dir).levels()
        reflection = asdict(self.reflection)
        self.telemetry.write({"kind": "end", "step": self.step, "levels": levels, "reflection": reflection})
        self.complete = True
        self.save()

    # --------------------------------------------------------------------------------------------------- helpers

    def _batch_rollouts(self) -> list[Rollout]:
        """G rollouts of every problem of the batch, spread evenly over the population."""
        prompts = self.population if self.config.mode == "fst" else [Prompt(self.task.seed_prompt)]
        asks = [
            Ask(prompts[i % len(prompts)], problem, i // len(prompts))
            for problem in self.order.batch(self.step - self.stage.start)
            for i in range(self.config.rollout.group_size)
        ]
        return self.collector.collect(self.task, asks, purpose="rl", step=self.step, key=(self.step,))

    def _generate(self, conversations: Sequence[list[Message]]) -> list[str]:
        """Answers of the frozen base model, for the policy reflector."""
        self.generated += 1
        serving = self.engine.model
        self.engine.load_weights(self.base, self.step)
        sampling = SamplingParams(1.0, self.config.reflector.max_new_tokens)
        try:
            return self.collector.complete(conversations, sampling, (self.cycle, self.generated))
        finally:
            self.engine.load_weights(serving, self.step)

    def check_room(self, task: Task, prompts: Sequence[Prompt]) -> Problem:
        """UserError when something sampled on `task` would not fit the context; returns its longest problem."""
        problems = [*task.train, *task.validation]
        longest = sorted(problems, key=lambda p: len(str(task.messages("", p))))[-32:]
        problem = min(longest, key=lambda p: self._room(task, prompts[0], p))
        limit = self.config.rollout.max_new_tokens
        for ask in [*(Ask(prompt, problem) for prompt in prompts), *retention_asks(task)]:
            if (room := self._room(task, ask.prompt, ask.problem)) < 0:
                do = f"use {limit + room} or less" if limit + room > 0 else "pose shorter problems"
                raise UserError(
                    f"rollout.max_new_tokens = {limit}: problem {ask.problem.id} under the prompt "
                    f"{ask.prompt.text!r:.60} and an answer of that length exceed the model's context of "
                    f"{self.model.context} tokens by {-room}; {do}, or a model with a longer context"
                )
        return problem

    def _room(self, task: Task, prompt: Prompt, problem: Problem) -> int:
        return self.model.room(task.messages(prompt.text, problem), self.config.rollout.max_new_tokens)

    def _fits(self, prompt: Prompt) -> bool:
        """Whether a proposed prompt can be used on every task of the stream: a switch may keep it."""
        return all(self._room(t, prompt, longest) >= 0 for t, longest in zip(self.tasks, self.longest, strict=True))

    def _where(self) -> dict[str, Any]:
        return {"step": self.step, "stage": self.stage.index, "task": self.task.name}

    def _record_evolution(self, evolution: Evolution, seconds: float) -> None:
        where = {"cycle": self.cycle, **self._where()}
        means = {m.prompt.id: m.mean for m in evolution.pool}
        lines: list[dict[str, Any]] = []
        if self.cycle == 0 or self.step == self.stage.start:
            seed = Prompt(self.task.seed_prompt)
            lines.append(
                {"kind": "candidate", **where, "id": seed.id, "text": seed.text, "parent": None, "status": "seed"}
                | {"reason": "the task's seed prompt", "parent_score": None, "child_score": None, "feedback": []}
                | {"mean_score": means.get(seed.id)}
            )
        for c in evolution.candidates:
            judged = c.status in ("accepted", "rejected")
            data = c.to_dict()
            lines.append(
                {
                    "kind": "candidate",
                    **where,
                    **data,
                    "status": c.status if judged else "refused",
                    "reason": c.note if judged else f"{c.status}: {c.note}" if c.note else c.status,
                    "parent_score": _mean(c.parent_scores),
                    "child_score": _mean(c.child_scores),
                    "mean_score": means.get(data["id"]),
                }
            )
        members = [{"id": m.prompt.id, "mean_score": m.mean, "scores": dict(m.scores)} for m in evolution.pool]
        lines.append({"kind": "population", **where, "members": members, "best": evolution.best.id})
        self.lineage.write("".join(json.dumps(line) + "\n" for line in lines))
        problems = list(evolution.pool[0].scores)
        chosen = evolution.pool[: len(evolution.population)]
        covered = sum(max(m.scores[x] for m in chosen) for x in problems) / len(problems)
        self.telemetry.write(
            {
                "kind": "evolve",
                **where,
                "proposals": len(evolution.candidates),
                "accepted": sum(c.status == "accepted" for c in evolution.candidates),
                "rollouts": evolution.rollouts,
                "best": evolution.pool[0].mean,
                "coverage": covered,
                "population": [p.id for p in evolution.population],
                "reflection": asdict(evolution.reflection),
                "time": {"seconds": seconds},
            },
            prompt=self.best.text,
        )


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


if __name__ == "__main__":
    run(main)
