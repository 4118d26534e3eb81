"""What an experiment is: a claim, the runs that test it, and a measure of them that says what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fst_fast.config import Stage
from fst_fast.errors import UserError
from fst_fast.experiments.stats import Verdict, judge
from fst_fast.plots import Group, Panel, draw
from fst_fast.runs import Run


@dataclass(frozen=True)
class Base:
    """A model that is made here, by a short supervised warm start of random weights on the glyph world."""

    family: str
    steps: int


@dataclass(frozen=True)
class Arm:
    """One configuration, run once a seed; `flags` are those of fst_fast.train, without --seed and --run-dir."""

    label: str
    flags: tuple[str, ...]
    start: Arm | Base | None = None  # whose last weights it starts from


@dataclass(frozen=True)
class Setting:
    """On what the experiments run. The first stage is the task most of them take, the second the one to switch to."""

    stages: tuple[Stage, ...]
    seeds: tuple[int, ...]
    flags: tuple[str, ...] = ()  # given by the user, for every run
    glyph: bool = True  # the embedded model and world: some experiments need them
    miniature: bool = False

    @property
    def task(self) -> str:
        return self.stages[0].task

    @property
    def steps(self) -> int:
        """Of the first stage: enough for RL to reach its peak."""
        return self.stages[0].steps

    @property
    def short(self) -> int:
        """Steps of arms that need no more than the early part of the curve: half of the first stage."""
        return 10 * (self.steps // 20) or self.steps // 2

    def stream(self, *steps: int) -> str:
        """The first stages, with these numbers of steps."""
        return ",".join(f"{stage.task}@{n}" for stage, n in zip(self.stages, steps, strict=False))

    @property
    def first(self) -> str:
        return self.stream(self.steps)

    @property
    def whole(self) -> str:
        return self.stream(*(stage.steps for stage in self.stages))

    def arm(self, label: str, mode: str, stream: str, *flags: str, start: Arm | Base | None = None) -> Arm:
        return Arm(label, ("--mode", mode, *self.flags, "--stream", stream, *flags), start)


@dataclass(frozen=True)
class Claim:
    text: str
    paper: str  # the number it reported, or who asked

    def judged(self, effects: Sequence[float], ours: str, more_than: float = 0.0) -> Finding:
        """Whether "the effect is greater than `more_than`", one effect a seed."""
        verdict, how = judge(effects, more_than)
        return Finding(self, f"{ours}: {how}", verdict)

    def found(self, ours: str, verdict: Verdict = "measured") -> Finding:
        return Finding(self, ours, verdict)


@dataclass(frozen=True)
class Finding:
    claim: Claim
    ours: str
    verdict: Verdict


Runs = Mapping[str, Sequence[Run]]  # by the arm's label, in the order of the seeds
Paint = Callable[[Any], None]  # draws on matplotlib axes


@dataclass(frozen=True)
class Result:
    findings: Sequence[Finding]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    paint: Paint
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)  # for the JSON file, beside the table


@dataclass(frozen=True)
class Experiment:
    """`measure` gets the runs of `arms`, each cut to the steps its arm asked for."""

    name: str
    question: str
    claims: Sequence[Claim]
    arms: Callable[[Setting], list[Arm]]
    measure: Callable[[Setting, Runs], Result]
    unfit: Callable[[Setting], str] = lambda _: ""  # why the setting cannot test it; "" = it can


def two_stages(setting: Setting) -> str:
    """For `Experiment.unfit`."""
    return "" if len(setting.stages) > 1 else "it needs a stream of two tasks, e.g. --stream TASK1@200,TASK2@200"


def two_tasks(setting: Setting) -> str:
    """For `Experiment.unfit`."""
    same = len(setting.stages) > 1 and setting.stages[0].task == setting.stages[1].task
    return two_stages(setting) or ("its stream must have two different tasks first" if same else "")


def glyph_only(setting: Setting) -> str:
    """For `Experiment.unfit`."""
    return "" if setting.glyph else "it is made of the glyph world and its model; leave --model.path out"


def check_fit(experiment: Experiment, setting: Setting) -> None:
    if why := experiment.unfit(setting):
        raise UserError(f"experiment {experiment.name}: {why}")


# -------------------------------------------------------------------------------------- helpers of the measures


def each(values: Sequence[float | None], form: str = ".2f") -> str:
    """All seeds in a cell: "0.97 / 0.98 / –"."""
    return " / ".join("–" if value is None else format(value, form).replace("-", "−") for value in values)


def last(run: Run, key: str = "reward", stage: int | None = None) -> float:
    """A number of the last evaluation, of the run or of a stage."""
    record = run.evals[-1] if stage is None else run.last_eval(stage)
    assert record is not None
    return float(record[key])


def lasts(runs: Sequence[Run], key: str = "reward", stage: int | None = None) -> list[float]:
    return [last(run, key, stage) for run in runs]


def area(run: Run, key: str = "reward", stage: int = 0) -> float:
    """Mean over a stage's evaluations after its first: the area under the learning curve."""
    values = [r[key] for r in run.evals if r["stage"] == stage][1:]
    return sum(values) / len(values)


def minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def curves(panel: Panel, runs: Runs, colors: Mapping[str, str] | None = None) -> Paint:
    """The panel's two keys of the evaluations against each other, every arm a line; `colors` names a mode an arm."""
    used: list[str] = []
    groups = []
    for label, of_arm in runs.items():
        mode = (colors or {}).get(label, of_arm[0].mode)
        groups.append(Group(label, mode, used.count(mode) % 3, tuple(of_arm)))
        used.append(mode)

    def paint(axes: Any) -> None:
        draw(axes, panel, groups)
        axes.legend(fontsize=8)

    return paint


def dots(values: Mapping[str, Sequence[float]], label: str) -> Paint:
    """One row an arm, one dot a seed."""

    def paint(axes: Any) -> None:
        for i, of_arm in enumerate(values.values()):
            axes.plot(of_arm, [i] * len(of_arm), "o", color="#0072b2", markersize=5, alpha=0.7)
        axes.set_yticks(range(len(values)), list(values), fontsize=8)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x")

    return paint
