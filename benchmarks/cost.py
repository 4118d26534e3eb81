"""Where a run's time goes, phase by phase, and what a whole run costs: short real runs, read from their own records.

    python benchmarks/cost.py [--steps 10] [--json FILE]                  the embedded model, on a CPU
    python benchmarks/cost.py --shape qwen3-0.6b [--json FILE]            random weights of a shape, on a GPU

Random weights end no response: all are rollout.max_new_tokens long. Rewards are dice, every reflection is taken for a
new prompt, and nothing is saved (25 GB a checkpoint of Qwen3-1.7B), so that every other part has its work.
Only groups with differing rewards are learnt from: their part is told, and RL has none at its start on glyph.
Whatever else is given goes to the trainer (--rollout.problems 8 ...).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import DEVICE, save, setting
from weights import SHAPES, save_random

from fst_fast.checkpoint import Saver
from fst_fast.records import Answer
from fst_fast.runs import SUMS, Run, read_run
from fst_fast.tasks.task import Message
from fst_fast.train import main as train
from fst_fast.trainer import Trainer

CONFIGS = {
    "fst": [],
    "fst, no reuse": ["--fast.reuse", "False"],
    "fst, no reuse, no race": ["--fast.reuse", "False", "--fast.race", "False"],
    "rl": ["--mode", "rl"],
}
COIN = random.Random(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each run: a cycle of the embedded model's")
    parser.add_argument("--whole", type=int, default=200, help="steps of the run whose cost is told")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape instead of the embedded")
    parser.add_argument("--only", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args, rest = parser.parse_known_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = workload(args.shape, args.steps, Path(folder)) + rest
        for i, name in enumerate(args.only):
            run_dir = Path(folder) / f"run-{i}"
            common = {"run-dir": run_dir, "threads": args.threads, "progress": False, "tensorboard": False}
            patched = random_weights() if args.shape else nullcontext()
            with open(os.devnull, "w") as quiet, redirect_stdout(quiet), patched:  # vLLM asks for its descriptor
                train([*words(common), *flags, *CONFIGS[name]])
            results[name] = measured(read_run(run_dir), args.whole)
    title = f"{args.shape or 'embedded model'}, {args.steps} steps, {DEVICE}, {args.threads} thread(s)"
    print(f"\n{title}; {setting()}")
    show(results, args.whole)
    if args.json:
        about = {"title": title, "shape": args.shape, "flags": flags[2:], "steps": args.steps, "whole": args.whole}
        save(args.json, **about, **setting(), results=results)


def workload(shape: str | None, steps: int, folder: Path) -> list[str]:
    """Flags of the model and the task. Two evaluations a run: before its first step and after its last."""
    every = {"eval.every": steps, "checkpoint-every": steps}
    if shape is None:
        return words({"stream": f"glyph:A@{steps}", **every})
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{i} + {i} = ?"}) + "\n" for i in range(2000)))
    return words({
        "stream": f"jsonl:{problems}@{steps}", "jsonl.verifier": "python:cost:dice",
        "model.path": save_random(shape, folder / "model"), "model.dtype": "bfloat16",
        "rollout.max-new-tokens": 256, "reflector.max-new-tokens": 256, "slow.lr": 1e-6,
        "eval.problems": 16, "eval.samples": 1, **every,
    })  # fmt: skip


def dice(row: Mapping[str, Any], response: str) -> float:
    """A coin. The response decides nothing: most ids are none of the small tokenizer's, and most texts empty."""
    return float(COIN.random() < 0.5)


@contextmanager
def random_weights() -> Iterator[None]:
    """What they cannot do: end an answer within its limit, which every reflection must, and be worth saving."""
    generate, numbers = Trainer._generate, count(1)

    def edited(trainer: Trainer, chats: Sequence[list[Message]]) -> list[Answer]:
        return [replace(a, text=f"Prompt {next(numbers)}.", fault="") for a in generate(trainer, chats)]

    with patch.object(Trainer, "_generate", edited), patch.object(Saver, "save", lambda *_: None):
        yield


def words(flags: Mapping[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def measured(run: Run, whole: int) -> dict[str, Any]:
    """Seconds by phase, and the hours of a run of `whole` steps: what is done once (start, checkpoint) is left out."""
    spent = run.spent
    phases = {name: seconds for name, seconds in spent.items() if name not in SUMS}
    phases["other"] = spent["seconds"] - sum(phases.values())
    once = sum(phases[name] for name in ("start", "checkpoint", "other", "eval"))
    steps = len(run.steps)
    return {
        "seconds": spent["seconds"],
        "phases": dict(sorted(phases.items(), key=lambda item: -item[1])),
        "a_step": (spent["seconds"] - once) / steps,
        "device_hours": (spent["seconds"] - once) / steps * whole / 3600,
        "rollouts": run.total("rollouts"),
        "tokens": run.total("tokens"),
        "gepa_tokens": run.total("gepa_tokens"),
        "live_groups": sum(r.get("live_groups", 0) for r in run.steps) / max(1, sum(r["groups"] for r in run.steps)),
        "mfu": run.utilisation("mfu", "learn"),
        "mfu_later": replace(run, steps=run.steps[1:]).utilisation("mfu", "learn"),  # the first step compiles kernels
        "joules": spent.get("joules"),
        # as NVML sees it, and of it what torch had handed out; vLLM's part comes and goes
        "memory_gib": max(r["time"].get("memory", 0) for r in run.steps) / 2**30,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "max_new_tokens": run.config["rollout"]["max_new_tokens"],
        "engine": run.config["rollout"]["engine"],
    }


def show(results: Mapping[str, Mapping[str, Any]], whole: int) -> None:
    names: Sequence[str] = list(dict.fromkeys(phase for r in results.values() for phase in r["phases"]))
    print(f"{'seconds, share':12}" + "".join(f"{name:>24}" for name in results))
    for phase in names:
        cells = [(r["phases"].get(phase, 0.0), r["seconds"]) for r in results.values()]
        print(f"{phase:14}" + "".join(f"{s:16.2f}{s / all_of_it:7.1%} " for s, all_of_it in cells))
    print(f"{'in all':14}" + "".join(f"{r['seconds']:16.2f}        " for r in results.values()))
    print(f"{'a step':14}" + "".join(f"{r['a_step']:16.3f}        " for r in results.values()))
    unit = "GPU-hours" if DEVICE == "cuda" else "hours"
    print(f"{unit} of a run of {whole} steps, without start, evaluations and checkpoints:")
    print(" " * 14 + "".join(f"{r['device_hours']:16.3f}        " for r in results.values()))
    print(f"{'live groups':14}" + "".join(f"{r['live_groups']:16.0%}        " for r in results.values()))
    print(f"{'tokens':14}" + "".join(f"{r['tokens']:16,}        " for r in results.values()))
    if DEVICE == "cuda":
        print(f"{'peak GiB':14}" + "".join(f"{r['memory_gib']:16.1f}        " for r in results.values()))
    if all(r["mfu_later"] is not None for r in results.values()):
        print(f"{'MFU of learn':14}" + "".join(f"{r['mfu_later']:16.1%}        " for r in results.values()))
        print("  after the first step, which compiles kernels")


if __name__ == "__main__":
    main()
