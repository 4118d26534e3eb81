from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fst_fast.compare import CompareCommand, fitting, main, plan
from fst_fast.config import ModelConfig
from fst_fast.errors import UserError

SMALL = [
    "--stream", "glyph:A@1", "--rollout.problems", "2", "--rollout.group-size", "2", "--fast.population", "2",
    "--fast.minibatch", "2", "--fast.scoring-problems", "2", "--fast.first-proposals", "2", "--eval.problems", "2",
    "--tensorboard", "False",
]  # fmt: skip


def test_arms_run_side_by_side_end_in_tables_and_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--modes", "rl,fst,fst --fast.population 1", "--out", str(tmp_path), *SMALL]
    main(argv)
    shown = capsys.readouterr().out
    for words in ("Stage 1 glyph:A", "reward, best single prompt", "steps to reward 0.9", "Settings that differ"):
        assert words in shown
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "fast.population = 1" in (tmp_path / "report.html").read_text()
    metrics = sorted(tmp_path.glob("*/metrics.jsonl"))
    assert [m.parent.name for m in metrics] == ["fst---fast-population-1-seed0", "fst-seed0", "rl-seed0"]
    before = [m.read_bytes() for m in metrics]
    main(argv)
    assert [m.read_bytes() for m in metrics] == before


def test_as_many_runs_as_cores_and_memory_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(10**8))
    jobs = plan(CompareCommand(out=tmp_path / "out"), [*SMALL, "--threads", "2"])
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for free, fit in ((64, 4), (5, 4), (3.5, 3), (0.1, 1)):
        monkeypatch.setattr("fst_fast.compare.free_memory", lambda free=free: int(free * 10**9))
        assert fitting(jobs) == fit
    large = [replace(job, config=replace(job.config, model=ModelConfig(path=str(tmp_path)))) for job in jobs]
    monkeypatch.setattr("fst_fast.compare.free_memory", lambda: 5 * 10**9)
    assert fitting(large) == 2


def test_a_run_that_fails_stops_the_comparison_with_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "rl-seed0").mkdir()
    (tmp_path / "rl-seed0" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"rl, seed 0 failed \(2\): error: run_dir: .*rl-seed0 is not empty"):
        main(["--modes", "rl", "--out", str(tmp_path), *SMALL])


def test_interrupted_a_comparison_says_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fst_fast.compare.start", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on where it stopped"):
        main(["--modes", "rl", "--out", str(tmp_path), *SMALL])


def test_arms_differ_in_mode_or_flags_and_every_seed_has_a_directory(tmp_path: Path) -> None:
    jobs = plan(CompareCommand(modes="rl,fst --fast.population 1", seeds="0,3", out=tmp_path), SMALL)
    assert [(j.config.mode, j.config.fast.population, j.config.seed) for j in jobs] == [
        ("rl", 2, 0), ("fst", 1, 0), ("rl", 2, 3), ("fst", 1, 3),
    ]  # fmt: skip
    assert len({j.dir for j in jobs}) == 4
    assert jobs[0].config.slow.lr != jobs[1].config.slow.lr  # each mode keeps its own measured rate


@pytest.mark.parametrize(("modes", "seeds"), [("rl,rl", "0"), ("rl", "1,1"), ("rl,,fst", "0"), ("sarsa", "0")])
def test_a_comparison_that_makes_no_sense_is_refused_before_any_run(modes: str, seeds: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        plan(CompareCommand(modes=modes, seeds=seeds, out=tmp_path), SMALL)
    assert not list(tmp_path.iterdir())
