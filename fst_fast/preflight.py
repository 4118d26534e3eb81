"""What a run refuses before any work that its configuration does not show: its directory, and other machines."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fst_fast.config import Config, flat
from fst_fast.errors import UserError
from fst_fast.files import check_line_ends
from fst_fast.ranks import Ranks

# by the names that their lengths have in a checkpoint
LOGS = {"metrics": "metrics.jsonl", "population": "population.jsonl", "rollouts": "rollouts/rollouts.jsonl"}


def check_empty(run_dir: Path, *, resume: bool) -> None:
    """UserError for a new run in a directory that has something in it."""
    if not resume and run_dir.exists() and any(not p.name.startswith(".") for p in run_dir.iterdir()):
        resume_it = f"--resume {shlex.quote(str(run_dir))}"
        raise UserError(f"run_dir: {run_dir} is not empty; choose another, or continue it with {resume_it}")


def check_logs(run_dir: Path, offsets: Mapping[str, int]) -> None:
    """UserError unless every append-only file has what the checkpoint knew of it: before the first is cut back."""
    for name, path in LOGS.items():
        check_line_ends(run_dir / path, offsets.get(name, 0))


def check_shared(run_dir: Path, ranks: Ranks) -> None:
    """UserError unless all machines see the run directory: each writes its parts of a checkpoint there."""
    if ranks.size == ranks.local:
        return
    mark = run_dir / ".shared"

    def make() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()

    ranks.first(make)
    deadline = time.monotonic() + 10  # a network's file system may be late
    while not (found := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    everywhere = all(ranks.join([found]))
    if ranks.main:
        mark.unlink()
    if not everywhere:
        raise UserError(f"run_dir: {run_dir} is another folder on each machine; give one that all of them share")


def check_alike(config: Config, inputs: Sequence[str], ranks: Ranks) -> None:
    """UserError unless all ranks were given the same: each machine has a command and files of its own, and ranks that
    train on different ones would do so without a word. The model may lie elsewhere on each."""
    own = flat(asdict(replace(config, run_dir="", threads=0, model=replace(config.model, path=""))))
    (first, files), *others = ranks.join([(own, inputs)])
    for rank, (settings, theirs) in enumerate(others, 1):
        for name, value in settings.items():
            if value != first[name]:
                apart = f"{name} is {first[name]!r} on rank 0 and {value!r} on rank {rank}"
                raise UserError(f"{apart}; start the same command everywhere")
        if theirs != files:
            raise UserError(
                f"ranks 0 and {rank} have other problems or another base model; give every machine the same files"
            )


def check_alike_resumed(resume: bool, ranks: Ranks) -> None:
    """UserError unless all ranks start a run or all resume one: the first would wait for the others."""
    if len(set(ranks.join([resume]))) > 1:
        raise UserError("some machines were given --resume and others were not; start the same command everywhere")
