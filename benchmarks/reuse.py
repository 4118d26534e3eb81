"""What racing and the reuse of GEPA's rollouts save, at what learning curve: whole runs of the default model on a CPU.

    python benchmarks/reuse.py [--seeds 0,1,2] [--streams plain,sliced] [--out runs/reuse] [--json FILE]

Two scoring sets: the default's 24 problems, and the paper's, all of the next T batches (160 here). Interrupted, the
same command goes on. Token counts are exact; the curves are as good as their evaluations of 128 samples.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from measure import save, setting

from fst_fast.compare import CompareCommand, plan, work
from fst_fast.runs import Run, read_run

STREAMS = {
    "plain": ["--stream", "glyph:A@100,glyph:B@60"],
    "sliced": ["--stream", "glyph:A/B@60", "--fast.population", "2"],
}
NEITHER = "fst --fast.race False --fast.reuse False"
ALL = "--fast.scoring-problems 160"
ARMS = {
    NEITHER: "24 problems",
    "fst --fast.reuse False": "24 problems, race",
    "fst --fast.race False": "24 problems, reuse",
    "fst": "24 problems, race + reuse (default)",
    f"{NEITHER} {ALL}": "160 problems",
    f"fst --fast.reuse False {ALL}": "160 problems, race",
    f"fst {ALL}": "160 problems, race + reuse",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--streams", default=",".join(STREAMS), help=f"of {', '.join(STREAMS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/reuse"), help="where the runs are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    results = {}
    for name in args.streams.split(","):
        command = CompareCommand(modes=",".join(ARMS), seeds=args.seeds, out=args.out / name, jobs=args.jobs)
        jobs = plan(command, STREAMS[name])
        work(jobs, args.jobs)
        runs = defaultdict(list)
        for job in jobs:
            runs[ARMS[job.label]].append(read_run(job.dir))
        results[name] = {label: measure(arm) for label, arm in runs.items()}
        show(name, results[name])
    if args.json:
        save(args.json, **setting(), seeds=args.seeds, streams=results)


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """Numbers of one arm: a list has a place a seed."""
    steps = [run.steps for run in runs]
    curves = [[r for r in run.evals if r["step"]] for run in runs]
    reuse = [r["reuse"] for of_run in steps for r in of_run if r.get("reuse", {}).get("fraction")]
    gaps = [r["gap"] for r in reuse if "gap" in r]
    ages: defaultdict[int, list[dict[str, float]]] = defaultdict(list)
    for r in reuse:
        if len(r["ages"]) == 1 and "reused_k3" in r:
            ages[int(*r["ages"])].append(r)
    return {
        "tokens": [of_run[-1]["tokens"] for of_run in steps],
        "gepa_tokens": [of_run[-1]["gepa_tokens"] for of_run in steps],
        "rollouts": [of_run[-1]["rollouts"] for of_run in steps],
        # means over the evaluations, which are evenly spaced: the area under the curve
        "held_out": [fmean(r["reward"] for r in curve) for curve in curves],
        "per_slice": [fmean(r["reward_per_slice"] for r in curve) for curve in curves],
        "trained": [fmean(r["reward"] for r in of_run) for of_run in steps],
        "live_groups": [fmean(r["live_groups"] / r["groups"] for r in of_run) for of_run in steps],
        "reused": [fmean(r.get("reuse", {}).get("fraction", 0.0) for r in of_run) for of_run in steps],
        "gap": [fmean(gaps), stdev(gaps) / len(gaps) ** 0.5] if len(gaps) > 1 else None,
        "ages": {
            age: {key: fmean(r[f"reused_{key}"] for r in of_age) for key in ("ratio", "k3", "clipped", "sequence_ess")}
            for age, of_age in sorted(ages.items())
        },
    }


def show(name: str, arms: dict[str, dict[str, Any]]) -> None:
    """The table; ratios are of the tokens, all seeds together, to those of the arm without either."""
    first = fmean(arms[ARMS[NEITHER]]["tokens"])
    print(f"\n{name}: {' '.join(STREAMS[name])}")
    heads = ("k tokens", "ratio", "GEPA's k", "held out", "per slice", "trained", "live", "reused", "reused - fresh")
    print(f"{'prompts scored on':36}" + "".join(f"{head:>16}" for head in heads))
    for label, m in arms.items():
        cells = [
            "/".join(f"{t / 1e3:.0f}" for t in m["tokens"]),
            f"{fmean(m['tokens']) / first:.2f}",
            "/".join(f"{t / 1e3:.0f}" for t in m["gepa_tokens"]),
            *("/".join(f"{x:.2f}" for x in m[key]) for key in ("held_out", "per_slice", "trained", "live_groups")),
            f"{fmean(m['reused']):.1%}",
            "{:+.4f} ± {:.4f}".format(*m["gap"]) if m["gap"] else "",
        ]
        print(f"{label:36}" + "".join(f"{cell:>16}" for cell in cells))
    for label, m in arms.items():
        if m["ages"]:
            print(f"{label}: reused by age in steps")
            for age, of_age in m["ages"].items():
                print(f"  {age}  " + "  ".join(f"{key} {value:.5f}" for key, value in of_age.items()))


if __name__ == "__main__":
    main()
