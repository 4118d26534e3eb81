"""A run killed at any point and resumed ends bit for bit as one that never was: weights, optimizer, every record."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_fast import checkpoint, evaluate
from fst_fast.cli import config_from, parse_train
from fst_fast.config import SlowConfig, to_toml
from fst_fast.errors import UserError
from fst_fast.model import load_model
from fst_fast.runs import read_run
from fst_fast.slow.policy import Policy
from fst_fast.train import Trainer, main
from tests.models import save_tiny
from tests.once import once
from tests.warm import Kill, Warm

pytestmark = pytest.mark.usefixtures("few_instructions")
ROOT = Path(__file__).parents[1]
SMALL = {
    "stream": "glyph:A@3,glyph:B@2", "threads": 1, "progress": False, "tensorboard": False,
    "rollout.problems": 4, "rollout.group-size": 4, "slow.minibatches": 2, "slow.warmup": 3,
    "fast.population": 2, "fast.every": 2, "fast.minibatch": 2, "fast.scoring-problems": 4,
    "fast.first-proposals": 4, "fast.proposals": 2, "eval.every": 2, "eval.problems": 2, "eval.samples": 1,
    "checkpoint-every": 2,
}  # fmt: skip
# Problems that noise solves now and then, posed to a random model, which rewrites its own prompts. The path is relative
# to the repository: random streams are named after tasks, and a task of problems after its file.
DATA = "jsonl:tests/data/noise.jsonl"
NOISE = SMALL | {
    "stream": f"{DATA}@4", "jsonl.verifier": "regex", "rollout.max-new-tokens": 8, "slow.lr": 1e-3,
    "model.path": "{random model}", "reflector.max-new-tokens": 16,
}  # fmt: skip
RUNS: dict[str, dict[str, object]] = {
    "fst": SMALL | {"mode": "fst"},
    "rl": SMALL | {"mode": "rl", "stream": f"{DATA}@3,glyph:B@2", "jsonl.verifier": "regex"},
    "gepa": SMALL | {"mode": "gepa"},
    "rl-then-gepa": NOISE | {"mode": "rl-then-gepa", "model.dtype": "bfloat16"},
    "fst-distill": SMALL | {"mode": "fst-distill", "checkpoint-every": 1},
    # the base model's weights are in the engine while it edits, also beside the steps before the second cycle
    "policy reflector": NOISE | {"mode": "fst", "stream": f"{DATA}@5", "fast.filler": True},
    "mixture": SMALL | {"mode": "fst", "stream": "glyph:A>glyph:B@4"},
    # two batches an epoch: the third of a cycle meets problems again, whose stored rollouts are used up
    "reuse": NOISE | {"mode": "fst", "fast.reuse": True, "fast.every": 3, "rollout.problems": 8, "checkpoint-every": 1},
    # six responses at a time: some of those asked ahead are done, some begun and some waiting when the weights change
    "lookahead": SMALL | {
        "mode": "fst", "stream": "glyph:A@6", "rollout.lookahead": 1, "rollout.max-batch": 6, "fast.reuse": True,
        "fast.every": 2, "eval.every": 4, "checkpoint-every": 4, "fast.race": False, "fast.scoring-problems": 8,
    },
    # the cycles before steps 4 and 8 begin behind the checkpoints four steps earlier and end before those there
    "filler": SMALL | {
        "mode": "fst", "stream": "glyph:A@10", "fast.filler": True, "rollout.lookahead": 1, "rollout.max-batch": 36,
        "fast.reuse": True, "fast.every": 4, "eval.every": 5, "checkpoint-every": 4, "fast.scoring-problems": 8,
        "fast.first-proposals": 6, "seed": 4,
    },
}  # fmt: skip

# A checkpoint falls between: the cycle before step 4 begins behind it, at step 2.
RUNS["filler behind a checkpoint"] = RUNS["filler"] | {"stream": "glyph:A@5", "checkpoint-every": 2}

# Where each run is killed, one place after the other; calls are counted from each (re)start.
KILLS = {
    "fst": [
        Kill("os:replace"),  # config.toml is not there yet: starts anew
        Kill("fst_fast.trainer:write_atomic", when="after"),
        Kill("fst_fast.checkpoint:write_atomic"),  # the first checkpoint is there but for its manifest
        Kill("fst_fast.evaluate:mean_kl"),
        Kill("fst_fast.rollout.collect:Collector._drain", call=5),  # within the first GEPA cycle
        Kill("fst_fast.fast.cycle:evolve", when="after"),
        Kill("fst_fast.files:Appender.write", call=4, when="half"),
        Kill("fst_fast.rollout.torch_engine:TorchEngine.step", call=130),
        Kill("fst_fast.slow.policy:Policy.update", call=2, when="after"),
        Kill("fst_fast.checkpoint:save_model", when="after"),
        Kill("os:rename"),
        Kill("os:rename", when="after"),
        Kill("fst_fast.trainer:Trainer.finish_stage"),
        Kill("fst_fast.trainer:Trainer.enter", call=2, when="after"),  # the switch of tasks
        Kill("fst_fast.trainer:Trainer.learn", call=2),
        Kill("fst_fast.checkpoint:load_policy", when="after"),  # a kill while resuming
        Kill("fst_fast.trainer:Trainer.finish"),
        Kill("fst_fast.trainer:Trainer.finish", when="after"),
        Kill("fst_fast.train:write_report"),
        Kill("os:replace"),  # of the report
        Kill("fst_fast.train:print_summary"),
    ],
    "rl": [
        Kill("fst_fast.slow.policy:Policy.update", call=4),
        Kill("fst_fast.rollout.reuse:RolloutStore.add", call=2, when="after"),
    ],
    "gepa": [
        Kill("fst_fast.trainer:lineage"),
        Kill("fst_fast.fast.cycle:evolve", call=2, when="after"),
        Kill("fst_fast.trainer:Trainer.learn", call=2, when="after"),
    ],
    "rl-then-gepa": [
        Kill("fst_fast.trainer:Trainer.learn", call=4, when="after"),
        Kill("fst_fast.fast.cycle:evolve", when="after"),  # after the last step
    ],
    "fst-distill": [
        Kill("fst_fast.slow.learner:Learner.distill", call=2, when="after"),  # no cycle is due where it resumes
        Kill("fst_fast.fast.cycle:evolve", when="after"),
    ],
    "policy reflector": [
        Kill("fst_fast.rollout.collect:Collector.complete", when="after"),
        Kill("fst_fast.trainer:Trainer._generate", call=2, when="after"),
        Kill("fst_fast.trainer:Trainer._fill", call=2, when="after"),
    ],
    "mixture": [Kill("fst_fast.trainer:Trainer.learn", call=3)],  # resumes where the order has to be counted up to
    "reuse": [Kill("fst_fast.trainer:Trainer._batch_rollouts", call=3, when="after")],
    "lookahead": [
        Kill("fst_fast.rollout.dispatch:Scheduler.load_weights", call=2, when="after"),  # with requests carried over
        Kill("fst_fast.trainer:Trainer._batch_rollouts", call=5),
    ],
    "filler": [
        Kill("fst_fast.evolving:Evolving.advance", call=4, when="after"),  # of the first cycle, which is waited for
        Kill("fst_fast.trainer:Trainer._batch_rollouts", call=3),  # beside the second
        Kill("fst_fast.trainer:Trainer.settle", call=5, when="after"),  # that one is over, and not saved yet
        Kill("fst_fast.trainer:Trainer._fill", call=7),
    ],
    # the next one begun, and not saved
    "filler behind a checkpoint": [Kill("fst_fast.trainer:Trainer._batch_rollouts", call=4)],
}

Flags = Callable[[str, Path], list[str]]
Whole = Callable[[str], Path]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = Warm(tmp_path_factory.mktemp("warm"), evaluate.INSTRUCTIONS)
    yield server
    server.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    """The command line of one of RUNS in a run directory."""
    random_model = str(once(tmp_path_factory, "resume/random model", lambda folder: save_tiny("qwen3", folder)))

    def of(run: str, run_dir: Path) -> list[str]:
        values = {name: str(value).replace("{random model}", random_model) for name, value in RUNS[run].items()}
        return [word for name, value in values.items() for word in (f"--{name}", value)] + ["--run-dir", str(run_dir)]

    return of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, flags: Flags) -> Whole:
    """The uninterrupted run, made in a process of pytest: another one than the killed runs', hash seed included."""
    return lambda run: once(tmp_path_factory, f"resume/{run}", lambda folder: main(flags(run, folder)))


@pytest.mark.parametrize("run", RUNS)
def test_a_run_killed_at_any_point_ends_as_if_nothing_had_happened(
    run: str, warm: Warm, flags: Flags, whole: Whole, tmp_path: Path
) -> None:
    for kill in KILLS[run]:
        ended = warm.run(*start_or_resume(tmp_path / "run", flags(run, tmp_path / "run")), kill=kill)
        assert ended.code == -9, (kill, ended)
    assert warm.run("--resume", tmp_path / "run") == (0, "")
    assert_equal(tmp_path / "run", whole(run))


def test_so_does_one_killed_at_random_times(warm: Warm, flags: Flags, whole: Whole, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # shown on failure
    rng = random.Random(seed)
    argv = flags("fst", tmp_path / "run")
    for _ in range(6):
        ended = warm.run(*start_or_resume(tmp_path / "run", argv), kill=rng.uniform(0.05, 1.5))
        assert ended.code in (-9, 0), ended
    assert warm.run(*start_or_resume(tmp_path / "run", argv)) == (0, "")
    assert_equal(tmp_path / "run", whole("fst"))


def test_the_runs_that_are_killed_here_learn_in_each_of_their_channels(whole: Whole) -> None:
    """Or their being equal would mean little."""
    accepted = 0
    for run, settings in RUNS.items():
        kinds = {kind: [r for r in records(whole(run)) if r["kind"] == kind] for kind in ("step", "evolve")}
        assert any("grad_norm" in r for r in kinds["step"]) == (settings["mode"] != "gepa"), run
        assert any(r["proposals"] for r in kinds["evolve"]) == (settings["mode"] != "rl"), run
        accepted += sum(r["accepted"] for r in kinds["evolve"])
        spanning = [r["step"] - 1 for r in kinds["step"] if r.get("spanning")]
        expected = [1, 3, 5] if run == "lookahead" else [3, 4] if run.startswith("filler") else []
        assert spanning == expected, run
    assert accepted > 2


def test_filler_runs_beside_the_steps_before_it_and_ends_before_its_own(whole: Whole) -> None:
    run = whole("filler")
    assert [r["step"] for r in records(run) if r["kind"] == "evolve"] == [0, 4, 8]
    stored = [json.loads(line) for line in (run / "rollouts" / "rollouts.jsonl").read_text().splitlines()]
    calls: dict[int, set[int]] = {}  # step at which they were asked -> weights that sampled them
    for r in stored:
        if r["purpose"] == "gepa":
            calls.setdefault(r["step"], set()).update(v for v, _ in r["versions"])
    assert calls == {0: {0}, 1: {2, 3, 4}, 4: {4}, 5: {5}, 6: {7}, 8: {8}}
    ages = [set(r["reuse"]["ages"]) for r in records(run) if r["kind"] == "step"]
    assert ages[4] == {"2"}  # what filled the steps before a cycle is used after it ...
    assert ages[8] == {"3"}
    assert [r["reuse"]["drops"] for r in records(run) if r["kind"] == "step"][8]["stale"] == 4  # ... for T steps


def test_a_policy_edits_prompts_beside_the_steps_too(whole: Whole) -> None:
    """Or `KILLS` would not try what its comment says."""
    run = whole("policy reflector")
    stored = [json.loads(line) for line in (run / "rollouts" / "rollouts.jsonl").read_text().splitlines()]
    asked = {r["step"] for r in stored if r["purpose"] == "gepa"}
    assert asked == {0, 1, 2, 3, 4}  # the cycles are those before steps 0, 2 and 4


def test_a_finished_run_resumed_stays_as_it_is(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole("fst"), tmp_path / "fst"))
    config = run / "config.toml"
    config.write_text(config.read_text().replace("tensorboard = false", "tensorboard = true"))
    assert warm.run("--resume", run) == (0, "")  # the report shows the changed setting
    before = tree(run)
    assert warm.run("--resume", run) == (0, "")
    assert tree(run) == before
    assert not (run / "tensorboard").exists()


def test_a_finished_run_that_is_given_more_goes_on_as_if_it_had_been_its_from_the_start(
    warm: Warm, flags: Flags, whole: Whole, tmp_path: Path
) -> None:
    """More steps of its last task, and another task."""
    run = tmp_path / "run"
    assert warm.run(*flags("fst", run), "--stream", "glyph:A@2") == (0, "")
    longer = ["--resume", run, "--stream", SMALL["stream"]]
    assert warm.run(*longer, kill=Kill("fst_fast.trainer:write_atomic", when="after")).code == -9
    assert warm.run("--resume", run, kill=Kill("fst_fast.trainer:Trainer.learn")).code == -9  # it knows by now
    assert warm.run(*longer, kill=Kill("fst_fast.trainer:Trainer.learn", call=3)).code == -9
    assert warm.run("--resume", run) == (0, "")
    assert [r["step"] for r in records(run) if r["kind"] == "end"] == [2, 5]
    assert read_run(run).notes[0].startswith("It was resumed")  # and not: it has not ended
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(r for r in lines if json.loads(r)["kind"] != "end") + lines[-1])
    assert_equal(run, whole("fst"))


def test_a_run_that_ended_between_evaluations_keeps_that_of_its_end(
    warm: Warm, flags: Flags, whole: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert warm.run(*flags("fst", run), "--stream", "glyph:A@3,glyph:B@1") == (0, "")
    assert warm.run("--resume", run, "--stream", SMALL["stream"]) == (0, "")
    steps, long = ([r for r in records(at) if r["kind"] == "eval"] for at in (run, whole("fst")))
    assert [(r["step"], r["stage"]) for r in steps] == [(0, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 1)]
    assert [r for r in steps if r["step"] != 4] == long
    ours, theirs = checkpoint.folders(run)[0], checkpoint.folders(whole("fst"))[0]
    assert tree(ours / "model") == tree(theirs / "model")
    assert same(trained(ours), trained(theirs))


@pytest.mark.parametrize(
    ("mode", "stream", "said"),
    [
        ("fst", "glyph:A@3,glyph:B@1", "more steps of its last task"),  # fewer
        ("fst", "glyph:A@3", "more steps of its last task"),
        ("fst", "glyph:A@4,glyph:B@2", "more steps of its last task"),
        ("fst", "glyph:A@3,glyph:C@2", "more steps of its last task"),
        ("mixture", "glyph:A>glyph:B@5", "changes over the 4 steps it was given; add a task behind it"),
        ("rl-then-gepa", f"{DATA}@5", "rl-then-gepa cannot go on"),
        ("fst", "glyph:A@3,glyph:B", "is not TASK@STEPS"),
        ("fst", "", "is not TASK@STEPS"),
    ],
)
def test_a_run_is_not_given_another_stream(mode: str, stream: str, said: str, flags: Flags, tmp_path: Path) -> None:
    config = config_from(flags(mode, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    with pytest.raises(UserError, match=re.escape(said)):
        parse_train(["--resume", str(tmp_path / "run"), "--stream", stream])
    assert parse_train(["--resume", str(tmp_path / "run"), "--stream", config.stream]).config == config
    if mode != "rl-then-gepa":
        more = f"{config.stream},glyph:C@1"
        assert parse_train(["--resume", str(tmp_path / "run"), f"--stream={more}"]).config.stream == more


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str, whole: Whole, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole("rl"), tmp_path / "run"))
    newest, before = checkpoint.folders(run)
    spoil(newest, damage)
    said = f"files of {newest.name} are damaged or gone; {before.name} is taken"
    with pytest.warns(UserWarning, match=said):
        assert checkpoint.latest(run) == before
    with pytest.warns(UserWarning, match=said):
        main(["--resume", str(run)])
    assert_equal(run, whole("rl"))


def test_a_copy_of_a_checkpoint_kept_beside_them_is_none_of_the_runs(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for name in ("step-000002", "step-000002-best", "step-best", "step-000010"):
        (root / name).mkdir(parents=True)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-000010", "step-000002"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(warm: Warm, whole: Whole, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole("rl"), tmp_path / "run"))
    for folder in checkpoint.folders(run):
        spoil(folder, "cut")
    before = tree(run)
    said = f"error: run_dir: no checkpoint of {run} is intact any more; start again in another run_dir\n"
    assert warm.run("--resume", run) == (2, said)
    assert tree(run) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "population.jsonl", "rollouts/rollouts.jsonl"])
def test_a_run_that_lost_records_its_checkpoint_knew_is_not_continued(
    name: str, warm: Warm, whole: Whole, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole("fst"), tmp_path / "run"))
    shutil.rmtree(checkpoint.folders(run)[0])
    (run / name).write_bytes((run / name).read_bytes()[:100])
    ended = warm.run("--resume", run)
    assert ended.code == 2
    assert str(run / name) in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert (run / name).stat().st_size == 100


def test_a_second_process_on_a_run_is_turned_away_and_the_first_goes_on(
    warm: Warm, flags: Flags, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    learn, others = Trainer.learn, []

    def learn_while_others_try(trainer: Trainer) -> None:
        if trainer.state.step == 1:
            others.append(warm.run(*flags("rl", run_dir)))
            others.append(warm.run("--resume", run_dir))
        learn(trainer)

    monkeypatch.setattr(Trainer, "learn", learn_while_others_try)
    main(flags("rl", run_dir))
    said = f"error: run_dir: {run_dir} is in use by another process; wait for it or choose another\n"
    assert others == [(2, said), (2, said)]
    assert_equal(run_dir, whole("rl"))


def start_or_resume(run_dir: Path, argv: list[str]) -> list[str]:
    return ["--resume", str(run_dir)] if (run_dir / "config.toml").exists() else argv


def assert_equal(run: Path, other: Path) -> None:
    assert records(run) == records(other)
    for name in ("population.jsonl", "rollouts/rollouts.jsonl"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    # killed right after a rename, a run may keep one checkpoint more than it was told to
    for a, b in zip(checkpoint.folders(run)[:2], checkpoint.folders(other), strict=True):
        assert a.name == b.name
        assert tree(a / "model") == tree(b / "model")
        assert same(trained(a), trained(b))
        assert state(a) == state(b)
    assert (run / "report.html").stat().st_size > 10_000


def records(run_dir: Path) -> list[dict[str, Any]]:
    """But what the run did in vain."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in r.items() if key != "time"} for r in lines if r["kind"] != "lost"]


def state(folder: Path) -> dict[str, Any]:
    saved = checkpoint.read_state(folder)
    del saved["offsets"]["metrics"]  # seconds have more or fewer digits
    return saved


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def trained(folder: Path) -> dict[str, Any]:
    """Masters, moments and counters of a checkpoint."""
    policy = Policy(load_model(str(folder / "model")), SlowConfig())
    checkpoint.load_policy(folder, policy)
    return policy.state_dict()


def same(a: object, b: object) -> bool:
    """Equality of a state_dict, tensors by their bits."""
    match a, b:
        case torch.Tensor(), torch.Tensor():
            return a.dtype == b.dtype and torch.equal(a, b)
        case dict(), dict():
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        case list(), list():
            return len(a) == len(b) and all(map(same, a, b))
    return a == b


def spoil(folder: Path, damage: str) -> None:
    weights = folder / "model" / "model.safetensors"
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "flipped":
            data = bytearray(weights.read_bytes())
            data[len(data) // 2] ^= 1
            weights.write_bytes(data)
        case "gone":
            (folder / "trainer" / "__0_0.distcp").unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
