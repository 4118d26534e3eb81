"""A GEPA cycle taken one call at a time: gepa drives it by calling us, and the loop has steps to do in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, NamedTuple, TypeVar

from fst_fast.fast.evolve import Evolution, evolve
from fst_fast.fast.population import Member
from fst_fast.fast.reflection import AbsentReflector, Reflection, ReflectionRequest, ReflectionUsage, Reflector
from fst_fast.records import Problem, Prompt, Rollout

R = TypeVar("R")


class Wanted(NamedTuple):
    """One rollout per pair. `scoring`: they score prompts on the scoring set."""

    pairs: Sequence[tuple[Prompt, Problem]]
    scoring: bool


class Cycle:
    """`evolve` of a `pool`, with its keyword arguments but for `evaluate`, a call at a time.

    `wanted` is the call it waits for, number `calls`, from 1; `give` takes its rollouts. When it waits for none,
    `evolution` is what it found.

    The reflector is asked within `give`, by its caller: no rollout and no collective runs in a thread of its own. One
    that works elsewhere can be left to it (`beside`): then the cycle is `reflecting`, until `listen` has its answers.
    """

    def __init__(self, pool: Sequence[Member], *, reflector: Reflector, **kwargs: Any):
        def work(ask: Callable[[Any], Any]) -> Evolution:
            relay = _Relay(reflector, ask)
            return evolve(pool, evaluate=lambda *call: ask(Wanted(*call)), reflector=relay, **kwargs)

        self._reflector, self.calls = reflector, 0
        self._answers: Callable[[], list[Reflection]] | None = None
        self._aside = Aside(work)
        self._reflect()

    @property
    def wanted(self) -> Wanted | None:
        question = self._aside.question
        return question if isinstance(question, Wanted) else None

    @property
    def reflecting(self) -> bool:
        return self._answers is not None

    @property
    def evolution(self) -> Evolution:
        return self._aside.result

    def give(self, rollouts: list[Rollout], *, beside: bool = False) -> None:
        self._aside.answer(rollouts)
        self._reflect(beside=beside)

    def listen(self) -> None:
        """Wait for the reflector, and go on."""
        assert self._answers
        answers, self._answers = self._answers(), None
        self._aside.answer(answers)
        self._reflect()

    def close(self) -> None:
        """Give it up."""
        self._aside.close()

    def _reflect(self, *, beside: bool = False) -> None:
        while isinstance(self._aside.question, _Edits):
            requests = self._aside.question.requests
            if beside and isinstance(self._reflector, AbsentReflector):
                self._answers = self._reflector.begin(requests)
                return
            self._aside.answer(self._reflector.reflect(requests))
        self.calls += 1


class Aside(Generic[R]):
    """`work(ask)` in a thread that runs only while this one waits for it: until it asks, or is done.

    `question` is what it asks, `answer` lets it go on. None: it is done, and `result` is what it returned. What it
    raises is raised here.
    """

    question: Any
    result: R

    def __init__(self, work: Callable[[Callable[[Any], Any]], R]):
        self._said: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        Thread(target=self._run, args=(work,), daemon=True).start()
        self._listen()

    def answer(self, answer: Any) -> None:
        self._answers.put(answer)
        self._listen()

    def close(self) -> None:
        """End the work where it stands."""
        if self.question is not None:
            self.question = None
            self._answers.put(_Closed())

    def _run(self, work: Callable[[Callable[[Any], Any]], R]) -> None:
        try:
            self._said.put(("result", work(self._ask)))
        except _Closed:
            pass
        except BaseException as error:
            self._said.put(("error", error))

    def _ask(self, question: Any) -> Any:
        self._said.put(("question", question))
        answer = self._answers.get()
        if isinstance(answer, _Closed):
            raise answer
        return answer

    def _listen(self) -> None:
        self.question = None
        kind, said = self._said.get()
        if kind == "error":
            raise said
        setattr(self, kind, said)


class _Closed(BaseException):
    """Not an Exception: nothing on the way out is to catch it."""


class _Edits(NamedTuple):
    requests: Sequence[ReflectionRequest]


@dataclass
class _Relay:
    """The reflector as `evolve` sees it."""

    inner: Reflector
    ask: Callable[[Any], list[Reflection]]

    @property
    def usage(self) -> ReflectionUsage:
        return self.inner.usage

    @usage.setter
    def usage(self, value: ReflectionUsage) -> None:
        self.inner.usage = value

    def reflect(self, requests: Sequence[ReflectionRequest]) -> list[Reflection]:
        return self.ask(_Edits(requests))
