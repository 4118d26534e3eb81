"""Who rewrites prompts: makes the reflector that the config names, or says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import TypeVar

from fst_fast.config import FastConfig, ReflectorConfig
from fst_fast.errors import UserError
from fst_fast.fast.phrasebook import PhrasebookReflector
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage, Reflector
from fst_fast.fast.template import Pose, instruction, parse
from fst_fast.ranks import ALONE, Ranks
from fst_fast.records import Answer
from fst_fast.tasks.task import Message, Task, posed

R = TypeVar("R")
Generate = Callable[[Sequence[list[Message]]], list[Answer]]
"""Chats in, the frozen base model's answers out, in order; one with a fault for a chat that leaves no room."""


def make_reflectors(
    fast: FastConfig,
    reflector: ReflectorConfig,
    tasks: Sequence[Task],
    generate: Generate | None = None,
    ranks: Ranks = ALONE,
) -> list[Reflector]:
    """The reflector named by `fast.reflector`, for each of `tasks`. `generate` serves "policy" only, `ranks` "openai".

    Raises:
        UserError: a task has no phrase book, or the endpoint no key.
    """
    if fast.reflector == "phrasebook":
        return [_phrasebook(task) for task in tasks]
    poses = [partial(posed, task) for task in tasks]
    if fast.reflector == "openai":
        from fst_fast.fast.endpoint import Endpoint, EndpointReflector

        endpoint = Endpoint(reflector)
        return [OnFirstRank(EndpointReflector(endpoint, pose, fast.max_prompt_chars), ranks) for pose in poses]
    assert generate is not None, "the policy reflector needs the engine"
    return [PolicyReflector(generate, pose, fast.max_prompt_chars, reflector.max_trace_chars) for pose in poses]


def _phrasebook(task: Task) -> PhrasebookReflector:
    if not any(task.phrasebook.values()):
        raise UserError(
            f'fast.reflector = "phrasebook": the task {task.name!r} has no phrase book; '
            'choose "policy" (the base model itself) or "openai" (an OpenAI-compatible endpoint), or --mode rl.'
        )
    return PhrasebookReflector(task.phrasebook)


class OnFirstRank:
    """A reflector that rank 0 asks, for all: its calls cost money."""

    def __init__(self, inner: Reflector, ranks: Ranks):
        self._inner, self._ranks = inner, ranks
        self.usage = inner.usage

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        return self.begin(requests)()

    def begin(self, requests: Sequence[ReflectionRequest]) -> Callable[[], list[Reflection]]:
        self._inner.usage = self.usage
        asked = in_background(lambda: self._inner.reflect(requests)) if self._ranks.main else None

        def result() -> tuple[list[Reflection], ReflectionUsage]:
            assert asked
            return asked.result(), self._inner.usage

        def answers() -> list[Reflection]:
            found, self.usage = self._ranks.first(result)
            return found

        return answers


def in_background(work: Callable[[], R]) -> Future[R]:
    """In a thread that does not outlive the process, as an executor's would."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


class PolicyReflector:
    """The base model, frozen, rewrites its own prompts: no second service needed."""

    def __init__(self, generate: Generate, pose: Pose, max_prompt_chars: int, max_trace_chars: int):
        self.usage = ReflectionUsage()
        self._generate, self._pose = generate, pose
        self._limits = {"max_prompt_chars": max_prompt_chars, "max_trace_chars": max_trace_chars}

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        texts = [instruction(request, self._pose, **self._limits) for request in requests]
        answers = self._generate([[{"role": "user", "content": text}] for text in texts])
        reflections = [Reflection(None, a.fault) if a.fault else parse(a.text) for a in answers]
        self.usage += ReflectionUsage(
            calls=len(requests),
            prompt_tokens=sum(a.prompt_tokens for a in answers),
            completion_tokens=sum(a.completion_tokens for a in answers),
            failures=sum(r.text is None for r in reflections),
        )
        return reflections
