"""The vLLM engine against real vLLM, on the CPU: `.ci/vllm` makes the environment and runs this folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fst_fast.config import RolloutConfig
from fst_fast.errors import UserError
from fst_fast.model import Model, load_model
from fst_fast.prefix_tree import Ragged, trie
from fst_fast.records import SamplingParams
from fst_fast.rollout import make_engine
from fst_fast.rollout.check import check_engine
from fst_fast.rollout.engine import Completion, Request
from fst_fast.rollout.vllm_engine import VllmEngine, _set_environment
from tests.models import FAMILIES, save_tiny, tiny
from tests.rollout.test_torch_engine import drain, error_of, order

vllm = pytest.importorskip("vllm", reason="vllm is not installed; .ci/vllm tests it in an environment of its own")

ROOT = Path(__file__).parents[2]
HEAD_DIM = 32  # the smallest that vLLM has on the CPU

ENGINES: list[VllmEngine] = []  # none may end before the last test: it would take vLLM's process groups along


def engine_on(model: Model, *, max_batch: int = 64, kv_bytes: int = 1 << 26) -> VllmEngine:
    ENGINES.append(VllmEngine(model, max_batch=max_batch, kv_bytes=kv_bytes))
    return ENGINES[-1]


def tokens(seed: int, n: int, vocabulary: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(5, vocabulary) for _ in range(n))


def requests_on(
    model: Model,
    *,
    prompts: Sequence[int] = (83, 101, 120),
    problems: int = 4,
    samples: int = 2,
    temperature: float = 0.7,
    new_tokens: int = 9,
) -> list[Request]:
    """Prompts of these lengths × problems of ragged lengths × samples, in problem-major order."""
    vocabulary = model.config.vocab_size
    heads = [tokens(i, n, vocabulary) for i, n in enumerate(prompts)]
    tails = [tokens(100 + i, 3 + 11 * i % 37, vocabulary) for i in range(problems)]
    contexts = [head + tail for tail in tails for head in heads for _ in range(samples)]
    sampling = SamplingParams(temperature, new_tokens)
    return [Request(i, context, sampling, seed=1000 + i) for i, context in enumerate(contexts)]


def change(model: Model, seed: int, size: float = 0.05) -> None:
    """What an optimizer step does, only larger: every weight moves, those of the norms and the head too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.add_(size * p.abs().mean() * torch.randn(p.shape, generator=generator))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tied heads (Qwen3, Gemma) and untied ones (Llama, Mistral)."""
    return tiny(request.param, tmp_path_factory.mktemp(request.param), head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def engine(model: Model) -> VllmEngine:
    return engine_on(model)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny("qwen3", tmp_path_factory.mktemp("qwen"), head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def served(qwen: Model) -> VllmEngine:
    """One engine for the tests that need no second family; `fresh` gives it back as new."""
    return engine_on(qwen)


@pytest.fixture
def fresh(served: VllmEngine, qwen: Model) -> Iterator[VllmEngine]:
    served.load_weights(qwen, 3)
    yield served
    served.abort(list(served._live))


@pytest.fixture(scope="module")
def narrow(qwen: Model) -> VllmEngine:
    """Two sequences at once, and a cache that holds one of three long prompts beside them."""
    block = 2 * 2 * 2 * HEAD_DIM * 4 * 32  # K and V of two layers and two heads, fp32, 32 tokens
    return engine_on(qwen, max_batch=2, kv_bytes=66 * block)


@pytest.fixture(scope="module")
def overlapping(qwen: Model) -> VllmEngine:
    """With async scheduling, as on a GPU: vLLM turns it off on a CPU, though it runs there."""
    make = vllm.EngineArgs.create_engine_config

    def config(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.scheduler_config.async_scheduling = True
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.EngineArgs, "create_engine_config", config)
        return engine_on(qwen)


def test_logprobs_are_the_trainers_after_each_of_five_weight_updates(model: Model, engine: VllmEngine) -> None:
    requests, stale = requests_on(model), {}
    for version in range(6):  # the first load replaces random weights the same way
        if version:
            change(model, version)
        engine.load_weights(model, version)
        done = drain(engine, requests)
        assert all(c.versions == ((version, len(c.response_ids)),) for c in done.values())
        assert error_of(model, requests, done) < 1e-5
        if stale:
            assert error_of(model, requests, stale) > 1e-3  # the comparison sees the weights of one update ago
        stale = done


def test_the_self_check_passes_before_and_after_an_update(model: Model, engine: VllmEngine) -> None:
    for version in range(2):
        change(model, version)
        engine.load_weights(model, version)
        check_engine(engine, model)


def test_nothing_is_sampled_from_the_random_weights_an_engine_starts_with(qwen: Model) -> None:
    new = engine_on(qwen)
    with pytest.raises(RuntimeError, match="without weights"):
        new.submit(requests_on(qwen))
    assert not new.busy


def test_responses_end_as_asked_with_a_logprob_for_every_token(qwen: Model, fresh: VllmEngine) -> None:
    requests = requests_on(qwen, samples=8, temperature=1.5, new_tokens=12)
    done = drain(fresh, requests)
    assert {c.finish_reason for c in done.values()} == {"stop", "length"}
    for r in requests:
        c = done[r.id]
        ends = [i for i, token in enumerate(c.response_ids) if token in qwen.eos_ids]
        assert len(c.logprobs) == len(c.response_ids) <= r.sampling.max_new_tokens
        assert ends == ([len(c.response_ids) - 1] if c.finish_reason == "stop" else [])
        assert c.finish_reason == "stop" or len(c.response_ids) == r.sampling.max_new_tokens
    assert error_of(qwen, requests, done) < 1e-5


def test_the_same_seed_draws_the_same_whatever_runs_beside_it(
    qwen: Model, fresh: VllmEngine, narrow: VllmEngine
) -> None:
    requests = requests_on(qwen)
    narrow.load_weights(qwen, 0)
    first, again, in_turns = (drain(e, requests) for e in (fresh, fresh, narrow))
    assert {i: c.response_ids for i, c in first.items()} == {i: c.response_ids for i, c in again.items()}
    assert {i: c.response_ids for i, c in first.items()} == {i: c.response_ids for i, c in in_turns.items()}
    reseeded = drain(fresh, [replace(r, seed=r.seed + 999) for r in requests])
    assert {i: c.response_ids for i, c in first.items()} != {i: c.response_ids for i, c in reseeded.items()}


def test_what_is_read_of_the_core_is_what_vllms_own_outputs_say(qwen: Model, fresh: VllmEngine) -> None:
    from vllm.sampling_params import RequestOutputKind

    requests = requests_on(qwen, samples=8, temperature=1.5, new_tokens=12)
    ours = drain(fresh, requests)
    computed = fresh.stats.computed_prompt_tokens
    fresh.load_weights(qwen, 4)
    again = drain(fresh, requests)
    computed = fresh.stats.computed_prompt_tokens - computed
    fresh.load_weights(qwen, 5)
    for r in requests:
        params = fresh._sampling_params(r)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        fresh._llm.add_request(str(r.id), {"prompt_token_ids": list(r.prompt_ids)}, params)
    theirs: dict[int, Any] = {}
    while fresh._llm.has_unfinished_requests():
        theirs |= {int(o.request_id): o for o in fresh._llm.step() if o.finished}
    for r in requests:
        [output] = theirs[r.id].outputs
        for c in (ours[r.id], again[r.id]):
            assert c.response_ids == tuple(output.token_ids)
            assert c.finish_reason == output.finish_reason
            said = [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
            assert c.logprobs == pytest.approx(said, abs=1e-6)
    assert computed == sum(len(r.prompt_ids) - theirs[r.id].num_cached_tokens for r in requests)
    assert {c.finish_reason for c in ours.values()} == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_sampling_follows_the_distribution(qwen: Model, fresh: VllmEngine, temperature: float) -> None:
    n, context = 4000, (9, 8, 7)
    done = drain(fresh, [Request(i, context, SamplingParams(temperature, 1), seed=i) for i in range(n)])
    with torch.no_grad():
        p = (qwen.lm(input_ids=torch.tensor([context])).logits[0, -1].double() / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([c.response_ids[0] for c in done.values()]), minlength=len(p)).double()
    common = p > 5 / n
    chi2 = ((counts - n * p)[common] ** 2 / (n * p)[common]).sum()
    freedom = int(common.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


# ------------------------------------------------------------------------------------------------- shared prefixes


def planned_prefill(requests: Sequence[Request], block: int) -> int:
    """Prompt tokens to compute when every shared stretch of whole blocks is computed once. A prompt's last token is
    always computed (its logits are wanted), and with it the rest of its block."""
    names: dict[tuple[int, ...], int] = {}
    readable, rest = [], 0
    for r in requests:
        whole = (len(r.prompt_ids) - 1) // block
        cuts = [r.prompt_ids[i * block : (i + 1) * block] for i in range(whole)]
        readable.append([names.setdefault(cut, len(names)) for cut in cuts])
        rest += len(r.prompt_ids) - whole * block
    return block * trie(Ragged.of(readable)).tokens + rest


def prefill(engine: VllmEngine, requests: Sequence[Request], monkeypatch: pytest.MonkeyPatch) -> int:
    """Prompt tokens that vLLM's model ran, by what its scheduler handed to the model; checked against our own count."""
    ran = 0
    executor, before = engine._llm.model_executor, replace(engine.stats)

    def execute(work: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += work.total_num_scheduled_tokens
        return original(work, *args, **kwargs)

    original = executor.execute_model
    with monkeypatch.context() as patch:
        patch.setattr(executor, "execute_model", execute)
        engine.submit(requests)
        while engine.busy:
            engine.step()
    # a response's last token is never run through the model
    fed = engine.stats.generated_tokens - before.generated_tokens - len(requests)
    assert engine.stats.prompt_tokens - before.prompt_tokens == sum(len(r.prompt_ids) for r in requests)
    assert engine.stats.computed_prompt_tokens - before.computed_prompt_tokens == ran - fed
    return ran - fed


def test_prefill_is_the_plan_and_less_than_in_problem_major_order_with_a_small_cache(
    qwen: Model, fresh: VllmEngine, narrow: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_on(qwen, prompts=(905, 1010, 1121), problems=16, temperature=1.0, new_tokens=3)
    asked, plan = sum(len(r.prompt_ids) for r in requests), planned_prefill(requests, fresh.block_size)
    narrow.load_weights(qwen, 0)
    roomy = prefill(fresh, order(requests), monkeypatch)
    small = prefill(narrow, order(requests), monkeypatch)
    narrow.load_weights(qwen, 1)  # an empty cache
    problem_major = prefill(narrow, requests, monkeypatch)
    print(f"\nasked {asked}, plan {plan}, computed {roomy}; small cache {small}, problem-major {problem_major}")
    assert abs(roomy - plan) <= 0.02 * plan
    assert abs(small - plan) <= 0.02 * plan
    assert problem_major > 3 * small
    assert asked > 10 * plan


def test_siblings_compute_their_prompt_once(qwen: Model, fresh: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for length, again in ((100, 4), (96, 32), (97, 1)):  # what eight siblings compute again: the rest of the last block
        prompt = tokens(length, length, qwen.config.vocab_size)
        requests = [Request(i, prompt, SamplingParams(1.0, 4), seed=i) for i in range(8)]
        assert prefill(fresh, requests, monkeypatch) == length + 7 * again


# ---------------------------------------------------------------------------------------------- weights and the cache


def skip_reset(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)


def test_a_skipped_cache_reset_is_caught(qwen: Model, fresh: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(fresh, qwen)
    skip_reset(fresh, monkeypatch)
    change(qwen, 1)
    fresh.load_weights(qwen, 4)
    fresh._loads -= 1  # the salt would have saved us
    with pytest.raises(UserError, match="log-probs are off by"):
        check_engine(fresh, qwen)


def test_a_skipped_cache_reset_is_caught_after_an_update_too_small_to_show_in_logprobs(
    qwen: Model, fresh: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engine(fresh, qwen)
    skip_reset(fresh, monkeypatch)
    change(qwen, 1, size=1e-7)
    fresh.load_weights(qwen, 4)
    fresh._loads -= 1
    with pytest.raises(UserError, match="took the rest from older weights"):
        check_engine(fresh, qwen)


def test_without_the_reset_the_salt_alone_keeps_old_prefixes_away(
    qwen: Model, fresh: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_engine(fresh, qwen)
    skip_reset(fresh, monkeypatch)
    change(qwen, 1)
    fresh.load_weights(qwen, 4)
    check_engine(fresh, qwen)


def test_a_reset_that_did_not_succeed_stops_the_engine(
    qwen: Model, fresh: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fresh._llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="did not empty its prefix cache"):
            fresh.load_weights(qwen, 4)
    with pytest.raises(RuntimeError, match="load_weights comes first"):
        fresh.submit(requests_on(qwen))


def test_weights_that_the_trainer_does_not_have_are_missed(
    qwen: Model, fresh: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [(n, p) for n, p in qwen.lm.named_parameters() if "layers.1.mlp" not in n]
    monkeypatch.setattr(qwen.lm, "named_parameters", lambda **_: iter(some))
    with pytest.raises(RuntimeError, match=r"2 of vllm's weights .*layers\.1\.mlp"):
        fresh.load_weights(qwen, 4)


def test_weights_change_only_under_an_idle_engine_and_wake_it(qwen: Model, fresh: VllmEngine) -> None:
    requests = requests_on(qwen)
    fresh.submit(requests)
    fresh.step()
    for forbidden in (lambda: fresh.load_weights(qwen, 4), fresh.sleep):
        with pytest.raises(RuntimeError, match="busy engine"):
            forbidden()
    fresh.abort([r.id for r in requests])
    fresh.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        fresh.submit(requests)
    change(qwen, 5)
    fresh.load_weights(qwen, 5)
    assert error_of(qwen, requests, drain(fresh, requests)) < 1e-5


def test_a_step_that_async_scheduling_has_begun_is_over_before_weights_change(
    qwen: Model, fresh: VllmEngine, overlapping: VllmEngine
) -> None:
    requests = requests_on(qwen, samples=8, temperature=1.5, new_tokens=12)
    in_flight, ended = overlapping._llm.engine_core.engine_core.batch_queue, set()
    for version in range(2):
        change(qwen, version)
        for engine in (fresh, overlapping):
            engine.load_weights(qwen, version)
        alone, done = drain(fresh, requests), drain(overlapping, requests)
        assert {i: c.response_ids for i, c in done.items()} == {i: c.response_ids for i, c in alone.items()}
        assert error_of(qwen, requests, done) < 1e-5
        ended |= {c.finish_reason for c in done.values()}
        overlapping.submit(requests)
        early = [c for _ in range(5) for c in overlapping.step()]
        aborted = overlapping.abort([r.id for r in requests])
        assert {len(c.response_ids) for c in aborted} == {0, 4}  # waiting; the fifth is under way
        for c in [*early, *aborted]:
            assert c.response_ids == alone[c.id].response_ids[: len(c.response_ids)]
            assert c.logprobs == pytest.approx(alone[c.id].logprobs[: len(c.logprobs)], abs=1e-5)
        assert in_flight
        overlapping.sleep()
        assert not in_flight
    assert ended == {"stop", "length"}


# ------------------------------------------------------------------------------------------------------- the queue


def test_priorities_go_first_and_then_the_order_of_submission(qwen: Model, narrow: VllmEngine) -> None:
    narrow.load_weights(qwen, 0)
    requests = requests_on(qwen, samples=1, temperature=1.0, new_tokens=1)
    ranked = [replace(r, priority=1 - (r.id >= 8)) for r in requests]
    narrow.submit(ranked)
    ended: list[int] = []
    while narrow.busy:
        ended += [c.id for c in narrow.step()]
    assert ended == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]


def test_abort_returns_what_there_is_and_leaves_the_others_alone(qwen: Model, narrow: VllmEngine) -> None:
    narrow.load_weights(qwen, 0)
    requests = requests_on(qwen, temperature=1.0, new_tokens=40)
    alone, before = drain(narrow, requests), replace(narrow.stats)
    narrow.submit(requests)
    done: dict[int, Completion] = {}
    for _ in range(4):
        done.update((c.id, c) for c in narrow.step())
    unwanted = [r.id for r in requests if r.id % 2 and r.id not in done]
    aborted = {c.id: c for c in narrow.abort([*unwanted, 12345])}
    assert set(aborted) == set(unwanted)
    assert {c.finish_reason for c in aborted.values()} == {"aborted"}
    assert {len(c.response_ids) for c in aborted.values()} == {0, 4}  # waiting, running
    for i, c in aborted.items():
        got = len(c.response_ids)
        assert c.response_ids == alone[i].response_ids[:got]
        assert c.logprobs == pytest.approx(alone[i].logprobs[:got], abs=1e-5)
        assert c.versions == (((0, 4),) if got else ())
    while narrow.busy:
        done.update((c.id, c) for c in narrow.step())
    assert {i: c.response_ids for i, c in done.items()} == {i: alone[i].response_ids for i in done}
    assert set(done) | set(aborted) == {r.id for r in requests}
    ends = [*done.values(), *aborted.values()]
    assert narrow.stats.generated_tokens - before.generated_tokens == sum(len(c.response_ids) for c in ends)
    started = [r for r in requests if r.id in done or aborted[r.id].response_ids]
    assert narrow.stats.prompt_tokens - before.prompt_tokens == sum(len(r.prompt_ids) for r in started)
    assert not narrow._named
    assert not narrow._llm.has_unfinished_requests()
    narrow.load_weights(qwen, 1)  # no block is left in use


def test_a_prompt_without_room_in_the_context_is_refused_before_any_work(qwen: Model, fresh: VllmEngine) -> None:
    long = Request(0, (7,) * (qwen.context - 6), SamplingParams(1.0, 7), seed=0)
    with pytest.raises(ValueError, match="context of 2048"):
        fresh.submit([*requests_on(qwen), long])
    assert not fresh.busy
    longest = Request(0, (7,) * (qwen.context - 7), SamplingParams(1.0, 7), seed=0)
    [done] = drain(fresh, [longest]).values()
    assert len(done.response_ids) == 7 or done.finish_reason == "stop"


# --------------------------------------------------------------------------------------------------------- the rest


def test_bf16_is_sampled_in_bf16(qwen: Model) -> None:
    half = load_model(qwen.path, dtype="bfloat16")
    engine = engine_on(half)
    engine.load_weights(half, 0)
    check_engine(engine, half)
    assert engine._llm.model_config.dtype == torch.bfloat16
    hidden = torch.ones(1, half.config.hidden_size, dtype=torch.bfloat16)
    [logits] = engine._llm.apply_model(lambda network: network.compute_logits(hidden))
    assert logits.dtype == torch.float32  # as the trainer's


def test_a_small_cache_bounds_the_context_that_prompts_must_fit_into(
    qwen: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = 2 * 2 * 2 * HEAD_DIM * 4 * 32  # as above
    monkeypatch.setitem(VllmEngine.__init__.__kwdefaults__, "kv_bytes", 20 * block)  # type: ignore[index]
    model = load_model(qwen.path)
    engine = make_engine(RolloutConfig(engine="vllm", max_batch=4), model)
    assert isinstance(engine, VllmEngine)
    ENGINES.append(engine)
    assert model.context == engine.context <= engine.cache_tokens - engine.block_size < 700 < qwen.context
    with pytest.raises(ValueError, match=f"context of {engine.context} tokens"):
        engine.submit([Request(0, (7,) * (engine.context - 6), SamplingParams(1.0, 7), seed=0)])
    requests = [Request(i, tokens(i, engine.context - 7, 500), SamplingParams(1.0, 7), seed=i) for i in range(3)]
    assert error_of(model, requests, drain(engine, requests)) < 1e-5


@pytest.mark.parametrize("on_cpu", [True, False])
def test_vllm_is_told_to_leave_the_trainer_its_threads(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("OMP_NUM_THREADS", None)
    _set_environment(on_cpu)
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())


def test_what_vllm_cannot_serve_is_told_in_a_sentence(qwen: Model) -> None:
    with pytest.raises(UserError, match=r"rollout.engine: vllm cannot serve .*not enough GPU memory"):
        VllmEngine(qwen, kv_bytes=1)
    with pytest.raises(UserError, match=r"model.device = 'cuda:1': .* CUDA_VISIBLE_DEVICES"):
        VllmEngine(SimpleNamespace(device=torch.device("cuda:1")))  # type: ignore[arg-type]


def test_the_real_benchmark_computes_what_the_plan_says_and_more_in_other_orders(tmp_path: Path) -> None:
    shipped = json.loads((ROOT / "benchmarks" / "workloads" / "real.json").read_text())
    (tmp_path / "small.json").write_text(json.dumps(shipped | {"problems": 8, "cache_blocks": 60}))
    command = [sys.executable, "benchmarks/rollouts.py", "--real", "--engine", "vllm", "--rounds", "1"]
    files = ["--workload", tmp_path / "small.json", "--json", tmp_path / "out.json"]
    subprocess.run([*command, *map(str, files)], cwd=ROOT, check=True, timeout=600)
    rows = json.loads((tmp_path / "out.json").read_text())["policies"]
    assert len({(row["asked"], row["generated"], row["plan"]) for row in rows.values()}) == 1
    for ordered in ("prompt-major", "ours, any admission"):
        assert abs(rows[ordered]["of_plan"] - 1) < 0.02
    assert rows["random"]["of_plan"] > 1.2
    assert rows["random"]["preemptions"] > 0
    assert rows["random"]["repeated"] > 0
    assert rows["ours"]["preemptions"] == rows["ours"]["repeated"] == 0


def test_what_checks_vllm_on_a_gpu_runs_here(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_vllm.py", str(save_tiny("qwen3", tmp_path, head_dim=HEAD_DIM))]
    found = subprocess.run(command, cwd=ROOT, check=True, timeout=600, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    assert lines[-1] == {"faults": []}
    assert [line["policy"] for line in lines if "policy" in line] == [0, 0, 0, 1, 2, 3]


def test_a_training_run_by_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {
        "rollout.engine": "vllm", "stream": "glyph:A@4", "run-dir": run, "slow.minibatches": 1, "slow.lr": 1e-3,
        "fast.every": 2, "fast.scoring-problems": 8, "fast.first-proposals": 4, "fast.proposals": 2,
        "fast.population": 2, "eval.every": 4, "eval.problems": 8, "tensorboard": False, "progress": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "fst_fast.train", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    for s in steps:
        assert s["ratio"] == pytest.approx(1, abs=1e-4)  # sampled by the weights that are trained
        assert s["clipped"] == 0
        assert s["cached_prompt_tokens"] > 0.5 * s["prompt_tokens"]
    rollouts = [json.loads(line) for line in (run / "rollouts" / "rollouts.jsonl").read_text().splitlines()]
    assert {r["engine"] for r in rollouts} == {f"vllm {vllm.__version__}"}
    spent = [r for r in rollouts if r["purpose"] == "rl"]
    assert {r["step"] for r in spent} == set(range(4))
    assert all(r["versions"] == [[r["step"], len(r["response_ids"])]] for r in spent)
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert last["kl"] > 1e-3  # the weights moved, and ρ stayed 1
    command = [sys.executable, "-m", "fst_fast.evaluate", str(run), "--problems", "8", "--samples", "2"]
    said = subprocess.run(command, cwd=ROOT, check=True, timeout=600, capture_output=True, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    assert (found["step"], last["samples"]) == (4, 2)
    assert (found["reward"], found["kl"]) == pytest.approx((last["reward"], last["kl"]), rel=1e-3)  # the same draws


def test_a_training_run_that_asks_ahead_carries_what_is_under_way_over_each_weight_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {
        "rollout.engine": "vllm", "mode": "rl", "stream": "jsonl:tests/data/noise.jsonl@4", "run-dir": run,
        "jsonl.verifier": "regex", "slow.lr": 1e-3, "eval.every": 4, "eval.problems": 2, "eval.samples": 1,
        "rollout.lookahead": 1, "rollout.max-batch": 20, "rollout.problems": 6, "slow.minibatches": 1,
        "tensorboard": False, "progress": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "fst_fast.train", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [set(s["token_ages"]) for s in steps] == [{"0"}] + [{"0", "1"}] * 3
    assert all(s["spanning"] > 0 for s in steps[1:])
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-4)
    assert all(1e-6 < s["k3"] < 0.1 for s in steps[1:])  # weights one step apart
    rollouts = [json.loads(line) for line in (run / "rollouts" / "rollouts.jsonl").read_text().splitlines()]
    spent = [r for r in rollouts if r["purpose"] == "rl"]
    assert len({(r["step"], r["problem_id"], r["sample"]) for r in spent}) == len(spent) == 4 * 6 * 8
    assert all(r["step"] - 1 <= v <= r["step"] for r in spent for v, _ in r["versions"])


def test_on_two_ranks_each_has_an_engine_that_sharded_weights_reach(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {
        "ranks": 2, "threads": 1, "rollout.engine": "vllm", "mode": "rl", "stream": "jsonl:tests/data/noise.jsonl@3",
        "run-dir": run, "jsonl.verifier": "regex", "slow.lr": 1e-3, "eval.every": 3, "eval.problems": 2,
        "eval.samples": 1, "rollout.problems": 6, "slow.minibatches": 1, "rollout.max-new-tokens": 12,
        "tensorboard": False, "progress": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "fst_fast.train", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert all(s["grad_norm"] > 0 for s in steps)
    assert all(0 < s["mismatch"]["abs"] < 1e-5 for s in steps)  # each step's weights reached both
