"""`python -m fst_fast.train`: the loop. Config in, run directory out.

Every step: problems × prompts → rollouts → groups → one slow step. Every T steps before that: one GEPA cycle on the
problems of the next T batches. Evaluation and checkpoints in between. On several ranks (launch.py starts them) each
runs this loop: what is sampled and learned is shared out below it, and rank 0 alone writes.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fst_fast import checkpoint
from fst_fast.cli import PlanCommand, parse_train, run
from fst_fast.config import Config, check, stages, without_effect
from fst_fast.launch import launch, workers
from fst_fast.model import model_folder
from fst_fast.plan import lines as plan_lines
from fst_fast.preflight import check_empty
from fst_fast.ranks import ALONE, Ranks, joined, launched
from fst_fast.report import write_report
from fst_fast.runs import print_summary
from fst_fast.tasks import task_maker
from fst_fast.trainer import Trainer


def main(argv: Sequence[str]) -> None:
    command = parse_train(argv)
    if isinstance(command, PlanCommand):
        print("\n".join(plan_lines(command.config, command.plan)))
        return
    config = command.config
    if command.resume:
        run_dir = Path(command.resume)
    else:
        for section in () if launched() else without_effect(config):
            warnings.warn(f"the flags --{section}.* have no effect: no task of the stream reads them", stacklevel=1)
        run_dir = Path(config.run_dir or f"runs/{config.mode}-{datetime.now():%Y%m%d-%H%M%S}")
    if count := workers(command.ranks, config):
        check_all(config, run_dir, resume=bool(command.resume))
        if code := launch(count, argv):
            sys.exit(code)
        return
    with joined(config.model.device) as ranks:
        run_dir = ranks.first(lambda: run_dir)  # it may have the time in its name
        threads = config.threads or max(1, (os.cpu_count() or 1) // ranks.local)
        config = replace(config, run_dir=config.run_dir if command.resume else str(run_dir), threads=threads)
        train(config, run_dir, resume=bool(command.resume), ranks=ranks)


def check_all(config: Config, run_dir: Path, *, resume: bool) -> None:
    """UserError for what a launcher can see of bad input before it starts workers, which look at the weights too."""
    check(config)
    model_folder(config.model.path)
    for stage in stages(config.stream):
        task_maker(config)(stage.task)
    check_empty(run_dir, resume=resume)


def train(config: Config, run_dir: Path, *, resume: bool = False, ranks: Ranks = ALONE) -> None:
    """One run from its configuration (or its last checkpoint) to its report."""
    trainer = Trainer(config, run_dir, ranks)  # bad input is refused here, before anything is written
    with resumable(run_dir), checkpoint.locked(run_dir) if ranks.main else nullcontext():
        with trainer.open(resume=resume):
            for stage in trainer.stages:
                trainer.enter(stage)
                while trainer.state.step < stage.end:
                    trainer.settle()
                    if trainer.due(config.checkpoint_every):
                        trainer.save()
                    if trainer.due(config.eval.every):
                        trainer.evaluate()
                    if trainer.evolves and trainer.due(config.fast.every):
                        trainer.evolve()
                    trainer.learn()
                if stage.index >= trainer.state.ended_stages:
                    trainer.finish_stage()
            trainer.finish()
        if ranks.main:
            write_report([run_dir], run_dir / "report.html")
            print_summary(run_dir)


@contextmanager
def resumable(run_dir: Path) -> Iterator[None]:
    """An interrupt inside, Ctrl-C or SIGTERM, says how the run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not (run_dir / "config.toml").is_file():
            raise
        command = f"python -m fst_fast.train --resume {shlex.quote(str(run_dir))}"
        raise type(error)(f"{command} continues from the last checkpoint") from None


if __name__ == "__main__":
    run(main)
