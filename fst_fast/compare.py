"""`python -m fst_fast.compare`: runs several modes on the same seeds, side by side, and draws them together.

Interrupted, the same command goes on: finished runs are kept, others resume from their last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fst_fast.cli import config_from, read_config, run
from fst_fast.config import Config, flat, stages
from fst_fast.errors import UserError, terminated
from fst_fast.plots import group_runs, plot_comparison
from fst_fast.report import caveats, comparison, write_report
from fst_fast.runs import parse, read_run

# RL alone needs about 50 to 90 steps on a task: the first stage gives it time to finish before the switch.
STREAM = "glyph:A@100,glyph:B@60"

# What a run imports takes 8 seconds of a core; a server that has done so is forked for each.
IMPORTED_ONCE = ["fst_fast.evaluate", "fst_fast.fast.evolve", "fst_fast.slow.learner", "fst_fast.rollout.torch_engine"]
IMPORTED_ONCE += ["transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3"]
IMPORTED_ONCE += ["matplotlib.backends.backend_svg", "pydantic"]


@dataclass(frozen=True)
class CompareCommand:
    """Run several modes on the same seeds and the same stream of tasks; ends with a table, a plot and one report.

    Any flag of fst_fast.train can follow and holds for all runs, e.g. --model.path, --stream (glyph:A@100,glyph:B@60
    where there is neither of these, nor a --config-file).
    """

    modes: str = "rl,gepa,fst"
    """Arms, comma-separated: a mode each, with flags of its own if wanted: "fst --fast.population 1,fst"."""
    seeds: str = "0"
    """Run seeds, comma-separated."""
    out: Path = Path("runs/compare")
    """Directory of the comparison: one run directory an arm and seed, report.html, comparison.png."""
    jobs: int = 0
    """Runs side by side; 0 = cores / threads of a run, or one where they share a GPU."""


@dataclass
class Job:
    """One run and its process; or another module's work that runs need, under a configuration that names its folder."""

    label: str
    argv: list[str]
    config: Config
    module: str = "fst_fast.train"
    needs: tuple[Path, ...] = ()  # directories of the jobs that must be done before
    last: str = "report.html"  # the file it writes last: where that is, nothing is left to do
    bar: TaskID | None = None
    process: ForkServerProcess | None = None
    offset: int = 0
    done: bool = False

    @property
    def dir(self) -> Path:
        return Path(self.config.run_dir)


def main(argv: Sequence[str]) -> None:
    command, rest = tyro.cli(
        CompareCommand, args=list(argv), prog="python -m fst_fast.compare", return_unknown_args=True
    )
    if not any(a.startswith(("--stream", "--model.path", "--config-file", "--config_file")) for a in rest):
        rest = ["--stream", STREAM, *rest]
    jobs = plan(command, rest)
    work(jobs, command.jobs or fitting(jobs))
    run_dirs = [job.dir for job in jobs]
    plot_comparison(run_dirs, command.out / "comparison.png")
    write_report(run_dirs, command.out / "report.html")
    print_comparison(run_dirs)
    print(f"plot: {command.out / 'comparison.png'}\nreport: {command.out / 'report.html'}")


def fitting(jobs: Sequence[Job]) -> int:
    """Runs that fit side by side: by cores and by memory that is free now; one where they share a GPU."""
    cores = os.cpu_count() or 1
    if torch.cuda.is_available() and any(job.config.model.device != "cpu" for job in jobs):
        return 1
    by_cores = cores // max(job.config.threads or cores for job in jobs)
    by_memory = free_memory() // max(memory(job.config.model.path) for job in jobs)
    return max(1, min(by_cores, by_memory))


def memory(model: str) -> int:
    """Bytes of one run, roughly: a process (measured on glyph: 0.6 GB), and a model's weights in fp32 with their
    gradient, both of Adam's moments and the frozen base model, from a folder that holds them in 16 bits."""
    weights = Path(model).glob("*.safetensors") if model else ()
    return 10**9 + 10 * sum(file.stat().st_size for file in weights)


def free_memory() -> int:
    """Bytes that new processes may take, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**63


def plan(command: CompareCommand, flags: Sequence[str]) -> list[Job]:
    """One job per arm and seed; every command line is checked before any run starts."""
    if command.jobs < 0:
        raise UserError(f"jobs = {command.jobs}: must be 0 or more")
    for word in (*flags, *command.modes.split()):
        if word.partition("=")[0] == "--seed":
            raise UserError(f"{word}: a comparison has --seeds, for all of its arms")
    jobs = []
    for seed in command.seeds.split(","):
        if not seed.strip().isdecimal():
            raise UserError(f"seeds = {command.seeds!r}: must be whole numbers, comma-separated")
        for arm in command.modes.split(","):
            try:
                words = shlex.split(arm)
            except ValueError as error:
                raise UserError(f"modes = {command.modes!r}: {arm!r} is not a mode with flags ({error})") from None
            if not words:
                raise UserError(f"modes = {command.modes!r}: an arm is empty")
            label = " ".join(words)
            name = "".join(c if c.isalnum() else "-" for c in label)
            argv = ["--mode", words[0], *flags, *words[1:], "--seed", seed]
            argv += ["--run-dir", str(command.out / f"{name}-seed{seed}")]
            jobs.append(Job(label, argv, config_from(argv)))
    if len({job.dir for job in jobs}) < len(jobs):
        raise UserError(f"modes = {command.modes!r}, seeds = {command.seeds!r}: an arm or a seed is named twice")
    for job in jobs:
        check_same(job)
    try:
        command.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {command.out} cannot be written ({error.strerror}); choose another") from None
    return jobs


def check_same(job: Job) -> None:
    """A run that the job would continue must be the one its flags describe."""
    if not (job.dir / "config.toml").is_file():
        return
    begun = read_config(job.dir)
    config = replace(job.config, run_dir=begun.run_dir, threads=begun.threads)
    for (name, old), new in zip(flat(asdict(begun)).items(), flat(asdict(config)).values(), strict=True):
        if old != new:
            raise UserError(f"{name} = {new!r}: {job.dir} was begun with {old!r}; choose another --out, or remove it")


def work(jobs: Sequence[Job], parallel: int) -> None:
    """Run all jobs that are not done, `parallel` at a time, with a bar each while they run. A run that fails stops the
    others with its message; so does a SIGTERM to this process."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for job in jobs:
            job.done = (job.dir / job.last).is_file()
        whole = progress.add_task("runs", total=len(jobs))
        before = signal.signal(signal.SIGTERM, terminated)
        try:
            while not all(job.done for job in jobs):
                running = [job for job in jobs if job.process and not job.done]
                done = {job.dir for job in jobs if job.done}
                progress.update(whole, completed=len(done))
                waiting = [job for job in jobs if not job.process and not job.done and done.issuperset(job.needs)]
                for job in waiting[: parallel - len(running)]:
                    start(job)
                    steps = stages(job.config.stream)[-1].end
                    job.bar = progress.add_task(f"{job.label}, seed {job.config.seed}", total=steps)
                for job in running:
                    follow(job, progress, console)
                time.sleep(0.2)
        except KeyboardInterrupt as error:
            raise type(error)("the same command goes on where it stopped") from None
        finally:
            signal.signal(signal.SIGTERM, before)
            for job in jobs:
                if job.process and job.process.exitcode is None:
                    job.process.terminate()
                    job.process.join()


def start(job: Job) -> None:
    """Start the job's run, or continue the one its directory holds."""
    argv = job.argv
    if (job.dir / "config.toml").is_file():
        argv = ["--resume", str(job.dir)]
    job.dir.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    job.process = context.Process(target=run_module, args=(job.module, argv, job.dir))
    job.process.start()


def run_module(module: str, argv: Sequence[str], run_dir: Path) -> None:
    """`python -m module argv...` in this process; output and core seconds are appended to files beside the run."""
    with open(run_dir.with_suffix(".log"), "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [module, *argv]
    signal.signal(signal.SIGTERM, terminated)  # what it took is written down also when it is stopped
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        with open(run_dir.with_suffix(".seconds"), "a") as spent:
            spent.write(f"{time.process_time():.1f}\n")


def core_seconds(job: Job) -> float:
    """What the job's processes took so far, those of earlier commands too."""
    path = job.dir.with_suffix(".seconds")
    return sum(map(float, path.read_text().split())) if path.is_file() else 0.0


def follow(job: Job, progress: Progress, console: Console) -> None:
    """Show what the job's run has written since; notice its end."""
    assert job.process is not None
    assert job.bar is not None
    code = job.process.exitcode
    path = job.dir / "metrics.jsonl"
    if path.is_file():
        with open(path, "rb") as file:
            file.seek(job.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                job.offset += len(line)
                record = parse(line) or {}
                progress.update(job.bar, completed=record.get("step", 0))
                if record.get("kind") == "eval":
                    text = f"{job.label}, seed {job.config.seed}: step {record['step']}, {record['task']}"
                    numbers = f"held-out reward {record['reward']:.3f}, KL {record['kl']:.3f}"
                    console.print(f"{text}, {numbers}", markup=False, highlight=False, soft_wrap=True)
    if code is not None:
        if code:
            last = job.dir.with_suffix(".log").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{job.label}, seed {job.config.seed} failed ({code}): {''.join(last)}")
        job.done = True
        progress.remove_task(job.bar)


def print_comparison(run_dirs: Sequence[Path]) -> None:
    """The report's tables on the console: a row per measure, a column per arm, all seeds in a cell."""
    console = Console()
    runs = [read_run(run_dir) for run_dir in run_dirs]
    groups = group_runs(runs)
    for part in comparison(groups):
        table = Table(title=Text(part["title"]))
        table.add_column("", no_wrap=True)
        for group in groups:
            table.add_column(Text(group.label), justify="right")
        for row in part["rows"]:
            table.add_row(*map(Text, [row["label"], *row["cells"]]))
        console.print(table)
    for caveat in caveats(runs):
        console.print(f"- {caveat}", markup=False, highlight=False)


if __name__ == "__main__":
    run(main)
