"""The one door to rollouts: (prompt, problem) pairs → scored, recorded rollouts, for both channels and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fst_fast.model import Model
from fst_fast.records import Answer, Problem, Prompt, Purpose, Rollout, SamplingParams
from fst_fast.rollout.engine import Completion, Request, RolloutEngine
from fst_fast.rollout.reuse import RolloutStore
from fst_fast.rollout.schedule import FILLER
from fst_fast.seeding import derive
from fst_fast.tasks.task import Message, Task


@dataclass(frozen=True, slots=True)
class Ask:
    """One rollout wanted."""

    prompt: Prompt
    problem: Problem
    sample: int = 0


@dataclass(slots=True)
class Totals:
    """What the run has spent on learning, evaluation apart; saved with every checkpoint."""

    rollouts: int = 0
    tokens: int = 0  # generated
    gepa_rollouts: int = 0  # of the above
    gepa_tokens: int = 0


class Collector:
    """Renders, schedules, samples, verifies and records. `key` names a call's random stream: no two calls share one."""

    def __init__(
        self,
        model: Model,
        engine: RolloutEngine,
        store: RolloutStore,
        totals: Totals,
        sampling: SamplingParams,
        seed: int,
    ):
        self.model, self.engine, self.store, self.totals = model, engine, store, totals
        self.sampling, self._seed = sampling, seed

    def collect(
        self,
        task: Task,
        asks: Sequence[Ask],
        *,
        purpose: Purpose,
        step: int,
        key: tuple[str | int, ...],
        scoring: bool = False,
    ) -> list[Rollout]:
        """One rollout per ask, in the order of `asks`. `scoring`: they are full evaluations on GEPA's scoring set."""
        encoded: dict[tuple[str, str], tuple[int, ...]] = {}  # a chat template is applied once per (prompt, problem)
        requests = []
        for i, ask in enumerate(asks):
            pair = (ask.prompt.text, ask.problem.id)
            if pair not in encoded:
                encoded[pair] = self.model.encode_chat(task.messages(ask.prompt.text, ask.problem))
            seed = derive(self._seed, purpose, *key, ask.prompt.id, ask.problem.id, ask.sample)
            priority = FILLER if purpose == "gepa" else step
            version = self.engine.policy_version
            requests.append(Request(i, encoded[pair], self.sampling, seed, priority, version, ask.problem.id))
        rollouts = [
            self._rollout(task, ask, request, completion, purpose, scoring)
            for ask, request, completion in zip(asks, requests, self._drain(requests), strict=True)
        ]
        self.store.add(rollouts, step=step)
        self._count(rollouts, purpose)
        return rollouts

    def complete(
        self, conversations: Sequence[list[Message]], sampling: SamplingParams, key: tuple[str | int, ...]
    ) -> list[Answer]:
        """Plain chat completions by the weights the engine holds, outside the store: the policy as reflection LM.

        A conversation that leaves no room in the context for `max_new_tokens`, or whose answer reaches that length, is
        answered with a fault.
        """
        requests = [
            Request(i, self.model.encode_chat(messages), sampling, derive(self._seed, "complete", *key, i))
            for i, messages in enumerate(conversations)
        ]
        room = self.model.context - sampling.max_new_tokens
        fitting = [r for r in requests if len(r.prompt_ids) <= room]
        done = {c.id: c for c in self._drain(fitting)}

        def answer(r: Request) -> Answer:
            if r.id not in done:
                return Answer("", f"{len(r.prompt_ids)} tokens of question leave no room in {self.model.context}")
            c = done[r.id]
            fault = "" if c.finish_reason == "stop" else f"cut off at {len(c.response_ids)} tokens"
            return Answer(self.model.decode(c.response_ids), fault, len(r.prompt_ids), len(c.response_ids))

        return [answer(r) for r in requests]

    def _drain(self, requests: list[Request]) -> list[Completion]:
        self.engine.submit(requests)
        done: dict[int, Completion] = {}
        while self.engine.busy:
            done.update((c.id, c) for c in self.engine.step())
        return [done[r.id] for r in requests]

    def _rollout(
        self, task: Task, ask: Ask, request: Request, c: Completion, purpose: Purpose, scoring: bool
    ) -> Rollout:
        response = self.model.decode(c.response_ids)
        return Rollout(
            prompt=ask.prompt,
            problem=ask.problem,
            sample=ask.sample,
            purpose=purpose,
            prompt_ids=request.prompt_ids,
            response_ids=c.response_ids,
            logprobs=c.logprobs,
            versions=c.versions,
            sampling=request.sampling,
            finish_reason=c.finish_reason,
            engine=self.engine.name,
            response=response,
            verdict=task.verify(ask.problem, response),
            scoring=scoring,
        )

    def _count(self, rollouts: Sequence[Rollout], purpose: Purpose) -> None:
        if purpose == "eval":
            return
        tokens = sum(len(r.response_ids) for r in rollouts)
        self.totals.rollouts += len(rollouts)
        self.totals.tokens += tokens
        if purpose == "gepa":
            self.totals.gepa_rollouts += len(rollouts)
            self.totals.gepa_tokens += tokens
