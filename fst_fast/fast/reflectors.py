"""Who rewrites prompts: makes the reflector that the config names, or says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fst_fast.config import FastConfig, ReflectorConfig
from fst_fast.errors import UserError
from fst_fast.fast.phrasebook import PhrasebookReflector
from fst_fast.fast.reflection import Reflector
from fst_fast.tasks.task import Message, Task

Generate = Callable[[Sequence[list[Message]]], list[str]]
"""Chats in, the frozen base model's answers out, in order."""


def make_reflector(
    fast: FastConfig, reflector: ReflectorConfig, task: Task, generate: Generate | None = None
) -> Reflector:
    """The reflector named by `fast.reflector`, for `task`. `generate` serves "policy" only.

    Raises:
        UserError: the task has no phrase book, or the endpoint no key.
    """
    if fast.reflector == "phrasebook":
        if not task.phrasebook:
            raise UserError(
                f'fast.reflector = "phrasebook": the task {task.name!r} has no phrase book; '
                'choose "policy" (the base model itself) or "openai" (an OpenAI-compatible endpoint).'
            )
        return PhrasebookReflector(task.phrasebook)
    raise NotImplementedError(fast.reflector)
