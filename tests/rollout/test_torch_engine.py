from __future__ import annotations

import random

import pytest
import torch

from fst_fast.model import Model
from fst_fast.records import SamplingParams
from fst_fast.rollout.engine import Completion, Request, RolloutEngine
from fst_fast.rollout.schedule import plan
from fst_fast.rollout.torch_engine import TorchEngine
from tests.models import FAMILIES, tiny


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(request.param, tmp_path_factory.mktemp(request.param))


def requests_on(model: Model, *, temperature: float = 0.7, samples: int = 2, new_tokens: int = 9) -> list[Request]:
    """3 prompts × 4 problems × samples with ragged lengths, all prompts behind one shared header."""
    rng = random.Random(3)
    draw = lambda n: tuple(rng.randrange(5, model.config.vocab_size) for _ in range(n))  # noqa: E731
    header, prompts, problems = draw(5), [draw(n) for n in (17, 25, 30)], [draw(n) for n in (3, 4, 9, 1)]
    contexts = [header + p + x for p in prompts for x in problems] + [header]  # one context is a prefix of the others
    return [
        Request(i * samples + s, c, SamplingParams(temperature, new_tokens + i % 3), seed=1000 + i * samples + s)
        for i, c in enumerate(contexts)
        for s in range(samples)
    ]


def order(requests: list[Request]) -> list[Request]:
    """By priority, and then depth-first along the trie of their prompts."""
    found = plan([r.prompt_ids for r in requests], [r.priority for r in requests])
    return [requests[i] for unit in found.units for i in unit.requests]


def drain(engine: RolloutEngine, requests: list[Request]) -> dict[int, Completion]:
    engine.submit(order(requests))
    done: dict[int, Completion] = {}
    while engine.busy:
        done.update((c.id, c) for c in engine.step())
    return done


def exact_logprobs(model: Model, request: Request, response: tuple[int, ...]) -> torch.Tensor:
    """By the whole model in float64, one sequence at a time, no cache: log-probs [len(response)]."""
    lm = model.lm
    dtype = lm.dtype
    lm.to(torch.float64)
    try:
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([request.prompt_ids + response])).logits[0]
    finally:
        lm.to(dtype)
    logprobs = (logits / request.sampling.temperature).log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def error_of(model: Model, requests: list[Request], done: dict[int, Completion]) -> float:
    worst = 0.0
    for r in requests:
        exact = exact_logprobs(model, r, done[r.id].response_ids)
        worst = max(worst, float((exact - torch.tensor(done[r.id].logprobs, dtype=torch.float64)).abs().max()))
    return worst


@pytest.mark.parametrize("max_batch", [64, 5])
def test_behaviour_logprobs_are_those_of_the_sampled_distribution(model: Model, max_batch: int) -> None:
    requests = requests_on(model)
    done = drain(TorchEngine(model, max_batch=max_batch), requests)
    assert set(done) == {r.id for r in requests}
    assert error_of(model, requests, done) < 2e-5


def test_a_request_draws_the_same_whatever_runs_beside_it(model: Model) -> None:
    requests = requests_on(model)
    together = drain(TorchEngine(model, max_batch=64), requests)
    in_turns = drain(TorchEngine(model, max_batch=3), requests)
    assert {i: c.response_ids for i, c in together.items()} == {i: c.response_ids for i, c in in_turns.items()}


def test_siblings_differ_and_lengths_and_end_tokens_are_respected(model: Model) -> None:
    requests = requests_on(model, temperature=1.5)
    done = drain(TorchEngine(model), requests)
    assert len({c.response_ids for c in done.values()}) > len(requests) / 2
    for r in requests:
        c = done[r.id]
        ends = [i for i, token in enumerate(c.response_ids) if token in model.eos_ids]
        assert len(c.logprobs) == len(c.response_ids) <= r.sampling.max_new_tokens
        assert ends == ([len(c.response_ids) - 1] if c.finish_reason == "stop" else [])
        assert c.finish_reason == "stop" or len(c.response_ids) == r.sampling.max_new_tokens


def test_shared_prefixes_are_computed_once(model: Model) -> None:
    engine = TorchEngine(model)
    requests = requests_on(model)
    drain(engine, requests)
    distinct = len({r.prompt_ids[:n] for r in requests for n in range(1, len(r.prompt_ids) + 1)})
    assert engine.stats.prompt_tokens == sum(len(r.prompt_ids) for r in requests)
    assert distinct <= engine.stats.computed_prompt_tokens <= distinct + 3 * 16  # a level must save 16 tokens


def test_after_a_weight_change_nothing_old_is_sampled_from(model: Model) -> None:
    engine = TorchEngine(model)
    requests = requests_on(model)
    before = drain(engine, requests)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.mul_(1.05)
    try:
        engine.load_weights(model, 7)
        after = drain(engine, requests)
        assert error_of(model, requests, after) < 2e-5
        assert error_of(model, requests, before) > 1e-3  # the check sees stale numbers
        assert all(c.versions == ((7, len(c.response_ids)),) for c in after.values())
    finally:
        with torch.no_grad():
            for p in model.lm.parameters():
                p.div_(1.05)


def test_weights_changed_behind_the_engines_back_are_noticed(model: Model) -> None:
    engine = TorchEngine(model)
    engine.submit(requests_on(model))
    engine.step()
    with torch.no_grad():
        next(model.lm.parameters()).add_(0.0)
    with pytest.raises(RuntimeError, match="weights changed"):
        engine.step()
    with pytest.raises(RuntimeError, match="busy"):
        engine.load_weights(model, 1)


def test_abort_returns_what_there_is_and_leaves_the_others_alone(model: Model) -> None:
    requests = requests_on(model)
    alone = drain(TorchEngine(model), requests)
    engine = TorchEngine(model, max_batch=20)
    engine.submit(order(requests))
    done = {c.id: c for _ in range(3) for c in engine.step()}
    unwanted = [r.id for r in requests if r.id % 2 and r.id not in done]
    aborted = {c.id: c for c in engine.abort(unwanted)}
    assert set(aborted) == set(unwanted)
    assert {c.finish_reason for c in aborted.values()} == {"aborted"}
    assert {c.versions for c in aborted.values()} == {(), ((0, 3),)}  # waiting, running
    while engine.busy:
        done.update((c.id, c) for c in engine.step())
    assert {i: c.response_ids for i, c in done.items()} == {i: alone[i].response_ids for i in done}


def test_priorities_go_first(model: Model) -> None:
    requests = requests_on(model, samples=1)
    urgent = [Request(100 + r.id, r.prompt_ids, r.sampling, r.seed, priority=-1) for r in requests[-2:]]
    for submissions in ([order(requests + urgent)], [requests, urgent]):
        engine = TorchEngine(model, max_batch=2)
        for submitted in submissions:
            engine.submit(submitted)
        engine.step()
        assert {run.request.id for run in engine._running} <= {r.id for r in urgent}


def test_a_prompt_without_room_in_the_context_is_refused_before_any_work(model: Model) -> None:
    engine = TorchEngine(model)
    long = Request(0, (7,) * (model.context - 6), SamplingParams(1.0, 7), seed=0)
    with pytest.raises(ValueError, match="context of 2048"):
        engine.submit([*requests_on(model), long])
    assert not engine.busy


def test_sampling_follows_the_distribution(model: Model) -> None:
    n = 4000
    requests = [Request(i, (9, 8, 7), SamplingParams(1.3, 1), seed=i) for i in range(n)]
    done = drain(TorchEngine(model, max_batch=n), requests)
    with torch.no_grad():
        p = (model.lm(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1].double() / 1.3).softmax(-1)
    counts = torch.bincount(torch.tensor([c.response_ids[0] for c in done.values()]), minlength=len(p)).double()
    common = p > 5 / n
    chi2 = ((counts - n * p)[common] ** 2 / (n * p)[common]).sum()
    freedom = int(common.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5
