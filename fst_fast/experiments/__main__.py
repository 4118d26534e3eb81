"""`python -m fst_fast.experiments NAME`: runs what an experiment needs, measures it, says whether the claim held.

Interrupted, the same command goes on: finished runs are kept, others resume from their last checkpoint.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from fst_fast.cli import run
from fst_fast.compare import STREAM, core_seconds, fitting, work
from fst_fast.config import stages
from fst_fast.errors import UserError
from fst_fast.experiments.catalogue import EXPERIMENTS
from fst_fast.experiments.experiment import Experiment, Setting, check_fit
from fst_fast.experiments.page import Report, show, write_claims, write_files, write_page
from fst_fast.experiments.pool import Pool
from fst_fast.report import caveats
from fst_fast.runs import read_run

SEEDS = "0,1,2"
# In miniature RL just gets there. Half as many held-out problems: an evaluation costs as much as six steps.
MINIATURE, FEW_SEEDS = "glyph:A@60,glyph:B@40", "0,1"
MINIATURE_FLAGS = ("--eval.problems", "32", "--slow.pack", "auto")


@dataclass(frozen=True)
class ExperimentsCommand:
    """Run experiments on the paper's claims: each ends with one JSON file, one table, one plot, and a verdict that
    holds for this model and task only.

    Any flag of fst_fast.train can follow and holds for all runs, e.g. --model.path.
    """

    names: Annotated[str, tyro.conf.Positional]
    """Which, comma-separated, or "all"."""
    miniature: bool = False
    """Shorter streams, two seeds, 32 held-out problems: everything in half an hour on two cores."""
    stream: str = ""
    """Tasks with their steps, as for fst_fast.train: most experiments take the first, some switch to the second. Empty
    = two glyph rules."""
    seeds: str = ""
    """Run seeds, comma-separated; empty = 0,1,2 (0,1 in miniature)."""
    out: Path = Path("runs/experiments")
    """Where runs and results are kept."""
    jobs: int = 0
    """Runs side by side; 0 = cores / threads of a run, or one where they share a GPU."""


def main(argv: Sequence[str]) -> None:
    started = time.monotonic()
    command, flags = tyro.cli(
        ExperimentsCommand,
        args=list(argv),
        prog="python -m fst_fast.experiments",
        return_unknown_args=True,
    )
    chosen, setting = choose(command.names), setting_of(command, flags)
    if len(chosen) < len(EXPERIMENTS):
        for experiment in chosen:
            check_fit(experiment, setting)
    fit = [e for e in chosen if not e.unfit(setting)]
    arms = {e.name: e.arms(setting) for e in fit}
    pool = Pool([arm for of in arms.values() for arm in of], setting, command.out / "runs")
    try:
        command.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {command.out} cannot be written ({error.strerror}); choose another") from None
    jobs = sorted(pool.jobs.values(), key=lambda job: -stages(job.config.stream)[-1].end)  # the longest first
    work(jobs, command.jobs or fitting(jobs))
    console, reports = Console(), []
    for experiment in chosen:
        if why := experiment.unfit(setting):
            findings = [
                claim.found(f"not testable here, because {why}", "not testable here") for claim in experiment.claims
            ]
            reports.append(Report(experiment, findings, None, {}))
        else:
            runs = {arm.label: pool.runs(arm, setting.seeds) for arm in arms[experiment.name]}
            result = experiment.measure(setting, runs)
            commands = {
                f"{arm.label}, seed {seed}": f"python -m fst_fast.train {shlex.join(pool.place(arm, seed).job.argv)}"
                for arm in arms[experiment.name]
                for seed in setting.seeds
            }
            reports.append(Report(experiment, result.findings, result, commands))
        write_files(reports[-1], command.out)
        show(reports[-1], console)
    page = command.out / f"{command.names.replace(',', '-')}.html"
    facts = [
        ("command", shlex.join(["python", "-m", "fst_fast.experiments", *argv])),
        ("tasks", ",".join(f"{s.task}@{s.steps}" for s in setting.stages)),
        ("seeds", ", ".join(map(str, setting.seeds))),
        ("runs", f"{len(jobs)}, shared by {len(chosen)} experiments"),
        ("they took", f"{sum(map(core_seconds, jobs)) / 60:.1f} minutes of a core, whenever they ran"),
        ("this command", f"{(time.monotonic() - started) / 60:.1f} minutes, on {os.cpu_count()} cores"),
    ]
    trained = [read_run(job.dir) for job in jobs if job.module == "fst_fast.train"]
    write_page(reports, page, "Claims of Fast-Slow Training, tried here", facts, caveats(trained))
    if len(reports) > 1:
        write_claims(reports, page.with_suffix(".md"))
    print(f"page: {page}")


def choose(names: str) -> list[Experiment]:
    """Experiments by name, in the order asked for."""
    known = {e.name: e for e in EXPERIMENTS}
    wanted = list(known) if names == "all" else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"experiment {unknown[0]!r}: there is none of this name; known are all, {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


def setting_of(command: ExperimentsCommand, flags: Sequence[str]) -> Setting:
    if command.jobs < 0:
        raise UserError(f"jobs = {command.jobs}: must be 0 or more")
    words = [flag.partition("=")[0].replace("_", "-") for flag in flags]
    for taken, instead in {
        "--mode": "an experiment chooses its modes",
        "--run-dir": "use --out",
        "--seed": "use --seeds",
        "--resume": "the same command goes on by itself",
    }.items():
        if taken in words:
            raise UserError(f"{taken}: {instead}")
    own = "--model.path" in words or "--config-file" in words
    if own and not command.stream:
        raise UserError("stream: a model of your own needs tasks of its own, e.g. --stream jsonl:problems.jsonl@200")
    seeds = (command.seeds or (FEW_SEEDS if command.miniature else SEEDS)).split(",")
    if not all(seed.strip().isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds = {command.seeds!r}: must be different whole numbers, comma-separated, e.g. 0,1,2")
    stream = command.stream or (MINIATURE if command.miniature else STREAM)
    ours = MINIATURE_FLAGS if command.miniature else ()
    return Setting(tuple(stages(stream)), tuple(map(int, seeds)), (*ours, *flags), not own, command.miniature)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
