"""A run as its files have it: `read_run` reads metrics.jsonl and config.toml back, also of a run that is still going or
was killed; `print_summary` is the table that a run ends with."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_fast.errors import UserError, visible

if TYPE_CHECKING:
    from rich.console import Console

Record = dict[str, Any]
SPENT = {"steps": "step", "rollouts": "rollouts", "tokens": "tokens"}  # and their key in a record
# Of a record's times: no sums.
RATES = ("tokens_per_second", "gpu_tokens_per_second", "mfu", "step_mfu", "watts", "utilisation", "memory")
SUMS = ("seconds", "gpu_hours", "gpu_dollars", "joules")  # the others are seconds of phases
MANY_CUT = 0.1  # a part of an evaluation's responses that is told at a run's end


@dataclass(frozen=True)
class Run:
    """metrics.jsonl and config.toml of a run directory; `notes` says what could not be read or must be known."""

    dir: Path
    config: Record
    steps: tuple[Record, ...]
    evals: tuple[Record, ...]
    evolves: tuple[Record, ...]
    ends: tuple[Record, ...]  # more than one where a run's stream was made longer
    notes: tuple[str, ...] = ()
    lost: tuple[Record, ...] = ()  # costs of what was done behind a checkpoint that the run then went back to

    @property
    def mode(self) -> str:
        return str(self.config.get("mode", "?"))

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @cached_property
    def stages(self) -> dict[int, str]:
        """Stage number to task name, of the stages the run has reached."""
        return {r["stage"]: r["task"] for r in sorted(self.evals + self.steps + self.evolves, key=lambda r: r["stage"])}

    def last_eval(self, stage: int) -> Record | None:
        return next((r for r in reversed(self.evals) if r["stage"] == stage), None)

    def start(self, stage: int, key: str) -> int:
        """Step, rollouts or tokens (`key`) spent before `stage` began."""
        return max((r[key] for r in self.steps + self.evals if r["stage"] < stage and key in r), default=0)

    @cached_property
    def spans(self) -> dict[int, tuple[int, int]]:
        """Stage to the steps finished when it began, and when it ended or where it is now."""
        first = {stage: self.start(stage, "step") for stage in self.stages}
        return {s: (f, max((r["step"] for r in self.steps if r["stage"] == s), default=f)) for s, f in first.items()}

    def total(self, key: str) -> int:
        """Last value of a running count: step, rollouts, tokens, gepa_rollouts, gepa_tokens."""
        return max((r[key] for r in self.steps + self.evals if key in r), default=0)

    def reflection(self, key: str) -> float:
        """Sum over the cycles of calls, prompt_tokens, completion_tokens, dollars or failures."""
        return sum(r.get("reflection", {}).get(key, 0) for r in (*self.evolves, *self.lost))

    @cached_property
    def spent(self) -> dict[str, float]:
        """Sums of the records' times (meter.py): seconds, those of each phase, GPU-hours, dollars, joules."""
        return summed(r.get("time", {}) for r in (*self.steps, *self.evals, *self.evolves, *self.lost, *self.ends))

    def utilisation(self, rate: str, over: str) -> float | None:
        """Mean of a rate of the steps (mfu, step_mfu), weighted by the seconds `over` which it was taken."""
        times = [r["time"] for r in self.steps if rate in r.get("time", {})]
        weight = sum(time[over] for time in times)
        return sum(time[rate] * time[over] for time in times) / weight if weight else None

    def levels(self) -> list[Record]:
        """Steps, rollouts and tokens from the stage's start to the first evaluation that reached each level."""
        wanted = self.config.get("eval", {}).get("levels", (0.5, 0.9))
        found = []
        for stage, task in self.stages.items():
            for level in wanted:
                hit = next((r for r in self.evals if r["stage"] == stage and r["reward"] >= level), None)
                spent = {name: hit[key] - self.start(stage, key) if hit else None for name, key in SPENT.items()}
                found.append({"stage": stage, "task": task, "level": level, **spent})
        return found


def read_run(run_dir: Path) -> Run:
    """Reads what a run directory has. UserError when it is none: neither config.toml nor metrics.jsonl in it."""
    if not (run_dir / "config.toml").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir} is no run directory: it has neither config.toml nor metrics.jsonl")
    notes: list[str] = []
    config: Record = {}
    try:
        config = tomllib.loads((run_dir / "config.toml").read_text(errors="replace"))
    except (FileNotFoundError, tomllib.TOMLDecodeError) as error:
        notes.append(f"config.toml could not be read ({plain(str(error), 200)}): mode and settings are unknown.")
    records = list(read_lines(run_dir / "metrics.jsonl", notes))
    names = ("step", "eval", "evolve", "lost", "end")
    kinds = {kind: tuple(r for r in records if r.get("kind") == kind) for kind in names}
    if not records or records[-1].get("kind") != "end":
        notes.append("This run has not ended: it is still going, or was stopped. Numbers are the latest, not final.")
    if kinds["lost"]:
        again = sum(r["time"].get("seconds", 0) for r in kinds["lost"])
        notes.append(
            f"It was resumed, and went back to a checkpoint: {again:,.0f} seconds of work were done again. They are in "
            "the sums of time and money; the step or cycle that was under way is not."
        )
    trained = [r for r in kinds["step"] if r.get("groups")]
    still = sum(r.get("live_groups") == 0 for r in trained)
    if 2 * still > len(trained):
        notes.append(
            f"In {still} of {len(trained)} steps no group had differing rewards: the weights did not move in those."
        )
    cut = next((r["truncated"] for r in reversed(kinds["eval"]) if "truncated" in r), 0.0)
    if cut > MANY_CUT:
        limit = config.get("rollout", {}).get("max_new_tokens", "?")
        notes.append(
            f"{cut:.0%} of the last evaluation's responses were cut off at rollout.max_new_tokens = {limit}, "
            "and scored as they stood: what they would have come to is not known."
        )
    steps, evals, evolves, lost, ends = (kinds[kind] for kind in names)
    return Run(run_dir, config, steps, evals, evolves, ends, tuple(notes), lost)


def read_lines(path: Path, notes: list[str]) -> Iterator[Record]:
    """Records of a JSON-lines file; a missing file or unreadable lines (a last one cut by a crash) become a note."""
    if not path.is_file():
        notes.append(f"{path.name} is not there (yet).")
        return
    bad = 0
    with path.open("rb") as file:
        for line in file:
            record = parse(line)
            bad += record is None
            if record is not None:
                yield record
    if bad:
        notes.append(f"{path.name}: {bad} unreadable line(s) left out (the last one is cut when a run is killed).")


def parse(line: bytes) -> Record | None:
    """The JSON object of a line, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def summed(of: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, in the order they come in; rates left out."""
    total: dict[str, float] = {}
    for values in of:
        for name, value in values.items():
            if name not in RATES:
                total[name] = total.get(name, 0) + value
    return total


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """The table a run ends with: per stage what was reached and at what cost, then totals and where the report is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    run = read_run(run_dir)
    columns = ["stage", "reward", "seed prompt", "KL to base", "steps"]
    table = Table(title=Text(f"{run.mode}, seed {run.seed}: held-out results at the end of each stage"))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for stage, task in run.stages.items():
        last = run.last_eval(stage) or {}
        first, end = run.spans[stage]
        row = [f"{stage + 1} {plain(task, 40)}"]
        row += [number(last.get(key)) for key in ("reward", "reward_seed", "kl")] + [str(end - first)]
        table.add_row(*map(Text, row))
        for part, values in last.get("by_task", {}).items():
            numbers = [number(values.get(key)) for key in ("reward", "reward_seed", "kl")]
            table.add_row(*map(Text, [f"  of it {plain(part, 40)}", *numbers]))
    console.print(table)
    lines = [
        *(f"reward {r['level']:g} on stage {r['stage'] + 1}: {_spent(r)}" for r in run.levels()),
        f"{run.total('rollouts'):,} rollouts, {run.total('gepa_rollouts'):,} of them by GEPA; "
        f"{run.total('tokens'):,} tokens, {run.total('gepa_tokens'):,} of them by GEPA",
        f"reflection: {run.reflection('calls'):,.0f} calls, ${run.reflection('dollars'):.2f}, "
        f"{run.reflection('failures'):,.0f} failures",
        *(f"{name}: {value}" for name, value in cost_facts(run)),
        *run.notes,
    ]
    report = run.dir / "report.html"
    lines += [f"report: {report}"] if report.is_file() else []
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _spent(reached: Record) -> str:
    return ", ".join(f"{count(reached[key])} {key}" for key in SPENT) if reached["steps"] is not None else "not reached"


def cost_facts(run: Run) -> list[tuple[str, str]]:
    """What a run took, (name, words): its time by phase; on a GPU what that costs, and how well it was used."""
    spent = run.spent
    seconds = spent.get("seconds", 0)
    if not seconds:
        return []
    phases = sorted(((s, name) for name, s in spent.items() if name not in SUMS), reverse=True)
    phases += [(seconds - sum(s for s, _ in phases), "other")] if phases else []
    shares = ", ".join(f"{name} {s / seconds:.0%}" for s, name in phases if s >= 0.005 * seconds)
    whole = f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    facts = [("time", f"{whole}: {shares}" if shares else whole)]
    if hours := spent.get("gpu_hours"):
        asked, answered = run.reflection("prompt_tokens"), run.reflection("completion_tokens")
        cost = f", ${spent['gpu_dollars']:.2f}" if spent["gpu_dollars"] else ""
        if cost and asked:
            total = spent["gpu_dollars"] + run.reflection("dollars")
            cost += f", with reflection ({asked:,.0f} + {answered:,.0f} tokens) ${total:.2f}"
        speed = f", {run.total('tokens') / hours / 3600:,.0f} sampled tokens/s per GPU"
        facts.append(("GPU-hours", f"{hours:.2f}{cost}{speed}"))
    times = [r["time"] for r in run.steps + run.evals + run.evolves if "watts" in r.get("time", {})]
    if times:
        share = sum(t["utilisation"] * t["seconds"] for t in times) / sum(t["seconds"] for t in times)
        highest = max(t["memory"] for t in times) / 2**30
        energy = f"{spent['joules'] / 3.6e6:.3f} kWh; at most {highest:.1f} GiB; a kernel ran {share:.0%} of the time"
        facts.append(("energy", energy))
    if (mfu := run.utilisation("mfu", "learn")) is not None:
        whole_step = run.utilisation("step_mfu", "seconds")
        facts.append(("model FLOPs utilisation", f"{mfu:.1%} of the peak in learning, {whole_step:.1%} in whole steps"))
    return facts


def number(value: object) -> str:
    """A reward, KL or entropy for people: 3 decimals, a dash when there is none."""
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def count(value: float) -> str:
    """A count for people: 4,608, 46.1k, 1.2M."""
    if value < 1e4:
        return f"{value:,.0f}"
    size, unit = next((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= size)
    return f"{value / size:.3g}{unit}"


def plain(text: str, limit: int) -> str:
    """One line that is safe on any terminal: no control or direction characters, at most `limit` characters."""
    text = visible(" ".join(text[: 4 * limit].split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
