"""Evaluation on held-out problems: mean@k under each prompt, per slice, under the seed prompt; exact KL to the base.

`python -m fst_fast.evaluate RUN` evaluates a run's last checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fst_fast.cli import read_config, run
from fst_fast.config import INSTRUCTIONS, EvalConfig, check, check_installed, stages
from fst_fast.errors import UserError
from fst_fast.model import Model, load_model
from fst_fast.ranks import Ranks, launched
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams
from fst_fast.rollout import make_engine
from fst_fast.rollout.check import check_engine
from fst_fast.rollout.collect import Ask, Collector
from fst_fast.rollout.dispatch import Scheduler
from fst_fast.rollout.reuse import RolloutStore
from fst_fast.runs import plain
from fst_fast.slow.learner import token_kl
from fst_fast.slow.policy import micro_batches, padded_tokens, response_states, shared_batches
from fst_fast.tasks import task_maker
from fst_fast.tasks.glyph import GlyphTask, instruction_cases
from fst_fast.tasks.mixture import Mixture, parts_of
from fst_fast.tasks.task import Task

if TYPE_CHECKING:
    from fst_fast.state import State

Scores = Mapping[str, Mapping[str, float]]  # prompt id → problem id → mean reward over samples


def evaluate(
    collector: Collector,
    task: Task,
    model: Model,
    base: Model,
    population: Sequence[Prompt],
    best: Prompt,
    config: EvalConfig,
    *,
    step: int,
    micro_tokens: int,
    key: tuple[str | int, ...],
    others: Sequence[Prompt] = (),
    at: float = 1.0,
    ood: Task | None = None,
) -> dict[str, Any]:
    """Metrics of one evaluation (the fields of an "eval" line in metrics.jsonl); `others` are evaluated beside.

    Of a mixture: those of each part, and their means by the weights it has at the place `at` of its stage (0 to 1).
    `ood` is evaluated under its seed prompt alone.
    """
    seed_prompt = Prompt(task.seed_prompt)
    prompts = list(dict.fromkeys([best, *population, seed_prompt, *others]))
    problems = [part.validation[: config.problems] for part in parts_of(task)]
    asks = [Ask(p, x, s) for p in prompts for x in chain(*problems) for s in range(config.samples)]
    rollouts = collector.collect(task, asks, purpose="eval", step=step, key=key)

    def measures(held_out: Sequence[Problem]) -> dict[str, Any]:
        slices = {x.id: x.slice for x in held_out}
        among = [r for r in rollouts if r.problem.id in slices]
        scores = mean_scores(among)
        by_prompt = {p.id: mean(scores[p.id].values()) for p in prompts}
        own = [r for r in among if r.prompt == best]
        return {
            "reward": by_prompt[best.id],
            "reward_by_prompt": by_prompt,
            "reward_mean_prompt": mean(by_prompt[p.id] for p in population),
            "reward_per_slice": cross_fitted({p.id: scores[p.id] for p in population}, slices),
            "reward_seed": by_prompt[seed_prompt.id],
            "kl": mean_kl(model, base, [r for r in own if r.sample == 0], micro_tokens, collector.ranks),
            "entropy": mean(-lp for r in own for lp in r.logprobs),
            "truncated": mean(r.finish_reason == "length" for r in own),
        }

    measured = [measures(held_out) for held_out in problems]
    record = measured[0]
    if isinstance(task, Mixture):
        weights = task.weights(at)
        record = weighted(measured, weights)
        record["by_task"] = {
            part.name: {"weight": w, **m} for part, w, m in zip(task.parts, weights, measured, strict=True)
        }
    record |= {"best_prompt": best.id, "samples": config.samples, "problems": sum(map(len, problems))}
    if glyph := next((part for part in parts_of(task) if isinstance(part, GlyphTask)), None):
        followed = collector.collect(glyph, retention_asks(glyph), purpose="eval", step=step, key=(*key, "retention"))
        record["retention"] = mean(r.reward for r in followed)
    if ood:
        unseen = ood.validation[: config.problems]
        asks = [Ask(Prompt(ood.seed_prompt), x, s) for x in unseen for s in range(config.samples)]
        answered = collector.collect(ood, asks, purpose="eval", step=step, key=(*key, "ood"))
        record["reward_ood"] = mean(r.reward for r in answered)
    return record


def deployed(mode: str, state: State, task: Task) -> tuple[list[Prompt], Prompt]:
    """(population, best prompt) that a run would use on `task` now; fst-distill deploys the weights alone."""
    if mode == "fst-distill":
        seed = Prompt(task.seed_prompt)
        return [seed], seed
    return state.population, state.best


def weighted(records: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """Means, by weights that sum to 1, of numbers and of mappings to numbers that all the records have."""
    return {
        key: weighted([r[key] for r in records], weights)
        if isinstance(value, Mapping)
        else sum(w * r[key] for w, r in zip(weights, records, strict=True))
        for key, value in records[0].items()
    }


def retention_asks(task: Task) -> list[Ask]:
    """Glyph only: prompts that state a rule each, to see how well the policy still follows instructions."""
    cases = instruction_cases(INSTRUCTIONS, 77) if isinstance(task, GlyphTask) else []
    return [Ask(Prompt(text), x) for text, x in cases]


def mean_scores(rollouts: Sequence[Rollout]) -> dict[str, dict[str, float]]:
    """Mean reward per prompt and problem."""
    rewards: dict[str, dict[str, list[float]]] = {}
    for r in rollouts:
        rewards.setdefault(r.prompt.id, {}).setdefault(r.problem.id, []).append(r.reward)
    return {p: {x: mean(v) for x, v in by_problem.items()} for p, by_problem in rewards.items()}


def cross_fitted(scores: Scores, slices: Mapping[str, str]) -> float:
    """Mean reward when each slice's problems get the slice's best prompt, chosen on one half of them and scored on the
    other, both ways: choosing and scoring on the same problems would count luck as skill."""
    total = 0.0
    for name in sorted(set(slices.values())):
        members = [x for x in slices if slices[x] == name]
        halves = members[::2], members[1::2]
        for chosen_on, scored_on in (halves, halves[::-1]):
            winner = max(scores, key=lambda p: mean(scores[p][x] for x in chosen_on))
            total += sum(scores[winner][x] for x in scored_on)
    return total / len(slices)


@torch.no_grad()
def mean_kl(model: Model, base: Model, rollouts: Sequence[Rollout], micro_tokens: int, ranks: Ranks) -> float:
    """Exact KL(π_train ‖ π_base) in nats, averaged over the response tokens of the policy's own rollouts."""
    sums = {"kl": 0.0, "tokens": 0}
    for indices, counts in shared_batches(ranks, rollouts, micro_batches(rollouts, micro_tokens), padded_tokens):
        batch = [rollouts[i] for i in indices]
        states = response_states(batch, model.device)
        kl = token_kl(model, states(model), base, states(base), batch)
        if counts:
            sums["kl"] += float(kl.double().sum())
            sums["tokens"] += len(kl)
    sums = ranks.total(sums)
    return sums["kl"] / sums["tokens"]


def mean(values: Any) -> float:
    """Arithmetic mean of an iterable; 0 when it is empty."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate the last checkpoint of a run on held-out problems: each prompt, per slice, the seed prompt, exact KL."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    task: str = ""
    """Task to evaluate on, e.g. glyph:C, or jsonl:FILE: of a file all problems that the run does not train on. Empty =
    the run's last stage."""
    problems: int = 0
    """Held-out problems; 0 = all there are."""
    samples: int = 4
    """k of mean@k."""


LABELS = {
    "reward": "reward under the best prompt",
    "reward_mean_prompt": "mean reward over the population",
    "reward_per_slice": "reward, each slice under its own best prompt",
    "reward_seed": "reward under the seed prompt",
    "reward_none": "reward without a system prompt",
    "retention": "other instructions followed",
    "kl": "KL to the base model",
    "entropy": "entropy of a token",
    "truncated": "responses that were cut off",
}


def main(argv: Sequence[str]) -> None:
    command = tyro.cli(EvaluateCommand, args=list(argv), prog="python -m fst_fast.evaluate")
    metrics, texts = evaluate_run(command)
    title = f"{command.run} at step {metrics['step']} on {metrics['task']}"
    table = Table(title=Text(f"{title}, mean@{command.samples} of {metrics['problems']}"))
    for column in ("what", "value"):
        table.add_column(column)
    for name, what in LABELS.items():
        if name in metrics:
            table.add_row(Text(what), Text(f"{metrics[name]:.3f}"))
    for name, part in metrics.get("by_task", {}).items():
        table.add_row(Text(f"reward on {name}"), Text(f"{part['reward']:.3f}"))
    for prompt, reward in metrics["reward_by_prompt"].items():
        mark = " (best)" if prompt == metrics["best_prompt"] else ""
        table.add_row(Text(f"prompt{mark}: {plain(texts[prompt], 200) or 'none'}"), Text(f"{reward:.3f}"))
    Console().print(table)
    print(json.dumps(metrics))


def evaluate_run(command: EvaluateCommand) -> tuple[dict[str, Any], dict[str, str]]:
    """Metrics of a run's last checkpoint, and the prompts' texts by their ids.

    The trained model is the checkpoint's Hugging Face folder, as whoever deploys it has it: no optimizer, no masters.
    """
    from fst_fast import checkpoint  # these import this file, or what does
    from fst_fast.context import check_room, longest_problem
    from fst_fast.state import State, check_inputs, fingerprint

    config = read_config(command.run)
    settings = replace(config.eval, samples=command.samples, problems=command.problems or config.eval.problems)
    check(replace(config, eval=settings))
    check_installed(replace(config, wandb=False, slow=replace(config.slow, lora_rank=0)))  # whose packages are not used
    if launched():
        raise UserError("evaluate works in one process, on one GPU: start it without torchrun")
    folder = checkpoint.latest(command.run)
    if folder is None:
        raise UserError(f"run: {command.run} has no checkpoint yet")
    saved = checkpoint.read_state(folder)
    state, make = State.from_dict(saved), task_maker(config)
    tasks = [make(stage.task) for stage in stages(config.stream)]
    ood = make(config.eval.ood, trained=tasks) if config.eval.ood else None
    task = make(command.task, trained=tasks) if command.task else tasks[state.entered]
    settings = replace(settings, problems=command.problems or len(task.validation))
    torch.set_num_threads(config.threads)
    base = load_model(**asdict(config.model))
    check_inputs(saved["inputs"], fingerprint(tasks, ood, base), command.run)
    model = load_model(**asdict(config.model) | {"path": str(folder / "model")})
    engine = make_engine(config.rollout, model)
    check_engine(engine, model)
    population, best = deployed(config.mode, state, task)
    prompts = [best, *population, Prompt(task.seed_prompt)]
    check_room(model, task, prompts, longest_problem(model, task), config.rollout.max_new_tokens)
    if ood:
        check_room(model, ood, [Prompt(ood.seed_prompt)], longest_problem(model, ood), config.rollout.max_new_tokens)
    sampling = SamplingParams(config.rollout.temperature, config.rollout.max_new_tokens)
    none = Prompt("")  # no system prompt at all: what the weights do alone
    with tempfile.TemporaryDirectory() as scratch:  # these rollouts are not the run's
        store = RolloutStore(Path(scratch))
        collector = Collector(model, Scheduler([engine]), store, state.totals, sampling, config.seed)
        metrics = evaluate(
            collector,
            task,
            model,
            base,
            population,
            best,
            settings,
            step=state.step,
            micro_tokens=config.slow.micro_tokens,
            key=(state.step, task.name, state.cycle),
            others=[none],
            ood=ood,
        )
    metrics["reward_none"] = metrics["reward_by_prompt"][none.id]
    where = {"step": state.step, "task": task.name}
    return where | metrics, {p.id: p.text for p in [*prompts, none]}


if __name__ == "__main__":
    run(main)
