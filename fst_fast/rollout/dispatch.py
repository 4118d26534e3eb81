"""Several rollout engines as one: requests are queued, planned, and handed to an engine when its cache has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from fst_fast.errors import EngineError
from fst_fast.model import Model
from fst_fast.rollout.engine import Completion, EngineStats, Request, RolloutEngine, check_completion
from fst_fast.rollout.schedule import AHEAD, LengthPredictor, peak_tokens, place, plan
from fst_fast.seeding import derive


@dataclass(slots=True)
class Started:
    """A request handed to an engine; it has made as many tokens as its engine has stepped since `at`."""

    request: Request
    path: tuple[int, ...]
    at: int


@dataclass(slots=True)
class Queue:
    """One engine's share: what waits for it, unit by unit, and what it runs."""

    waiting: deque[tuple[Request, tuple[int, ...]]]  # by priority, with the trie path of the prompt
    running: dict[int, Started]
    steps: int = 0


class Dispatcher:
    """Which request starts next on which engine. Knows requests and token counts, no engines: the simulator drives it
    as the Scheduler does.

    `cache_tokens` is what one engine's KV cache holds; None = it keeps no prefix from one request to the next, and a
    lone engine is served in the order of the trie. `bounded`: a request starts when its expected growth and that of all
    others fit the cache; else the engines bound their batches themselves, and everything is handed over at once.
    """

    BLOCK = 16  # tokens; a running request wastes up to one block

    def __init__(
        self,
        engines: int,
        *,
        cache_tokens: int | None = None,
        bounded: bool = False,
        max_running: int | None = None,
    ):
        self.cache_tokens, self.bounded, self.max_running = cache_tokens, bounded, max_running
        self.lengths = LengthPredictor()
        self.queues = [Queue(deque(), {}) for _ in range(engines)]
        self._where: dict[int, int] = {}  # engine of every unfinished request
        self._node_tokens: list[int] = []

    def __len__(self) -> int:
        """Unfinished requests."""
        return len(self._where)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, and plan all that wait anew. Raises ValueError when an id is taken."""
        ids = [r.id for r in requests]
        if len(set(ids)) < len(ids) or not self._where.keys().isdisjoint(ids):
            taken = next(i for i in ids if i in self._where or ids.count(i) > 1)
            raise ValueError(f"request id {taken} is taken by an unfinished request; give every request its own")
        waiting = [r for q in self.queues for r, _ in q.waiting] + list(requests)
        running = [s for q in self.queues for s in q.running.values()]
        everything = waiting + [s.request for s in running]
        by_length = self.cache_tokens is not None or len(self.queues) > 1
        left = [self._left(q) for q in self.queues]
        predicted = [self.lengths.expected(r.problem) for r in waiting] + [n for each in left for n in each]
        found = plan(
            [r.prompt_ids for r in everything],
            # what runs is in the plan for the sake of its prefixes only
            [r.priority for r in waiting] + [1 << 30] * len(running),
            predicted if by_length else None,
            cache_tokens=self.cache_tokens or 0,
        )
        self._node_tokens = found.node_tokens
        for q in self.queues:
            q.waiting.clear()
        for unit, engine in zip(found.units, place(found, [sum(each) for each in left]), strict=True):
            for i in unit.requests:
                if i < len(waiting):
                    self._where[everything[i].id] = engine
                    self.queues[engine].waiting.append((everything[i], unit.path))
                else:
                    running[i - len(waiting)].path = unit.path

    def start(self, engines: Sequence[int], version: int) -> list[tuple[int, Request]]:
        """What these engines start now, with their number: each what waits for it, as far as it fits; then one that
        has run dry takes over what would start last elsewhere. Requests meant for weights after `version` wait."""
        started = []
        for engine in engines:
            q = self.queues[engine]
            while q.waiting:
                at = 0
                if not self._fits(q, *q.waiting[0], version):
                    at = _last(q.waiting)
                    if not at or not self._fits(q, *q.waiting[at], version):
                        break
                started.append(self._start(engine, q.waiting, at))
        if not self.bounded:  # nothing that has been handed over comes back
            return started
        for engine in engines:
            q = self.queues[engine]
            while not q.waiting and (richest := max(self.queues, key=lambda other: len(other.waiting))).waiting:
                last = _last(richest.waiting)
                if not self._fits(q, *richest.waiting[last], version):
                    break
                started.append(self._start(engine, richest.waiting, last))
        return started

    def advance(self, engine: int, steps: int = 1) -> None:
        """Every running request of the engine has made `steps` more tokens."""
        self.queues[engine].steps += steps

    def finish(self, id: int, tokens: int) -> None:
        """The response of request `id` is complete."""
        ended = self.queues[self._where.pop(id)].running.pop(id)
        self.lengths.observe(ended.request.problem, tokens)

    def cancel(self, ids: Iterable[int]) -> list[Request]:
        """Forget these requests; those that were still waiting."""
        unwanted = set(ids) & self._where.keys()
        waiting = []
        for q in self.queues:
            waiting += [r for r, _ in q.waiting if r.id in unwanted]
            q.waiting = deque(item for item in q.waiting if item[0].id not in unwanted)
            for i in unwanted & q.running.keys():
                del q.running[i]
        for i in unwanted:
            del self._where[i]
        return waiting

    def _start(self, engine: int, waiting: deque[tuple[Request, tuple[int, ...]]], at: int) -> tuple[int, Request]:
        q, (request, path) = self.queues[engine], waiting[at]
        del waiting[at]
        q.running[request.id] = Started(request, path, q.steps)
        self._where[request.id] = engine
        return engine, request

    def _fits(self, q: Queue, request: Request, path: tuple[int, ...], version: int) -> bool:
        if request.policy_version is not None and request.policy_version > version:
            return False
        if self.max_running is not None and len(q.running) >= self.max_running:
            return False
        if not self.bounded or self.cache_tokens is None or not q.running:
            return True
        made, limit, alive = self._outlook(q, request)
        nodes = set(path).union(*(s.path for s in q.running.values()))
        prompts = sum(self._node_tokens[k] for k in nodes)
        return prompts + peak_tokens(alive, made + self.BLOCK, limit) <= self.cache_tokens

    def _left(self, q: Queue) -> list[float]:
        """Tokens that each running response is expected to make yet."""
        if not q.running:
            return []
        _, limit, alive = self._outlook(q)
        gaps = np.diff(np.minimum(AHEAD, limit[:, None]), prepend=0.0, axis=1)
        return (alive * gaps).sum(1).tolist()

    def _outlook(self, q: Queue, *new: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of what runs and of `new`: tokens made [n], tokens yet to come at most [n], and their chances [n, AHEAD]."""
        requests = [*(s.request for s in q.running.values()), *new]
        made = np.array([float(q.steps - s.at) for s in q.running.values()] + [0.0] * len(new))
        limit = np.array([r.sampling.max_new_tokens for r in requests]) - made
        return made, limit, self.lengths.survival([r.problem for r in requests], made, AHEAD)


def _last(waiting: deque[tuple[Request, tuple[int, ...]]]) -> int:
    """Index of the last request of the most urgent class."""
    return sum(r.priority == waiting[0][0].priority for r, _ in waiting) - 1


PATIENCE = 1000  # steps of an engine without an ended request until it is looked at


@dataclass(slots=True)
class Watch:
    """An engine since one of its requests ended."""

    steps: int = 0
    tokens: int = 0  # of its stats, at the first of these steps
    seen: int = 0  # the same when it was last looked at

    def check(self, tokens: int, running: Iterable[Started]) -> None:
        """After a step. ValueError when no token comes any more, or more of them than the requests may have."""
        self.steps += 1
        if self.steps % PATIENCE:
            return
        if tokens == self.seen:
            raise ValueError(f"no token in {PATIENCE} steps")
        most = sum(s.request.sampling.max_new_tokens for s in running)
        if tokens - self.tokens > most:
            raise ValueError(f"{tokens - self.tokens} tokens for requests of at most {most}, none of which has ended")
        self.seen = tokens


class Scheduler:
    """A RolloutEngine over one or several: plans what waits, feeds them, and tops up those that run dry.

    Requests are started with weights at most `lookahead` versions older than the `policy_version` they name (they wait
    for the others). At a weight change what is under way is interrupted: its tokens stay, each with the log-prob of the
    weights that sampled it, its cached keys and values go, and the rest is sampled by the new weights.

    `cache_tokens`: what an engine is trusted with at once, where it should not be left to pre-empt by itself.
    """

    def __init__(self, engines: Sequence[RolloutEngine], *, cache_tokens: int | None = None, lookahead: int = 0):
        self.engines, self.lookahead = list(engines), lookahead
        self.name, self.version = self.engines[0].name, self.engines[0].version
        bounded = cache_tokens is not None
        tokens = cache_tokens if bounded else self.cache_tokens
        self.dispatcher = Dispatcher(len(self.engines), cache_tokens=tokens, bounded=bounded)
        self._watches = [Watch() for _ in self.engines]
        self._begun: dict[int, Completion] = {}  # tokens of interrupted responses, by request
        self._given: dict[int, Request] = {}  # as submitted

    @property
    def policy_version(self) -> int:
        return self.engines[0].policy_version

    @property
    def cache_tokens(self) -> int | None:
        return self.engines[0].cache_tokens

    @property
    def busy(self) -> bool:
        return bool(self.dispatcher)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(*map(sum, zip(*(astuple(engine.stats) for engine in self.engines), strict=True)))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; what there is room for starts at once. Raises ValueError when an id is taken or a prompt
        leaves no room in the context."""
        self.dispatcher.submit(requests)
        self._given |= {r.id: r for r in requests}
        try:
            self._feed()
        except ValueError:
            self.abort([r.id for r in requests])
            raise

    def step(self) -> list[Completion]:
        """Raises EngineError when an engine dies, loses or never ends a request, or answers without log-probs."""
        self._feed()
        done = []
        if self.busy and not any(engine.busy for engine in self.engines):
            raise EngineError(
                f"{len(self.dispatcher)} requests neither run nor can start: an engine dropped them, or they are for "
                f"weights after {self.policy_version + self.lookahead}"
            )
        for i, engine in enumerate(self.engines):
            if engine.busy:
                done += [self._whole(c) for c in self._advance(i)]
        for c in done:
            self.dispatcher.finish(c.id, len(c.response_ids))
            del self._given[c.id]
        return done

    def abort(self, ids: Iterable[int]) -> list[Completion]:
        unwanted = set(ids) & self._given.keys()
        waiting = self.dispatcher.cancel(unwanted)
        self._watches = [Watch() for _ in self.engines]
        ended = [Completion(r.id, (), (), (), "aborted") for r in waiting]
        ended += [c for engine in self.engines for c in engine.abort(unwanted)]
        for i in unwanted:
            del self._given[i]
        return [self._whole(c) for c in ended]

    def load_weights(self, model: Model, version: int) -> None:
        self._interrupt()
        for engine in self.engines:
            engine.load_weights(model, version)

    def sleep(self) -> None:
        """Until the weight change that comes next; what is under way is interrupted already now."""
        self._interrupt()
        for engine in self.engines:
            engine.sleep()

    def _interrupt(self) -> None:
        """Take back what the engines have begun; the rest of it waits like any other request."""
        under_way = [i for q in self.dispatcher.queues for i in q.running]
        self.dispatcher.cancel(under_way)
        self._watches = [Watch() for _ in self.engines]
        begun = [self._whole(c) for engine in self.engines for c in engine.abort(under_way)]
        self._begun |= {c.id: c for c in begun}
        if begun:
            self.dispatcher.submit([_rest(self._given[c.id], c, self.policy_version) for c in begun])

    def _advance(self, i: int) -> list[Completion]:
        """One step of engine `i`; what it says is checked here, before anything is made of it."""
        engine, running, watch = self.engines[i], self.dispatcher.queues[i].running, self._watches[i]
        if not watch.steps:
            watch.tokens = watch.seen = engine.stats.generated_tokens
        try:
            finished = engine.step()
            answered = {c.id for c in finished}
            if len(answered) < len(finished) or not answered <= running.keys():
                raise ValueError(f"answers to requests {[c.id for c in finished]}, not all of them under way")
            for c in finished:
                check_completion(c, running[c.id].request)
            watch.check(engine.stats.generated_tokens, running.values())
        except Exception as error:  # vllm, CUDA and networks each raise their own
            raise EngineError(f"the {engine.name} engine failed: {type(error).__name__}: {error}") from error
        if finished:
            self._watches[i] = Watch()
        self.dispatcher.advance(i)
        return finished

    def _feed(self) -> None:
        started: list[list[Request]] = [[] for _ in self.engines]
        for i, request in self.dispatcher.start(range(len(self.engines)), self.policy_version + self.lookahead):
            started[i].append(request)
        for engine, requests in zip(self.engines, started, strict=True):
            if requests:
                engine.submit(requests)

    def _whole(self, c: Completion) -> Completion:
        """With the tokens from before an interruption."""
        begun = self._begun.pop(c.id, None)
        if begun is None:
            return c
        return replace(
            c,
            response_ids=begun.response_ids + c.response_ids,
            logprobs=begun.logprobs + c.logprobs,
            versions=begun.versions + c.versions,
        )


def _rest(request: Request, begun: Completion, version: int) -> Request:
    """What is left of a request: the tokens so far are part of its prompt, and its draws are new ones."""
    left = request.sampling.max_new_tokens - len(begun.response_ids)
    return replace(
        request,
        prompt_ids=request.prompt_ids + begun.response_ids,
        sampling=replace(request.sampling, max_new_tokens=left),
        seed=derive(request.seed, "rest", version) if begun.response_ids else request.seed,
    )
