"""What a run says of itself while it trains: metrics.jsonl, TensorBoard, wandb, the console. runs.py reads it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fst_fast.files import Appender
from fst_fast.runs import Record, parse, plain, summed

if TYPE_CHECKING:
    from rich.console import Console

    from fst_fast.config import Config


class Telemetry:
    """The loop's one outlet; `with Telemetry(...) as telemetry: telemetry.write({"kind": "step", ...})`.

    `offset` and `step` come from the checkpoint a run resumes from (0, 0 for a new one): metrics.jsonl is cut there,
    what is cut off leaves its costs in a record "lost", and TensorBoard hides what it has of later steps. The terminal
    gets a live display, anything else a line per evaluation and evolution. `dry`: nothing is written or said, rank 0
    does. UserError when metrics.jsonl does not fit `offset`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        total_steps: int,
        *,
        offset: int = 0,
        step: int = 0,
        console: Console | None = None,
        dry: bool = False,
    ) -> None:
        from rich.console import Console

        if dry:
            config = replace(config, wandb=False, tensorboard=False, progress=False)
        self.console = console or Console(quiet=dry)
        lost = None if dry else _costs_behind(run_dir / "metrics.jsonl", offset)  # opening cuts them off
        self._metrics = Appender(run_dir / "metrics.jsonl", offset=offset, dry=dry)
        if lost:
            self._metrics.write(json.dumps({"kind": "lost", "step": step, **lost}) + "\n")
        self._display = _Display(self.console, total_steps, step) if config.progress else None
        self._total = total_steps
        self._tensorboard = None
        self._wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 0.1 s after torch

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        if config.wandb:
            import wandb

            name = run_dir.resolve().name
            self._wandb = wandb.init(
                project="fst-fast", name=name, id=name, resume="allow", dir=str(run_dir), config=asdict(config)
            )

    def __enter__(self) -> Self:
        if self._display and self.console.is_terminal:
            self._display.live.start()
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display:
            self._display.live.stop()
        self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(error is not None))

    def write(self, record: Mapping[str, Any], prompt: str = "") -> None:
        """Records one step, eval, evolve or end; `prompt` is the text of the best prompt, for the console only."""
        self._metrics.write(json.dumps(record) + "\n")
        values = scalars(record)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, record["step"])
            if record["kind"] != "step":
                self._tensorboard.flush()
        if self._wandb:
            self._wandb.log({"step": record["step"], **values})
        if self._display:
            self._display.update(record, prompt)
        if record["kind"] in ("eval", "evolve"):
            self.log(_line(record, self._total, prompt))

    def log(self, text: str) -> None:
        """One plain line on the console, above the live display if there is one."""
        encoding = self.console.encoding
        text = text.encode(encoding, "replace").decode(encoding)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def offset(self) -> int:
        """Bytes of metrics.jsonl, safe on disk: what a checkpoint stores."""
        self._metrics.sync()
        return self._metrics.offset


class _Display:
    """The live lines at the foot of a terminal: progress bar, numbers, best prompt."""

    def __init__(self, console: Console, total: int, step: int) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps, time left", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self._bar = self._progress.add_task("", total=total, completed=step)
        self._numbers: dict[str, str] = {}
        self._prompt = ""
        self.live = Live(console=console, get_renderable=self._render)

    def update(self, record: Mapping[str, Any], prompt: str) -> None:
        if "task" in record:
            self._progress.update(self._bar, description=f"stage {record['stage'] + 1} {plain(record['task'], 30)}")
        self._progress.update(self._bar, completed=record["step"])
        names = {"reward": "training reward", "entropy": "entropy"} if record["kind"] == "step" else {}
        if record["kind"] == "eval":
            names = {"reward": "held-out reward", "kl": "KL"}
        self._numbers |= {label: f"{record[key]:.3f}" for key, label in names.items() if key in record}
        if "tokens_per_second" in record.get("time", {}):
            self._numbers["tokens/s"] = f"{record['time']['tokens_per_second']:,.0f}"
        self._prompt = plain(prompt, 300) or self._prompt

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text  # Text never parses markup

        lines = ["   ".join(f"{label} {number}" for label, number in self._numbers.items())]
        lines += [f"best prompt: {self._prompt}"] if self._prompt else []
        return Group(self._progress, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def _costs_behind(path: Path, offset: int) -> Record | None:
    """Summed over the records behind `offset`, which a resumed run makes again: their time and money were spent."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(offset)
        records = [r for r in map(parse, file) if r and ("time" in r or r.get("kind") == "lost")]
    if not records:
        return None
    costs = {of: summed(r.get(of, {}) for r in records) for of in ("time", "reflection")}
    return {"records": sum(r.get("records", 1) for r in records), **costs}


def _line(record: Mapping[str, Any], total: int, prompt: str) -> str:
    parts = [f"step {record['step']}/{total}", plain(record["task"], 40)]
    if record["kind"] == "eval":
        parts += [f"held-out reward {record['reward']:.3f}"]
        parts += [f"{label} {record[key]:.3f}" for key, label in _EVAL_NUMBERS if key in record]
        parts += [f"{record['truncated']:.0%} cut off"] if record.get("truncated") else []
        parts += [f"{record['rollouts']:,} rollouts"]
    else:
        parts += [
            f"prompts evolved (cycle {record['cycle']}): {record['accepted']} of {record['proposals']} accepted",
            f"best scores {record['best']:.3f}, together {record['coverage']:.3f}",
        ]
        if "failed" in record:
            parts += [f"{record['failed']} edits failed, most of this: {plain(record['failure'], 200)}"]
    return " · ".join(parts + ([f"best prompt: {plain(prompt, 100)}"] if prompt else []))


_EVAL_NUMBERS = (
    ("reward_seed", "seed prompt"),
    ("kl", "KL"),
    ("entropy", "entropy"),
    ("retention", "retention"),
    ("reward_ood", "out of distribution"),
)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, `kind/key`, those of `time`, `reflection`, `reuse` and `mismatch` as
    `kind/time/key`; the reward on each task of a mixture."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if key == "by_task":
            value = {f"reward on {task}": part["reward"] for task, part in value.items()}
        inner = value if key in ("time", "reflection", "reuse", "mismatch", "by_task") else {"": value}
        for name, number in inner.items():
            if isinstance(number, int | float) and key not in ("step", "stage", "cycle"):
                found["/".join(part for part in (record["kind"], key, name) if part)] = number
    return found
