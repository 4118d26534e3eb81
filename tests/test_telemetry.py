"""What a run writes of itself: exact files, a resume that loses and doubles nothing, a console safe to read."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fst_fast.config import GLYPH, Config, check_installed
from fst_fast.errors import UserError
from fst_fast.runs import print_summary, read_run
from fst_fast.telemetry import Telemetry, scalars
from tests.run_records import console, evaluation, evolution, step, text_of, write_run

CONFIG = replace(GLYPH, tensorboard=False)
EVIL = "[red]first[/red] line\nsecond \x1b[31mred\x07 \ud800 \u202egnp.exe {{7*7}} " + "x" * 10**6


def test_metrics_are_the_records_one_ascii_line_each_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    records = [step(1, best="\ud800 é"), evaluation(1), evolution(1)]
    path = tmp_path / "run" / "metrics.jsonl"
    with Telemetry(path.parent, CONFIG, 10, console=console()) as telemetry:
        for i, record in enumerate(records):
            telemetry.write(record)
            assert [json.loads(line) for line in path.read_text("ascii").splitlines()] == records[: i + 1]
            assert telemetry.offset() == path.stat().st_size


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with Telemetry(tmp_path, CONFIG, 10, console=console()) as telemetry:
        telemetry.write(step(1))
        offset = telemetry.offset()
        telemetry.write(step(2, reward=0.0))
    with Telemetry(tmp_path, CONFIG, 10, offset=offset, step=1, console=console()) as telemetry:
        telemetry.write(step(2, reward=1.0))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [step(1), step(2, reward=1.0)]


def test_what_a_resumed_run_did_in_vain_stays_in_its_costs(tmp_path: Path) -> None:
    """Killed behind its checkpoint twice, before another was made, and once before its first."""
    time = {"seconds": 3.0, "learn": 2.0, "gpu_hours": 0.5, "gpu_dollars": 1.0, "mfu": 0.4}
    write = partial(Telemetry, tmp_path, CONFIG, 10, console=console())
    with write() as telemetry:
        telemetry.write(step(1, time=time))
    with write() as telemetry:
        telemetry.write(step(1, time=time))
        offset = telemetry.offset()
        telemetry.write(step(2, time=time))
        telemetry.write(evolution(2, time=time))
        telemetry._metrics.write('{"kind": "step", "ti')
    with write(offset=offset, step=1) as telemetry:
        telemetry.write(step(2, time=time))
    with write(offset=offset, step=1) as telemetry:
        telemetry.write(evolution(2, time=time))
    run = read_run(tmp_path)
    assert [r["records"] for r in run.lost] == [1, 3]
    assert (len(run.steps), len(run.evolves)) == (1, 1)
    assert run.spent == {"seconds": 18.0, "learn": 12.0, "gpu_hours": 3.0, "gpu_dollars": 6.0}
    assert run.reflection("calls") == 2 * 8
    assert run.reflection("dollars") == 0.5
    assert any("12 seconds of work were done again" in note for note in run.notes)
    with write(offset=(tmp_path / "metrics.jsonl").stat().st_size, step=2) as telemetry:
        telemetry.write(step(3, time=time))
    assert read_run(tmp_path).lost == run.lost  # nothing was in vain


@pytest.mark.parametrize("offset", [3, 10**6])
def test_a_file_the_checkpoint_did_not_know_is_refused_and_left_alone(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step"}\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl.*{offset}"):
        Telemetry(tmp_path, CONFIG, 10, offset=offset, step=1, console=console())
    assert path.read_text() == '{"kind": "step"}\n'


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, tensorboard=True)
    with Telemetry(tmp_path, config, 10, console=console()) as telemetry:
        telemetry.write(step(1))
        offset = telemetry.offset()
        telemetry.write(step(2, reward=0.0))
        telemetry.write(step(3, reward=0.0))
        telemetry.write(evolution(3))
    with Telemetry(tmp_path, config, 10, offset=offset, step=1, console=console()) as telemetry:
        telemetry.write(step(2, reward=1.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/reward")] == [(1, 0.5), (2, 1.0)]


def test_scalars_are_the_numbers_alone_with_time_and_reflection_by_name() -> None:
    record = evolution(3, note="text", nothing=None)
    assert scalars(record) == {
        "evolve/proposals": 8, "evolve/accepted": 3, "evolve/rollouts": 300, "evolve/best": 0.6, "evolve/coverage": 0.9,
        "evolve/reflection/calls": 8, "evolve/reflection/dollars": 0.25, "evolve/reflection/failures": 1,
        "evolve/time/seconds": 2.0,
    }  # fmt: skip


def test_the_tasks_of_a_mixture_have_a_scalar_and_a_line_of_the_summary_each(tmp_path: Path) -> None:
    parts = {name: {"weight": 0.5, "reward": r, "kl": 0.25, "reward_seed": 0.0} for name, r in (("a", 0.125), ("b", 1))}
    assert scalars(evaluation(1, by_task=parts))["eval/by_task/reward on b"] == 1
    out = console()
    print_summary(write_run(tmp_path, [step(1), evaluation(1, by_task=parts)]), out)
    assert re.search(r"of it a .*\.125.*of it b ", text_of(out), re.DOTALL)


@pytest.mark.parametrize("progress", [True, False])
def test_a_log_file_gets_one_plain_line_per_evaluation_and_evolution(tmp_path: Path, progress: bool) -> None:
    out = console()
    with Telemetry(tmp_path, replace(CONFIG, progress=progress), 10, console=out) as telemetry:
        for n in range(1, 4):
            telemetry.write(step(n), prompt=EVIL)
        telemetry.write(evaluation(3, 0.75, task=EVIL), prompt=EVIL)
        telemetry.write(evolution(3), prompt=EVIL)
        telemetry.write(evolution(3, failed=5, failure=EVIL), prompt=EVIL)
    lines = text_of(out).splitlines()
    assert len(lines) == 3
    assert "5 edits failed, most of this: [red]first[/red] line second" in lines[2]
    assert "failed" not in lines[1]
    assert "step 3/10" in lines[0]
    assert "held-out reward 0.750 · seed prompt 0.100 · KL 0.050" in lines[0]
    assert "[red]first[/red] line second �[31mred� � �gnp.exe {{7*7}}" in lines[0]
    assert "3 of 8 accepted" in lines[1]
    assert all(len(line) < 600 and line.isprintable() for line in lines)


def test_the_live_display_shows_hostile_prompts_as_text(tmp_path: Path) -> None:
    out = console(force_terminal=True)
    with Telemetry(tmp_path, CONFIG, 10, console=out) as telemetry:
        telemetry.write(evaluation(3, kl=0.125), prompt=EVIL)
        telemetry.write(step(4, time={"tokens_per_second": 4321.0}), prompt=EVIL)
    shown = text_of(out)
    assert "[red]first[/red] line second �[31mred" in shown.rsplit("best prompt", 1)[1]
    assert "\x1b[31mred" not in shown
    assert "4/10" in shown
    assert "KL 0.125" in shown
    assert "tokens/s 4,321" in shown


def test_a_terminal_that_knows_ascii_only_does_not_end_the_run(tmp_path: Path) -> None:
    raw = io.BytesIO()
    out = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=400)
    with Telemetry(tmp_path, CONFIG, 10, console=out) as telemetry:
        telemetry.write(evaluation(1, task="glyph:数"), prompt=EVIL)
    out.file.flush()
    assert b"held-out reward 0.500" in raw.getvalue()


def test_the_files_are_whole_when_the_loop_raises(tmp_path: Path) -> None:
    def loop() -> None:
        with Telemetry(tmp_path, CONFIG, 10, console=console(force_terminal=True)) as telemetry:
            telemetry.write(step(1))
            raise RuntimeError("of the loop")

    with pytest.raises(RuntimeError, match="of the loop"):
        loop()
    assert len(read_run(tmp_path).steps) == 1


def test_wandb_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        check_installed(replace(CONFIG, wandb=True))


def test_wandb_gets_the_config_and_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=calls.append, finish=lambda exit_code: calls.append(exit_code))
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Telemetry(tmp_path / "fst-1", replace(CONFIG, wandb=True), 10, console=console()) as telemetry:
        telemetry.write(step(1))
    assert calls[0]["id"] == "fst-1"
    assert calls[0]["resume"] == "allow"
    assert Config(**{**calls[0]["config"], "mode": "rl"}).mode == "rl"
    assert calls[1] == {"step": 1} | scalars(step(1))
    assert calls[2] == 0
