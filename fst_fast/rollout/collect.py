"""The one door to rollouts: (prompt, problem) pairs → scored, recorded rollouts, for both channels and evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from fst_fast.errors import EngineError
from fst_fast.model import Model
from fst_fast.ranks import ALONE, Ranks
from fst_fast.records import Answer, Problem, Prompt, Purpose, Rollout, SamplingParams, Verdict
from fst_fast.rollout.engine import Completion, Request, RolloutEngine
from fst_fast.rollout.reuse import RolloutStore
from fst_fast.rollout.schedule import FILLER, LengthPredictor, place, plan
from fst_fast.seeding import derive
from fst_fast.tasks.task import Message, Task, posed, verdicts


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


@dataclass(frozen=True, slots=True)
class Asked:
    """This rank's rollouts under way: what `Collector.submit` gives, and `Collector.finish` takes once."""

    task: Task
    places: list[int]  # of the asks below among all
    asks: list[Ask]
    requests: list[Request]
    purpose: Purpose
    step: int
    scoring: bool
    versions: range  # of the weights that may sample them


class Collector:
    """Renders, schedules, samples, verifies and records. `key` names a call's random stream: no two calls share one.

    Every rank is asked for the same, samples its share with an engine of its own, and returns it all. Shares are of
    equal work, by the lengths of earlier responses to the same problems; those to one prompt and problem stay together.
    `phase("verify")` is entered while responses are decoded and verified (meter.py).
    """

    def __init__(
        self,
        model: Model,
        engine: RolloutEngine,
        store: RolloutStore,
        totals: Totals,
        sampling: SamplingParams,
        seed: int,
        ranks: Ranks = ALONE,
        phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ):
        self.model, self.engine, self.store, self.totals = model, engine, store, totals
        self.sampling, self._seed, self.ranks, self._phase = sampling, seed, ranks, phase
        self._ids = count()
        self._lengths = LengthPredictor()  # of all ranks' responses: each divides the work as the others do
        self._done: dict[int, Completion] = {}  # finished, and not yet asked for

    def collect(
        self, task: Task, asks: Sequence[Ask], *, purpose: Purpose, step: int, key: tuple[str | int, ...]
    ) -> list[Rollout]:
        """One rollout per ask, in the order of `asks`."""
        return self.finish(self.submit(task, asks, purpose=purpose, step=step, key=key))

    def submit(
        self,
        task: Task,
        asks: Sequence[Ask],
        *,
        purpose: Purpose,
        step: int,
        key: tuple[str | int, ...],
        scoring: bool = False,
        ahead: int = 0,
        age: int = 0,
    ) -> Asked:
        """Queue a request per ask. `scoring`: they score prompts on GEPA's scoring set. `ahead`: they are for weights
        so many versions after the engine's, by which they may begin; what is not finished when those are loaded is
        finished by them. `age`: so many weight changes they may live through besides."""
        version = self.engine.policy_version
        encoded: dict[tuple[str, str], tuple[int, ...]] = {}  # a chat template is applied once per (prompt, problem)
        for ask in asks:
            pair = (ask.prompt.text, ask.problem.id)
            if pair not in encoded:
                encoded[pair] = self.model.encode_chat(task.messages(ask.prompt.text, ask.problem))
        prompts = [encoded[ask.prompt.text, ask.problem.id] for ask in asks]
        places = shares(asks, prompts, self._lengths, self.ranks.size)[self.ranks.rank]
        requests = []
        for i in places:
            ask = asks[i]
            seed = derive(self._seed, purpose, *key, ask.prompt.id, ask.problem.id, ask.sample)
            priority = FILLER if purpose == "gepa" else step
            requests.append(
                Request(next(self._ids), prompts[i], self.sampling, seed, priority, version + ahead, ask.problem.id)
            )
        if requests:
            self.engine.submit(requests)
        own, versions = [asks[i] for i in places], range(version, version + ahead + age + 1)
        return Asked(task, places, own, requests, purpose, step, scoring, versions)

    def ready(self, asked: Asked) -> bool:
        """Whether `finish` has nothing to wait for on this rank."""
        return all(r.id in self._done for r in asked.requests)

    def finish(self, asked: Asked) -> list[Rollout]:
        """One rollout per ask, in their order, when all of them are done."""
        done = self._drain(asked.requests)
        if strangers := {v for c in done for v, _ in c.versions} - set(asked.versions):
            first, last = asked.versions[0], asked.versions[-1]
            wanted = f"weights {first}" if first == last else f"weights {first} to {last}"
            raise EngineError(f"rollouts for {wanted} were sampled by weights {min(strangers)}")
        with self._phase("verify"):
            responses = [self.model.decode(c.response_ids) for c in done]
            said = verdicts(asked.task, [(ask.problem, r) for ask, r in zip(asked.asks, responses, strict=True)])
        own = [
            self._rollout(asked, *one) for one in zip(asked.asks, asked.requests, done, responses, said, strict=True)
        ]
        everywhere = self.ranks.join(list(zip(asked.places, own, strict=True)))
        rollouts = [rollout for _, rollout in sorted(everywhere, key=lambda found: found[0])]
        for r in rollouts:
            self._lengths.observe(r.problem.id, len(r.response_ids))
        self.store.add(rollouts, step=asked.step, posed=partial(posed, asked.task))
        self._count(rollouts, asked.purpose)
        return rollouts

    def complete(
        self, conversations: Sequence[list[Message]], sampling: SamplingParams, key: tuple[str | int, ...]
    ) -> list[Answer]:
        """Plain chat completions by the weights the engine holds, outside the store: the policy as reflection LM.

        A conversation that leaves no room in the context for `max_new_tokens`, or whose answer reaches that length, is
        answered with a fault.
        """
        requests = [
            Request(
                next(self._ids), self.model.encode_chat(messages), sampling, derive(self._seed, "complete", *key, i)
            )
            for i, messages in self.ranks.share(list(enumerate(conversations)))
        ]
        room = self.model.context - sampling.max_new_tokens
        fitting = [r for r in requests if len(r.prompt_ids) <= room]
        if fitting:
            self.engine.submit(fitting)
        done = {c.id: c for c in self._drain(fitting)}

        def answer(r: Request) -> Answer:
            if r.id not in done:
                return Answer("", f"{len(r.prompt_ids)} tokens of question leave no room in {self.model.context}")
            c = done[r.id]
            fault = "" if c.finish_reason == "stop" else f"cut off at {len(c.response_ids)} tokens"
            return Answer(self.model.decode(c.response_ids), fault, len(r.prompt_ids), len(c.response_ids))

        return self.ranks.join([answer(r) for r in requests])

    def _drain(self, requests: list[Request]) -> list[Completion]:
        """Of these requests, in their order; what else finishes on the way is kept for those who asked."""
        missing = {r.id for r in requests} - self._done.keys()
        while missing:
            if not self.engine.busy:
                raise EngineError(f"the {self.engine.name} engine lost {len(missing)} of {len(requests)} requests")
            for c in self.engine.step():
                self._done[c.id] = c
                missing.discard(c.id)
        return [self._done.pop(r.id) for r in requests]

    def _rollout(
        self, asked: Asked, ask: Ask, request: Request, c: Completion, response: str, verdict: Verdict
    ) -> Rollout:
        return Rollout(
            prompt=ask.prompt,
            problem=ask.problem,
            sample=ask.sample,
            purpose=asked.purpose,
            prompt_ids=request.prompt_ids,
            response_ids=c.response_ids,
            logprobs=c.logprobs,
            versions=c.versions,
            sampling=request.sampling,
            finish_reason=c.finish_reason,
            engine=f"{self.engine.name} {self.engine.version}",
            response=response,
            verdict=verdict,
            scoring=asked.scoring,
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


def shares(
    asks: Sequence[Ask], prompts: Sequence[tuple[int, ...]], lengths: LengthPredictor, size: int
) -> list[list[int]]:
    """Indices of the asks of each of `size` ranks: about equal work, by the tokens of `prompts` and the lengths to
    expect; those that share a whole prompt stay together."""
    if size == 1:
        return [list(range(len(asks)))]
    found = plan(prompts, [0] * len(asks), [lengths.expected(ask.problem.id) for ask in asks])
    out: list[list[int]] = [[] for _ in range(size)]
    for unit, rank in zip(found.units, place(found, [0.0] * size), strict=True):
        out[rank] += unit.requests
    return [sorted(each) for each in out]


def version_metrics(rollouts: Sequence[Rollout], version: int) -> dict[str, Any]:
    """Tokens by how many versions before `version` the weights were that sampled them; responses of several weights."""
    ages: Counter[int] = Counter()
    for r in rollouts:
        for sampled_by, tokens in r.versions:
            ages[version - sampled_by] += tokens
    return {
        "token_ages": {str(a): n for a, n in sorted(ages.items())},
        "spanning": sum(len(r.versions) > 1 for r in rollouts),
    }
