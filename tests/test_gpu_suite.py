"""The GPU suite's rehearsal: it must run at the first try where GPU time is scarce."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The Python of the suite: builds nothing here, and fails in one part.
SHIM = f"""#!/usr/bin/env bash
case "$*" in
  *setup.py*) exit 0 ;;
  *tune.py*) exit 7 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
# gpu_correct.py with one backend, where the gradient of the hidden states is half of what it is.
HALVED = """
import runpy, sys
from fst_kernels import api, blocks
right, api.BACKENDS = blocks.Multiplier.back, ("torch",)
blocks.Multiplier.back = lambda self, grad: right(self, grad) / 2
sys.path.insert(0, "benchmarks")
sys.argv = ["gpu_correct.py", "--quick", "--json", sys.argv[1]]
runpy.run_path("benchmarks/gpu_correct.py", run_name="__main__")
"""


def suite(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    shim = folder / "python"
    shim.write_text(SHIM)
    shim.chmod(0o755)
    own = {"PYTHON": str(shim), "FST_SUITE": "quick", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks/gpu_suite.sh"), *words]
    return subprocess.run(command, env=os.environ | own | env, capture_output=True, text=True, cwd=folder)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_what_is_no_part_is_refused_with_the_names_of_all(tmp_path: Path) -> None:
    run = suite(tmp_path, "kernel")
    assert run.returncode == 2
    assert "kernel is no part" in run.stderr
    assert "correct tests tree kernels qwen3-8b" in run.stderr
    assert suite(tmp_path, "./a", "./b").returncode == 2


def test_every_part_leaves_a_log_and_json_and_one_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = suite(tmp_path, "tune", "qwen3-8b", f"{out}/")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "failed: tune (exit status 7)" in run.stderr
    assert {name: part["status"] for name, part in read(out / "parts.json").items()} == {"tune": 7, "qwen3-8b": 0}
    assert (out / "tune.log").exists()
    assert (out / "qwen3-8b.png").read_bytes().startswith(b"\x89PNG")
    found = read(out / "qwen3-8b.json")
    assert found["goals"]
    assert found["versions"]["torch"]
    assert {r["op"] for r in found["results"]} > {"loss, forward + backward", "log-probs and entropy, no gradient"}
    for result in found["results"]:
        assert "eager torch" in result["seconds"] or result["op"].startswith("row kernel")
        assert result["failed"].keys().isdisjoint(result["seconds"])
        for name, errors in result["errors"].items():
            assert all(0 <= x < 1e-4 for x in errors.values()), (result["op"], name, errors)


def test_a_part_that_takes_too_long_is_stopped_and_named(tmp_path: Path) -> None:
    run = suite(tmp_path, "correct", f"{tmp_path}/", FST_LIMIT="1")
    assert run.returncode == 1
    assert "failed: correct (ran past 1 s)" in run.stderr


def test_the_sweep_passes_all_that_is_right_and_fails_a_wrong_gradient(tmp_path: Path) -> None:
    found = tmp_path / "correct.json"
    command = [sys.executable, "-c", HALVED, str(found)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-2000:]
    checks = read(found)["checks"]
    wrong = {x["check"] for x in checks if not x["ok"]}
    halved = {
        x["check"] for x in checks if x["check"].startswith(("loss", "logprobs", "kl")) and x["check"].endswith("dX")
    }
    assert wrong == halved
    assert len(checks) > 3 * len(halved) > 100
