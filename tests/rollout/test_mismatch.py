"""Every step says how far the engine's log-probs are from the trainer's; one with other weights stops the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_fast import train, trainer
from fst_fast.errors import EngineError
from fst_fast.model import Model, load_model
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict, Versions
from fst_fast.rollout import torch_engine
from fst_fast.rollout.check import check_mismatch, mismatch
from fst_fast.rollout.torch_engine import TorchEngine
from tests.models import save_tiny

GLYPH: dict[str, object] = {
    "stream": "glyph:A@4", "threads": 1, "progress": False, "tensorboard": False, "rollout.problems": 6,
    "rollout.group-size": 4, "slow.minibatches": 2, "fast.population": 2, "fast.every": 2, "fast.minibatch": 4,
    "fast.scoring-problems": 6, "fast.first-proposals": 6, "fast.proposals": 2, "eval.every": 4, "eval.problems": 4,
    "eval.samples": 1,
}  # fmt: skip


def bf16(folder: Path) -> dict[str, object]:
    """A random model, and a verifier whose rewards differ by chance."""
    return GLYPH | {
        "mode": "rl", "model.path": save_tiny("qwen3", folder / "model"), "model.dtype": "bfloat16",
        "stream": "jsonl:tests/data/noise.jsonl@4", "jsonl.verifier": "regex", "rollout.max-new-tokens": 12,
        "slow.lr": 3e-3, "slow.warmup": 0, "slow.kl-coef": 0, "slow.minibatches": 1,
    }  # fmt: skip


def run(flags: dict[str, object], folder: Path, **changes: object) -> list[dict[str, Any]]:
    """The steps of a run."""
    values = flags | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    train.main([*words, "--run-dir", str(folder)])
    return steps_of(folder)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def test_a_healthy_engine_is_off_by_rounding_in_float32(tmp_path: Path) -> None:
    steps = run(GLYPH, tmp_path, rollout__lookahead=1, rollout__max_batch=8)
    assert len(steps) == 4
    for step in steps:
        assert step["mismatch"]["tokens"] > 0
        assert 0 < step["mismatch"]["abs"] < 1e-5
        assert step["mismatch"]["above_2"] == 0 <= step["mismatch"]["k3"] < 1e-9
    # tokens of the weights before, where it is not: they are told apart
    older = [step["mismatch"]["older_abs"] for step in steps if "older_abs" in step["mismatch"]]
    assert older
    assert min(older) > 1e-3


def test_so_it_is_where_the_training_pass_tells_nothing(tmp_path: Path) -> None:
    steps = run(GLYPH, tmp_path, mode="fst-distill", stream="glyph:A@2")
    assert [0 < step["mismatch"]["abs"] < 1e-5 for step in steps] == [True, True]


def test_and_by_more_in_bfloat16_but_not_by_what_stops_a_run(tmp_path: Path) -> None:
    steps = run(bf16(tmp_path), tmp_path / "run")
    assert len(steps) == 4
    assert all(1e-5 < step["mismatch"]["abs"] < 0.01 for step in steps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_keeps_old_weights_stops_the_run_at_the_next_step(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = GLYPH if dtype == "float32" else bf16(tmp_path)
    serve_stale_weights(monkeypatch, str(flags.get("model.path", "")), dtype)
    with pytest.raises(
        EngineError, match=r"torch engine's log-probs .* off the trainer's .*; if it does so again, use"
    ):
        run(flags, tmp_path / "run", checkpoint_every=1)
    steps = steps_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3]  # version 2 did not reach it
    assert steps[1]["mismatch"]["abs"] < 0.05 * steps[2]["mismatch"]["abs"]
    # what was learned from them is not saved
    assert max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == "step-000002"


def serve_stale_weights(patch: pytest.MonkeyPatch, path: str, dtype: str) -> None:
    """The engine has a copy of the weights, and from version 2 on it keeps what it has."""
    replica, copied, load_weights = load_model(path, dtype=dtype), torch_engine._copied, TorchEngine.load_weights

    def load(engine: TorchEngine, model: Model, version: int) -> None:
        patch.setattr(torch_engine, "_copied", copied if version < 2 else lambda _, replica: replica)
        load_weights(engine, model, version)

    patch.setattr(TorchEngine, "load_weights", load)
    patch.setattr(trainer, "make_engine", lambda _, model, **__: TorchEngine(model, replica=replica))


def test_means_are_over_tokens_and_those_of_other_weights_stand_apart() -> None:
    found = mismatch(
        [(rollout(((4, 1), (5, 2))), torch.tensor([0.5, 0.0, 1.0])), (rollout(((5, 1),)), torch.tensor([-0.1]))], 5
    )
    assert found == {
        "tokens": 3,
        "abs": pytest.approx(1.1 / 3),
        "k3": pytest.approx((math.e - 2 + math.exp(-0.1) - 0.9) / 3),
        "above_2": pytest.approx(1 / 3),
        "older_tokens": 1,
        "older_abs": 0.5,
        "older_k3": pytest.approx(math.exp(0.5) - 1.5),
        "older_above_2": 0,
    }


@pytest.mark.parametrize("off", [0.2, math.nan, math.inf])
def test_more_than_the_limit_and_no_number_stop_a_run(off: float) -> None:
    check_mismatch({"tokens": 3, "abs": 0.1}, 0.1, "any")
    check_mismatch({}, 0.1, "any")  # nothing was sampled by the present weights
    with pytest.raises(EngineError, match="of 3 tokens are"):
        check_mismatch({"tokens": 3, "abs": off}, 0.1, "any")


def rollout(versions: Versions) -> Rollout:
    n = sum(tokens for _, tokens in versions)
    return Rollout(
        Prompt("p"), Problem("x", "x", ""), 0, "rl", (1,), (2,) * n, (-1.0,) * n, versions, SamplingParams(1.0, 9),
        "stop", "any", "", Verdict(0.0, "", {}),
    )  # fmt: skip
