"""The verbs of train.py's loop, over the parts of a run and its state."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fst_fast import checkpoint
from fst_fast.config import (
    Config,
    Stage,
    check,
    check_installed,
    evolves,
    pauses,
    proposals_of,
    stages,
    to_toml,
)
from fst_fast.context import check_context, room
from fst_fast.data import make_order
from fst_fast.evaluate import deployed, evaluate, mean
from fst_fast.evolving import Evolving
from fst_fast.fast.cycle import Cycle
from fst_fast.fast.lineage import lineage, summary
from fst_fast.fast.population import Member, distinct
from fst_fast.fast.reflectors import make_reflectors
from fst_fast.files import Appender, write_atomic
from fst_fast.meter import Meter, mfu, sampling_work
from fst_fast.model import Model, load_model
from fst_fast.preflight import check_alike, check_alike_resumed, check_empty, check_logs, check_shared
from fst_fast.ranks import ALONE, Ranks
from fst_fast.rates import peak_flops
from fst_fast.records import Answer, Problem, Prompt, Rollout, SamplingParams
from fst_fast.rollout import make_engine
from fst_fast.rollout.check import MISMATCH, check_engine, check_mismatch, mismatch
from fst_fast.rollout.collect import Ask, Asked, Collector, version_metrics
from fst_fast.rollout.dispatch import Scheduler
from fst_fast.rollout.engine import EngineStats
from fst_fast.rollout.reuse import Plan, Reused, RolloutStore, Rule, plan, reuse_metrics
from fst_fast.runs import read_run
from fst_fast.seeding import stream
from fst_fast.shape import shape_of
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner, StepReport
from fst_fast.slow.lora import Unadapted, adapt
from fst_fast.slow.policy import Policy
from fst_fast.slow.sharding import recompute, shard
from fst_fast.state import State, check_inputs, fingerprint
from fst_fast.tasks import task_maker
from fst_fast.tasks.task import Message
from fst_fast.telemetry import Telemetry

BASE_VERSION = -1  # policy_version of what the frozen base model sampled


@dataclass(frozen=True)
class Batch:
    """One step's rollouts, under way."""

    asks: list[Ask]
    reuse: Plan
    sampled: Asked  # those that `reuse` does not answer


class Trainer:
    """The verbs of the loop, over the parts of a run and its state."""

    def __init__(self, config: Config, run_dir: Path, ranks: Ranks = ALONE):
        self.meter = Meter()
        check(config)
        check_installed(config)
        torch.set_num_threads(config.threads)
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        self.stages = stages(config.stream)
        make = task_maker(config)
        self.tasks = [make(stage.task) for stage in self.stages]
        self.ood = make(config.eval.ood, trained=self.tasks) if config.eval.ood else None
        size = config.rollout.problems
        names = [t.name for t in self.tasks]
        self.names = [f"{n}#{i}" if n in names[:i] else n for i, n in enumerate(names)]  # a task may come back
        self.orders = [
            make_order(task, size, stage, seed=config.seed, name=name)
            for task, name, stage in zip(self.tasks, self.names, self.stages, strict=True)
        ]
        loading = asdict(config.model)
        self.base = load_model(**loading)
        self.base.lm.requires_grad_(False)
        self.longest = check_context(self.base, self.tasks, self.ood, config)
        self.inputs = fingerprint(self.tasks, self.ood, self.base)
        check_alike(config, self.inputs, self.ranks)
        self.shape = shape_of(self.base.lm, config.model.path)
        # of a mixture of experts the shape counts them all for every token: no utilisation then
        dense = not any(".experts." in name for name, _ in self.base.lm.named_parameters())
        self.peak = self.ranks.size * peak_flops(self.base.device, config.peak_tflops) * dense
        if config.slow.lora_rank:  # the weights are those of the base: once is enough
            self.model = self.base
            adapt(self.model, config.slow.lora_rank, config.seed)
        else:
            self._shard(self.base)  # before the next one is loaded: a GPU holds one whole model at a time
            self.model = load_model(**loading)
        recompute(self.model, config.slow.recompute)
        self._shard(self.model)
        if config.slow.lora_rank:
            self.base = Unadapted(self.model)
        embedded = self.model.sharded and config.rollout.engine == "torch"
        replica = load_model(**loading) if embedded else None  # for the engine to copy the weights to
        self.policy = Policy(self.model, config.slow)
        self.learner = Learner(self.policy, self.base, config.slow, self.ranks)
        whole = self.model.context
        self.engine = make_engine(config.rollout, self.model, replica=replica)
        self.model.context = min(self.ranks.join([self.model.context]))  # all decide alike what fits
        if self.model.context < whole:
            check_context(self.model, self.tasks, self.ood, config)
        background = self.model.device.type == "cuda"
        self.saver = checkpoint.Saver(run_dir, self.ranks, keep=config.keep_checkpoints, background=background)
        check_engine(self.engine, self.model)
        self.checked_update = False
        self.state = State(best=Prompt(self.tasks[0].seed_prompt))
        self.saved = self.evaluated = -1  # step of the newest checkpoint, and of an evaluation before it
        self.ahead: Batch | None = None  # the next step's
        self.evolving: Evolving | None = None

    # ------------------------------------------------------------------------------------------ opening and saving

    def open(self, *, resume: bool) -> AbstractContextManager[object]:
        """Start the run directory, or go back to its last good checkpoint; a run that was complete stays as it is."""
        config, run_dir, dry = self.config, self.run_dir, not self.ranks.main
        check_alike_resumed(resume, self.ranks)
        self.ranks.first(lambda: check_empty(run_dir, resume=resume))
        check_shared(run_dir, self.ranks)
        if config.mode != "rl":
            self.reflectors = make_reflectors(config.fast, config.reflector, self.tasks, self._generate, self.ranks)
        offsets = self.restore() if resume else {}
        if self.state.complete:
            if self.ranks.main:
                print(f"{run_dir} is complete: nothing is left to do")
            return nullcontext()
        self.ranks.first(lambda: check_logs(run_dir, offsets))
        self.ranks.first(lambda: write_atomic(run_dir / "config.toml", to_toml(config).encode()))
        at = offsets.get
        steps, step = self.stages[-1].end, self.state.step
        self.telemetry = Telemetry(run_dir, config, steps, offset=at("metrics", 0), step=step, dry=dry)
        self.lineage = Appender(run_dir / "population.jsonl", offset=at("population", 0), dry=dry)
        self.store = RolloutStore(run_dir, offset=at("rollouts", 0), count=at("rollout_count", 0), dry=dry)
        if self._reuses:
            problems = {p.id: p for t in self.tasks for p in t.train}
            start = self.state.reused.start
            self.store.scored = self.ranks.first(lambda: self.store.read_back(problems, start=start))
        sampling = SamplingParams(config.rollout.temperature, config.rollout.max_new_tokens)
        scheduler = Scheduler([self.engine], lookahead=config.rollout.lookahead)
        totals, phase = self.state.totals, self.meter.phase
        self.collector = Collector(self.model, scheduler, self.store, totals, sampling, config.seed, self.ranks, phase)
        self.engine.load_weights(self.model, self.state.step)
        self.telemetry.log(f"resumed {run_dir} at step {step}" if resume else f"run directory: {run_dir}")
        self.meter.start(self.model.device, config.price_per_gpu_hour, self.telemetry.log, self.ranks)
        parts = ExitStack()
        parts.enter_context(self.telemetry)
        parts.callback(self.meter.close)
        parts.callback(self._stop_evolving)
        return parts

    def restore(self) -> dict[str, int]:
        """Weights, optimizer and state of the newest good checkpoint; returns the lengths of the run's logs there,
        {} when there is no checkpoint yet."""
        folder = checkpoint.latest(self.run_dir, self.ranks)
        if folder is None:
            return {}
        saved = self.ranks.first(lambda: checkpoint.read_state(folder))
        check_inputs(saved["inputs"], self.inputs, self.run_dir)
        checkpoint.load_policy(folder, self.policy, self.ranks)
        self.state = State.from_dict(saved)
        self.saved = self.state.step
        ended = sum(stage.end <= self.state.step for stage in self.stages)
        if ended < self.state.ended_stages:  # the last one was made longer
            self.state.ended_stages, self.evaluated = ended, self.state.step
        self.state.complete &= ended == len(self.stages)
        return saved["offsets"]

    def save(self) -> None:
        """Checkpoint: a run resumed from here does, bit for bit, what this one does next."""
        if self.saved == self.state.step and not self.state.complete:  # just resumed from it
            return
        self.lineage.sync()
        self.store.sync()
        offsets = {
            "metrics": self.telemetry.offset(),
            "population": self.lineage.offset,
            "rollouts": self.store.offset,
            "rollout_count": self.store.count,
        }
        state = {**self.state.to_dict(), "inputs": self.inputs, "offsets": offsets}
        with self.meter.phase("checkpoint"):
            self.saver.save(self.policy, state)
        self.saved = self.state.step

    # -------------------------------------------------------------------------------------------------- the verbs

    def enter(self, stage: Stage) -> None:
        """Make `stage` the current one; when it is new, its seed prompt joins (or replaces) the pool."""
        self.stage, self.task, self.order = stage, self.tasks[stage.index], self.orders[stage.index]
        self.slices = {p.id: p.slice for p in self.task.train}
        if self.state.entered >= stage.index:
            return
        self.state.failed = []
        seed = Member(Prompt(self.task.seed_prompt), cycle=self.state.cycle)
        if self.state.entered < 0 or self.config.fast.at_switch == "reset" or not self.evolves:
            self.state.pool, self.state.population, self.state.best = [seed], [seed.prompt], seed.prompt
        else:
            self.state.pool = distinct([*self.state.pool, seed])
        self.state.entered = stage.index

    def due(self, every: int, *, after: int = 0) -> bool:
        """Whether something done every `every` steps of a stage comes before the next step, or `after` steps later."""
        return (self.state.step + after - self.stage.start) % every == 0

    @property
    def evolves(self) -> bool:
        return evolves(self.config)

    def evolve(self, *, proposals: int | None = None) -> None:
        """One GEPA cycle with the weights as they are, on the problems of the next T batches, unless one for this step
        ran beside the last ones."""
        if proposals is None:
            if self.state.evolved == self.state.step:
                return
            proposals = proposals_of(self.config, first=self.state.step == self.stage.start)
        if self.config.mode == "fst-distill":  # the prompts are the teacher's: the frozen base
            self.engine.load_weights(self.base, BASE_VERSION)
        self._begin_cycle(self.state.step, proposals)
        self.settle()
        if self.config.mode == "fst-distill":
            self.engine.load_weights(self.model, self.state.step)

    def settle(self) -> None:
        """End the cycle that comes before the next step, if one is under way, and take over what it found."""
        ending = self.evolving
        if ending is None or ending.step > self.state.step:
            return
        while not ending.over:
            ending.advance(self.state.step)
        self.evolving, evolution = None, ending.cycle.evolution
        self.store.forget(before=ending.first)
        if self._reuses:
            self.state.reused = Reused(ending.begin, used=[i for i in self.state.reused.used if i >= ending.first])
        self.state.pool, self.state.population = list(evolution.pool), list(evolution.population)
        self.state.best, self.state.blind = evolution.best, dict(evolution.blind)
        self.state.reflection += evolution.reflection
        where = {"cycle": self.state.cycle, **self._where()}
        new = self.state.cycle == 0 or self.state.step == self.stage.start
        lines = lineage(evolution, Prompt(self.task.seed_prompt) if new else None)
        self.lineage.write("".join(json.dumps({**where, **line}) + "\n" for line in lines))
        record = {"kind": "evolve", **where, **summary(evolution), "time": self.meter.read()}
        self.telemetry.write(record, prompt=self.state.best.text)
        self.state.cycle += 1
        self.state.evolved = self.state.step

    def learn(self) -> None:
        """One step: rollouts of the next batch, spread over the prompts, and one slow step on their groups."""
        started = time.monotonic()
        report, rollouts, lr = StepReport(0, 0, {}), [], self.policy.lr
        reuse, before = Plan(self.state.reused.cap), replace(self.engine.stats)
        if self.config.mode != "gepa":
            self._fill()
            with self.meter.phase("rollout"):
                batch = self.ahead or self._ask(self.state.step)
                self._ask_ahead()
                rollouts, reuse = self._batch_rollouts(batch), batch.reuse
            with self.meter.phase("sync"):
                self.collector.engine.sleep()
            with self.meter.phase("learn"):
                report = self._learn_from(rollouts)
        self.state.step += 1
        with self.meter.phase("sync"):
            self.collector.engine.load_weights(self.model, self.state.step)  # what was asked ahead goes on with them
        record = self._step_record(report, rollouts, reuse, before, lr, time.monotonic() - started)
        self.telemetry.write(record, prompt=self.state.best.text)
        if rollouts:  # what was learned from wrong ones is not saved
            limit = self.config.rollout.max_mismatch or MISMATCH[self.model.dtype]
            check_mismatch(record["mismatch"], limit, self.engine.name)
        if not self.checked_update:  # the first new weights have reached the engine, and no KV of the old is left
            check_engine(self.engine, self.model)
            self.checked_update = True

    def _step_record(
        self, report: StepReport, rollouts: list[Rollout], reuse: Plan, before: EngineStats, lr: float, seconds: float
    ) -> dict[str, Any]:
        """What metrics.jsonl has of the step that has just ended; `before`: what the engine had counted when it began,
        `lr`: of its first update."""
        tokens = sum(len(r.response_ids) for r in rollouts)
        fresh = [r for r in rollouts if r.purpose == "rl"]
        prompts = self.ranks.total(
            {
                "asked": self.engine.stats.prompt_tokens - before.prompt_tokens,
                "computed": self.engine.stats.computed_prompt_tokens - before.computed_prompt_tokens,
            }
        )
        record: dict[str, Any] = {"kind": "step", **self._where()}
        if rollouts:
            record |= {
                "reward": sum(r.reward for r in rollouts) / len(rollouts),
                "groups": report.groups,
                "live_groups": report.live_groups,
                **report.metrics,
                "lr": lr,
                # the mean surprise of sampled tokens is an unbiased estimate of the policy's entropy per token
                "entropy": -sum(lp for r in rollouts for lp in r.logprobs) / tokens,
                "response_tokens": tokens / len(rollouts),
                "truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
                "prompt_tokens": prompts["asked"],
                "cached_prompt_tokens": prompts["asked"] - prompts["computed"],
                **version_metrics(rollouts, self.state.step - 1),
                "mismatch": mismatch(report.at_start, self.state.step - 1),
            }
        if self._reuses:
            record["reuse"] = reuse_metrics(
                reuse, rollouts, report.log_ratios, version=self.state.step - 1, weight_max=self.config.slow.weight_max
            )
        record |= asdict(self.state.totals)
        speed = sum(len(r.response_ids) for r in fresh) / seconds
        record["time"] = self.meter.read() | {"tokens_per_second": speed}
        if self.meter.gpus:
            record["time"]["gpu_tokens_per_second"] = speed / self.meter.gpus
        if self.peak and report.log_ratios:
            sampled, slow = sampling_work(fresh), self.config.slow
            passes = {"kl": slow.kl_coef > 0, "lora": slow.lora_rank > 0}
            record["time"] |= mfu(self.shape, self.peak, report.work, sampled, record["time"], **passes)
        return record

    def evaluate(self) -> None:
        """Held-out reward and KL of what the run would deploy now."""
        if self.evaluated == self.state.step:
            return
        state, name = self.state, self.names[self.stage.index]
        with self.meter.phase("eval"):
            found = evaluate(
                self.collector,
                self.task,
                self.model,
                self.base,
                *deployed(self.config.mode, state, self.task),
                self.config.eval,
                step=state.step,
                micro_tokens=self.config.slow.micro_tokens,
                key=(state.step, name, state.cycle),
                at=self.stage.place(state.step),
                ood=self.ood,
            )
        record = {"kind": "eval", **self._where(), **found, **asdict(state.totals), "time": self.meter.read()}
        self.telemetry.write(record, prompt=state.best.text)

    def finish_stage(self) -> None:
        """Last evaluation of a stage; rl-then-gepa first evolves prompts for the finished weights."""
        if self.config.mode == "rl-then-gepa" and self.stage.index == len(self.stages) - 1:
            cycles = -(-self.stage.steps // self.config.fast.every)  # what fst would have spent on this stage
            self.evolve(proposals=self.config.fast.first_proposals + (cycles - 1) * self.config.fast.proposals)
        self.evaluate()
        self.state.ended_stages = self.stage.index + 1

    def finish(self) -> None:
        """The run's last line and checkpoint. A run that was complete before stays as it is."""
        if self.state.complete:
            return
        levels = self.ranks.first(lambda: read_run(self.run_dir).levels())
        reflection = asdict(self.state.reflection)
        record = {"kind": "end", "step": self.state.step, "levels": levels, "reflection": reflection}
        self.telemetry.write(record | {"time": self.meter.read()})
        self.state.complete = True
        self.save()
        self.saver.settle()

    # --------------------------------------------------------------------------------------------------- helpers

    def _shard(self, model: Model) -> None:
        if self.ranks.mesh:
            shard(model, self.ranks, offload=self.config.slow.offload)

    @property
    def _reuses(self) -> bool:
        return self.config.fast.reuse and self.config.mode == "fst"

    def _ask_ahead(self) -> None:
        """Ask for the next step's rollouts, where they are certain: not over a GEPA cycle, nor over an evaluation,
        which wants the engine, nor over a checkpoint, from which a resumed run must sample the same."""
        self.ahead, after = None, self.state.step + 1
        if not self.config.rollout.lookahead or after == self.stage.end:
            return
        if not any(self.due(every, after=1) for every in pauses(self.config)):
            self.ahead = self._ask(after)

    def _fill(self) -> None:
        """With `fast.filler`: begin the next cycle beside this step, or take it one call further when it is ready.
        Checkpoints know nothing of a cycle under way: it begins after the last one."""
        every, here = self.config.fast.every, self.state.step - self.stage.start
        if not (self.config.fast.filler and self.config.mode == "fst"):
            return
        if self.evolving is None:
            left = every - here % every
            saves = any(self.due(self.config.checkpoint_every, after=n) for n in range(1, left))
            if self.state.step + left < self.stage.end and not saves:
                self._begin_cycle(self.state.step + left, self.config.fast.proposals)
        elif self.evolving.ready():
            self.evolving.advance(self.state.step, beside=True)

    def _begin_cycle(self, step: int, proposals: int) -> None:
        """A GEPA cycle before `step`, on the problems of the T batches from there on, with its first call asked."""
        ahead = self.order.lookahead(step - self.stage.start, self.config.fast.every)  # the T batches
        failed, self.state.failed, self.generated = set(self.state.failed), [], 0
        begin, first = self.store.offset, self.store.count
        with self.meter.phase("reflect"):  # and what GEPA does by itself
            cycle = Cycle(
                self.state.pool,
                scoring=ahead[: self.config.fast.scoring_problems],
                training=ahead,
                reflector=self.reflectors[self.stage.index],
                config=self.config.fast,
                proposals=proposals,
                seed=self.config.seed,
                cycle=self.state.cycle,
                first=[p for p in self.task.train if p.id in failed],
                blind=self._reuses,
                fits=self._fits,
            )
            self.evolving = Evolving(
                cycle, self.state.cycle, step, self.task, self.collector, self.meter.phase, begin, first
            )
            self.evolving.ask(self.state.step)

    def _stop_evolving(self) -> None:
        """After an error: leave no thread that waits."""
        if self.evolving:
            self.evolving.cycle.close()

    def _ask(self, step: int) -> Batch:
        """Plan the rollouts of `step`, this one or the next, and queue what the store does not answer.

        What is reused is decided here, before anything is sampled, with the weights and the store of this moment: a
        step asked ahead is gated by weights one version older than those that will train on it.
        """
        asks = self._asks(step)
        reuse = self._plan(asks, step) if self._reuses else Plan(self.state.reused.cap)
        self.state.reused.used += reuse.taken.values()
        missing = [ask for i, ask in enumerate(asks) if i not in reuse.taken]
        ahead = step - self.state.step
        return Batch(
            asks,
            reuse,
            self.collector.submit(self.task, missing, purpose="rl", step=step, key=(step,), ahead=ahead),
        )

    def _asks(self, step: int) -> list[Ask]:
        """G rollouts of every problem of the batch, dealt out over the population: evenly once it has its K prompts."""
        asks = []
        for problem in self.order.batch(step - self.stage.start):
            prompts: Sequence[Prompt] = [Prompt(self.task.seed_prompt)]
            if self.config.mode == "fst":
                prompts = self.state.blind.get(problem.id, self.state.population)
                if self.config.fast.route == "slice":
                    prompts = self._best_for(problem, prompts)
            size = self.config.rollout.group_size
            asks += [Ask(prompts[i % len(prompts)], problem, i // len(prompts)) for i in range(size)]
        return asks

    def _best_for(self, problem: Problem, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompt of the highest mean on the other scored problems of the problem's slice; several when they tie."""

        def on_peers(scores: Mapping[str, float]) -> float:
            same = (s for x, s in scores.items() if self.slices.get(x) == problem.slice and x != problem.id)
            return mean(same)

        pool = {m.prompt: on_peers(m.scores) for m in self.state.pool}
        means = [pool.get(p, 0.0) for p in prompts]
        return [p for p, of in zip(prompts, means, strict=True) if of == max(means)]

    def _learn_from(self, rollouts: Sequence[Rollout]) -> StepReport:
        rng = stream(self.config.seed, "minibatches", self.state.step)
        if self.config.mode == "fst-distill":
            contexts = [self.model.encode_chat(self.task.messages(self.state.best.text, r.problem)) for r in rollouts]
            return self.learner.distill(rollouts, contexts, rng)
        groups = group_by_problem(rollouts)
        if self.config.fast.failed_first and self.config.mode == "fst":
            self.state.failed += [g.problem.id for g in groups if not any(r.reward for r in g.rollouts)]
        return self.learner.step(groups, rng)

    def _plan(self, asks: Sequence[Ask], step: int) -> Plan:
        """Which of the asks of `step` GEPA's evaluations answer."""
        rule = Rule(
            blind=frozenset(self.state.blind),
            sampling=self.collector.sampling,
            version=self.state.step,
            oldest=step - self.config.fast.every + 1,
            cap=self.config.fast.reuse_cap * self.state.reused.cap,
            used=frozenset(self.state.reused.used),
        )
        with self.meter.phase("gate"):
            found = plan(asks, self.store.scored, rule, self.learner.log_ratios)
        if found.cap < rule.cap:
            self.state.reused.cap /= 2
        return found

    def _batch_rollouts(self, batch: Batch) -> list[Rollout]:
        """One rollout per ask: from the store where the plan says so, the others fresh."""
        fresh, taken = iter(self.collector.finish(batch.sampled)), batch.reuse.taken
        return [self.store.scored[taken[i]] if i in taken else next(fresh) for i in range(len(batch.asks))]

    def _generate(self, conversations: Sequence[list[Message]]) -> list[Answer]:
        """Answers of the frozen base model, for the policy reflector."""
        self.generated += 1
        version = self.engine.policy_version
        if version != BASE_VERSION:
            self.engine.load_weights(self.base, BASE_VERSION)
        sampling = SamplingParams(1.0, self.config.reflector.max_new_tokens)
        answers = self.collector.complete(conversations, sampling, (self.state.cycle, self.generated))
        if version != BASE_VERSION:  # not after an error: sharded weights are gathered, and the other ranks never come
            self.engine.load_weights(self.model, version)
        return answers

    def _fits(self, prompt: Prompt) -> bool:
        """Whether a proposed prompt can be used on every task of the stream: a switch may keep it."""
        limit = self.config.rollout.max_new_tokens
        pairs = zip(self.tasks, self.longest, strict=True)
        return all(room(self.model, task, prompt, longest, limit) >= 0 for task, longest in pairs)

    def _where(self) -> dict[str, Any]:
        return {"step": self.state.step, "stage": self.stage.index, "task": self.task.name}
