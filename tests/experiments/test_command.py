"""The command end to end on tiny runs: what it shares, what it leaves behind, how it goes on, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fst_fast.compare import core_seconds, work
from fst_fast.config import stages
from fst_fast.errors import UserError
from fst_fast.experiments.__main__ import ExperimentsCommand, choose, main, setting_of
from fst_fast.experiments.experiment import Arm, Base, Setting
from fst_fast.experiments.pool import Pool, begins, cut
from fst_fast.runs import read_run
from fst_fast.tasks import star_base
from fst_fast.train import train

SMALL = (
    "--rollout.problems", "2", "--rollout.group-size", "4", "--slow.minibatches", "1", "--fast.minibatch", "2",
    "--fast.scoring-problems", "2", "--fast.first-proposals", "2", "--fast.proposals", "1", "--fast.every", "2",
    "--eval.problems", "2", "--eval.every", "2", "--eval.samples", "1",
)  # fmt: skip


def pool(setting: Setting, *arms: Arm) -> Pool:
    return Pool(arms, setting, Path("runs"))


def test_equal_arms_and_beginnings_of_longer_runs_are_run_once() -> None:
    setting = Setting(tuple(stages("glyph:A@20,glyph:B@20")), (0, 1), SMALL)
    short, long = setting.arm("short", "fst", setting.stream(10)), setting.arm("long", "fst", setting.whole)
    again = setting.arm("again", "fst", setting.stream(20), "--fast.population", "4")  # the default, in other words
    other = setting.arm("other", "fst", setting.stream(10), "--fast.population", "2")
    later = setting.arm("fresh", "rl", "glyph:B@4", start=setting.arm("short", "fst", setting.stream(10)))
    found = pool(setting, short, long, again, other, later)
    assert len(found.jobs) == 2 * 3
    homes = {found.place(arm, 0).job.dir for arm in (short, long, again)}
    assert len(homes) == 1
    (home,) = homes
    fresh = found.place(later, 0).job
    assert fresh.needs == (home,)
    assert fresh.config.model.path == str(home / "checkpoints" / "step-000010" / "model")
    assert found.jobs[home].config.keep_checkpoints > 1000  # or the weights it starts from would be gone
    assert fresh.config.slow.lr == 5e-4  # glyph's own, though a model path is given


def test_what_begins_a_run_ends_at_an_evaluation_of_it_and_differs_in_nothing_else() -> None:
    config = setting_of(ExperimentsCommand("all"), SMALL).arm("x", "fst", "glyph:A@20,glyph:B@20")
    base = pool(Setting(tuple(stages("glyph:A@20")), (0,)), config).place(config, 0).job.config

    def of(stream: str, mode: str = "fst") -> bool:
        return begins(replace(base, stream=stream, mode=mode), replace(base, mode=mode))  # type: ignore[arg-type]

    assert of("glyph:A@20")
    assert of("glyph:A@10")
    assert of("glyph:A@20,glyph:B@4")
    assert not of("glyph:A@11")  # no evaluation there
    assert not of("glyph:B@10")
    longer = replace(base, stream="glyph:A>glyph:B@20")
    assert not begins(replace(base, stream="glyph:A>glyph:B@10"), longer)  # it shifts twice as fast
    assert not of("glyph:A@10,glyph:B@20")
    assert not of("glyph:A@22")
    assert not of("glyph:A@10", "rl-then-gepa")
    assert not begins(replace(base, seed=1, stream="glyph:A@10"), base)


def test_a_run_read_off_a_longer_one_is_the_run_itself(tmp_path: Path) -> None:
    setting = Setting(tuple(stages("glyph:A@4,glyph:B@2")), (0,), SMALL)
    short, long = setting.arm("short", "fst", setting.stream(4)), setting.arm("long", "fst", setting.whole)
    runs = []
    for arm in (short, long):
        config = replace(pool(setting, arm).place(arm, 0).job.config, run_dir=str(tmp_path / arm.label), threads=1)
        train(config, tmp_path / arm.label)
        runs.append(read_run(tmp_path / arm.label))
    for length in (4, 2):
        own = stages(f"glyph:A@{length}")
        for kind in ("evals", "steps", "evolves"):
            one, other = (getattr(cut(run, own), kind) for run in runs)
            assert [{**r, "time": 0} for r in one] == [{**r, "time": 0} for r in other]
        assert cut(runs[1], own).evals[-1]["step"] == length


def test_a_miniature_ends_in_files_and_a_page_and_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["kl,plasticity", "--miniature", "--seeds", "0", "--stream", "glyph:A@2,glyph:B@2"]
    argv += ["--out", str(tmp_path), *SMALL]
    main(argv)
    shown = capsys.readouterr().out
    assert "not even the base learned the second task" in " ".join(shown.split())
    page = (tmp_path / "kl-plasticity.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing from a network
    for name in ("kl", "plasticity"):
        data = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"claim", "paper", "ours", "verdict"} == set(data["findings"][0])
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}: ")
    claims = (tmp_path / "kl-plasticity.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in claims[2:]] == ["| kl", "| plasticity", "| plasticity"]
    assert {line.count(" | ") for line in claims} == {4}
    metrics = {path: path.read_bytes() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert len(metrics) == 2 + 3  # plasticity starts from the weights of kl's
    interrupted = next(iter(metrics)).parent
    (interrupted / "report.html").unlink()  # as if killed before its end: it goes on, the others stay
    main(argv)
    assert {path: path.read_bytes() for path in metrics} == metrics
    assert (interrupted / "report.html").is_file()


def test_a_model_that_is_warmed_up_here_is_one_that_runs_start_from(tmp_path: Path) -> None:
    setting = Setting(tuple(stages("glyph:A@2")), (0,), SMALL)
    of = Pool([setting.arm("Llama, RL", "rl", setting.first, start=Base("llama", 1))], setting, tmp_path)
    made, run = of.jobs.values()
    assert run.needs == (made.dir,)
    assert run.config.model.path == str(made.dir)
    made.argv.append("--help")  # its command line is read, the minute of warm start is spared
    work([made], 1)
    assert "--family {qwen3,llama,gemma3}" in made.dir.with_suffix(".log").read_text()
    assert core_seconds(made) > 0


def test_star_graphs_are_tried_on_a_tiny_model_made_for_them_or_on_the_users() -> None:
    (experiment,) = choose("star-graph")
    setting = setting_of(ExperimentsCommand("star-graph", miniature=True, seeds="0"), [])
    assert not experiment.unfit(setting)
    runs = pool(setting, *experiment.arms(setting)).jobs.values()
    assert {(run.config.mode, run.config.stream, run.config.model.path) for run in runs} == {
        (mode, "star_graph:3x2@60", str(star_base.ASSET)) for mode in ("rl", "fst")
    }
    assert {run.config.fast.reflector for run in runs} == {"phrasebook"}
    own = setting_of(ExperimentsCommand("star-graph", stream="star_graph:4x3@300"), ["--model.path", "x"])
    assert not experiment.unfit(own)
    assert {(arm.start, arm.flags[-1]) for arm in experiment.arms(own)} == {(None, "star_graph:4x3@300")}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sarsa"], "there is none of this name; known are all, efficiency"),
        (["kl", "--seeds", "0,0"], "different whole numbers"),
        (["kl", "--seeds", "a"], "different whole numbers"),
        (["kl", "--mode", "rl"], "chooses its modes"),
        (["kl", "--seed", "1"], "use --seeds"),
        (["kl", "--jobs", "-1"], "jobs = -1"),
        (["kl", "--stream", "glyph:A"], "TASK@STEPS"),
        (["kl", "--model.path", "x"], "tasks of its own"),
        (["ood", "--model.path", "x", "--stream", "jsonl:x@9"], "add --eval.ood TASK"),
        (["continual", "--stream", "glyph:A@2"], "a stream of two tasks"),
        (["drift", "--stream", "glyph:A@2,glyph:A@2"], "two different tasks"),
        (["star-graph", "--stream", "star_graph:4x3@9"], "reads star_graph:3x2 only"),
        (["kl", "--rollout.group-size", "3"], "group_size = 3"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_run(argv: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        main([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_all_cannot_test_says_why() -> None:
    setting = setting_of(ExperimentsCommand("all", stream="jsonl:x@100"), ["--model.path", "somewhere"])
    why = {e.name: e.unfit(setting) for e in choose("all")}
    assert {name for name, reason in why.items() if reason} == {
        "ood", "star-graph", "continual", "drift", "plasticity", "sliced", "routing", "families"
    }  # fmt: skip
