"""What a reflector is: it reads rollouts of a prompt and proposes an edited prompt, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from operator import add
from typing import Protocol, runtime_checkable

from fst_fast.records import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class ReflectionRequest:
    """One prompt to edit, and what happened under it on one minibatch of problems."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    seed: int  # for reflectors that draw at random


@dataclass(frozen=True, slots=True)
class Reflection:
    """The edited prompt, or None when there is none; `note` says what was done, or what went wrong."""

    text: str | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class ReflectionUsage:
    calls: int = 0  # edits asked for
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    failures: int = 0  # calls without a usable answer

    def __add__(self, other: ReflectionUsage) -> ReflectionUsage:
        return ReflectionUsage(*map(add, astuple(self), astuple(other)))


class Reflector(Protocol):
    usage: ReflectionUsage  # since it was made, or set to nothing by the cycle that asks

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        """One answer per request, in order. An answer that fails is a Reflection without text, never an exception."""
        ...


@runtime_checkable
class AbsentReflector(Reflector, Protocol):
    """One that works elsewhere: this machine has better to do than wait for it."""

    def begin(self, requests: Sequence[ReflectionRequest]) -> Callable[[], list[Reflection]]:
        """Asks, and returns at once: what is returned waits for the answers."""
        ...
