"""What every benchmark measures with: clocks, interleaved rounds, peak memory, copy bandwidth; what ran where."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")
Times = dict[str, dict[str, list[float]]]


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call: between two events on a GPU, whose queue is empty before, else by the clock on the wall."""
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, budget: float = 15.0) -> Times:
    """Every call once a round, after a round that warms up: what a round disturbs, it disturbs for all.

    A call that has taken `budget` seconds sits out after three rounds. "cpu_seconds" are of the whole process.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            if len(wall[name]) >= 3 and sum(wall[name]) > budget:
                continue
            before = time.process_time()
            taken = seconds_of(call)
            if round_:
                wall[name].append(taken)
                cpu[name].append(time.process_time() - before)
    return {"seconds": wall} if DEVICE == "cuda" else {"seconds": wall, "cpu_seconds": cpu}


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(x) for name, x in seconds.items()}


def peak_bytes_of(call: Callable[[], object]) -> int | None:
    """Most memory in use during the call beyond what was in use before: torch's on a GPU, the process's on Linux."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as in use
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _kilobytes(status, "VmRSS")
    call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1])


def free_memory() -> None:
    """After something failed: give back what it held. An error that has spoilt the GPU's context is raised again."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def copy_bandwidth() -> float:
    """Bytes read and written a second by torch's copy of 2 GiB (256 MiB on a CPU) of random numbers; best of 7."""
    a = torch.rand(2**29 if DEVICE == "cuda" else 2**26, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(seconds_of(lambda: b.copy_(a)) for _ in range(7))


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:150]


def setting() -> dict[str, Any]:
    """What a result depends on: the code, the machine, the versions."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        **_code(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "versions": versions,
        "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }


def save(path: Path, **results: Any) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


def _code() -> dict[str, Any]:
    """The commit; FST_COMMIT names it where the code travelled without its repository."""
    if commit := os.environ.get("FST_COMMIT"):
        return {"commit": commit, "dirty": None}

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _cpu() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    capability = torch.backends.cpu.get_cpu_capability()
    return {"model": model, "capability": capability, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _gpu() -> dict[str, Any] | None:
    if DEVICE != "cuda":
        return None
    p = torch.cuda.get_device_properties(0)
    return {"name": p.name, "gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count}
