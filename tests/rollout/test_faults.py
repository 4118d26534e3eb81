"""An engine that dies, hangs or answers wrongly stops the run with a sentence; resumed, it counts nothing twice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fst_fast import cli, train
from fst_fast.rollout import dispatch
from fst_fast.rollout.engine import Completion
from fst_fast.rollout.torch_engine import TorchEngine
from tests.test_resume import SMALL, assert_equal


def flags(run_dir: Path) -> list[str]:
    return [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + ["--run-dir", str(run_dir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train.main(flags(run))
    return run


Step = Callable[[TorchEngine], list[Completion]]
really: Step = TorchEngine.step


def dies(engine: TorchEngine) -> list[Completion]:
    really(engine)
    raise OSError("CUDA error: device-side assert triggered")


def without_logprobs(engine: TorchEngine) -> list[Completion]:
    return [replace(c, logprobs=()) for c in really(engine)]


def with_a_logprob_that_is_no_number(engine: TorchEngine) -> list[Completion]:
    return [replace(c, logprobs=(*c.logprobs[1:], float("nan"))) for c in really(engine)]


def by_unknown_weights(engine: TorchEngine) -> list[Completion]:
    return [replace(c, versions=()) for c in really(engine)]


def answers_twice(engine: TorchEngine) -> list[Completion]:
    return [again for c in really(engine) for again in (c, c)]


def too_long(engine: TorchEngine) -> list[Completion]:
    return [
        replace(c, response_ids=c.response_ids * 30, logprobs=c.logprobs * 30, versions=c.versions * 30)
        for c in really(engine)
    ]


def never_ends(engine: TorchEngine) -> list[Completion]:
    return []


def never_ends_and_makes_tokens(engine: TorchEngine) -> list[Completion]:
    engine.stats.generated_tokens += 1
    return []


FAULTS: dict[Step, str] = {
    dies: "OSError: CUDA error: device-side assert triggered",
    without_logprobs: "0 log-probs for",
    with_a_logprob_that_is_no_number: "a log-prob that is no number",
    by_unknown_weights: "tokens by weights ()",
    answers_twice: "not all of them under way",
    too_long: "tokens where 1 to 20 were asked for",
    never_ends: "no token in 50 steps",
    never_ends_and_makes_tokens: "none of which has ended",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_engine_stops_the_run_and_the_resumed_run_is_the_unbroken_one(
    fault: Step, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    learn = train.Trainer.learn

    def learn_until(trainer: train.Trainer) -> None:
        if trainer.state.step == 3:  # after the checkpoint at 2: what follows is lost, and sampled again
            patch.setattr(TorchEngine, "step", fault)
        learn(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "learn", learn_until)
        patch.setattr(dispatch, "PATIENCE", 50)
        patch.setattr(sys, "argv", ["train", *flags(tmp_path / "run")])
        with pytest.raises(SystemExit) as end:
            cli.run(train.main)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert said.startswith("error: the torch engine failed: ")
    assert FAULTS[fault] in said
    assert said.endswith("; --resume continues from the last checkpoint")
    train.main(["--resume", str(tmp_path / "run")])
    assert_equal(tmp_path / "run", whole)
