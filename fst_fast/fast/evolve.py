"""One GEPA cycle over the prompt population, driven through gepa's public protocols; the only file that imports `gepa`.

The pool is scored afresh, since the policy moved; then parents from its Pareto front are tried on fresh problems, the
reflector edits them from what went wrong, and children that do better there enter the same race and join the pool.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Literal

import gepa
from gepa.core.adapter import EvaluationBatch
from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.proposer.base import CandidateProposal
from gepa.proposer.reflective_mutation.reflection_lm import ReflectionProposal
from gepa.strategies.proposal_sampling import ProposalTask

from fst_fast.config import FastConfig
from fst_fast.fast.population import Member, breeding_weights, distinct, normalised
from fst_fast.fast.race import Race
from fst_fast.fast.reflection import Reflection, ReflectionRequest, ReflectionUsage, Reflector
from fst_fast.fast.text import cut_middle, printable
from fst_fast.records import Problem, Prompt, Rollout
from fst_fast.seeding import derive, stream

Evaluate = Callable[[Sequence[tuple[Prompt, Problem]], bool], list[Rollout]]
"""One rollout per pair, in the order asked. One call is one batch for the engine. The flag: whether these score prompts
on the scoring set; rollouts of minibatches decide on acceptance, which makes them useless to learn from."""

Status = Literal["accepted", "rejected", "duplicate", "empty", "too long", "failed"]

_SOLVED = 1.0
_KEPT_FEEDBACKS, _KEPT_CHARS = 3, 500  # of a proposal's feedback, in the lineage


@dataclass(frozen=True, slots=True)
class Candidate:
    """One proposal of a cycle and what became of it: a line of the lineage.

    accepted: it joined the pool; rejected: no better than its parent on the minibatch. The others were refused before
    any rollout: duplicate (in the pool or proposed in the same round), empty, too long, failed (no answer).
    """

    cycle: int
    index: int  # number of the proposal in its cycle
    parent: str  # id of the prompt that was edited
    text: str  # "" when the reflector had no answer
    status: Status
    problems: tuple[str, ...]  # ids of the minibatch
    slice: str  # the slice that all of them belong to, if they do
    parent_scores: tuple[float, ...]
    child_scores: tuple[float, ...]  # empty when refused
    feedback: tuple[str, ...]  # examples of what the reflector read
    note: str  # what the reflector says of its edit, or why there is none

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with the id of the proposed prompt."""
        return {"id": Prompt(self.text).id if self.text else None, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Evolution:
    """What a cycle leaves behind. `pool` is in the order of greedy coverage: best first, population first.

    Prompts that dropped out of the race follow, with the scores they have.
    """

    pool: tuple[Member, ...]  # carried into the next cycle
    population: tuple[Prompt, ...]  # its first K: they share the rollouts of a group
    blind: Mapping[str, tuple[Prompt, ...]]  # scored problem → the K chosen without its scores; empty unless asked for
    candidates: tuple[Candidate, ...]  # every proposal, in order
    rollouts: int  # really asked for
    skipped: int  # parents not edited, because they solved their whole minibatch
    reflection: ReflectionUsage  # of this cycle

    @property
    def best(self) -> Prompt:
        """The prompt of the highest mean score."""
        return self.pool[0].prompt


def evolve(
    pool: Sequence[Member],
    scoring: Sequence[Problem],
    training: Sequence[Problem],
    evaluate: Evaluate,
    reflector: Reflector,
    config: FastConfig,
    *,
    proposals: int,
    seed: int,
    cycle: int,
    first: Sequence[Problem] = (),
    blind: bool = False,
    fits: Callable[[Prompt], bool] = lambda _: True,
) -> Evolution:
    """Score `pool` on `scoring`, try `proposals` edits on minibatches of `training`, choose the next pool.

    `first`: further training problems, which the minibatches take before all others.

    `blind`: find also which prompts each scored problem would have got without its own scores (race.py).

    `fits` is False for a prompt that leaves the policy no room to answer: it is refused as too long. Fewer proposals
    are made when parents go on solving their whole minibatch. The same arguments give the same result, as far as
    `evaluate` and `reflector` do. Exceptions of both propagate.
    """
    if not (pool and scoring and training):
        raise ValueError("evolve needs a prompt, a scoring problem and a training problem at least")
    reflector.usage = ReflectionUsage()  # of this cycle alone: sums of floats must not depend on a resume
    run = _Cycle(
        distinct(pool), scoring, training, first, evaluate, reflector, config, proposals, seed, cycle, blind, fits
    )
    result = gepa.optimize(
        seed_candidate=_candidate(run.members[0].prompt),
        trainset=training,
        valset=[_SCORING],
        adapter=run,
        reflection_strategy=run,
        sampling_strategy=run,
        acceptance_criterion=run,
        stop_callbacks=run.should_stop,
        callbacks=[run],
        skip_perfect_score=True,
        perfect_score=_SOLVED,
        track_best_outputs=False,
        raise_on_exception=True,
        logger=SimpleNamespace(log=lambda message: None),  # gepa's own prints every prompt it meets
        seed=derive(seed, "gepa", cycle),
    )
    if run.error:
        raise run.error
    members = _members(result, run, cycle)
    standing = [members[i] for i in run.race.standing()]
    k = min(config.population, len(run.race.finished()))
    return Evolution(
        pool=tuple(standing[: max(config.pool, k)]),
        population=tuple(m.prompt for m in standing[:k]),
        blind=run.race.blind_populations(config.population),
        candidates=tuple(run.candidates),
        rollouts=run.rollouts,
        skipped=run.skipped,
        reflection=reflector.usage,
    )


def _members(result: Any, run: _Cycle, cycle: int) -> list[Member]:
    """All who raced: those carried in, then the accepted children."""
    prompts = [Prompt(candidate[_COMPONENT]) for candidate in result.candidates]
    assert prompts == run.race.prompts, "gepa lost the pool"
    children = [
        Member(prompts[i], parent=prompts[result.parents[i][0]].id, cycle=cycle)
        for i in range(len(run.members), len(prompts))
    ]
    return [replace(m, scores=run.race.scores_of(i)) for i, m in enumerate([*run.members, *children])]


class _Cycle:
    """One cycle in all the roles that gepa's protocols ask for: what it calls, and in which order, reads downwards.

    gepa swallows exceptions of callbacks and of reflection: they are kept in `error`, which ends the cycle.
    """

    propose_new_texts = None  # without this attribute gepa burns the budget and proposes nothing

    def __init__(
        self,
        members: list[Member],
        scoring: Sequence[Problem],
        training: Sequence[Problem],
        first: Sequence[Problem],
        evaluate: Evaluate,
        reflector: Reflector,
        config: FastConfig,
        proposals: int,
        seed: int,
        cycle: int,
        blind: bool,
        fits: Callable[[Prompt], bool],
    ):
        training = [*first, *training]
        self.members = members
        self.reflector, self.config, self.proposals, self.seed, self.cycle = reflector, config, proposals, seed, cycle
        self.fits, self._evaluate = fits, evaluate
        self.parents = stream(seed, "gepa", cycle, "parents")
        rng = stream(seed, "gepa", cycle, "minibatches")
        self.minibatches = Minibatches(training, config.minibatch, rng, first={p.id for p in first})
        self.known: set[str] = set()  # texts in the pool or proposed in this round
        self.candidates: list[Candidate] = []
        self.rollouts = self.rounds = self.sampled = 0
        self.error: Exception | None = None
        distinct_problems = list({p.id: p for p in scoring}.values())
        self.race = Race(distinct_problems, self._score, keep=config.population, pauses=config.race, blind=blind)
        self.race.enter([m.prompt for m in members])

    @property
    def skipped(self) -> int:
        return self.sampled - len(self.candidates)

    # Adapter: rollouts.

    def evaluate(self, batch: list[Any], candidate: dict[str, str], capture_traces: bool = False, **_: Any) -> Any:
        """gepa calls this once, to score the seed candidate: the pool has raced already."""
        assert candidate == _candidate(self.members[0].prompt)
        assert batch == [_SCORING]
        return self._scored(0)

    def batch_evaluate(self, items: list[tuple[dict[str, str], list[Any]]], **_: Any) -> list[Any]:
        """Of parents or children on their minibatches, or of accepted children in the race."""
        prompts = [Prompt(candidate[_COMPONENT]) for candidate, _ in items]
        if all(batch == [_SCORING] for _, batch in items):
            first = len(self.race.prompts)
            self.race.enter(prompts)
            return [self._scored(i) for i in range(first, len(self.race.prompts))]
        pairs = [(prompt, problem) for prompt, (_, batch) in zip(prompts, items, strict=True) for problem in batch]
        ordered = iter(self._rollouts(pairs, scoring=False))
        batches = [[next(ordered) for _ in batch] for _, batch in items]
        return [EvaluationBatch(outputs=b, scores=[r.reward for r in b], trajectories=b) for b in batches]

    def _score(self, pairs: Sequence[tuple[Prompt, Problem]]) -> list[float]:
        return [r.reward for r in self._rollouts(pairs, scoring=True)]

    def _rollouts(self, pairs: Sequence[tuple[Prompt, Problem]], *, scoring: bool) -> list[Rollout]:
        rollouts = self._evaluate(pairs, scoring)
        if [(r.prompt, r.problem.id) for r in rollouts] != [(prompt, problem.id) for prompt, problem in pairs]:
            raise ValueError("evaluate must return one rollout per pair, in the order asked")
        self.rollouts += len(pairs)
        return rollouts

    def _scored(self, i: int) -> Any:
        """What gepa is told of a racer: its own choices by score are replaced by ours."""
        return EvaluationBatch(outputs=[None], scores=[fmean(self.race.scores_of(i).values())])

    # Stopper: asked before every round.

    def should_stop(self, _state: GEPAState) -> bool:
        if self.rounds == 0 and not self.error:
            return False  # the first round brings in the rest of the pool
        most_rounds = 2 * math.ceil(self.proposals / self.config.parallel)  # parents may all be perfect: always end
        return bool(self.error) or len(self.candidates) >= self.proposals or self.rounds >= most_rounds

    # Callback: the public API takes one seed candidate, so the others are registered when the first round begins.

    def on_iteration_start(self, event: Mapping[str, Any]) -> None:
        if self.rounds > 0:
            return
        try:
            state: GEPAState = event["state"]
            for i, member in enumerate(self.members[1:], start=1):
                scored = ValsetEvaluation({}, {0: self._scored(i).scores[0]})
                before = state.total_num_evals
                state.increment_evals(1)
                state.update_state_with_new_program([], _candidate(member.prompt), scored, None, before)
        except Exception as error:
            self.error = error

    # Sampling strategy: whom to edit, and on which problems.

    def sample_tasks(self, state: GEPAState, *_: Any) -> list[ProposalTask]:
        if self.error:
            raise self.error
        self.rounds += 1
        assert len(state.program_candidates) == len(self.race.prompts), "gepa lost the pool"
        self.known = {normalised(prompt.text) for prompt in self.race.prompts}
        n = min(self.config.parallel, self.proposals - len(self.candidates))
        self.sampled += n
        return [self._task(self.minibatches.draw()) for _ in range(n)]

    def _task(self, minibatch: list[Problem]) -> ProposalTask:
        """A parent from the Pareto front on the minibatch's slices: a slice nobody solves yet starts from anyone."""
        slices = {p.slice for p in minibatch}
        relevant = [p.id for p in self.race.problems if p.slice in slices]
        finished = self.race.finished()
        scores = map(self.race.scores_of, finished)
        (i,) = self.parents.choices(finished, breeding_weights([{x: of[x] for x in relevant} for of in scores]))
        return ProposalTask(i, _candidate(self.race.prompts[i]), [p.id for p in minibatch], minibatch)

    # Reflection: rollouts in, edits out. gepa leaves out tasks whose parent solved everything.

    def make_reflective_dataset(self, candidate: dict[str, str], batch: Any, components: list[str]) -> dict[str, Any]:
        return {_COMPONENT: [{"rollout": rollout} for rollout in batch.trajectories]}

    def reflect_many(self, jobs: list[tuple[dict[str, str], Mapping[str, Any], list[str]]]) -> list[tuple[Any, Any]]:
        try:
            requests = [
                ReflectionRequest(
                    Prompt(candidate[_COMPONENT]),
                    tuple(item["rollout"] for item in dataset[_COMPONENT]),
                    derive(self.seed, "gepa", self.cycle, "reflect", len(self.candidates) + i),
                )
                for i, (candidate, dataset, _) in enumerate(jobs)
            ]
            answers = self.reflector.reflect(requests)
            return [(self._propose(*pair), self) for pair in zip(requests, answers, strict=True)]
        except Exception as error:
            self.error = error
            raise

    def reflect(self, *_: Any) -> Any:
        """gepa's second try, one by one, after `reflect_many` raised."""
        raise self.error or AssertionError("gepa is expected to call reflect_many")

    def _propose(self, request: ReflectionRequest, answer: Reflection) -> ReflectionProposal:
        """Note the proposal in the lineage; a refused one is handed on as no edit, which costs no rollout."""
        text = None if answer.text is None else printable(answer.text).strip()
        status = self._judge(text)
        failures = [printable(r.verdict.feedback) for r in request.rollouts if r.reward < _SOLVED]
        slices = {r.problem.slice for r in request.rollouts}
        index = len(self.candidates)
        self.candidates.append(
            Candidate(
                cycle=self.cycle,
                index=index,
                parent=request.prompt.id,
                text=cut_middle(text or "", self.config.max_prompt_chars),
                status=status,
                problems=tuple(r.problem.id for r in request.rollouts),
                slice=slices.pop() if len(slices) == 1 else "",
                parent_scores=tuple(r.reward for r in request.rollouts),
                child_scores=(),
                feedback=tuple(cut_middle(f, _KEPT_CHARS) for f in list(dict.fromkeys(failures))[:_KEPT_FEEDBACKS]),
                note=cut_middle(printable(answer.note), _KEPT_CHARS),
            )
        )
        if status != "rejected" or text is None:
            return ReflectionProposal(new_texts={})
        self.known.add(normalised(text))
        return ReflectionProposal(new_texts={_COMPONENT: text}, metadata={"candidate": index})

    def _judge(self, text: str | None) -> Status:
        """Why `text` is refused; "rejected" when it is not, until `should_accept` knows better."""
        if text is None:
            return "failed"
        if not text:
            return "empty"
        if len(text) > self.config.max_prompt_chars or not self.fits(Prompt(text)):
            return "too long"
        return "duplicate" if normalised(text) in self.known else "rejected"

    # Acceptance, on the minibatch.

    def should_accept(self, proposal: CandidateProposal, _state: GEPAState) -> bool:
        """The sum improves, or enough problems are newly solved: a specialist may lose elsewhere what it gains.

        Rounded once: the same rewards on other problems are no improvement.
        """
        before, after = proposal.subsample_scores_before, proposal.subsample_scores_after
        newly = sum(b < _SOLVED <= a for b, a in zip(before, after, strict=True))
        accepted = math.fsum(after) > math.fsum(before) or newly >= self.config.newly_solved
        i = proposal.metadata["candidate"]
        status: Status = "accepted" if accepted else "rejected"
        self.candidates[i] = replace(self.candidates[i], status=status, child_scores=tuple(after))
        return accepted


class Minibatches:
    """Deals minibatches without replacement, reshuffling when the problems run out.

    Of a sliced task each minibatch comes from one slice, in turn: a reflector that sees one slice's failures can write
    a specialist. Slices smaller than a minibatch count as one. The ids `first` are dealt before the others.
    """

    def __init__(self, problems: Sequence[Problem], size: int, rng: random.Random, first: Set[str] = frozenset()):
        slices: defaultdict[str, dict[str, Problem]] = defaultdict(dict)
        for p in problems:
            slices[p.slice][p.id] = p
        whole = [list(s.values()) for s in slices.values() if len(s) >= size]
        rest = [p for s in slices.values() if len(s) < size for p in s.values()]
        self._slices, self._size, self._rng = [*whole, rest] if rest else whole, size, rng
        self._decks: list[list[Problem]] = [[] for _ in self._slices]
        self._turn = rng.randrange(len(self._slices))
        if first:
            self._decks = [sorted(rng.sample(s, len(s)), key=lambda p: p.id not in first) for s in self._slices]

    def draw(self) -> list[Problem]:
        i = self._turn = (self._turn + 1) % len(self._slices)
        if len(self._decks[i]) < self._size:
            self._decks[i] = self._rng.sample(self._slices[i], len(self._slices[i]))
        drawn, self._decks[i] = self._decks[i][: self._size], self._decks[i][self._size :]
        return drawn


_COMPONENT = "prompt"  # the only text of a candidate
_SCORING = "scoring"  # the only item of gepa's validation set, number 0: it stands for the race


def _candidate(prompt: Prompt) -> dict[str, str]:
    return {_COMPONENT: prompt.text}
