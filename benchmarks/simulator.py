"""Rollout engines in virtual time: paged KV with vLLM's prefix cache, continuous batching, several engines.

Event-driven: between two events an engine's batch is constant and the time of its iterations is summed in closed form.
The planned policies are driven by the trainer's own Dispatcher. Prefill stalls decode (vLLM overlaps a little of it).
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from fst_fast.fast.race import heats
from fst_fast.records import SamplingParams
from fst_fast.rollout.dispatch import Dispatcher
from fst_fast.rollout.engine import Request
from fst_fast.rollout.schedule import FILLER

Order = Literal["random", "problem-major", "prompt-major", "planned"]


@dataclass(frozen=True)
class Hardware:
    """Seconds: a decode iteration takes iteration + per_sequence · batch + per_kv_token · KV tokens read."""

    iteration: float
    per_sequence: float
    per_kv_token: float
    per_prefill_token: float


@dataclass(frozen=True)
class Lengths:
    """Lognormal response lengths, cut at `limit`; of the logarithm's variance `problem_share` is the problem's."""

    mean: float
    sigma: float
    problem_share: float
    limit: int


@dataclass(frozen=True)
class Gepa:
    """The calls of a GEPA cycle before every `every` steps: the pool is scored on `scoring` problems, in a race or at
    once, then `proposals` parents and their children on minibatches, then the `accepted` children are scored."""

    every: int
    pool: int
    keep: int  # prompts that a race never drops below
    scoring: int
    proposals: int
    minibatch: int
    accepted: int
    reflect: float  # seconds of all edits together

    def calls(self, *, race: bool) -> list[tuple[int, int]]:
        """(problems, prompts) of each; nothing but edits comes between the two of minibatches."""
        minibatch = (self.minibatch, self.proposals)
        return [*self._heats(self.pool, race), minibatch, minibatch, *self._heats(self.accepted, race)]

    def _heats(self, prompts: int, race: bool) -> list[tuple[int, int]]:
        calls, start = [], 0
        for end in heats(self.scoring, pauses=race):
            calls.append((end - start, prompts))
            prompts, start = max(min(prompts, self.keep), -(-prompts // 2)), end
        return calls


@dataclass(frozen=True)
class Workload:
    """One training step's rollouts, `steps` times. K prompts × P problems, G rollouts a problem over all prompts."""

    prompts: int
    prompt_tokens: int
    problems: int
    problem_tokens: int
    group: int
    lengths: Lengths
    engines: int
    cache_blocks: int
    steps: int
    hardware: Hardware
    reuse: float = 0.0  # part of the rollouts that the store gives, for the policies that reuse
    known: int = 4  # earlier responses per problem that the predictor has seen
    block_size: int = 16
    max_running: int = 256
    gepa: Gepa | None = None
    layout: Literal["prompt-first", "problem-first"] = "prompt-first"
    note: str | list[str] = ""

    @staticmethod
    def load(path: Path) -> Workload:
        data = json.loads(path.read_text())
        parts = {"lengths": Lengths, "hardware": Hardware, "gepa": Gepa}
        return Workload(**data | {name: of(**data[name]) for name, of in parts.items() if data.get(name)})


@dataclass(frozen=True)
class Policy:
    """`planned` is the trainer's: longest first, placed by work, topped up; the other orders are dealt out in equal
    parts. `admission`: a request starts when its expected growth fits. `streaming`: the next step's requests start
    before this step's weights arrive."""

    name: str
    order: Order
    admission: bool = False
    streaming: bool = False
    reuse: bool = False


POLICIES = (
    Policy("random", "random"),
    Policy("problem-major", "problem-major"),
    Policy("prompt-major", "prompt-major"),
    Policy("random + streaming", "random", streaming=True),
    Policy("ours, any admission", "planned"),
    Policy("ours", "planned", admission=True),
    Policy("ours + reuse", "planned", admission=True, reuse=True),
    Policy("ours + streaming", "planned", admission=True, streaming=True),
    Policy("ours + streaming + reuse", "planned", admission=True, streaming=True, reuse=True),
)


@dataclass
class Job:
    """One request in an engine."""

    id: int
    step: int
    prompt: tuple[int, ...]
    length: int  # tokens its response will have
    keys: list[Hashable] = field(default_factory=list)  # of its full blocks so far
    made: int = 0
    started: bool = False
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return len(self.prompt) + self.made


@dataclass
class Result:
    """What a simulation measured."""

    seconds: list[float]  # of each step
    requests: int = 0
    decoded: int = 0
    prompt_tokens: int = 0  # of the requests, each once
    prefilled: int = 0  # prompt tokens computed at a first start
    repeated: int = 0  # tokens computed again after a pre-emption or a weight change
    optimum: int = 0  # prompt tokens computed if every shared full block is computed once a step
    preemptions: int = 0
    busy: float = 0.0  # engine seconds

    @property
    def hit_rate(self) -> float:
        """Part of the prompt tokens that came from the prefix cache at the first start."""
        return 1 - self.prefilled / self.prompt_tokens

    @property
    def of_optimum(self) -> float:
        """Prompt tokens saved, of those that can be saved."""
        return (self.prompt_tokens - self.prefilled) / max(1, self.prompt_tokens - self.optimum)


class BlockCache:
    """vLLM's block pool: full blocks are found by the hash of all tokens up to their end, free ones stay readable until
    they are taken, least recently freed first; a sequence frees its tail before its head."""

    def __init__(self, blocks: int):
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._key: list[Hashable | None] = [None] * blocks
        self._uses = [0] * blocks
        self._block_of: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def forget(self) -> None:
        """No block is found any more: the weights have changed."""
        self._block_of.clear()
        self._key = [None] * len(self)

    def found(self, keys: Sequence[Hashable]) -> list[int]:
        """Blocks of the longest cached prefix."""
        out = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            out.append(block)
        return out

    def room_beside(self, found: Sequence[int]) -> int:
        """Free blocks when those found are taken."""
        return len(self.free) - sum(not self._uses[b] for b in found)

    def share(self, found: Iterable[int]) -> None:
        for b in found:
            self.free.pop(b, None)
            self._uses[b] += 1

    def take(self, count: int) -> list[int]:
        out = []
        for _ in range(count):
            b, _ = self.free.popitem(last=False)
            if (key := self._key[b]) is not None:
                del self._block_of[key]
                self._key[b] = None
            self._uses[b] = 1
            out.append(b)
        return out

    def name(self, block: int, key: Hashable) -> None:
        """A block is full: it can be found from now on (the first of equal ones is)."""
        if self._key[block] is None and key not in self._block_of:
            self._key[block] = key
            self._block_of[key] = block

    def give(self, blocks: Sequence[int]) -> None:
        for b in reversed(blocks):
            self._uses[b] -= 1
            if not self._uses[b]:
                self.free[b] = None


class Engine:
    """One engine: a clock, what runs, what waits in arrival order."""

    def __init__(self, workload: Workload, result: Result):
        self.workload, self.result = workload, result
        self.cache = BlockCache(workload.cache_blocks)
        self.clock = 0.0
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self._next: tuple[float, int] | None = None  # time and iterations of the next event, while known

    def admit(self) -> None:
        """Start what waits, in order, while blocks for its tokens so far are free."""
        size, hardware = self.workload.block_size, self.workload.hardware
        while self.waiting and len(self.running) < self.workload.max_running:
            s = self.waiting[0]
            found = self.cache.found(s.keys[: (s.tokens - 1) // size])
            need = -(-s.tokens // size) - len(found)
            if need > self.cache.room_beside(found):
                if not self.running:
                    raise ValueError(
                        f"cache_blocks = {len(self.cache)}: a sequence of {s.tokens} tokens alone needs "
                        f"{-(-s.tokens // size)} blocks of {size}"
                    )
                return
            self.waiting.popleft()
            self.cache.share(found)
            s.blocks = found + self.cache.take(need)
            self._name(s, len(found))
            computed = s.tokens - len(found) * size
            if s.started:
                self.result.repeated += computed
            else:
                self.result.prefilled += computed
                s.started = True
            self._spend(computed * hardware.per_prefill_token)
            self.running.append(s)
            self._next = None

    def next_event(self) -> tuple[float, int]:
        """(time, iterations) at which the next response is complete, or blocks run out."""
        if self._next is None:
            if not self.running:
                return math.inf, 0
            steps = min(s.length - s.made for s in self.running)
            if self._growth(steps) > len(self.cache.free):
                low, high = 0, steps  # growth(low) fits, growth(high) does not
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if self._growth(middle) <= len(self.cache.free) else (low, middle)
                steps = low
            self._next = (self.clock + self._seconds(steps), steps)
        return self._next

    def advance(self, steps: int) -> list[Job]:
        """Decode `steps` iterations; the sequences that are complete. Without blocks for one more, the last to come
        goes back to the queue."""
        size = self.workload.block_size
        self._spend(self._seconds(steps))
        self._next = None
        done, on = [], []
        for s in self.running:
            s.made += steps
            full = (s.tokens - steps) // size
            s.blocks += self.cache.take(-(-s.tokens // size) - len(s.blocks))
            self._name(s, full)
            (done if s.made == s.length else on).append(s)
        self.result.decoded += steps * len(self.running)
        self.running = on
        for s in done:
            self.cache.give(s.blocks)
        while not done and self.running and self._growth(1) > len(self.cache.free):
            if len(self.running) == 1:
                raise ValueError(f"cache_blocks = {len(self.cache)}: too few for one sequence of this workload")
            last = self.running.pop()
            self._stop(last)
            self.waiting.appendleft(last)
            self.result.preemptions += 1
        return done

    def advance_to(self, time: float) -> int:
        """Whole iterations until `time`, before the next event; how many."""
        if not self.running:
            self.clock = max(self.clock, time)
            return 0
        low, high = 0, self.next_event()[1]
        while high > low:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.clock + self._seconds(middle) <= time else (low, middle - 1)
        if low < self.next_event()[1]:
            self.advance(low)
        return low

    def new_weights(self) -> None:
        """What runs keeps its tokens and loses its KV."""
        for s in reversed(self.running):
            self._stop(s)
            self.waiting.appendleft(s)
        self.running = []
        self.cache.forget()
        self._next = None

    def _stop(self, s: Job) -> None:
        self.cache.give(s.blocks)
        s.blocks = []
        self._next = None

    def _name(self, s: Job, first: int) -> None:
        for i in range(first, s.tokens // self.workload.block_size):
            if i == len(s.keys):
                s.keys.append((s.id, i))
            self.cache.name(s.blocks[i], s.keys[i])

    def _growth(self, steps: int) -> int:
        size = self.workload.block_size
        return sum(-(-(s.tokens + steps) // size) - len(s.blocks) for s in self.running)

    def _seconds(self, steps: int) -> float:
        h, batch = self.workload.hardware, len(self.running)
        read = steps * sum(s.tokens for s in self.running) + batch * steps * (steps - 1) / 2
        return steps * (h.iteration + h.per_sequence * batch) + read * h.per_kv_token

    def _spend(self, seconds: float) -> None:
        self.clock += seconds
        self.result.busy += seconds


def simulate(workload: Workload, policy: Policy, *, seed: int = 0) -> Result:
    """Run the workload's steps under a policy. The same seed gives every policy the same lengths."""
    return Simulation(workload, policy, seed).run()


class Simulation:
    def __init__(self, workload: Workload, policy: Policy, seed: int):
        self.workload, self.policy, self.seed = workload, policy, seed
        self.result = Result([])
        self.engines = [Engine(workload, self.result) for _ in range(workload.engines)]
        self.dispatcher = Dispatcher(
            workload.engines,
            cache_tokens=workload.cache_blocks * workload.block_size,
            bounded=policy.admission,
            max_running=workload.max_running,
        )
        self.sequences: dict[int, Job] = {}
        self.unfinished: Counter[int] = Counter()  # by step
        self.submitted = 0

    def run(self) -> Result:
        steps, ahead = self.workload.steps, 1 + self.policy.streaming
        now = 0.0
        for step in range(steps):
            while self.submitted < min(step + ahead, steps):
                self._submit(self.submitted)
                self.submitted += 1
            self._feed(range(len(self.engines)))
            started = now
            while self.unfinished[step]:
                now = self._event(step)
            for i, engine in enumerate(self.engines):
                self._count(i, engine.advance_to(now))
                engine.new_weights()
            self.result.seconds.append(now - started)
        return self.result

    def _event(self, step: int) -> float:
        """Advance the engine whose event comes first; its time."""
        i = min(range(len(self.engines)), key=lambda e: self.engines[e].next_event()[0])
        engine = self.engines[i]
        steps = engine.next_event()[1]
        before = self.result.preemptions
        done = engine.advance(steps)
        self._count(i, steps)
        time = engine.clock
        for s in done:
            self.unfinished[s.step] -= 1
            if self.policy.order == "planned":
                self.dispatcher.finish(s.id, s.length)
        if self.result.preemptions == before and self.unfinished[step]:
            self._feed([i])
        return time

    def _count(self, engine: int, steps: int) -> None:
        if self.policy.order == "planned":
            self.dispatcher.advance(engine, steps)

    def _feed(self, engines: Sequence[int]) -> None:
        if self.policy.order == "planned":
            for i, request in self.dispatcher.start(engines, version=0):
                self.engines[i].waiting.append(self.sequences.pop(request.id))
        for i in engines:
            self.engines[i].admit()

    def _submit(self, step: int) -> None:
        sequences, problems = make_step(self.workload, step, self.seed)
        if self.policy.reuse:
            sequences = reused(sequences, self.workload.reuse)
        self.unfinished[step] = len(sequences)
        r = self.result
        r.requests += len(sequences)
        r.prompt_tokens += sum(len(s.prompt) for s in sequences)
        r.optimum += optimum(sequences, self.workload.block_size)
        if self.policy.order != "planned":
            self._deal(dealt(sequences, problems, self.policy.order, random.Random(f"{self.seed} {step}")))
            return
        self._plan(sequences, problems, known_lengths(self.workload, step, self.seed), priority=step)

    def _plan(
        self, jobs: list[Job], names: dict[int, tuple[int, str]], known: dict[str, list[int]], priority: int
    ) -> None:
        for problem, lengths in known.items():
            for n in lengths:
                self.dispatcher.lengths.observe(problem, n)
        self.sequences |= {s.id: s for s in jobs}
        limit = SamplingParams(1.0, self.workload.lengths.limit)
        self.dispatcher.submit([Request(s.id, s.prompt, limit, 0, priority, problem=names[s.id][1]) for s in jobs])

    def _deal(self, ordered: list[Job]) -> None:
        """Equal parts of the order to every engine, as a data-parallel batch is split."""
        share = -(-len(ordered) // len(self.engines))
        for i, engine in enumerate(self.engines):
            engine.waiting.extend(ordered[i * share : (i + 1) * share])


class Cycles(Simulation):
    """FST's rollouts: a GEPA cycle before every T steps, which the steps wait for; or (`filler`) it runs beside the T
    steps before it, one call a step, behind their requests, and is ended before its own. Steps are streamed, but not
    over the end of a cycle that is waited for."""

    def __init__(self, workload: Workload, seed: int, *, race: bool, filler: bool):
        super().__init__(workload, Policy("", "planned", admission=True, streaming=True), seed)
        assert workload.gepa, "this workload has no gepa"
        self.gepa, self.filler = workload.gepa, filler
        self.calls = workload.gepa.calls(race=race)
        self.edits = self.calls.index((self.gepa.minibatch, self.gepa.proposals))  # call after which edits are made
        self.cycle, self.call = 0, -1
        self.now, self.ids = 0.0, 1 << 40  # beyond those of the steps

    def run(self) -> Result:
        """`seconds` are those of cycles, the first and what it waits for left out."""
        every, ended = self.gepa.every, []
        for step in range(self.workload.steps):
            if step % every == 0:
                self._finish_cycle()
                ended.append(self.now)
                self.cycle, self.call = step // every + 1, -1
            if self.filler:
                self._next_call()
            last = self.workload.steps if self.filler else min(self.workload.steps, (step // every + 1) * every)
            while self.submitted < min(step + 2, last):
                self._submit(self.submitted)
                self.submitted += 1
            self._until(step)
            for engine in self.engines:
                engine.new_weights()
        self.result.seconds = [b - a for a, b in pairwise(ended)]
        return self.result

    def _finish_cycle(self) -> None:
        while self.call < len(self.calls):
            self._next_call()
            if self.call < len(self.calls):
                self._until(self._tag())

    def _tag(self) -> int:
        return -1 - self.cycle * len(self.calls) - self.call

    def _next_call(self) -> None:
        """Ask what comes after the call that is done, if it is."""
        if self.call >= 0 and self.unfinished[self._tag()]:
            return
        if self.call == self.edits:
            self._wait(self.now + self.gepa.reflect)
        self.call = min(self.call + 1, len(self.calls))
        if self.call == len(self.calls):
            return
        problems, prompts = self.calls[self.call]
        shape = replace(self.workload, problems=problems, group=prompts, prompts=prompts)
        number = 100_000 - self._tag()  # no step's
        jobs, names = make_step(shape, number, self.seed)
        renamed = {s.id: self.ids + i for i, s in enumerate(jobs)}
        self.ids += len(jobs)
        jobs = [replace(s, id=renamed[s.id], step=self._tag()) for s in jobs]
        self.unfinished[self._tag()] = len(jobs)
        self.result.requests += len(jobs)
        known = known_lengths(shape, number, self.seed)
        self._plan(jobs, {renamed[i]: name for i, name in names.items()}, known, priority=FILLER)

    def _until(self, tag: int) -> None:
        self._feed(range(len(self.engines)))
        while self.unfinished[tag]:
            self.now = max(self.now, self._event(tag))
        self._wait(self.now)

    def _wait(self, until: float) -> None:
        self.now = until
        for i, engine in enumerate(self.engines):
            self._count(i, engine.advance_to(until))


def make_step(workload: Workload, step: int, seed: int) -> tuple[list[Job], dict[int, tuple[int, str]]]:
    """The step's sequences, and the prompt's number and the problem's name of each."""
    w, rng = workload, np.random.default_rng([seed, step, 1])
    effect = problem_effects(w, step, seed)
    noise = rng.standard_normal((w.problems, w.group))
    lengths = response_lengths(w, effect, noise)
    first, words = step * w.problems * w.group, np.random.default_rng([seed, 2])
    prompts = [tuple(t) for t in words.integers(0, 1 << 17, (w.prompts, w.prompt_tokens)).tolist()]
    problems = [tuple(t) for t in rng.integers(0, 1 << 17, (w.problems, w.problem_tokens)).tolist()]
    out, names = [], {}
    whole: dict[tuple[int, int], tuple[tuple[int, ...], list[Hashable]]] = {}
    for p in range(w.problems):
        for g in range(w.group):
            k = g % w.prompts
            if (k, p) not in whole:
                parts = (prompts[k], problems[p]) if w.layout == "prompt-first" else (problems[p], prompts[k])
                ids = parts[0] + parts[1]
                head = (k if w.layout == "prompt-first" else (step, p), len(parts[0]) // w.block_size)
                count = len(ids) // w.block_size
                keys: list[Hashable] = [("head", head[0], i) if i < head[1] else (step, k, p, i) for i in range(count)]
                whole[k, p] = ids, keys
            ids, keys = whole[k, p]
            s = Job(first + p * w.group + g, step, ids, int(lengths[p, g]), list(keys))
            out.append(s)
            names[s.id] = (k, f"{step}:{p}")
    return out, names


def problem_effects(w: Workload, step: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, step, 3]).standard_normal(w.problems)


def response_lengths(w: Workload, effect: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """int [problems, samples]."""
    d = w.lengths
    log = d.sigma * (d.problem_share**0.5 * effect[:, None] + (1 - d.problem_share) ** 0.5 * noise)
    return np.clip(np.exp(math.log(d.mean) - d.sigma**2 / 2 + log), 1, d.limit).astype(np.int64)


def known_lengths(w: Workload, step: int, seed: int) -> dict[str, list[int]]:
    """What the predictor has seen of the step's problems: GEPA has evaluated them (the lookahead)."""
    noise = np.random.default_rng([seed, step, 4]).standard_normal((w.problems, w.known))
    lengths = response_lengths(w, problem_effects(w, step, seed), noise)
    return {f"{step}:{p}": row for p, row in enumerate(lengths.tolist())}


def reused(sequences: list[Job], fraction: float) -> list[Job]:
    """What is left to sample when the store gives that part, spread evenly over problems and prompts."""
    rng = random.Random(len(sequences))
    gone = set(rng.sample(range(len(sequences)), round(fraction * len(sequences))))
    return [s for i, s in enumerate(sequences) if i not in gone]


def dealt(sequences: list[Job], names: dict[int, tuple[int, str]], order: Order, rng: random.Random) -> list[Job]:
    """Without a plan: as the batch comes (problem by problem), prompt by prompt, or shuffled."""
    if order == "random":
        return rng.sample(sequences, len(sequences))
    if order == "prompt-major":
        return sorted(sequences, key=lambda s: names[s.id][0])
    return sequences


def lower_bound(workload: Workload, sequences: list[Job]) -> float:
    """Seconds that these take at least on fresh engines, in whatever order and wherever, every length known beforehand.

    An engine makes as many iterations as its longest response has tokens; each costs `iteration`, and what the
    sequences themselves cost comes on top. So with X seconds each, engines that are filled with the longest first (cut
    in two where that is needed) make the most of them; the least X that is enough is found by bisection.
    """
    h, size, engines = workload.hardware, workload.block_size, workload.engines
    rows = sorted(((s.length, len(s.prompt)) for s in sequences), reverse=True)
    length, prompt = np.array(rows, np.float64).T
    alone = (prompt - 1) % size + 1  # tokens of the prompt that no cache saves
    own = h.per_prefill_token * alone + h.per_sequence * length
    own += h.per_kv_token * length * (prompt + (length - 1) / 2)
    placed = np.cumsum(own)

    def enough(seconds: float) -> bool:
        room, i = 0.0, 0
        for _ in range(engines):
            room += max(0.0, seconds - h.iteration * length[i])
            i = int(np.searchsorted(placed, room * (1 + 1e-12), "right"))
            if i == len(rows):
                return True
        return False

    low, high = float((h.iteration * length + own).max()), float(h.iteration * length[0] + placed[-1])
    if enough(low):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low


def optimum(sequences: list[Job], block: int) -> int:
    """Prompt tokens to compute when each distinct full block is computed once and never lost. The last token of a
    prompt is always computed: its hidden state is what the first response token is sampled from."""
    full = {key for s in sequences for key in s.keys[: (len(s.prompt) - 1) // block]}
    rest = sum(len(s.prompt) - (len(s.prompt) - 1) // block * block for s in sequences)
    return len(full) * block + rest
