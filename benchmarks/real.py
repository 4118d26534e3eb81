"""A workload on a real engine: the orders in which a batch can be handed over, and ours, by what the engine then ran.

The model is random and tiny, made on the spot; prompts and response lengths are the workload's. vLLM's count of tokens
run and of pre-emptions is taken where its scheduler hands work to the model.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from simulator import Job, Order, Workload, dealt, known_lengths, make_step, optimum
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from fst_fast.model import GLYPH_BASE, Model, load_model
from fst_fast.prefix_tree import Ragged, trie
from fst_fast.records import SamplingParams
from fst_fast.rollout.dispatch import Scheduler
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.torch_engine import TorchEngine

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32  # 32: the smallest head that vLLM has on the CPU
ORDERS: tuple[Order, ...] = (
    "random",
    "problem-major",
    "prompt-major",
)  # an engine serves them first come, first served


@dataclass
class Work:
    """What an engine was made to do, counted below it."""

    tokens: int = 0  # run through the model: prompts, responses, and both again after a pre-emption
    preemptions: int = 0


def run(workload: Workload, engine_name: str, *, rounds: int, seed: int) -> dict[str, Any]:
    """Every policy once a round, one after the other, each on an empty cache. Raises ValueError for a block size that
    the engine does not have."""
    w = workload
    sequences, names = make_step(w, 0, seed)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), w.prompt_tokens + w.problem_tokens + w.lengths.limit)
        engine, work = make_engine(w, engine_name, model)
        floor = max(model.tokenizer.all_special_ids) + 1
        limit = SamplingParams(1.0, w.lengths.limit)
        requests = {
            s.id: Request(
                s.id,
                tuple(floor + t % (model.config.vocab_size - floor) for t in s.prompt),
                limit,
                s.id,
                problem=names[s.id][1],
            )
            for s in sequences
        }
        ends = EndsAsDrawn(engine, {s.id: s.length for s in sequences})
        prompts = Ragged.of([r.prompt_ids for r in requests.values()])
        plan = optimum(sequences, w.block_size) if engine_name == "vllm" else trie(prompts).tokens
        policies: dict[str, tuple[Sequence[Job], dict[str, Any] | None]] = {
            order: (dealt(sequences, names, order, random.Random(seed)), None) for order in ORDERS
        }
        policies["ours, any admission"] = sequences, {}
        if engine_name == "vllm":  # the embedded engine has no cache to fill: it bounds its batch
            policies["ours"] = sequences, {"cache_tokens": w.cache_blocks * w.block_size}
        rows: dict[str, dict[str, Any]] = {}
        for count in range(rounds):
            for policy, (ordered, scheduling) in policies.items():
                engine.load_weights(model, count)  # an empty cache
                above = cast(RolloutEngine, ends)
                if scheduling is not None:
                    above = scheduler = Scheduler([above], **scheduling)
                    for problem, lengths in known_lengths(w, 0, seed).items():
                        for n in lengths:
                            scheduler.dispatcher.lengths.observe(problem, n)
                row = served(above, engine, work, [requests[s.id] for s in ordered])
                assert row["generated"] == sum(s.length for s in sequences)
                kept = rows.setdefault(policy, row | {"plan": plan, "seconds": [], "computed": []})
                kept["seconds"].append(row["seconds"])
                kept["computed"].append(row["computed"])
    for row in rows.values():
        computed = statistics.median(row["computed"])
        row["hit_rate"] = 1 - computed / row["asked"]
        row["of_savable"] = (row["asked"] - computed) / (row["asked"] - plan)
        row["of_plan"] = computed / plan
    return rows


def served(above: RolloutEngine, engine: RolloutEngine, work: Work, requests: Sequence[Request]) -> dict[str, Any]:
    """Sample all of them; what it took. `steps` are the engine's iterations: a makespan that no other load moves."""
    before, ran = replace(engine.stats), replace(work)
    started, steps, done = time.perf_counter(), 0, 0
    above.submit(requests)
    while above.busy:
        done += len(above.step())
        steps += 1
    seconds = time.perf_counter() - started
    assert done == len(requests)
    computed = engine.stats.computed_prompt_tokens - before.computed_prompt_tokens
    generated = engine.stats.generated_tokens - before.generated_tokens
    # a response's last token is never run through the model
    repeated = work.tokens - ran.tokens - computed - (generated - done) if work.tokens else 0
    return {
        "asked": engine.stats.prompt_tokens - before.prompt_tokens,
        "computed": computed,
        "generated": generated,
        "repeated": repeated,
        "preemptions": work.preemptions - ran.preemptions,
        "steps": steps,
        "seconds": seconds,
    }


class EndsAsDrawn:
    """The engine, with every response ended at the length that was drawn for it: who schedules knows the limit only."""

    def __init__(self, engine: RolloutEngine, lengths: Mapping[int, int]):
        self._engine, self._lengths = engine, lengths

    def submit(self, requests: Sequence[Request]) -> None:
        self._engine.submit([replace(r, sampling=SamplingParams(1.0, self._lengths[r.id])) for r in requests])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def random_model(folder: Path, context: int) -> Model:
    """Two layers of random weights that never end a response by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(GLYPH_BASE)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load_model(str(folder))
    model.eos_ids = frozenset()
    return model


def make_engine(workload: Workload, name: str, model: Model) -> tuple[RolloutEngine, Work]:
    if name == "torch":
        return TorchEngine(model, max_batch=workload.max_running), Work()
    from fst_fast.rollout.vllm_engine import VllmEngine

    per_token = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4  # bytes of keys and values, fp32
    kv_bytes = (workload.cache_blocks + 1) * workload.block_size * per_token  # one block is vLLM's own
    engine = VllmEngine(model, max_batch=workload.max_running, kv_bytes=kv_bytes)
    if engine.block_size != workload.block_size:
        raise ValueError(f"block_size = {workload.block_size}: vllm has blocks of {engine.block_size} tokens here")
    work, executor = Work(), engine._llm.model_executor
    execute_model = executor.execute_model

    def counted(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        work.tokens += scheduled.total_num_scheduled_tokens
        work.preemptions += len(scheduled.preempted_req_ids or ())
        return execute_model(scheduled, *args, **kwargs)

    executor.execute_model = counted
    return engine, work
