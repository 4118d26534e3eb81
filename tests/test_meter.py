"""Seconds by phase, GPU-hours, energy and FLOPs of a run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fst_fast.config import GLYPH, Config
from fst_fast.meter import Meter, mfu, sampling_work, together
from fst_fast.ranks import Ranks
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.runs import read_run
from fst_fast.shape import PassWork, Shape
from fst_fast.slow.lora import adapt
from fst_fast.train import main
from fst_fast.trainer import Trainer
from tests.models import save_tiny, tiny


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
