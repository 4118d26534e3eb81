from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fst_fast.cli import PlanCommand, config_from, parse_train
from fst_fast.config import PRESETS, without_effect
from fst_fast.errors import UserError
from fst_fast.launch import say
from fst_fast.plan import lines as plan_lines


def test_presets_depend_on_the_model_and_the_mode() -> None:
    assert config_from([]).fast.reflector == "phrasebook"
    assert config_from(["--mode", "rl"]).slow.lr != config_from([]).slow.lr
    paper = config_from(["--model.path", "somewhere"])
    assert (paper.fast.every, paper.fast.population, paper.rollout.group_size, paper.rollout.problems) == (6, 4, 8, 32)
    assert (paper.slow.lr, paper.slow.weight_max, paper.slow.kl_coef, paper.slow.warmup) == (1e-6, 4.0, 0.001, 10)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("qwen3-8b")])
def test_a_preset_of_qwen3_8b_needs_its_folder_and_is_planned_without(name: str) -> None:
    with pytest.raises(UserError, match=rf"model.path: the preset {name} trains a Qwen3-8B"):
        config_from(["--preset", name])
    config = parse_train(["--preset", name, "--model.path", "somewhere", "--mode", "rl"]).config
    assert (config.mode, config.fast.every, config.slow.recompute, config.model.dtype) == ("rl", 6, "full", "bfloat16")
    assert config.stream.startswith(name.removeprefix("qwen3-8b-") + ":")
    command = parse_train(["--plan", "--preset", name])
    assert isinstance(command, PlanCommand)
    lines = list(plan_lines(command.config, command.plan))
    assert lines[0].endswith(" on 8 x h100")
    assert any("fits in 79.2" in line for line in lines)


def test_flags_are_read_alike_in_every_spelling(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    text = 'mode = "rl"\nseed = 7\nrun_dir = "{}"\n[slow]\nlr = 0.1\n'
    file.write_text(text.format(tmp_path))
    for words in (["--config-file", str(file)], ["--config_file", str(file)], [f"--config-file={file}"]):
        config = config_from(words)
        assert (config.mode, config.seed, config.slow.lr) == ("rl", 7, 0.1)
        assert config.run_dir == ""  # the other run's
    file.write_text(text.format(tmp_path / "mine"))
    assert config_from(["--config-file", str(file)]).run_dir == str(tmp_path / "mine")
    assert config_from(["--config-file", str(file), "--seed", "8"]).seed == 8
    for words in (["--reflector", "policy"], ["--reflector=policy"], ["--fast.reflector", "policy"]):
        assert config_from(words).fast.reflector == "policy"


def test_settings_that_no_task_reads_are_named() -> None:
    changed = ["--jsonl.verifier", "regex", "--data.prompt", "agnostic"]
    assert without_effect(config_from(changed)) == ["jsonl", "data"]
    assert without_effect(config_from([*changed, "--stream", "glyph:A+jsonl:file@3"])) == ["data"]
    assert without_effect(config_from([*changed, "--stream", "hover:x@3", "--eval.ood", "jsonl:file"])) == []
    assert without_effect(config_from(["--eval.ood", "math-ood:x", *changed[2:]])) == []
    assert without_effect(config_from([])) == []


def test_help_is_running_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines end where the terminal does, not where the source's do."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        parse_train(["--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("--stream"))
    end = next(i for i, line in enumerate(lines) if line.startswith("--run-dir"))
    assert end - start > 5
    assert all(len(line) > 60 for line in lines[start + 1 : end - 1])


def test_help_that_nobody_reads_to_its_end_is_no_error() -> None:
    end, pipe = os.pipe()
    os.close(end)
    with open(pipe, "wb") as closed:
        command = [sys.executable, "-m", "fst_fast.train", "--help"]
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("error", ["", "raise BrokenPipeError('an engine')"])
def test_who_stops_reading_is_no_error_of_the_command_but_other_broken_pipes_are(error: str) -> None:
    """`python -m fst_fast.evaluate RUN | head`."""
    work = error or "print(1, flush=True)"
    program = f"from fst_fast.cli import run\ndef main(argv):\n    input()\n    {work}\nrun(main)"
    out = None if error else subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=out, stderr=subprocess.PIPE, text=True
    )
    if process.stdout:
        process.stdout.close()
    said = process.communicate("begin\n")[1]
    assert process.returncode == (1 if error else 128 + signal.SIGPIPE)
    assert said.endswith("BrokenPipeError: an engine\n" if error else "")
    assert bool(said) == bool(error)


def test_what_an_error_quotes_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert say("error: \x1b]0;title\x07 \x9b2J \u202e\u2028 \udcff, é\n\tof two lines", 2) == 2
    assert capsys.readouterr().err == "error: �]0;title� �2J �� �, é\n\tof two lines\n"
