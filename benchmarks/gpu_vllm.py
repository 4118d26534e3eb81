"""vLLM in the trainer's process on this device: three times asleep, with new weights after each, and what it samples
against the model's own forward pass. Needs vLLM and a model folder; one engine a process.

    python benchmarks/gpu_vllm.py MODEL [--in-turn]          --in-turn: no async scheduling, to compare tokens/s

MODEL is a folder, or a shape (qwen3-8b, ...), which gets random weights. One line of JSON a finding. Exit status 1 if
log-probs are off, memory does not come back, the process is left on another stream, or on a CPU seeds do not repeat.
Read besides: `free_asleep` far above `free_awake`, `threads` 2, `runner` (V2 on CUDA), `start_seconds` of a second run;
`iteration_ms` with all and with an eighth of the requests, of which rates.json has what a sequence costs beside its KV
(`sequence_us`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from measure import DEVICE, setting
from weights import SHAPES, save_random

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
    parser.add_argument("model", help=f"folder of a Hugging Face model, or one of {', '.join(SHAPES)}")
    parser.add_argument("--in-turn", action="store_true", help="without async scheduling, which the trainer's has")
    parser.add_argument("--requests", type=int, default=256 if GPU else 8)
    parser.add_argument("--tokens", type=int, default=256 if GPU else 12, help="of a response at most")
    parser.add_argument("--gpu-memory", type=float, default=0.5, help="part of the GPU that vLLM takes")
    args = parser.parse_args()
    if args.in_turn:
        in_turn()
    torch.set_num_threads(2)
    say(model=args.model, **setting())
    with tempfile.TemporaryDirectory() as folder:
        path = save_random(args.model, Path(folder)) if args.model in SHAPES else args.model
        return check(load_model(str(path), dtype="bfloat16" if GPU else "float32"), args)


def check(model: Model, args: argparse.Namespace) -> int:
    """Exit status."""
    before, started = free(), time.time()
    engine = VllmEngine(model, max_batch=args.requests, gpu_memory=args.gpu_memory)
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
    sample(engine, model, args, args.requests // 8)
    changed = sum(first[i] != again[i] for i in first)  # on a GPU sums depend on the batch, which the cache changes
    say(seeds_that_gave_other_tokens_again=changed)
    faults = [f"{changed} seeds gave other tokens again"] if changed and not GPU else []
    if GPU and torch.cuda.current_stream() != torch.cuda.default_stream():
        faults.append("vLLM left this process on a stream of its own")  # which the trainer's does not wait for
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


def sample(engine: VllmEngine, model: Model, args: argparse.Namespace, count: int = 0) -> dict[int, tuple[int, ...]]:
    """Responses to `count` prompts (0 = all) with a common beginning. Ends the process where log-probs are off."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (300 if GPU else 40,), generator=generator).tolist()
    sampling = SamplingParams(1.0, args.tokens)
    requests = [Request(i, (*ids, i % 7 + 5), sampling, seed=i) for i in range(count or args.requests)]
    started, done, iterations = time.time(), {}, 0
    engine.submit(requests)
    while engine.busy:
        done |= {c.id: c for c in engine.step()}
        iterations += 1
    if GPU:
        torch.cuda.synchronize()
    seconds, tokens = time.time() - started, sum(len(c.response_ids) for c in done.values())
    error = max(worst_error(model, requests[i].prompt_ids, done[i]) for i in list(done)[:8])
    say(policy=engine.policy_version, requests=len(done), tokens_per_second=tokens / seconds,
        iteration_ms=1e3 * seconds / iterations, worst_error=error)  # fmt: skip
    if not error < LIMIT:
        sys.exit(f"log-probs are off by {error:.3g}, more than {LIMIT}")
    return {i: c.response_ids for i, c in done.items()}


def spoil(gib: float) -> None:
    """Fill what a sleeping engine gave back with NaN, so that whatever is read of it shows."""
    if GPU:
        torch.full((max(1, int(gib) - 3), 2**28), float("nan"), device="cuda")  # 1 GiB a row
        torch.cuda.empty_cache()


def in_turn() -> None:
    import vllm

    make = vllm.LLMEngine.from_engine_args
    vllm.LLMEngine.from_engine_args = lambda of, **options: make(replace(of, async_scheduling=False), **options)


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
