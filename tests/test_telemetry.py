"""What a run writes of itself: exact files, a resume that loses and doubles nothing, a console safe to read."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from fst_fast.config import GLYPH, Config, check_installed
from fst_fast.errors import UserError
from fst_fast.meter import Meter, mfu, sampling_work, together
from fst_fast.ranks import Ranks
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.runs import count, plain, print_summary, read_run
from fst_fast.shape import PassWork, Shape
from fst_fast.slow.lora import adapt
from fst_fast.telemetry import Telemetry, scalars
from fst_fast.train import main
from fst_fast.trainer import Trainer
from tests.models import save_tiny, tiny

CONFIG = replace(GLYPH, tensorboard=False)
EVIL = "[red]first[/red] line\nsecond \x1b[31mred\x07 \ud800 \u202egnp.exe {{7*7}} " + "x" * 10**6


def step(n: int, reward: float = 0.5, **more: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": n, "stage": 0, "task": "glyph:A", "reward": reward, "entropy": 1.5}
    return record | {"rollouts": 128 * n, "tokens": 1000 * n, "gepa_rollouts": 0, "gepa_tokens": 0} | more


def evaluation(n: int, reward: float = 0.5, **more: Any) -> dict[str, Any]:
    return step(n, reward, **{"kind": "eval", "kl": 0.05, "reward_seed": 0.1, "best_prompt": "aaa", **more})


def evolution(n: int, **more: Any) -> dict[str, Any]:
    record = {"kind": "evolve", "step": n, "stage": 0, "task": "glyph:A", "cycle": 0, "proposals": 8, "accepted": 3}
    record |= {"rollouts": 300, "best": 0.6, "coverage": 0.9, "population": ["aaa"]}
    return record | {"reflection": {"calls": 8, "dollars": 0.25, "failures": 1}, "time": {"seconds": 2.0}} | more


def console(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=400, **options)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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


# ------------------------------------------------------------------------------------------------- reading a run back


def write_run(folder: Path, records: list[dict[str, Any]], config: str = 'mode = "fst"\nseed = 3\n') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


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
    assert (len(run.evals), len(run.steps), run.end) == (1, 1, None)
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


# ------------------------------------------------------------------------------------------------------- the meter


class FakeNvml:
    """What of pynvml is called: 300 W, then 500 W from the second reading on; `dies` after so many readings."""

    class NVMLError(Exception):
        pass

    def __init__(self, dies: int = 10**9, missing: str = ""):
        self.readings, self.dies, self.missing, self.shut = 0, dies, missing, 0
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        if self.missing:
            raise self.NVMLError(self.missing)

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle"
        self.readings += 1
        if self.readings > self.dies:
            raise self.NVMLError("GPU is lost")
        return 300_000 if self.readings == 1 else 500_000

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=(10 + self.readings) * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=50)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("fst_fast.meter.INTERVAL", 0.01)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-ab"))
    return fake


def wait_for(said: Callable[[], bool]) -> None:
    for _ in range(1000):
        if said():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


CUDA = torch.device("cuda", 0)


def test_energy_is_the_integral_of_power_over_the_time_between_readings(nvml: FakeNvml) -> None:
    meter, logged = Meter(), list[str]()
    meter.start(CUDA, 3.0, logged.append, Ranks())
    wait_for(lambda: nvml.readings >= 6)
    spent = meter.read()
    meter.close()
    assert nvml.asked == ["GPU-1234-ab"]
    assert 400 < spent["watts"] <= 500  # trapezoids: 400 W up to the second reading, then 500
    assert spent["joules"] == pytest.approx(spent["watts"] * spent["seconds"], rel=0.5)
    assert 15 <= spent["memory"] / 2**30 <= 10 + nvml.readings
    assert spent["utilisation"] == pytest.approx(0.5)
    assert spent["gpu_hours"] == pytest.approx(spent["seconds"] / 3600)
    assert spent["gpu_dollars"] == pytest.approx(3.0 * spent["gpu_hours"])
    assert logged == []


def test_the_sampling_thread_ends_with_the_meter_and_gives_nvml_back(nvml: FakeNvml) -> None:
    meter = Meter()
    meter.start(CUDA, 0.0, lambda _: None, Ranks())
    assert "nvml" in {t.name for t in threading.enumerate()}
    meter.close()
    assert "nvml" not in {t.name for t in threading.enumerate()}
    assert nvml.shut == 1


def test_a_gpu_that_stops_answering_is_said_once_and_the_run_goes_on(nvml: FakeNvml) -> None:
    nvml.dies = 3
    meter, logged = Meter(), list[str]()
    meter.start(CUDA, 0.0, logged.append, Ranks())
    wait_for(lambda: bool(logged))
    assert "joules" in meter.read()
    assert "joules" not in meter.read()
    meter.close()
    assert logged == ["power and energy are not measured any more: GPU is lost"]


def test_without_nvml_the_log_says_so_once_and_gpu_hours_are_still_counted(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml
) -> None:
    for module, said in ((None, "pip install nvidia-ml-py"), (FakeNvml(missing="no driver"), "no driver")):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        meter, logged = Meter(), list[str]()
        meter.start(CUDA, 1.0, logged.append, Ranks())
        assert len(logged) == 1
        assert said in logged[0]
        spent = meter.read()
        assert "joules" not in spent
        assert spent["gpu_hours"] > 0
        meter.close()


def test_several_gpus_spend_energy_together_and_one_that_does_not_answer_is_left_out() -> None:
    one, other = ({"joules": 10.0, "watts": 5.0, "memory": m, "utilisation": u} for m, u in ((3.0, 0.5), (4.0, 1.0)))
    assert together([one, {}, other]) == {"joules": 20.0, "watts": 10.0, "memory": 4.0, "utilisation": 0.75}
    assert together([{}, {}]) == {}


def test_a_cpu_has_seconds_by_phase_alone_and_nobody_looks_for_a_gpu(nvml: FakeNvml) -> None:
    meter = Meter()
    time.sleep(0.01)
    meter.start(torch.device("cpu"), 2.0, lambda _: pytest.fail("nothing to say"), Ranks())
    with meter.phase("outer"), meter.phase("inner"):
        time.sleep(0.02)
    with meter.phase("inner"):
        time.sleep(0.01)
    spent = meter.read()
    assert set(spent) == {"seconds", "start", "outer", "inner"}
    assert spent["start"] >= 0.01
    assert spent["inner"] >= 0.03 > 0.02 > spent["outer"]  # a phase inside another counts for itself
    assert spent["seconds"] >= spent["inner"] + spent["outer"]
    assert set(meter.read()) == {"seconds"}
    assert not nvml.readings
    meter.close()


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


def test_flops_utilisation_counts_a_shared_prompt_once() -> None:
    shape = Shape("", 2, 4, 8, 8, 8, vocab=16, context=99, parameters=364, tied=True)
    prompt, other = tuple(range(5, 15)), (5, 6, 7, 40)
    sampled = sampling_work([rollout(prompt, (1, 2)), rollout(prompt, (1, 2)), rollout(other, (1,))])
    assert sampled == PassWork(10 + 1 + 2 + 2 + 1, 55 + 4 + 2 * (11 + 12) + 5, 5)
    learned = PassWork(100, 1000, 10)
    spent = {"learn": 2.0, "seconds": 8.0}
    found = mfu(shape, 1e6, learned, sampled, spent, kl=True, lora=False)
    learning = 4 * (2 * 300 * 100 + 4 * 2 * 8 * 1000 + 2 * 64 * 10)
    sampling = 2 * 300 * 16 + 4 * 2 * 8 * 110 + 2 * 64 * 5
    assert found == pytest.approx({"mfu": learning / 2e6, "step_mfu": (learning + sampling) / 8e6})
    assert mfu(shape, 1e6, learned, sampled, spent, kl=False, lora=False)["mfu"] == 0.75 * found["mfu"]


@pytest.mark.parametrize("lora", [False, True])
def test_learning_takes_as_many_forward_passes_as_flops_utilisation_says(lora: bool, tmp_path: Path) -> None:
    """Frozen weights have no gradient of their own; torch counts the FLOPs."""
    model = tiny("llama", tmp_path)
    if lora:
        adapt(model, 1, 0)
    ids = torch.arange(5, 37)[None]

    def flops(backward: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            logits = model.lm(input_ids=ids).logits
            if backward:
                logits.log_softmax(-1)[0, :, 3].sum().backward()
        return counter.get_total_flops()

    shape, work = Shape("", 1, 1, 1, 1, 1, vocab=1, context=1, parameters=2, tied=False), PassWork(1, 1, 1)
    rates = mfu(shape, 1.0, work, PassWork(), {"learn": 1.0, "seconds": 1.0}, kl=False, lora=lora)
    passes = rates["mfu"] / shape.forward_flops(work)
    # the first layer's input needs no gradient, and the updates cost a little
    assert flops(backward=True) / flops(backward=False) == pytest.approx(passes, rel=0.1)


def rollout(prompt: tuple[int, ...], response: tuple[int, ...]) -> Rollout:
    sampling, verdict = SamplingParams(1.0), Verdict(0.0, "")
    n = len(response)
    return Rollout(
        Prompt(""), Problem("", {}), 0, "rl", prompt, response, (0.0,) * n, ((0, n),), sampling, "stop", "", "", verdict
    )


def test_a_mixture_of_experts_says_no_flops_utilisation(tmp_path: Path) -> None:
    """It would count all experts for every token: of Qwen3-30B-A3B ten times as many parameters as are used."""
    save_tiny("qwen3-moe", tmp_path)
    config = Config(peak_tflops=1e-3, stream="glyph:A@1", mode="rl", threads=1)
    of_experts = Trainer(replace(config, model=replace(config.model, path=str(tmp_path))), tmp_path / "run")
    assert not of_experts.peak
    assert Trainer(replace(GLYPH, peak_tflops=1e-3), tmp_path / "run").peak == 1e9


def test_a_real_run_accounts_for_its_time_and_with_a_peak_for_its_flops(tmp_path: Path) -> None:
    flags = {
        "run-dir": tmp_path / "run", "stream": "glyph:A@2", "threads": 1, "progress": False, "tensorboard": False,
        "rollout.problems": 8, "fast.every": 2, "fast.first-proposals": 4, "eval.problems": 4, "peak-tflops": 1e-3,
    }  # fmt: skip
    main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    run = read_run(tmp_path / "run")
    assert set(run.spent) == {
        "seconds", "start", "rollout", "gate", "learn", "sync", "scoring", "minibatch", "reflect", "verify", "eval",
        "checkpoint",
    }  # fmt: skip
    assert sum(s for name, s in run.spent.items() if name != "seconds") <= run.spent["seconds"]
    trained = [r for r in run.steps if r["live_groups"]]
    assert trained
    for r in trained:
        assert r["time"]["step_mfu"] > 0
        assert 0 < r["time"]["mfu"] < 1e3
