"""What rollout scheduling is worth: policies simulated on a workload, or run on a real engine.

    python benchmarks/rollouts.py [--workload FILE] [--json FILE]      simulated steps, and hit rates by cache size
    python benchmarks/rollouts.py --planner                            time to plan 100,000 requests of 4k tokens
    python benchmarks/rollouts.py --real [--engine vllm]               real.json, or the FILE given, on a real engine

Workloads are JSON files in benchmarks/workloads/, each with a note of where its numbers come from.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from simulator import POLICIES, BlockCache, Cycles, Job, Workload, dealt, lower_bound, make_step, optimum, simulate

from fst_fast.prefix_tree import Ragged, trie
from fst_fast.rollout.schedule import place, plan

CACHES = (80, 120, 160, 320, 640, 1280, 5120)
AGAINST = (("random", 9), ("problem-major", 10))  # columns of the table, with their widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, help="by default paper.json; real.json with --real")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planner", action="store_true", help="time the planner instead")
    parser.add_argument("--real", action="store_true", help="run a real engine on a random tiny model instead")
    parser.add_argument("--engine", choices=["torch", "vllm"], default="torch", help="which one (vllm: its CPU build)")
    parser.add_argument("--rounds", type=int, default=3, help="of --real, every policy once in each")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    if args.planner:
        results = planner()
    else:
        name = "real.json" if args.real else "paper.json"
        workload = Workload.load(args.workload or Path(__file__).parent / "workloads" / name)
        if args.real:
            results = real(workload, args.engine, args.rounds, args.seed)
        else:
            results = simulated(workload, args.seed)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def simulated(workload: Workload, seed: int) -> dict[str, Any]:
    w = workload
    print(
        f"{w.problems} problems x {w.group} rollouts over {w.prompts} prompts ({w.prompt_tokens} + {w.problem_tokens} "
        f"tokens), {w.engines} engines of {w.cache_blocks} blocks, {w.steps} steps; seed {seed}"
    )
    print(
        f"{'policy':26}{'s/step':>8}{'x random':>9}{'x problem':>10}{'busy':>6}{'hit rate':>9}{'of optimum':>11}"
        f"{'prefilled':>11}{'repeated':>10}{'preempted':>10}{'sim s':>7}"
    )
    rows: dict[str, Any] = {}
    for policy in POLICIES:
        started = time.perf_counter()
        r = simulate(w, policy, seed=seed)
        took = time.perf_counter() - started
        mean = sum(r.seconds) / len(r.seconds)
        rows[policy.name] = asdict(r) | {"seconds_per_step": mean, "hit_rate": r.hit_rate, "of_optimum": r.of_optimum}
        against = [rows[name]["seconds_per_step"] / mean for name, _ in AGAINST if name in rows]
        ratios = "".join(f"{r:{width}.2f}" for r, (_, width) in zip([*against, 1.0][:2], AGAINST, strict=True))
        print(
            f"{policy.name:26}{mean:8.1f}{ratios}{r.busy / sum(r.seconds) / w.engines:6.2f}{r.hit_rate:9.3f}"
            f"{r.of_optimum:11.3f}{r.prefilled:11}{r.repeated:10}{r.preemptions:10}{took:7.2f}"
        )
    bound = statistics.fmean(lower_bound(w, make_step(w, step, seed)[0]) for step in range(w.steps))
    print(
        f"{'lower bound':26}{bound:8.1f}"
        + "".join(f"{rows[name]['seconds_per_step'] / bound:{width}.2f}" for name, width in AGAINST)
        + "  of a step by itself: any order and placement, every length known beforehand"
    )
    return {
        "workload": asdict(w),
        "policies": rows,
        "cycles": cycles(w, seed) if w.gepa else {},
        "lower_bound": bound,
        "layouts": layouts(w, seed),
        "hit_rates": hit_rates(w, seed),
    }


CYCLES = 2  # after a first, which is always waited for


def cycles(workload: Workload, seed: int) -> dict[str, Any]:
    """Seconds of a GEPA cycle and its T steps, rollouts and edits alone: raced or scored at once, the steps waiting for
    the cycle or the cycle filling the steps before it."""
    assert workload.gepa
    w = replace(workload, steps=CYCLES * workload.gepa.every + 1)
    print(f"\n{'a GEPA cycle and its steps':40}{'s':>8}{'x first':>9}{'busy':>6}{'tokens':>12}{'calls':>7}")
    out: dict[str, Any] = {}
    for race in (True, False):
        for filler in (False, True):
            sim = Cycles(w, seed, race=race, filler=filler)
            r = sim.run()
            name = f"{'raced' if race else 'scored at once'}, {'as filler' if filler else 'waited for'}"
            mean = statistics.fmean(r.seconds)
            out[name] = {"seconds": r.seconds, "decoded": r.decoded, "calls": sim.calls}
            first = statistics.fmean(next(iter(out.values()))["seconds"])
            print(
                f"{name:40}{mean:8.1f}{first / mean:9.2f}{r.busy / sim.now / w.engines:6.2f}{r.decoded:12}"
                f"{len(sim.calls):7}"
            )
    return out


def layouts(workload: Workload, seed: int) -> dict[str, int]:
    """Prompt tokens of one step to compute at best, by which of the two comes first in the context."""
    out = {}
    for layout in ("prompt-first", "problem-first"):
        sequences, _ = make_step(replace(workload, layout=layout), 0, seed)
        out[layout] = optimum(sequences, workload.block_size)
    asked = sum(len(s.prompt) for s in sequences)
    said = ", ".join(f"{name} {tokens} ({1 - tokens / asked:.0%} saved)" for name, tokens in out.items())
    print(f"\nprompt tokens of a step: {asked} asked; computed at best: {said}")
    return out


def hit_rates(workload: Workload, seed: int) -> dict[str, dict[int, float]]:
    """Prefix tokens saved, of those that can be saved, by a cache of so many blocks: prompts only, one request after
    the other, vLLM's block rules."""
    sequences, names = make_step(workload, 0, seed)
    best = optimum(sequences, workload.block_size)
    asked = sum(len(s.prompt) for s in sequences)

    def ours(blocks: int) -> list[Job]:
        prompts = Ragged.of([s.prompt for s in sequences])
        found = plan(prompts, [0] * len(sequences), [1.0] * len(sequences), cache_tokens=blocks * workload.block_size)
        return [sequences[i] for unit in found.units for i in unit.requests]

    orders: dict[str, Callable[[int], Sequence[Job]]] = {
        "random": lambda _: dealt(sequences, names, "random", random.Random(seed)),
        "problem-major": lambda _: sequences,
        "prompt-major": lambda _: dealt(sequences, names, "prompt-major", random.Random(seed)),
        "ours": ours,
    }
    print(
        f"\nof the prompt tokens that can be saved, saved by a cache of\n{'blocks':16}"
        + "".join(f"{b:8}" for b in CACHES)
    )
    out: dict[str, dict[int, float]] = {}
    for name, ordered in orders.items():
        out[name] = {}
        for blocks in CACHES:
            if blocks * workload.block_size >= max(len(s.prompt) for s in sequences) + workload.block_size:
                computed = replay(ordered(blocks), blocks, workload.block_size)
                out[name][blocks] = (asked - computed) / (asked - best)
        print(f"{name:16}" + "".join(f"{out[name][b]:8.3f}" if b in out[name] else f"{'-':>8}" for b in CACHES))
    return out


def replay(ordered: Sequence[Job], blocks: int, size: int) -> int:
    """Prompt tokens computed, one request after the other."""
    cache, computed = BlockCache(blocks), 0
    for s in ordered:
        found = cache.found(s.keys[: (len(s.prompt) - 1) // size])
        cache.share(found)
        held = found + cache.take(-(-len(s.prompt) // size) - len(found))
        for block, key in zip(held, s.keys, strict=False):  # the last block is not full
            cache.name(block, key)
        cache.give(held)
        computed += len(s.prompt) - len(found) * size
    return computed


def planner() -> dict[str, Any]:
    """100,000 requests of 4,000 tokens as int32 arrays, in shuffled order: trie, order and placement on 8 engines."""
    print(f"{'100,000 requests of 4,000 tokens':64}{'tokens stored':>14}{'nodes':>8}{'trie s':>8}{'plan s':>8}")
    out: dict[str, Any] = {}
    for name, problems, samples, prompt_tokens, shared in (
        ("8 prompts x 1,563 problems x 8 samples, 3000 + 1000", 1563, 8, 3000, True),
        ("the same, 300 + 3700", 1563, 8, 300, True),
        ("the same, 3000 + 1000, every request with a copy of its own", 1563, 8, 3000, False),
        ("8 prompts x 12,500 problems x 1 sample, 3000 + 1000", 12500, 1, 3000, True),
    ):
        sequences = requests_of_4k(problems, samples, prompt_tokens, shared=shared)
        predicted = np.random.default_rng(1).lognormal(7, 0.8, problems)[(sequences.starts // 4000) % problems]
        seconds = []
        for _ in range(3):
            started = time.process_time()
            tree = trie(sequences)
            built = time.process_time() - started
            found = plan(sequences, [0] * len(sequences), predicted.tolist(), cache_tokens=150_000)
            place(found, [0.0] * 8)
            seconds.append((built, time.process_time() - started - built))
        build, whole = (statistics.median(s) for s in zip(*seconds, strict=True))
        out[name] = {"trie": build, "plan": whole, "runs": seconds}
        print(f"{name:64}{len(sequences.ids):14}{len(tree):8}{build:8.3f}{whole:8.3f}")
    print("plan s = trie, units, order and placement together; CPU seconds of the one thread that does it")
    return out


def requests_of_4k(problems: int, samples: int, prompt_tokens: int, *, shared: bool) -> Ragged:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 150_000, (8, 1, prompt_tokens), np.int32)
    problem = rng.integers(0, 150_000, (1, problems, 4000 - prompt_tokens), np.int32)
    width = (8, problems)
    ids = np.concatenate(
        [np.broadcast_to(prompt, (*width, prompt_tokens)), np.broadcast_to(problem, (*width, 4000 - prompt_tokens))], 2
    )
    flat = ids.reshape(-1, 4000)
    if not shared:
        flat = np.repeat(flat, samples, 0)
    starts = np.arange(len(flat), dtype=np.int64) * 4000
    if shared:
        starts = np.repeat(starts, samples)
    starts = rng.permutation(starts)
    return Ragged(np.ascontiguousarray(flat).reshape(-1), starts, np.full(len(starts), 4000))


def real(workload: Workload, engine: str, rounds: int, seed: int) -> dict[str, Any]:
    from real import run  # needs torch and transformers, and for vllm an environment of its own

    w = workload
    rows = run(w, engine, rounds=rounds, seed=seed)
    first = next(iter(rows.values()))
    print(
        f"{w.problems} problems x {w.group} rollouts over {w.prompts} prompts ({w.prompt_tokens} + {w.problem_tokens} "
        f"tokens), {engine} engine, {w.cache_blocks} blocks of {w.block_size}, at most {w.max_running} at once: "
        f"{first['asked']} prompt tokens asked, {first['plan']} when every prefix is computed once; seed {seed}"
    )
    print(
        f"{'policy':22}{'computed':>10}{'of the plan':>12}{'hit rate':>9}{'of savable':>11}{'preempted':>10}"
        f"{'repeated':>10}{'steps':>7}{'median s':>10}{'x random':>9}"
    )
    reference = statistics.median(first["seconds"])
    for name, r in rows.items():
        middle = statistics.median(r["seconds"])
        print(
            f"{name:22}{statistics.median(r['computed']):10.0f}{r['of_plan']:12.3f}{r['hit_rate']:9.3f}"
            f"{r['of_savable']:11.3f}{r['preemptions']:10}{r['repeated']:10}{r['steps']:7}{middle:10.2f}"
            f"{reference / middle:9.2f}"
        )
    return {"workload": asdict(w), "engine": engine, "policies": rows}


if __name__ == "__main__":
    main()
