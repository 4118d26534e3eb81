"""Does all that a run will sample fit the model's context? Asked before any work, and of every proposed prompt."""

from __future__ import annotations

from collections.abc import Sequence

from fst_fast.config import Config
from fst_fast.errors import UserError, quoted
from fst_fast.evaluate import retention_asks
from fst_fast.fast.reflection import ReflectionRequest
from fst_fast.fast.template import instruction
from fst_fast.model import Model
from fst_fast.records import Problem, Prompt
from fst_fast.rollout.collect import Ask
from fst_fast.tasks.mixture import parts_of
from fst_fast.tasks.task import Task


def longest_problem(model: Model, task: Task) -> Problem:
    """The problem with the most tokens, among the 32 with the most characters."""
    problems = sorted([*task.train, *task.validation], key=lambda p: len(str(task.messages("", p))))[-32:]
    return min(problems, key=lambda p: room(model, task, Prompt(task.seed_prompt), p, 0))


def room(model: Model, task: Task, prompt: Prompt, problem: Problem, max_new_tokens: int) -> int:
    """Tokens left over when the problem is posed under the prompt and answered at full length."""
    return model.room(task.messages(prompt.text, problem), max_new_tokens)


def check_context(model: Model, tasks: Sequence[Task], ood: Task | None, config: Config) -> list[Problem]:
    """UserError when what a run will sample leaves no room for an answer; the longest problem of each of `tasks`."""
    answer = config.rollout.max_new_tokens
    longest = [longest_problem(model, task) for task in tasks]
    for task, problem in zip(tasks, longest, strict=True):
        check_room(model, task, [Prompt(task.seed_prompt)], problem, answer)
    if ood:
        check_room(model, ood, [Prompt(ood.seed_prompt)], longest_problem(model, ood), answer)
    if config.mode != "rl" and config.fast.reflector == "policy":
        for task in tasks:
            check_edits(model, task, config)
    return longest


def check_edits(model: Model, task: Task, config: Config) -> None:
    """UserError when the model's context has no room for the question of an edit, not even without its rollouts."""
    limits = {"max_prompt_chars": config.fast.max_prompt_chars, "max_trace_chars": config.reflector.max_trace_chars}
    question = instruction(ReflectionRequest(Prompt(task.seed_prompt), (), 0), lambda problem: "", **limits)
    answer = config.reflector.max_new_tokens
    if (left := model.room([{"role": "user", "content": question}], answer)) <= 0:
        raise UserError(
            f"reflector.max_new_tokens = {answer}: the question of an edit takes {model.context - answer - left} "
            f"tokens, its rollouts apart, and the model's context is {model.context}; use less, a model with a longer "
            "context, another --reflector, or --mode rl"
        )


def check_room(model: Model, task: Task, prompts: Sequence[Prompt], longest: Problem, max_new_tokens: int) -> None:
    """UserError when the longest problem under one of `prompts`, or what evaluation adds, does not fit."""
    asks = [(task, Ask(prompt, longest)) for prompt in prompts]
    asks += [(part, ask) for part in parts_of(task) for ask in retention_asks(part)]
    for part, ask in asks:
        if (left := room(model, part, ask.prompt, ask.problem, max_new_tokens)) < 0:
            fitting = max_new_tokens + left
            do = f"use {fitting} or less" if fitting > 0 else "pose shorter problems"
            raise UserError(
                f"rollout.max_new_tokens = {max_new_tokens}: problem {ask.problem.id} under the prompt "
                f"{quoted(ask.prompt.text, 60)} and an answer of that length exceed the model's context of "
                f"{model.context} tokens by {-left}; {do}, or a model with a longer context"
            )
