"""What is read of a run: whole, cut, without files; its sums and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fst_fast.config import GLYPH
from fst_fast.errors import UserError
from fst_fast.runs import count, plain, print_summary, read_run
from fst_fast.telemetry import Telemetry
from tests.run_records import console, evaluation, evolution, step, text_of, write_run

CONFIG = replace(GLYPH, tensorboard=False)


def two_stages() -> list[dict[str, Any]]:
    """30 steps of A, which reaches .95 at step 20; at B's start GEPA spends 500, .6 is reached 10 steps later."""
    b = {"stage": 1, "task": "glyph:B"}
    return [
        evaluation(0, 0.0), step(10), evaluation(10, 0.4), step(20), evaluation(20, 0.95), step(30),
        evaluation(30, 0.7), evaluation(30, 0.0, **b), evolution(30, **b),
        step(40, rollouts=5620, gepa_rollouts=500, **b),
        evaluation(40, 0.6, rollouts=5620, tokens=44_000, gepa_rollouts=500, **b),
    ]  # fmt: skip


def test_levels_count_from_the_start_of_their_stage_with_what_gepa_spent(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, two_stages()))
    a, b = {"stage": 0, "task": "glyph:A"}, {"stage": 1, "task": "glyph:B"}
    assert run.levels() == [
        {**a, "level": 0.5, "steps": 20, "rollouts": 2560, "tokens": 20_000},
        {**a, "level": 0.9, "steps": 20, "rollouts": 2560, "tokens": 20_000},
        {**b, "level": 0.5, "steps": 10, "rollouts": 5620 - 3840, "tokens": 14_000},
        {**b, "level": 0.9, "steps": None, "rollouts": None, "tokens": None},
    ]
    assert run.spans == {0: (0, 30), 1: (30, 40)}
    assert run.last_eval(0) == evaluation(30, 0.7)
    assert (run.mode, run.seed, run.stages) == ("fst", 3, {0: "glyph:A", 1: "glyph:B"})


def test_the_levels_of_the_config_are_used(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, two_stages(), "[eval]\nlevels = [0.95]\n"))
    assert [(r["level"], r["steps"]) for r in run.levels()] == [(0.95, 20), (0.95, None)]


def test_the_summary_says_what_was_reached_and_spent_and_where_the_report_is(tmp_path: Path) -> None:
    write_run(tmp_path, [*two_stages(), {"kind": "end", "step": 40}])
    (tmp_path / "report.html").write_text("")
    out = console()
    print_summary(tmp_path, out)
    shown = " ".join(text_of(out).split())
    for wanted in ("fst, seed 3", "0.700", "reward 0.9 on stage 1: 20 steps, 2,560 rollouts, 20k tokens",
                   "reward 0.9 on stage 2: not reached", "5,620 rollouts, 500 of them by GEPA",
                   "8 calls, $0.25, 1 failures", f"report: {tmp_path / 'report.html'}"):  # fmt: skip
        assert wanted in shown
    assert "not ended" not in shown


def test_a_run_that_was_given_more_steps_has_not_ended_and_its_first_end_is_paid_for(tmp_path: Path) -> None:
    end = {"kind": "end", "step": 40, "time": {"seconds": 7.0}}
    run = read_run(write_run(tmp_path, [end, step(41) | {"time": {"seconds": 3.0}}]))
    assert run.spent["seconds"] == 10
    assert "not ended" in run.notes[0]
    write_run(tmp_path, [end, step(41) | {"time": {"seconds": 3.0}}, end])
    assert read_run(tmp_path).spent["seconds"] == 17
    assert not read_run(tmp_path).notes


def test_responses_that_were_cut_off_are_told_of(tmp_path: Path) -> None:
    """The reward alone does not show that --rollout.max-new-tokens is too small."""
    out = console()
    with Telemetry(tmp_path, CONFIG, 10, console=out) as telemetry:
        telemetry.write(evaluation(0, truncated=0.0))
        telemetry.write(evaluation(10, truncated=0.89))
    first, second = text_of(out).splitlines()
    assert "cut off" not in first
    assert "89% cut off" in second
    config = "[rollout]\nmax_new_tokens = 32\n"
    cut = read_run(write_run(tmp_path / "cut", [evaluation(0, truncated=0.0), evaluation(10, truncated=0.89)], config))
    assert any("89% of the last evaluation's responses" in n and "max_new_tokens = 32" in n for n in cut.notes)
    grown = read_run(write_run(tmp_path / "grown", [evaluation(0, truncated=0.89), evaluation(10, truncated=0.1)]))
    assert not any("cut off" in note for note in grown.notes)


def test_a_run_that_was_killed_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    write_run(tmp_path, [evaluation(0), step(1)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"[1, 2]\n\xff\xfe\n" + b"[" * 100_000 + b'\n{"kind": "step", "st')
    run = read_run(tmp_path)
    assert (len(run.evals), len(run.steps), run.ends) == (1, 1, ())
    assert any("4 unreadable" in note for note in run.notes)
    assert any("has not ended" in note for note in run.notes)
    print_summary(tmp_path, out := console())
    assert "has not ended" in text_of(out)


def test_missing_files_are_named_and_a_folder_without_any_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mode = ")
    run = read_run(tmp_path)
    assert "config.toml could not be read" in run.notes[0]
    assert "metrics.jsonl is not there" in run.notes[1]
    print_summary(tmp_path, console())
    with pytest.raises(UserError, match="is no run directory"):
        read_run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (4608, "4,608"), (46_080, "46.1k"), (1_250_000, "1.25M"), (3e9, "3G")]
)
def test_counts_for_people(value: float, shown: str) -> None:
    assert count(value) == shown


def test_plain_text_is_one_short_printable_line() -> None:
    assert plain("a\n b\t\x00c\u2028d", 80) == "a b �c d"
    assert plain("x" * 10**7, 5) == "xxxx…"


def on_gpu(n: int, **more: float) -> dict[str, Any]:
    time = {"seconds": 10.0, "learn": 4.0, "rollout": 5.0, "gpu_hours": 0.5, "gpu_dollars": 1.0, "joules": 1.8e6}
    return step(n, time=time | {"watts": 500.0, "memory": n * 2**30, "utilisation": 0.5, "mfu": 0.1 * n} | more)


def test_totals_are_sums_of_what_adds_up_and_weighted_means_of_rates(tmp_path: Path) -> None:
    records = [on_gpu(1, step_mfu=0.1), on_gpu(3, learn=12.0, seconds=30.0, step_mfu=0.2, rollout=15.0)]
    reflection = {"calls": 8, "prompt_tokens": 3000, "completion_tokens": 400, "dollars": 0.25, "failures": 1}
    records.append(evolution(3, reflection=reflection))
    run = read_run(write_run(tmp_path, records))
    assert run.spent["seconds"] == 42
    assert run.spent["learn"] == 16
    assert not {"mfu", "watts", "memory", "utilisation"} & set(run.spent)
    assert run.utilisation("mfu", "learn") == pytest.approx((0.1 * 4 + 0.3 * 12) / 16)
    print_summary(tmp_path, out := console())
    shown = text_of(out)
    for wanted in ("time: 42 seconds: rollout 48%, learn 38%, other 14%",
                   "GPU-hours: 1.00, $2.00, with reflection (3,000 + 400 tokens) $2.25, 1 sampled tokens/s per GPU",
                   "1.000 kWh; at most 3.0 GiB; a kernel ran 50% of the time",
                   "model FLOPs utilisation: 25.0% of the peak in learning, 17.5% in whole steps"):  # fmt: skip
        assert wanted in shown, wanted
