"""`python -m fst_fast.train --plan ...`: what a run would take, before it is begun. No work, no weights.

Tokens follow from the configuration, memory from the model's shape, seconds from rates (rates.json), which for the
embedded model on this machine are measured on the spot. What cannot fit is refused, with what would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from fst_fast.config import Config, Recompute, check, stages, validated
from fst_fast.data import make_order
from fst_fast.errors import UserError
from fst_fast.fast.reflectors import make_reflectors
from fst_fast.memory import FRAGMENTS, GIB, Layout, Part, host_parts, kv_room, parts, peak
from fst_fast.model import GLYPH_BASE
from fst_fast.rates import TABLE, Hardware, Lengths, Roofline, kind_of, read_table
from fst_fast.shape import Shape, read_shape
from fst_fast.tasks import PUBLISHED, task_maker
from fst_fast.tasks.mixture import tasks_in
from fst_fast.workload import LIVE, Speed, Work, phases, work_of

# GPU-hours a run of the model on 8 H100: the paper's range, and what this project wants
PAPER_MODEL, PAPER, GOAL = "qwen3-8b", (25, 40), 10

Some = Annotated[int, Field(ge=0, le=10**9)]


@dataclass(frozen=True)
class PlanOptions:
    """Flags of --plan alone: the machine, and what a plan cannot know."""

    gpu: str = ""
    """Kind of device in the table of rates (h100, h200, a100, cpu); empty = this machine's GPU, else its CPU."""
    gpus: Annotated[int, Field(ge=1, le=100_000)] = 1
    """How many of them."""
    node: Annotated[int, Field(ge=1, le=1000)] = 8
    """GPUs of one machine: the trainer's state is spread over these, and every machine has all of it."""
    liger: bool = True
    """GPUs with the extra [liger], whose layers keep a third less for the backward pass."""
    model: str = ""
    """A built-in shape (qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b) instead of --model.path's config.json."""
    prompt_tokens: Some = 400
    """Mean tokens of a system prompt (assumed; the embedded model's are measured)."""
    problem_tokens: Some = 200
    """Mean tokens of a problem with the chat template's own."""
    response_tokens: Some = 0
    """Mean tokens of a response; 0 = half of rollout.max_new_tokens."""
    live: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the groups whose rewards differ: only those are trained on; 0 = all, the dearest case (the embedded
    model's is measured)."""


@dataclass(frozen=True)
class Target:
    """What is planned for: a model on a machine."""

    shape: Shape
    hardware: Hardware
    here: bool  # the embedded model on this machine's CPU: measured

    @property
    def on_gpu(self) -> bool:
        return self.hardware.name != "cpu"


def target_of(config: Config, options: PlanOptions) -> Target:
    """UserError for a device or a model that is none."""
    table, kind = read_table(), options.gpu or ("cpu" if config.model.device == "cpu" else _this_machine())
    if kind not in table:
        raise UserError(f"plan.gpu = {kind!r}: rates are known of {', '.join(table)}; {TABLE} takes more")
    if options.model:
        shape = read_shape(options.model, field="plan.model")
    else:
        shape = read_shape(config.model.path or str(GLYPH_BASE), field="model.path")
    embedded = not options.model and not config.model.path
    return Target(shape, table[kind], embedded and kind == "cpu" and options.gpus == 1)


def layout_of(config: Config, options: PlanOptions, target: Target) -> Layout:
    sequences = -(-config.rollout.problems * config.rollout.group_size // options.gpus)
    context = options.prompt_tokens + options.problem_tokens
    return Layout(
        gpus=options.gpus,
        node=options.node,
        recompute=config.slow.recompute,
        fused=options.liger and target.on_gpu,
        offload=config.slow.offload,
        bytes=4 if config.model.dtype == "float32" else 2,
        micro_tokens=config.slow.micro_tokens,
        kl=config.slow.kl_coef > 0 or config.mode == "fst-distill",
        vllm=config.rollout.engine == "vllm",
        sequences=min(config.rollout.max_batch, sequences),
        tokens=min(target.shape.context, context + config.rollout.max_new_tokens),
        gpu_fraction=config.rollout.gpu_memory,
        gpu_bytes=_memory(target),
    )


def check_fits(config: Config, options: PlanOptions, target: Target) -> None:
    """UserError with what would fit, where the run cannot."""
    if not _whole(options.gpus, options.node):
        raise UserError(
            f"plan.gpus = {options.gpus}: machines of plan.node = {options.node} have as many processes each; use a "
            "multiple of it"
        )
    context = options.prompt_tokens + options.problem_tokens
    if context + config.rollout.max_new_tokens > target.shape.context:
        raise UserError(
            f"rollout.max_new_tokens = {config.rollout.max_new_tokens}: with {context} tokens of prompt and problem "
            f"(plan.prompt_tokens, plan.problem_tokens) that exceeds the context of {target.shape.name}, "
            f"{target.shape.context} tokens; use {max(1, target.shape.context - context)} or less"
        )
    at = layout_of(config, options, target)
    if not (fault := _misfit(target, at)):
        return
    if not target.on_gpu:
        raise UserError(f"{fault}; plan for GPUs, e.g. --plan.gpu h100 --plan.gpus 8, or take a smaller model")
    for changed in _alternatives(at):
        if not _misfit(target, changed):
            raise UserError(f"{fault}; {_flags(at, changed)} fits")
    raise UserError(f"{fault}; neither recomputing, offloading, bf16 nor 64 times the GPUs make it fit")


def check_tasks(config: Config) -> list[str]:
    """UserError for tasks that are not as the run needs them. Those that were not looked at: their data is not on this
    machine, or takes work to read."""
    make, away = task_maker(config), []
    for stage in stages(config.stream):
        if not all(map(_is_here, tasks_in(stage.task))):
            away.append(stage.task)
            continue
        task = make(stage.task)
        make_order(task, config.rollout.problems, stage, seed=config.seed, name=task.name)
        if config.mode != "rl" and config.fast.reflector == "phrasebook":
            make_reflectors(config.fast, config.reflector, [task])
    if ood := config.eval.ood:
        if all(map(_is_here, tasks_in(ood))):
            make(ood, trained=[])
        else:
            away.append(ood)
    return away


def _is_here(task: str) -> bool:
    """Whether a task needs no data, or has it in a file or folder that is read at once: codeio runs its programs."""
    kind, _, source = task.partition(":")
    named = kind.removesuffix("-ood")
    return named != "codeio" and (named not in ("jsonl", *PUBLISHED) or Path(source).exists())


def _whole(gpus: int, node: int) -> bool:
    """Whether so many are one machine's, or all of several."""
    return gpus <= node or gpus % node == 0


def _gpus(n: int) -> str:
    return f"{n} GPU{'s' * (n > 1)}"


def _misfit(target: Target, at: Layout) -> str:
    """Why it does not fit; "" when it does."""
    shape = target.shape
    where = _gpus(at.gpus) if target.on_gpu else "this machine's CPU"
    who = f"{shape.name} on {where} of {at.gpu_bytes / GIB:.0f} GiB"
    if at.vllm and (room := kv_room(shape, at)) < 1:
        return (
            f"rollout.gpu_memory = {at.gpu_fraction:g}: {who}, vLLM's share holds its weights and "
            f"{max(0.0, room):.2f} sequences of {at.tokens:,} tokens"
        )
    all_parts = parts(shape, at)
    if (needed := peak(all_parts)) > at.gpu_bytes:
        largest = max(all_parts, key=lambda p: p.bytes)
        return f"plan: {who} needs {needed / GIB:.0f} GiB of each, {largest.bytes / GIB:.0f} of them {largest.name}"
    return ""


def _alternatives(at: Layout) -> Iterator[Layout]:
    """Other layouts, those that cost least speed first."""
    modes = get_args(Recompute)
    for gpus in (n for n in (1, 2, 4, 8, 16, 32, 64) if _whole(at.gpus * n, at.node)):
        for offload, micro, fraction, mode, size in product(
            (at.offload, True),
            dict.fromkeys((at.micro_tokens, min(at.micro_tokens, at.tokens))),
            dict.fromkeys((at.gpu_fraction, 0.4, 0.3, 0.5, 0.7, 0.85)),
            modes[modes.index(at.recompute) :],
            (2, at.bytes),
        ):
            yield replace(
                at, gpus=at.gpus * gpus, sequences=-(-at.sequences // gpus), offload=offload, micro_tokens=micro,
                gpu_fraction=fraction, recompute=mode, bytes=size,
            )  # fmt: skip


def _flags(at: Layout, to: Layout) -> str:
    """What to change to get from one layout to the other, as flags."""
    named = {
        "plan.gpus": (at.gpus, to.gpus),
        "model.dtype": (at.bytes, "bfloat16" if to.bytes == 2 != at.bytes else at.bytes),
        "slow.recompute": (at.recompute, to.recompute),
        "slow.offload": (at.offload, to.offload),
        "rollout.gpu-memory": (at.gpu_fraction, to.gpu_fraction),
        "slow.micro-tokens": (at.micro_tokens, to.micro_tokens),
    }
    return " ".join(f"--{name} {new}" for name, (old, new) in named.items() if old != new)


def speed_of(config: Config, options: PlanOptions, target: Target) -> Speed:
    if target.here:
        from fst_fast.calibrate import calibrate

        return calibrate(config)
    at = layout_of(config, options, target)
    response = options.response_tokens or config.rollout.max_new_tokens / 2
    context = options.prompt_tokens + options.problem_tokens
    batch = config.rollout.max_batch
    if at.vllm:
        batch = max(1, min(batch, int(kv_room(target.shape, at) * at.tokens / (context + response))))
    return Roofline(
        target.shape,
        target.hardware,
        Lengths(context, options.problem_tokens, min(response, config.rollout.max_new_tokens),
                config.rollout.max_new_tokens),
        gpus=options.gpus,
        shards=at.shards,
        bytes=at.bytes,
        batch=batch,
        eager=not at.vllm,
        kl=config.slow.kl_coef > 0,
        recompute={"off": 0.0, "selective": 0.05, "full": 1.0}[config.slow.recompute],
        offload=config.slow.offload,
        sharing=sharing_of(config, options, response),
    )  # fmt: skip


def sharing_of(config: Config, options: PlanOptions, response: float) -> tuple[float, float]:
    """Rollouts of a packed micro-batch that share a prompt, and a prompt with its problem (slow.pack)."""
    if config.slow.pack == "off" or config.mode == "fst-distill":
        return 1.0, 1.0
    prompts = config.fast.population if config.mode == "fst" else 1
    on_problem = config.rollout.group_size / prompts
    fit = config.slow.micro_tokens / (options.problem_tokens / on_problem + response)
    return max(1.0, min(config.rollout.problems * on_problem, fit)), max(1.0, min(on_problem, fit))


def reflection_tokens(config: Config, options: PlanOptions, lengths: Lengths) -> tuple[float, float]:
    """Prompt and completion tokens of one call: the prompt, its traces, 250 tokens around them; the prompt edited."""
    if config.fast.reflector == "phrasebook":
        return 0.0, 0.0
    trace = config.reflector.max_trace_chars / 4  # characters a token (assumed)
    per_trace = options.problem_tokens + min(lengths.response, trace) + min(100, trace)
    asked = 250 + options.prompt_tokens + config.fast.minibatch * per_trace
    return asked, min(config.reflector.max_new_tokens, options.prompt_tokens + 150)


def lines(config: Config, options: PlanOptions) -> Iterator[str]:
    """The plan, for people. UserError for what cannot work or fit."""
    check(config)
    validated(PlanOptions, asdict(options), prefix="plan.")
    if config.slow.lora_rank:
        raise UserError("slow.lora_rank: a plan knows the training of all weights alone; use 0 for an upper bound")
    away = check_tasks(config)
    target = target_of(config, options)
    answer, context = config.reflector.max_new_tokens, target.shape.context
    if config.mode != "rl" and config.fast.reflector == "policy" and answer >= context:
        raise UserError(
            f"reflector.max_new_tokens = {answer}: an edit by the policy of that length leaves no room for its "
            f"question in the context of {target.shape.name}, {context} tokens; use less, or another --reflector"
        )
    if not target.here:
        check_fits(config, options, target)
    speed = speed_of(config, options, target)
    live = options.live or (LIVE if target.here else 1.0)
    work = work_of(config, live)
    yield from report(config, options, target, speed, work, away)


def report(
    config: Config, options: PlanOptions, target: Target, speed: Speed, work: Work, away: list[str]
) -> Iterator[str]:
    shape, hardware, n = target.shape, target.hardware, speed.lengths
    machine = f"{options.gpus} x {hardware.name}" if target.on_gpu else "this machine's CPU"
    yield f"plan: {config.mode} of {shape.name} ({shape.parameters / 1e9:.4g} B parameters) on {machine}"
    if away:
        yield f"not looked at, not on this machine or too much work: {', '.join(away)}"
    yield ""
    if target.on_gpu:
        at = layout_of(config, options, target)
        yield "memory of each GPU, GiB (arithmetic from the shape, 2 % below what a run on an H100 had)"
        yield from _table(parts(shape, at))
        needed = peak(parts(shape, at))
        lost = f"with {FRAGMENTS - 1:.0%} lost between blocks"
        yield f"  {needed / GIB:8.2f}  at the worst moment, {lost}: fits in {at.gpu_bytes / GIB:.1f}"
        yield f"memory of the machine{'s, each' if at.gpus > at.node else ''}, GiB (arithmetic)"
        yield from _table(host_parts(shape, at))
        yield ""
    yield "tokens (lengths: " + (
        "measured here with the embedded model)" if target.here
        else "assumed: --plan.prompt-tokens, --plan.problem-tokens, --plan.response-tokens)"
    )  # fmt: skip
    rl, gepa, evals = (work.rollouts(*names) for names in (("rollout",), ("scoring", "minibatch"), ("eval",)))
    rows = {
        "sampled for steps": (rl, rl * n.response),
        "sampled by GEPA": (gepa, gepa * n.response),
        "steps and GEPA": (rl + gepa, (rl + gepa) * n.response),
        "reused by steps, at most": (work.reused, work.reused * n.response),
        "sampled by evaluations": (evals, evals * n.response),
        "prompts asked for": (rl + gepa + evals, (rl + gepa + evals) * n.context),
        "trained on": (work.steps * work.learned, work.steps * work.learned * (n.context + n.response)),
    }
    for name, (rollouts, tokens) in rows.items():
        yield f"  {name:28}{rollouts:12,.0f} rollouts {tokens:16,.0f} tokens"
    each = work.proposals / max(1, work.cycles)
    yield f"  {work.steps:,} steps, {work.cycles} GEPA cycles of {each:.3g} proposals on average"
    yield ""
    spent = phases(work, speed, config)
    total = sum(spent.values())
    how = "measured here, just now" if target.here else f"rates of {hardware.name}, below"
    yield f"time ({how}; without start and report)"
    for phase, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        yield f"  {phase:12}{seconds:14,.1f} s {seconds / total:6.0%}"
    yield f"  {'in all':12}{total:14,.1f} s, {total / max(1, work.steps):.3g} s a step with its share of all"
    yield ""
    yield from _cost(config, options, target, speed, work, total)
    if not target.here:
        yield ""
        yield f"rates of {hardware.name}, and where they are from"
        for name, rate in hardware.rates.items():
            yield f"  {name:20}{rate.value:10g}  {rate.source}"


def _table(of: list[Part]) -> Iterator[str]:
    for p in sorted(of, key=lambda p: (p.when != "always", p.when, -p.bytes)):
        yield f"  {p.bytes / GIB:8.2f}  {p.when:9} {p.name}"


def _cost(
    config: Config, options: PlanOptions, target: Target, speed: Speed, work: Work, seconds: float
) -> Iterator[str]:
    asked, answered = reflection_tokens(config, options, speed.lengths)
    dollars = 0.0
    if config.fast.reflector == "openai":
        price_in, price_out = config.reflector.price_in, config.reflector.price_out
        dollars = work.proposals * (asked * price_in + answered * price_out) / 1e6
    yield (
        f"reflection ({config.fast.reflector}): {work.proposals:,.0f} calls x {asked:,.0f} + {answered:,.0f} tokens "
        f"= {work.proposals * asked:,.0f} + {work.proposals * answered:,.0f} tokens, ${dollars:.2f}"
    )
    if target.on_gpu:
        hours = options.gpus * seconds / 3600
        price = config.price_per_gpu_hour or target.hardware["price"]
        yield (
            f"GPU-hours: {_gpus(options.gpus)} x {seconds:,.0f} s / 3600 = {hours:.1f}; x ${price:g} = "
            f"${hours * price:.2f}, with reflection ${hours * price + dollars:.2f} (NOT measured)"
        )
        for flags, less in overlapped(config, speed, options.live or 1.0):
            if less < seconds:
                yield f"  with {flags}: {options.gpus * less / 3600:.1f}"
        if target.shape.name == PAPER_MODEL:
            yield (
                f"the paper's runs of this model: {PAPER[0]} to {PAPER[1]} GPU-hours; this is {hours / PAPER[1]:.2f} "
                f"to {hours / PAPER[0]:.2f} of that (what this project wants to reach: {GOAL} GPU-hours)"
            )


def overlapped(config: Config, speed: Speed, live: float) -> Iterator[tuple[str, float]]:
    """Flags that fill what GPUs leave idle while they wait for the longest response, and a run's seconds with them."""
    if config.mode not in ("rl", "fst"):
        return
    fast = config.fast
    if config.mode == "fst" and fast.every > 1:
        fast = replace(fast, filler=True)
    for race in dict.fromkeys((fast.race, fast.race and config.mode != "fst")):  # and where it evolves, without
        changed = replace(config, rollout=replace(config.rollout, lookahead=1), fast=replace(fast, race=race))
        flags = {
            "--rollout.lookahead 1": not config.rollout.lookahead,
            "--fast.filler True": fast.filler != config.fast.filler,
            "--fast.race False": race != config.fast.race,
        }
        if any(flags.values()):
            seconds = sum(phases(work_of(changed, live), speed, changed).values())
            yield " ".join(flag for flag, new in flags.items() if new), seconds


def _this_machine() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name(0)
    if not (kind := kind_of(name)):
        raise UserError(f"plan.gpu: no rates are known of {name}; name a kind that is near, e.g. --plan.gpu h100")
    return kind


def _memory(target: Target) -> float:
    """Bytes of one GPU by the table; of this machine's CPU where the system says."""
    if target.on_gpu or not Path("/proc/meminfo").exists():
        return target.hardware["memory_gib"] * GIB
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
