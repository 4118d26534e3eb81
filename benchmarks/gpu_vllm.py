"""vLLM in the trainer's process on this device: three times asleep, with new weights after each, and what it samples
against the model's own forward pass. Needs vLLM and a model folder; one engine a process.

    python benchmarks/gpu_vllm.py MODEL [--overlap]          --overlap: vLLM's async scheduling, to compare tokens/s

One line of JSON a finding. Exit status 1 if log-probs are off, memory does not come back, or seeds do not repeat.
Read besides: `free_asleep` far above `free_awake`, `threads` 2, `runner` (V2 on CUDA), `start_seconds` of a second run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace

import torch
from measure import DEVICE

from fst_fast.model import Model, load_model
from fst_fast.records import SamplingParams
from fst_fast.rollout.check import check_engine, worst_error
from fst_fast.rollout.engine import Request
from fst_fast.rollout.vllm_engine import VllmEngine

GPU = DEVICE == "cuda"
LIMIT = 0.2 if GPU else 1e-3  # of |Δ log p|, bf16 and fp32: those of check_engine
LOST = 0.5  # GiB that a sleep may cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Hugging Face model")
    parser.add_argument("--overlap", action="store_true", help="with async scheduling, which the trainer's has not")
    parser.add_argument("--requests", type=int, default=256 if GPU else 8)
    parser.add_argument("--tokens", type=int, default=512 if GPU else 12, help="of a response at most")
    args = parser.parse_args()
    if args.overlap:
        overlap()
    torch.set_num_threads(2)
    model = load_model(args.model, dtype="bfloat16" if GPU else "float32")
    before, started = free(), time.time()
    engine = VllmEngine(model, max_batch=args.requests, gpu_memory=0.4)
    say(
        vllm=engine.version, start_seconds=time.time() - started, free_before=before, free_after=free(),
        context=engine.context, cache_tokens=engine.cache_tokens, block=engine.block_size,
        threads=torch.get_num_threads(),
        runner=type(engine._llm.model_executor.driver_worker.worker.model_runner).__module__,
        cuda_graphs=str(engine._llm.vllm_config.compilation_config.cudagraph_mode),
    )  # fmt: skip
    engine.load_weights(model, 0)
    check_engine(engine, model)
    first, again = sample(engine, model, args), sample(engine, model, args)
    faults = [] if first == again else [f"{sum(first[i] != again[i] for i in first)} seeds gave other tokens again"]
    for version in range(1, 4):
        awake, started = free(), time.time()
        engine.sleep()
        slept, asleep = time.time() - started, free()
        spoil(asleep)
        with torch.no_grad():
            for p in model.lm.parameters():
                p.mul_(1 + 0.02 * version)
        started = time.time()
        engine.load_weights(model, version)
        say(version=version, sleep_seconds=slept, load_seconds=time.time() - started, free_awake=awake,
            free_asleep=asleep, free_again=free())  # fmt: skip
        if awake - free() > LOST:
            faults.append(f"sleep {version} lost {awake - free():.2f} GiB")
        check_engine(engine, model)  # raises where log-probs are off, or KV of older weights is read
        sample(engine, model, args)
    say(faults=faults)
    return bool(faults)


def sample(engine: VllmEngine, model: Model, args: argparse.Namespace) -> dict[int, tuple[int, ...]]:
    """Responses to prompts with a common beginning. Ends the process where log-probs are off."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (300 if GPU else 40,), generator=generator).tolist()
    requests = [Request(i, (*ids, i % 7 + 5), SamplingParams(1.0, args.tokens), seed=i) for i in range(args.requests)]
    started, done = time.time(), {}
    engine.submit(requests)
    while engine.busy:
        done |= {c.id: c for c in engine.step()}
    if GPU:
        torch.cuda.synchronize()
    seconds, tokens = time.time() - started, sum(len(c.response_ids) for c in done.values())
    error = max(worst_error(model, requests[i].prompt_ids, done[i]) for i in list(done)[:8])
    say(policy=engine.policy_version, tokens_per_second=tokens / seconds, worst_error=error)
    if not error < LIMIT:
        sys.exit(f"log-probs are off by {error:.3g}, more than {LIMIT}")
    return {i: c.response_ids for i, c in done.items()}


def spoil(gib: float) -> None:
    """Fill what a sleeping engine gave back with NaN, so that whatever is read of it shows."""
    if GPU:
        torch.full((max(1, int(gib) - 3), 2**28), float("nan"), device="cuda")  # 1 GiB a row
        torch.cuda.empty_cache()


def overlap() -> None:
    import vllm

    make = vllm.LLMEngine.from_engine_args
    vllm.LLMEngine.from_engine_args = lambda of, **options: make(replace(of, async_scheduling=True), **options)


def free() -> float:
    """GiB of the GPU."""
    if not GPU:
        return 0.0
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0]) / 2**30


def say(**found: object) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
