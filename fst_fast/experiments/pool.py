"""The runs of all experiments as one pool: a run is named by its configuration, so equal arms are run once.

A run that is the beginning of a longer one is not run at all: it is read off the longer one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fst_fast.cli import config_from
from fst_fast.compare import Job, check_same
from fst_fast.config import Config, Stage, flat, stages
from fst_fast.experiments.experiment import Arm, Base, Setting
from fst_fast.runs import Run, read_run
from fst_fast.tasks.mixture import is_mixture

ALL_CHECKPOINTS = 10**6


@dataclass(frozen=True)
class Place:
    """Where an arm's run of one seed is found."""

    job: Job
    stages: list[Stage]  # those of the arm, which may be fewer and shorter than the job's

    @property
    def model(self) -> Path:
        """The weights at the arm's end, as a Hugging Face folder."""
        return self.job.dir / "checkpoints" / f"step-{self.stages[-1].end:06d}" / "model"

    def read(self) -> Run:
        return cut(read_run(self.job.dir), self.stages)


class Pool:
    """All runs of some arms. Every configuration is checked when it is made, before anything runs."""

    def __init__(self, arms: Iterable[Arm], setting: Setting, folder: Path):
        self.folder, self._preset = folder, "glyph" if setting.glyph else "paper"
        self.jobs: dict[Path, Job] = {}  # by directory
        self._places: dict[tuple[Arm, int], Place] = {}
        wanted = list(dict.fromkeys(arms))
        starts = list(dict.fromkeys(a.start for a in wanted if isinstance(a.start, Arm)))
        roots = list(dict.fromkeys([*starts, *(a for a in wanted if a.start is None)]))
        for of_level in (roots, [a for a in wanted if a.start is not None]):
            self._add(of_level, setting.seeds, kept=starts)
        for job in self.jobs.values():
            if job.module == "fst_fast.train":
                check_same(job)

    def runs(self, arm: Arm, seeds: Sequence[int]) -> list[Run]:
        return [self._places[arm, seed].read() for seed in seeds]

    def place(self, arm: Arm, seed: int) -> Place:
        return self._places[arm, seed]

    def _add(self, arms: Sequence[Arm], seeds: Sequence[int], kept: Sequence[Arm]) -> None:
        planned = {(arm, seed): self._plan(arm, seed) for arm in arms for seed in seeds}
        longest: list[Job] = []
        for job in sorted(planned.values(), key=lambda job: -stages(job.config.stream)[-1].end):
            if not any(begins(job.config, other.config) for other in longest):
                longest.append(job)
        homes = {key: next(o for o in longest if begins(job.config, o.config)) for key, job in planned.items()}
        for (arm, seed), job in planned.items():
            home = homes[arm, seed]
            if arm in kept and job.config.stream != home.config.stream:  # its last weights are needed
                home.argv += ["--keep-checkpoints", str(ALL_CHECKPOINTS)]
                home.config = replace(home.config, keep_checkpoints=ALL_CHECKPOINTS)
        for job in longest:
            self._name(job)
            self.jobs[job.dir] = job
        self._places |= {key: Place(homes[key], stages(job.config.stream)) for key, job in planned.items()}

    def _plan(self, arm: Arm, seed: int) -> Job:
        argv, needs = list(arm.flags), []
        if isinstance(arm.start, Base):
            made = self._base(arm.start)
            needs, model = [made.dir], made.dir
        elif arm.start:
            begun = self._places[arm.start, seed]
            needs, model = [begun.job.dir], begun.model
        if arm.start:
            argv += ["--model.path", str(model)]
            argv += [] if "--preset" in argv else ["--preset", self._preset]
        argv += ["--seed", str(seed), "--tensorboard", "False", "--progress", "False"]
        return Job(arm.label, argv, config_from(argv), needs=tuple(needs))

    def _base(self, base: Base) -> Job:
        folder = self.folder / f"base-{base.family}-{base.steps}"
        argv = ["--family", base.family, "--steps", str(base.steps), "--out", str(folder)]
        made = Job(
            f"warm start of a tiny {base.family}",
            argv,
            Config(run_dir=str(folder), threads=1),
            module="fst_fast.tasks.glyph_base",
            last="README.md",
        )
        return self.jobs.setdefault(folder, made)

    def _name(self, job: Job) -> None:
        config = job.config
        settings = {k: v for k, v in flat(asdict(config)).items() if k not in ("run_dir", "threads", "progress")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
        task = "".join(c if c.isalnum() else "-" for c in config.stream)[-40:]
        job.config = replace(config, run_dir=str(self.folder / f"{config.mode}-{task}-{digest}-seed{config.seed}"))
        job.argv += ["--run-dir", job.config.run_dir]


def begins(short: Config, long: Config) -> bool:
    """Whether the first steps of `long` are all of `short`: everything is the same but that its stream ends earlier,
    at an evaluation. (Prompts that fit only the tasks of the shorter stream would make a difference: of long texts.)"""
    if short == long:
        return True
    if replace(short, stream="") != replace(long, stream="") or short.mode == "rl-then-gepa":  # evolves after its end
        return False
    one, other = stages(short.stream), stages(long.stream)
    n = len(one) - 1
    return (
        n < len(other)
        and one[:n] == other[:n]
        and one[n].task == other[n].task
        and (one[n].steps == other[n].steps or (one[n].steps < other[n].steps and _ends_early(one[n], short)))
    )


def _ends_early(stage: Stage, config: Config) -> bool:
    """Whether its steps are the first ones of a longer stage: a mixture may shift over the whole of its stage."""
    return stage.steps % config.eval.every == 0 and not is_mixture(stage.task)


def cut(run: Run, own: Sequence[Stage]) -> Run:
    """The run as if its stream had ended with the stages `own`."""
    index, end = own[-1].index, own[-1].end
    return replace(
        run,
        steps=tuple(r for r in run.steps if r["step"] <= end),
        evals=tuple(r for r in run.evals if r["step"] <= end and r["stage"] <= index),
        evolves=tuple(r for r in run.evolves if r["step"] < end or run.mode == "rl-then-gepa"),
    )
