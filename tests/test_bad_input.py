"""Whatever a user gets wrong is told in one sentence that names it, with exit code 2, before anything is written."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from fst_fast import checkpoint, cli, compare, evaluate, report, train, trainer
from fst_fast.config import RolloutConfig
from fst_fast.errors import UserError
from fst_fast.model import GLYPH_BASE, Model, load_model
from fst_fast.records import Prompt
from fst_fast.rollout import make_engine
from fst_fast.rollout.engine import RolloutEngine
from fst_fast.runs import read_run
from fst_fast.slow.policy import Policy

pytestmark = pytest.mark.usefixtures("few_instructions")
SMALL = {
    "stream": "glyph:A@3", "threads": 1, "progress": False, "tensorboard": False,
    "rollout.problems": 2, "rollout.group-size": 2, "slow.minibatches": 1, "fast.population": 2, "fast.every": 2,
    "fast.minibatch": 2, "fast.scoring-problems": 2, "fast.first-proposals": 2, "fast.proposals": 2,
    "eval.problems": 2, "eval.samples": 1, "checkpoint-every": 1,
}  # fmt: skip


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All files and folders below, with the files' contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


class Refusals:
    """Calls commands that must fail."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch

    def command(self, main: Callable[[list[str]], None], *argv: object) -> str:
        """What the command says on stderr, all of it."""
        self._monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
        self._monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # run() changes it
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        said = self._capsys.readouterr().err
        assert end.value.code == 2, said
        return said

    def sentence(self, main: Callable[[list[str]], None], *argv: object) -> str:
        """The one sentence it says."""
        said = self.command(main, *argv)
        assert said.startswith("error: ")
        assert said.count("\n") == 1, said
        return said

    def train(self, *argv: object) -> str:
        """The sentence of a new run that must leave no trace on disk."""
        before = tree(self.folder)
        said = self.sentence(train.main, *argv, "--run-dir", self.folder / "runs" / "mine")
        assert tree(self.folder) == before
        return said


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusals:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Refusals(tmp_path, capsys, monkeypatch)


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nope", "3"], ["--nope"]),
        (["--rollout.problems", "x"], ["--rollout.problems", "'x'"]),
        (["--rollout.problems", "1.5"], ["--rollout.problems", "1.5"]),
        (["--slow.lr", "fast"], ["--slow.lr", "fast"]),
        (["--progress", "maybe"], ["--progress", "maybe"]),
        (["--fast.reflector", "nobody"], ["--fast.reflector", "nobody", "phrasebook"]),
    ],
)
def test_a_flag_that_does_not_exist_or_cannot_be_read(argv: list[str], words: list[str], refuse: Refusals) -> None:
    """tyro says these in a box of its own."""
    before = tree(refuse.folder)
    said = refuse.command(train.main, *argv, "--run-dir", refuse.folder / "run")
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert tree(refuse.folder) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "rll"}, ["mode = 'rll'", "rl-then-gepa"]),
        ({"preset": "nope"}, ["preset = 'nope'", "glyph"]),
        ({"preset": "paper"}, ["model.path: the preset paper", "folder"]),
        ({"rollout.problems": 0}, ["rollout.problems = 0", "greater than or equal to 1"]),
        ({"rollout.problems": -3}, ["rollout.problems = -3"]),
        ({"rollout.problems": 10**30}, ["rollout.problems = 1000"]),
        ({"rollout.problems": 5000}, ["rollout.problems = 5000", "4096"]),
        ({"rollout.group-size": 1}, ["rollout.group_size = 1"]),
        ({"rollout.engine": "vllm", "rollout.gpu-memory": 1.5}, ["rollout.gpu_memory = 1.5", "less than 1"]),
        ({"fast.filler": True, "fast.every": 1}, ["fast.filler = True", "fast.every of 2 or more"]),
        ({"rollout.lookahead": 2}, ["rollout.lookahead = 2", "less than or equal to 1"]),
        ({"mode": "fst-distill", "rollout.lookahead": 1}, ["rollout.lookahead = 1", "use 0 with fst-distill"]),
        ({"rollout.group-size": 6}, ["rollout.group_size = 6", "fast.population = 4", "1 or 2 or 3 or 6"]),
        ({"rollout.temperature": "nan"}, ["rollout.temperature = nan"]),
        ({"rollout.temperature": 0}, ["rollout.temperature = 0"]),
        ({"rollout.max-new-tokens": 500}, ["rollout.max_new_tokens = 500", "context of 512", "or less"]),
        ({"stream": "glyph:\udcff@3"}, ["stream = 'glyph:\\udcff@3'", "not valid UTF-8"]),
        ({"ranks": -1}, ["error: ranks = '-1': must be a number of processes"]),
        ({"fast.proposals": 10**6}, ["fast.proposals = 1000000", "less than or equal to 10000"]),
        ({"slow.lr": "nan"}, ["slow.lr = nan"]),
        ({"slow.lr": "inf"}, ["slow.lr = inf"]),
        ({"slow.lr": 0}, ["slow.lr = 0", "greater than 0"]),
        ({"slow.beta1": 1.5}, ["slow.beta1 = 1.5", "less than 1"]),
        ({"slow.kl-coef": -1}, ["slow.kl_coef = -1"]),
        ({"slow.minibatches": 17}, ["slow.minibatches = 17", "rollout.problems = 16"]),
        ({"eval.levels": 2}, ["eval.levels.0 = 2"]),
        ({"seed": -1}, ["seed = -1"]),
        ({"seed": 2**63}, ["seed = 9223372036854775808"]),
        ({"threads": -1}, ["threads = -1"]),
        ({"threads": 10**9}, ["threads = 1000000000"]),
        ({"model.device": "gpu"}, ["model.device = 'gpu'", "auto or cpu"]),
        ({"fast.reflector": "openai"}, ["OPENAI_API_KEY"]),
        (
            {"fast.reflector": "policy", "reflector.max-new-tokens": 32},
            ["reflector.max_new_tokens = 32", "takes 487 tokens", "context is 512"],
        ),
        ({"stream": ""}, ["stream: ''", "TASK@STEPS"]),
        ({"stream": "glyph:A"}, ["stream: 'glyph:A'"]),
        ({"stream": "glyph:A@0"}, ["stream: 'glyph:A@0'"]),
        ({"stream": "glyph:A@-1"}, ["stream: 'glyph:A@-1'"]),
        ({"stream": "glyph:A@1.5"}, ["stream: 'glyph:A@1.5'"]),
        ({"stream": "glyph:A@5,,glyph:B@5"}, ["stream: ''"]),
        ({"stream": f"glyph:A@{'9' * 5000}"}, ["stream: 'glyph:A@999"]),
        ({"stream": "nope:A@5"}, ["'nope:A'", "glyph:A"]),
        ({"stream": "glyph:a@5"}, ["'glyph:a'", "A to Z"]),
        ({"stream": "star_graph:1x1@5"}, ["'star_graph:1x1'", "star_graph:4x3"]),
        (
            {"stream": f"math:{Path(__file__).parent / 'data' / 'polaris.jsonl'}@5", "rollout.problems": 2},
            ["fast.reflector", "phrasebook"],
        ),
        ({"stream": "jsonl:missing.jsonl@5"}, ["missing.jsonl", "No such file"]),
        ({"model.path": "missing"}, ["model.path: missing", "config.json"]),
        ({"config-file": "missing.toml"}, ["missing.toml cannot be read"]),
        ({"config-file": "."}, [". cannot be read"]),
    ],
)
def test_a_value_that_cannot_work(settings: dict[str, object], words: list[str], refuse: Refusals) -> None:
    said = refuse.train(*flags(settings))
    assert all(word in said for word in words), said


def test_an_engine_that_is_not_installed(refuse: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    said = refuse.train(*flags(SMALL), "--rollout.engine", "vllm")
    assert "rollout.engine: vllm is not installed; pip install -e '.[vllm]' on a GPU machine, or use torch" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"modus = 'rl'", ["unknown field modus", "mode"]),
        (b"[rollout]\nproblem = 3", ["unknown field rollout.problem", "did you mean rollout.problems"]),
        (b"[rollout]\nproblems = '3'", ["rollout.problems = '3'", "integer"]),
        (b"[rollout]\nproblems = 3.5", ["rollout.problems = 3.5", "integer"]),
        (b"[rollout]\nproblems = 0", ["rollout.problems = 0"]),
        (b"[slow]\nlr = nan", ["slow.lr = nan"]),
        (b"[slow]\nlr = 1979-05-27", ["slow.lr", "1979-05-27"]),
        (b"rollout = 3", ["rollout = 3", "table"]),
        (b"model = 3", ["model = 3", "table"]),
        (b"mode = 3", ["mode = 3"]),
        (b"mode = \n", ["not valid TOML", "line 1"]),
        (b"mode = 'rl'\nmode = 'rl'\n", ["not valid TOML", "line 2"]),
        (b"# \xff\xfe", ["not valid TOML", "utf-8"]),
        (b"seed = " + b"9" * 5000, ["not valid TOML", "digits"]),
        (b"seed = " + b"[" * 100_000, ["not valid TOML"]),
    ],
)
def test_a_configuration_file_that_cannot_work(text: bytes, words: list[str], refuse: Refusals) -> None:
    file = refuse.folder / "config.toml"
    file.write_bytes(text)
    said = refuse.train("--config-file", file)
    assert all(word in said for word in [str(file), *words]), said


# ------------------------------------------------------------------------------------------------- models and problems


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def half_written(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 192}))


def encoder_and_decoder(folder: Path) -> None:
    shutil.rmtree(folder)
    T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(GLYPH_BASE).save_pretrained(folder)


QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("config.json"), ["no config.json"]),
        (without("model.safetensors"), ["cannot be loaded", "model.safetensors"]),
        (without("tokenizer.json"), ["no tokenizer"]),
        (without("chat_template.jinja"), ["no chat template"]),
        (holding("chat_template.jinja", b"{% for %}"), ["chat template"]),
        (
            holding("chat_template.jinja", b"{{ raise_exception('no system role') }}"),
            ["chat template", "no system role"],
        ),
        (holding("tokenizer.json", b"{"), ["the tokenizer", "cannot be loaded"]),
        (holding("config.json", b"{"), ["cannot be loaded", "JSON"]),
        (half_written, ["cannot be loaded"]),
        (holding("model.safetensors", b""), ["cannot be loaded"]),
        (with_tensors(lambda tensors: tensors.pop(QUERY)), ["do not fit its config.json", QUERY]),
        (with_tensors(lambda tensors: tensors[QUERY].fill_(float("nan"))), ["not all finite"]),
        (wider, ["do not fit its config.json"]),
        (encoder_and_decoder, ["cannot be loaded as a causal LM"]),
    ],
)
def test_a_model_folder_that_cannot_be_trained(
    spoil: Callable[[Path], None], words: list[str], refuse: Refusals
) -> None:
    folder = Path(shutil.copytree(GLYPH_BASE, refuse.folder / "model"))
    spoil(folder)
    said = refuse.train("--model.path", folder, "--preset", "glyph")
    assert all(word in said for word in ["model.path", str(folder), *words]), said


GOOD = b'{"problem": "1 + 1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["no problems"]),
        (b"\n\n", ["no problems"]),
        (GOOD, ["cannot be split"]),
        (GOOD + b"\n{nope\n", ["line 3", "not JSON"]),
        (GOOD + b'{"problem": "\xff", "answer": "1"}\n', ["line 2", "UTF-8"]),
        (GOOD + b"[1, 2]\n", ["line 2", "not an object"]),
        (GOOD + b'{"question": "1 + 2", "answer": "3"}\n', ["line 2", "'problem'", "jsonl.problem_field"]),
        (GOOD + b'{"problem": "1 + 2"}\n', ["line 2", "'answer'", "jsonl.answer_field"]),
        (GOOD + b'{"problem": "1 + 2", "answer": "3"}\n', ["rollout.problems = 16", "1 training problems"]),
    ],
)
def test_a_file_of_problems_that_cannot_be_used(text: bytes, words: list[str], refuse: Refusals) -> None:
    file = refuse.folder / "problems.jsonl"
    file.write_bytes(text)
    said = refuse.train("--stream", f"jsonl:{file}@5", "--fast.reflector", "policy", "--reflector.max-new-tokens", 64)
    assert all(word in said for word in [str(file), *words]), said


def test_a_problem_that_does_not_fit_the_context_under_the_seed_prompt(refuse: Refusals) -> None:
    file = refuse.folder / "problems.jsonl"
    rows = [{"problem": f"{i} " + "a b c d " * (20 if i < 30 else 150), "answer": "x"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = ["--fast.reflector", "policy", "--reflector.max-new-tokens", "64"]
    said = refuse.train("--stream", f"jsonl:{file}@5", *policy)
    assert all(words in said for words in ("rollout.max_new_tokens = 20", "context of 512", str(file))), said
    assert "pose shorter problems" in refuse.train(
        "--stream", f"jsonl:{file}@5", *policy, "--rollout.max-new-tokens", 1
    )


# --------------------------------------------------------------------------------------------------- the run directory


def test_a_run_directory_that_holds_something_is_left_alone(refuse: Refusals) -> None:
    mine = refuse.folder / "runs" / "mine"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("my only copy")
    said = refuse.train()
    assert f"{mine} is not empty" in said
    assert f"--resume {mine}" in said


def test_an_empty_run_directory_stays_empty_when_the_run_is_refused(refuse: Refusals) -> None:
    (refuse.folder / "runs" / "mine").mkdir(parents=True)
    assert "OPENAI_API_KEY" in refuse.train("--fast.reflector", "openai")


def test_a_run_directory_that_cannot_be_made(refuse: Refusals) -> None:
    (refuse.folder / "runs").write_text("a file in the way")
    said = refuse.train()
    assert f"run_dir: {refuse.folder / 'runs' / 'mine'} cannot be written" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_without_permission(refuse: Refusals) -> None:
    (refuse.folder / "runs").mkdir(mode=0o500)
    assert "Permission denied" in refuse.train()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume"], ["--resume"]),
        (["--resume", ""], ["--resume"]),
        (["--resume", "{run}", "--seed", "3"], ["--resume", "no other flag"]),
        (["--mode", "fst", "--resume", "{run}"], ["--resume", "no other flag"]),
        (["--resume", "{run}/nothing"], ["nothing is not a run directory"]),
        (["--resume", "{run}"], ["is not a run directory: it has no config.toml"]),
    ],
)
def test_a_resume_that_cannot_be(argv: list[str], words: list[str], refuse: Refusals) -> None:
    said = refuse.sentence(train.main, *(word.replace("{run}", str(refuse.folder)) for word in argv))
    assert all(word in said for word in words), said
    assert not tree(refuse.folder)


@pytest.mark.parametrize("text", ["mode = ", "modus = 3", "[slow]\nlr = nan\n"])
def test_a_run_whose_configuration_was_broken_is_not_resumed(text: str, refuse: Refusals) -> None:
    (refuse.folder / "config.toml").write_text(text)
    before = tree(refuse.folder)
    assert str(refuse.folder / "config.toml") in refuse.sentence(train.main, "--resume", refuse.folder)
    assert tree(refuse.folder) == before


# -------------------------------------------------------------------------------------------------- the other commands


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train.main(flags(SMALL | {"mode": "rl", "run-dir": run}))
    return run


def test_what_is_no_run_can_be_neither_evaluated_nor_reported(refuse: Refusals) -> None:
    before = tree(refuse.folder)
    for main in (evaluate.main, report.main):
        for folder in (refuse.folder, refuse.folder / "missing"):
            assert str(folder) in refuse.sentence(main, folder)
    assert tree(refuse.folder) == before


def test_a_run_without_a_checkpoint_cannot_be_evaluated(finished: Path, refuse: Refusals) -> None:
    shutil.copy(finished / "config.toml", refuse.folder)
    before = tree(refuse.folder)
    assert "has no checkpoint yet" in refuse.sentence(evaluate.main, refuse.folder)
    assert tree(refuse.folder) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--samples", "0"], ["eval.samples = 0"]),
        (["--problems", "-1"], ["eval.problems = -1"]),
        (["--task", "nope"], ["'nope'", "glyph:A"]),
        (["--task", "jsonl:missing.jsonl"], ["missing.jsonl"]),
    ],
)
def test_an_evaluation_that_cannot_be(argv: list[str], words: list[str], finished: Path, refuse: Refusals) -> None:
    before = tree(finished)
    said = refuse.sentence(evaluate.main, finished, *argv)
    assert all(word in said for word in words), said
    assert tree(finished) == before


def test_an_evaluation_of_what_the_run_was_not(
    finished: Path, refuse: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fst_fast.state.fingerprint", lambda tasks, ood, base: ["of another model"])
        assert f"not those that {finished} was begun with" in refuse.sentence(evaluate.main, finished)
    shutil.copytree(finished, refuse.folder / "run")
    config = refuse.folder / "run" / "config.toml"
    config.write_text(config.read_text().replace('engine = "torch"', 'engine = "vllm"'))
    with monkeypatch.context() as patch:
        patch.setattr("fst_fast.config.find_spec", lambda name: None)
        assert "vllm is not installed" in refuse.sentence(evaluate.main, refuse.folder / "run")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        evaluate.main([str(finished)])


def test_a_report_that_cannot_be_written(finished: Path, refuse: Refusals) -> None:
    (refuse.folder / "file").touch()
    assert str(refuse.folder / "file") in refuse.sentence(report.main, finished, "--out", refuse.folder / "file" / "x")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--modes", "fst,rll"], ["mode = 'rll'"]),
        (["--modes", "fst,,rl"], ["modes = 'fst,,rl'", "empty"]),
        (["--modes", "fst,fst"], ["named twice"]),
        (["--modes", "fst '--seed"], ["modes", "quotation"]),
        (["--seeds", "0,0"], ["named twice"]),
        (["--seeds", "-5"], ["seeds = '-5'", "whole numbers"]),
        (["--seeds", "0,a"], ["seeds = '0,a'", "whole numbers"]),
        (["--seed", "3"], ["--seed: ", "--seeds"]),
        (["--modes", "rl --seed=3"], ["--seed=3: ", "--seeds"]),
        (["--jobs", "-1"], ["jobs = -1"]),
        (["--rollout.problems", "0"], ["rollout.problems = 0"]),
        (["--out", "{file}"], ["out: ", "cannot be written"]),
        (["--modes", "rl", "--out", "{begun}", "--eval.every", "7"], ["eval.every = 7", "begun with 10"]),
    ],
)
def test_a_comparison_that_cannot_be(argv: list[str], words: list[str], finished: Path, refuse: Refusals) -> None:
    (refuse.folder / "file").touch()
    shutil.copytree(finished, refuse.folder / "begun" / "rl-seed0")
    before = tree(refuse.folder)
    places = {name: str(refuse.folder / name) for name in ("file", "begun")}
    if "{begun}" in argv:
        argv = [*argv, *flags(SMALL)]
    said = refuse.sentence(compare.main, "--out", refuse.folder / "new", *(word.format(**places) for word in argv))
    assert all(word in said for word in words), said
    assert tree(refuse.folder) == before


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", ["train", "evaluate", "report", "compare"])
def test_every_command_started_as_a_module_has_these_manners(command: str, refuse: Refusals) -> None:
    def main(argv: list[str]) -> None:
        runpy.run_module(f"fst_fast.{command}", run_name="__main__", alter_sys=True)

    wrong = {"train": ["--resume", "missing"], "compare": ["--modes", "missing"]}.get(command, ["missing"])
    assert "missing" in refuse.sentence(main, *wrong)


# --------------------------------------------------------------------------------------------------- during a run


def test_a_proposed_prompt_that_is_too_long_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    train.main(flags(SMALL | {"mode": "gepa", "fast.max-prompt-chars": 30, "run-dir": tmp_path / "run"}))
    lines = map(json.loads, (tmp_path / "run" / "population.jsonl").read_text().splitlines())
    proposed = [line for line in lines if line["kind"] == "candidate" and line["status"] != "seed"]
    assert proposed
    assert {line["reason"][:8] for line in proposed} == {"too long"}


def test_a_proposed_prompt_must_leave_room_on_every_task_of_the_stream(tmp_path: Path) -> None:
    rows = [{"problem": f"{i} " + "a b c d " * 60, "answer": "x"} for i in range(40)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = Prompt("put a plus between items. " * 45)
    for stream, fits in (("glyph:A@2", True), (f"glyph:A@2,jsonl:{tmp_path}/long.jsonl@2", False)):
        config = cli.config_from(flags(SMALL | {"stream": stream}))
        assert train.Trainer(config, tmp_path)._fits(prompt) == fits


def test_an_engine_with_room_for_less_than_the_models_context_is_told_of_before_the_run(
    refuse: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(config: RolloutConfig, model: Model, **kwargs: Any) -> RolloutEngine:
        model.context = 40  # as make_engine does where vLLM has KV cache for so much
        return make_engine(config, model, **kwargs)

    monkeypatch.setattr(trainer, "make_engine", small)
    said = refuse.sentence(train.main, *flags(SMALL | {"run-dir": refuse.folder / "run"}))
    assert "rollout.max_new_tokens" in said
    assert "context of 40 tokens" in said


def test_weights_that_diverge_end_the_run_with_a_sentence(
    refuse: Refusals, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *_: torch.tensor(float("nan")))
    settings = SMALL | {"mode": "fst-distill", "run-dir": refuse.folder / "run"}
    said = refuse.sentence(train.main, *flags(settings))
    assert "gradient norm is nan" in said
    assert "slow.lr" in said


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fst_fast.files.Appender.write", FULL),
        ("fst_fast.files.Appender.sync", FULL),
        ("fst_fast.checkpoint.write_atomic", FULL),
        ("transformers.PreTrainedModel.save_pretrained", RuntimeError("I/O error: No space left (os error 28)")),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", Exception("No space left on device (os error 28)")),
        ("fst_fast.train.write_report", FULL),
    ],
)
def test_a_disk_that_fills_up_stops_the_run_at_a_good_checkpoint(
    name: str, error: Exception, finished: Path, refuse: Refusals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = refuse.folder / "run"
    settings = SMALL | {"mode": "rl", "run-dir": run}

    def fail(trainer: train.Trainer) -> None:
        if trainer.state.step == 2:

            def full(*_: object, **__: object) -> None:
                raise error

            patch.setattr(name, full)
        learn(trainer)

    learn = train.Trainer.learn
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "learn", fail)
        said = refuse.sentence(train.main, *flags(settings))
    assert "no space left on the disk" in said
    assert "--resume" in said
    assert not list((run / "checkpoints").glob(".*"))
    load_checkpoint(run)
    train.main(["--resume", str(run)])
    assert read_run(run).ends
    assert (run / "rollouts" / "rollouts.jsonl").read_bytes() == (finished / "rollouts" / "rollouts.jsonl").read_bytes()


def load_checkpoint(run: Path) -> None:
    folder = checkpoint.latest(run)
    assert folder
    policy = Policy(load_model(""), cli.read_config(run).slow)
    checkpoint.load_policy(folder, policy)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of that size at `folder`, and what resizes it; skips where that is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
@pytest.mark.parametrize("kilobytes", [4, 1000, 2000])
def test_a_really_full_disk_does_the_same(kilobytes: int, finished: Path, refuse: Refusals) -> None:
    run = refuse.folder / "disk" / "run"
    with small_disk(refuse.folder / "disk", kilobytes) as resize:
        settings = SMALL | {"mode": "rl", "run-dir": run, "tensorboard": True}
        assert "no space left on the disk" in refuse.sentence(train.main, *flags(settings))
        resize(50_000)
        train.main(["--resume", str(run)])
        whole = (finished / "rollouts" / "rollouts.jsonl").read_bytes()
        assert (run / "rollouts" / "rollouts.jsonl").read_bytes() == whole


def test_a_disk_that_is_full_from_the_start_leaves_no_run_behind(refuse: Refusals) -> None:
    with small_disk(refuse.folder / "disk", 4) as _:
        (refuse.folder / "disk" / "filler").write_bytes(b"x" * 4096)
        said = refuse.sentence(train.main, *flags(SMALL | {"run-dir": refuse.folder / "disk" / "run"}))
        assert "no space left on the disk" in said
        assert os.listdir(refuse.folder / "disk") == ["filler"]
