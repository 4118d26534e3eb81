"""Where a run's time, energy and money go: seconds by phase, and what NVML says of the GPU meanwhile."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fst_fast.prefix_tree import Ragged, trie
from fst_fast.ranks import ALONE, Ranks
from fst_fast.records import Rollout
from fst_fast.shape import PassWork, Shape

INTERVAL = 0.5  # seconds between two readings of the GPU


class Meter:
    """What was spent since the last `read`: that of a record is what happened since the one before."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds of the phases inside the one under way
        self._since = time.monotonic()
        self.gpus, self._price, self._ranks = 0, 0.0, ALONE
        self._gpu: GpuSampler | None = None

    def start(self, device: torch.device, price: float, log: Callable[[str], None], ranks: Ranks) -> None:
        """The end of the phase "start". Watch the GPUs too, if the run is on any, one a rank; `price` in dollars an
        hour of each."""
        self._seconds["start"] += time.monotonic() - self._since - sum(self._seconds.values())
        self.gpus, self._price, self._ranks = ranks.size * (device.type == "cuda"), price, ranks
        if self.gpus:
            self._gpu = open_gpu(device, log)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside; phases inside it count for themselves alone."""
        started, outer, self._inner = time.monotonic(), self._inner, 0.0
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # what was queued belongs to this phase
            took = time.monotonic() - started
            self._seconds[name] += took - self._inner
            self._inner = outer + took

    def read(self) -> dict[str, float]:
        """`seconds` in all, those of every phase by name; on GPUs gpu_hours, their dollars, and what NVML has of all of
        them: the ranks read together."""
        now = time.monotonic()
        spent: dict[str, float] = {"seconds": now - self._since, **self._seconds}
        if self.gpus:
            hours = self.gpus * spent["seconds"] / 3600
            spent |= {"gpu_hours": hours, "gpu_dollars": hours * self._price}
            spent |= together(self._ranks.join([self._gpu.read() if self._gpu else {}]))
        self._seconds.clear()
        self._since = now
        return spent

    def close(self) -> None:
        if self._gpu:
            self._gpu.close()


def mfu(
    shape: Shape, peak: float, learned: PassWork, sampled: PassWork, spent: Mapping[str, float], *, kl: bool, lora: bool
) -> dict[str, float]:
    """Model FLOPs utilisation of learning alone and of the whole step, by the seconds `spent` (shape.py counts).

    `peak` in FLOP/s. Learning: three forward passes' worth of the policy over what was `learned` from, with `lora` two,
    since frozen weights get no gradient; with `kl` one of the base. The whole step: also one over what was `sampled`. A
    prefix that a pass shares counts once; padding, recomputation, the reuse gate and low-rank updates count nothing.
    """
    passes = (2 if lora else 3) + kl
    learning, sampling = passes * shape.forward_flops(learned), shape.forward_flops(sampled)
    return {"mfu": learning / spent["learn"] / peak, "step_mfu": (learning + sampling) / spent["seconds"] / peak}


def sampling_work(rollouts: Sequence[Rollout]) -> PassWork:
    """What the prompts of `rollouts` share, computed once, and every response by itself."""
    prompts = trie(Ragged.of([r.prompt_ids for r in rollouts]))
    stretches = [*zip(prompts.start.tolist(), prompts.end.tolist(), strict=True)]
    stretches += [(len(r.prompt_ids), len(r.prompt_ids) + len(r.response_ids)) for r in rollouts]
    return PassWork.over(stretches, sum(len(r.response_ids) for r in rollouts))


def together(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What several GPUs read as one: joules and watts in all, the highest memory, the mean utilisation."""
    found = [reading for reading in readings if reading]  # one is empty where NVML is missing
    if not found:
        return {}
    return {
        "joules": sum(r["joules"] for r in found),
        "watts": sum(r["watts"] for r in found),
        "memory": max(r["memory"] for r in found),
        "utilisation": sum(r["utilisation"] for r in found) / len(found),
    }


def open_gpu(device: torch.device, log: Callable[[str], None]) -> GpuSampler | None:
    """A sampler of the GPU; None, and one line to `log`, where NVML is missing or does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return GpuSampler(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid), log)
    except ImportError:
        log("power and energy are not measured: pip install nvidia-ml-py")
    except Exception as error:  # of NVML: no driver, no permission, not supported
        log(f"power and energy are not measured: {error}")
    return None


class GpuSampler:
    """Reads power, memory and utilisation in a thread of its own. Energy is the integral of power (trapezoids)."""

    def __init__(self, nvml: Any, handle: Any, log: Callable[[str], None]):
        self._nvml, self._handle, self._log = nvml, handle, log
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._last = self._sample()  # raises here what it cannot do at all
        self._start = self._last
        self._joules = self._peak = self._busy = 0.0
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()

    def read(self) -> dict[str, float]:
        """Since the last read: joules, mean watts, highest memory in bytes, mean utilisation (0 to 1)."""
        with self._lock:
            seconds = self._last[0] - self._start[0]
            self._start, found = self._last, (self._joules, self._peak, self._busy)
            self._joules = self._peak = self._busy = 0.0
        joules, peak, busy = found
        if not seconds:  # shorter than the interval: the next record has it
            return {}
        return {"joules": joules, "watts": joules / seconds, "memory": peak, "utilisation": busy / seconds}

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._nvml.nvmlShutdown()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            try:
                now = self._sample()
            except self._nvml.NVMLError as error:
                self._log(f"power and energy are not measured any more: {error}")
                return
            with self._lock:
                seconds = now[0] - self._last[0]
                self._joules += seconds * (self._last[1] + now[1]) / 2
                self._busy += seconds * (self._last[3] + now[3]) / 2
                self._peak = max(self._peak, self._last[2], now[2])
                self._last = now

    def _sample(self) -> tuple[float, float, float, float]:
        """Time, watts, bytes in use, part of the time that a kernel ran."""
        watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        used = float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
        return time.monotonic(), watts, used, busy
