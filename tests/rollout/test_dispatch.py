from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fst_fast.model import Model
from fst_fast.records import SamplingParams
from fst_fast.rollout.dispatch import Dispatcher, Scheduler, _rest
from fst_fast.rollout.engine import Completion, Request
from fst_fast.rollout.schedule import FILLER
from fst_fast.rollout.torch_engine import TorchEngine
from tests.models import tiny
from tests.rollout.test_torch_engine import drain, error_of, exact_logprobs, order, requests_on


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


def run(scheduler: Scheduler) -> dict[int, Completion]:
    done: dict[int, Completion] = {}
    while scheduler.busy:
        done.update((c.id, c) for c in scheduler.step())
    return done


def asked(id: int, *, prompt: int = 0, problem: int = 0, priority: int = 0, version: int | None = None) -> Request:
    ids = (1,) * 100 + (prompt,) * 100 + (problem,) * 20
    return Request(id, ids, SamplingParams(1.0, 1000), id, priority, version, str(problem))


def test_one_embedded_engine_is_given_the_same_order_and_bits_as_without_a_scheduler(model: Model) -> None:
    requests = requests_on(model)
    random.Random(0).shuffle(requests)
    scheduler = Scheduler([TorchEngine(model, max_batch=7)])
    scheduler.submit(requests)
    assert run(scheduler) == drain(TorchEngine(model, max_batch=7), order(requests))


def test_several_engines_share_the_work_and_every_request_is_answered_once(model: Model) -> None:
    requests = requests_on(model)
    alone = drain(TorchEngine(model), requests)
    for cache_tokens in (None, 400):
        engines = [TorchEngine(model) for _ in range(3)]
        scheduler = Scheduler(engines, cache_tokens=cache_tokens)
        scheduler.submit(requests)
        seen: list[int] = []
        done: dict[int, Completion] = {}
        while scheduler.busy:
            for c in scheduler.step():
                seen.append(c.id)
                done[c.id] = c
        assert sorted(seen) == sorted(r.id for r in requests)
        assert {i: c.response_ids for i, c in done.items()} == {i: c.response_ids for i, c in alone.items()}
        assert all(e.stats.generated_tokens for e in engines)
        assert scheduler.stats.generated_tokens == sum(len(c.response_ids) for c in done.values())


def test_cancelled_requests_come_back_as_far_as_they_got(model: Model) -> None:
    requests = requests_on(model)
    alone = drain(TorchEngine(model), requests)
    scheduler = Scheduler([TorchEngine(model)], cache_tokens=200)
    scheduler.submit(requests)
    done = {c.id: c for _ in range(3) for c in scheduler.step()}
    unwanted = [r.id for r in requests if r.id % 2 and r.id not in done]
    aborted = {c.id: c for c in scheduler.abort([*unwanted, 10_000])}
    assert set(aborted) == set(unwanted)
    assert {len(c.response_ids) for c in aborted.values()} >= {0, 3}  # waiting, running
    done |= run(scheduler)
    assert {i: c.response_ids for i, c in done.items()} == {
        i: c.response_ids for i, c in alone.items() if i not in aborted
    }


def test_a_prompt_without_room_is_refused_and_leaves_nothing_behind(model: Model) -> None:
    scheduler = Scheduler([TorchEngine(model)])
    long = Request(0, (7,) * (model.context - 6), SamplingParams(1.0, 7), seed=0)
    with pytest.raises(ValueError, match="context of 2048"):
        scheduler.submit([long])
    assert not scheduler.busy
    scheduler.submit([Request(0, (7, 8), SamplingParams(1.0, 2), seed=0)])
    with pytest.raises(ValueError, match="request id 0 is taken"):
        scheduler.submit([Request(0, (7, 8), SamplingParams(1.0, 2), seed=0)])
    assert set(run(scheduler)) == {0}


@pytest.mark.parametrize("sleeps", [False, True])
def test_interrupted_by_new_weights_each_token_has_the_logprob_of_the_weights_that_sampled_it(
    sleeps: bool, model: Model
) -> None:
    requests = requests_on(model, new_tokens=12)
    scheduler = Scheduler([TorchEngine(model), TorchEngine(model)], cache_tokens=200, lookahead=1)
    ahead = [Request(r.id, r.prompt_ids, r.sampling, r.seed, 1, 1) for r in requests]
    scheduler.submit(ahead)
    done = {c.id: c for _ in range(4) for c in scheduler.step()}
    before = {r.id: exact_logprobs(model, r, (5,) * 20) for r in requests[:1]}
    old_model = [p.detach().clone() for p in model.lm.parameters()]
    if sleeps:  # nothing is under way while weights change, and nothing is forgotten
        scheduler.sleep()
        assert not any(engine.busy for engine in scheduler.engines)
        assert scheduler.busy
    with torch.no_grad():
        for p in model.lm.parameters():
            p.mul_(1.05)
    try:
        scheduler.load_weights(model, 1)
        new = run(scheduler)
        assert not set(new) & set(done)
        assert set(new) | set(done) == {r.id for r in requests}
        by_id = {r.id: r for r in requests}
        spanning = [c for c in new.values() if len(c.versions) == 2]
        assert spanning
        for c in new.values():
            n = len(c.response_ids)
            assert c.versions == (((0, 4), (1, n - 4)) if c in spanning else ((1, n),))
        assert len(spanning) < len(new)
        assert all(c.versions == ((0, len(c.response_ids)),) for c in done.values())
        under_new = {c.id: exact_logprobs(model, by_id[c.id], c.response_ids) for c in new.values()}
        new_weights = [p.detach().clone() for p in model.lm.parameters()]
        restore(model, old_model)
        under_old = {c.id: exact_logprobs(model, by_id[c.id], c.response_ids) for c in new.values()}
        restore(model, new_weights)
        for c in new.values():
            said = torch.tensor(c.logprobs, dtype=torch.float64)
            assert len(c.response_ids) <= by_id[c.id].sampling.max_new_tokens
            kept = 4 if c in spanning else 0
            old, young = (said - under_old[c.id])[:kept], (said - under_new[c.id])[kept:]
            assert torch.cat([old, young]).abs().max() < 2e-5
        wrong = max(float((torch.tensor(c.logprobs) - under_new[c.id])[:4].abs().max()) for c in spanning)
        assert wrong > 1e-3  # the check tells the two weights apart
    finally:
        restore(model, old_model)
    assert torch.equal(before[requests[0].id], exact_logprobs(model, requests[0], (5,) * 20))


def test_what_is_left_of_a_request_has_draws_of_its_own() -> None:
    requests = [asked(i) for i in range(50)]
    begun = [Completion(r.id, (5, 6), (-1.0, -1.0), ((0, 2),), "aborted") for r in requests]
    seeds = {_rest(r, c, v).seed for r, c in zip(requests, begun, strict=True) for v in (1, 2)}
    assert len(seeds | {r.seed for r in requests}) == 150
    untouched = Completion(0, (), (), (), "aborted")
    assert _rest(requests[0], untouched, 1) == requests[0]


def restore(model: Model, weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, w in zip(model.lm.parameters(), weights, strict=True):
            p.copy_(w)


def test_requests_meant_for_later_weights_wait_unless_the_lookahead_reaches_them() -> None:
    dispatcher = Dispatcher(1, cache_tokens=10**6, bounded=True)
    dispatcher.submit([asked(0, version=3), asked(1, version=4, priority=1), asked(2, version=5, priority=2)])
    assert [r.id for _, r in dispatcher.start([0], version=3)] == [0]
    assert [r.id for _, r in dispatcher.start([0], version=4)] == [1]
    assert [r.id for _, r in dispatcher.start([0], version=4)] == []


def test_an_engine_that_keeps_prefixes_is_given_the_longest_first_and_one_that_does_not_the_trie(model: Model) -> None:
    requests = [asked(i, problem=1 + i) for i in range(12)]
    for cache_tokens, expected in ((10**6, [11, 10, 9]), (None, [0, 1, 2])):
        engine = TorchEngine(model, max_batch=3)
        engine.cache_tokens = cache_tokens  # type: ignore[assignment]
        scheduler = Scheduler([engine])
        for r in requests:
            scheduler.dispatcher.lengths.observe(r.problem, 50 * (1 + r.id))
        scheduler.submit(requests)
        scheduler.step()
        assert [run.request.id for run in engine._running] == expected


def test_classes_go_in_order_and_the_filler_last() -> None:
    dispatcher = Dispatcher(1, cache_tokens=10**6, bounded=True)
    dispatcher.submit([asked(0, priority=FILLER), asked(1, priority=6, problem=1)])
    dispatcher.submit([asked(2, priority=5, problem=2)])
    assert [r.id for _, r in dispatcher.start([0], version=0)] == [2, 1, 0]


def test_what_starts_is_expected_to_fit_and_the_rest_follows_when_something_ends() -> None:
    dispatcher = Dispatcher(1, cache_tokens=5000, bounded=True)
    for problem in range(40):
        for _ in range(5):
            dispatcher.lengths.observe(str(problem), 200)
    dispatcher.submit([asked(i, problem=i) for i in range(40)])
    started = [r.id for _, r in dispatcher.start([0], version=0)]
    assert 5 < len(started) < 5000 / 236 + 1
    assert not dispatcher.start([0], version=0)
    dispatcher.advance(0, 150)
    dispatcher.finish(started[0], 150)
    assert len(dispatcher.start([0], version=0)) >= 1


def test_an_engine_that_runs_dry_takes_what_would_start_last_elsewhere() -> None:
    dispatcher = Dispatcher(2, cache_tokens=900, bounded=True)
    for problem in range(20):
        for _ in range(5):
            dispatcher.lengths.observe(str(problem), 100 + problem)
    dispatcher.submit([asked(i, problem=i, prompt=i % 2) for i in range(20)])
    dispatcher.start([0, 1], version=0)
    first, other = dispatcher.queues
    dispatcher.cancel([*first.running, *(r.id for r, _ in first.waiting)])
    shortest = other.waiting[-1][0].id
    waiting = len(other.waiting)
    taken = [(e, r.id) for e, r in dispatcher.start([0], version=0)]
    assert taken[0] == (0, shortest)
    assert len(other.waiting) == waiting - len(taken)


def test_weights_that_change_on_an_idle_scheduler_are_simply_loaded(model: Model, tmp_path: Path) -> None:
    scheduler = Scheduler([TorchEngine(model)])
    scheduler.load_weights(model, 7)
    requests = requests_on(model)[:4]
    scheduler.submit(requests)
    done = run(scheduler)
    assert all(c.versions == ((7, len(c.response_ids)),) for c in done.values())
    assert error_of(model, requests, done) < 2e-5
