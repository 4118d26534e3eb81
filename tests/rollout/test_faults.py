"""An engine that dies, hangs or answers wrongly stops the run with a sentence; resumed, it counts nothing twice."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from fst_fast import checkpoint, cli, train
from fst_fast.rollout import dispatch
from fst_fast.rollout.engine import Completion
from fst_fast.rollout.torch_engine import TorchEngine
from tests.once import once
from tests.test_resume import SMALL, assert_equal, records, tree

pytestmark = pytest.mark.usefixtures("few_instructions")


def flags(run_dir: Path) -> list[str]:
    return [word for name, value in SMALL.items() for word in (f"--{name}", str(value))] + ["--run-dir", str(run_dir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "faults/whole", lambda run: train.main(flags(run)))


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


def by_older_weights(engine: TorchEngine) -> list[Completion]:
    return [replace(c, versions=((2, len(c.response_ids)),)) for c in really(engine)]


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
    by_older_weights: "rollouts for weights 3 were sampled by weights 2",
    answers_twice: "not all of them under way",
    too_long: "tokens where 1 to 20 were asked for",
    never_ends: "no token in 50 steps",
    never_ends_and_makes_tokens: "none of which has ended",
}


class Killed(BaseException):
    pass


def run_until_step_three(argv: list[str], then: Callable[[pytest.MonkeyPatch], None]) -> None:
    """Runs; `then` comes before step 3: behind the checkpoint at 2, what follows it is lost, and sampled again."""
    learn = train.Trainer.learn

    def learn_until(trainer: train.Trainer) -> None:
        if trainer.state.step == 3:
            then(patch)
        learn(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "learn", learn_until)
        patch.setattr(sys, "argv", ["train", *argv])
        cli.run(train.main)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in step 3, with a checkpoint at 2 and records of the cycle and the step after it."""

    def kill(patch: pytest.MonkeyPatch) -> None:
        raise Killed

    def make(run: Path) -> None:
        with pytest.raises(Killed):
            run_until_step_three(flags(run), kill)

    return once(tmp_path_factory, "faults/killed", make)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_engine_stops_the_run_and_leaves_what_a_killed_one_does(
    fault: Step, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(copytree(killed, tmp_path / "run"))
    monkeypatch.setattr(dispatch, "PATIENCE", 50)
    with pytest.raises(SystemExit) as end:
        run_until_step_three(["--resume", str(run)], lambda patch: patch.setattr(TorchEngine, "step", fault))
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert said.startswith("error: ")
    assert FAULTS[fault] in said
    assert said.endswith("; --resume continues from the last checkpoint")
    assert records(run) == records(killed)
    assert tree(run / "checkpoints") == tree(killed / "checkpoints")
    for name in ("population.jsonl", "rollouts/rollouts.jsonl"):
        assert (run / name).read_bytes() == (killed / name).read_bytes(), name


def test_such_a_run_ends_as_the_unbroken_one(killed: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(copytree(killed, tmp_path / "run"))
    train.main(["--resume", str(run)])
    assert_equal(run, whole)


def kept(run: Path) -> int:
    """Bytes of the store that the newest checkpoint knows."""
    folder = checkpoint.latest(run)
    assert folder
    return checkpoint.read_state(folder)["offsets"]["rollouts"]


def test_a_torn_last_record_is_cut_off_and_sampled_again(killed: Path, whole: Path, tmp_path: Path) -> None:
    run = Path(copytree(killed, tmp_path / "run"))
    store = run / "rollouts" / "rollouts.jsonl"
    data = store.read_bytes()
    torn = data[: data.rindex(b"\n", 0, -1) + 100]
    assert len(torn) > kept(run)
    store.write_bytes(torn)
    train.main(["--resume", str(run)])
    assert_equal(run, whole)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data, end: data[: end - 100], "is not the file this checkpoint knew: no line of it ends at byte"),
        (lambda data, end: data[: end - 100] + b"x" + data[end - 99 :], r"the line that ends at byte \d+ is damaged"),
    ],
    ids=["cut", "flipped"],
)
def test_a_store_damaged_before_the_checkpoint_is_refused_in_a_sentence(
    damage: Callable[[bytes, int], bytes],
    sentence: str,
    killed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(copytree(killed, tmp_path / "run"))
    store = run / "rollouts" / "rollouts.jsonl"
    store.write_bytes(damage(store.read_bytes(), kept(run)))
    before, others = store.read_bytes(), {name: (run / name).read_bytes() for name in ("metrics.jsonl", "config.toml")}
    monkeypatch.setattr(sys, "argv", ["train", "--resume", str(run)])
    with pytest.raises(SystemExit) as end:
        cli.run(train.main)
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(sentence, said), said
    assert store.read_bytes().startswith(before[: kept(run) - 200])
    if "no line" in sentence:  # known before anything is cut back
        assert {name: (run / name).read_bytes() for name in others} == others
