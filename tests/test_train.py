"""The main job end to end: small, real, through the same `train` the command line calls."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fst_fast import cli, evaluate
from fst_fast.config import Config, EvalConfig, FastConfig, RolloutConfig, preset
from fst_fast.errors import UserError
from fst_fast.records import Prompt
from fst_fast.state import check_inputs
from fst_fast.tasks.jsonl import JsonlOptions
from fst_fast.train import main, train
from fst_fast.trainer import Trainer
from tests.models import FAMILIES, save_tiny
from tests.once import once


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def small(config: Config, **changes: Any) -> Config:
    return replace(
        config,
        rollout=replace(config.rollout, problems=4, group_size=4),
        fast=replace(
            config.fast, every=2, minibatch=4, scoring_problems=6, first_proposals=4, proposals=2, population=2
        ),
        eval=EvalConfig(every=2, problems=8, samples=1),
        tensorboard=False,
        progress=False,
        threads=1,
        **changes,
    )


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of FST, as they come by default. Not to be changed."""
    config = replace(preset("glyph", "fst"), stream="glyph:A@10", tensorboard=False, progress=False)
    return once(tmp_path_factory, "train/fst", lambda folder: train(config, folder))


def test_fst_learns_glyph_within_ten_steps_and_writes_all_of_it_down(run: Path) -> None:
    metrics = lines(run / "metrics.jsonl")
    evals = [r for r in metrics if r["kind"] == "eval"]
    assert evals[0]["reward"] == 0  # the seed prompt never says the rule
    assert evals[-1]["reward"] > 0.7  # sampled from the base under the best prompt it is .6: the weights learned too
    assert 0 < evals[-1]["kl"] < 0.1
    assert [r["step"] for r in metrics if r["kind"] == "step"] == list(range(1, 11))
    rollouts = lines(run / "rollouts" / "rollouts.jsonl")
    spent = [r for r in rollouts if r["purpose"] != "eval"]
    reused = sum(round(r["reuse"]["fraction"] * 128) for r in metrics if r["kind"] == "step")
    assert reused == 24 * 4
    taken = [i for r in metrics if r["kind"] == "step" for i in r["reuse"]["taken"]]
    assert len(set(taken)) == reused
    assert {r["purpose"] for r in rollouts if r["id"] in taken} == {"gepa"}
    assert len(spent) == evals[-1]["rollouts"] == 10 * 128 - reused + evals[-1]["gepa_rollouts"]
    assert sum(len(r["response_ids"]) for r in spent) == evals[-1]["tokens"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for r in spent:
        if r["purpose"] == "rl":
            groups.setdefault((r["step"], r["problem_id"]), []).append(r)
    assert [len(g) for g in groups.values()] == [4] * 24 + [8] * (160 - 24)  # the others were scored, and reused
    assert all(len({r["prompt_id"] for r in g}) == 4 for g in groups.values())  # one group over all the prompts
    assert all(r["versions"] == [[7, len(r["response_ids"])]] for r in spent if r["step"] == 7)
    lineage = lines(run / "population.jsonl")
    accepted = [r for r in lineage if r.get("status") == "accepted"]
    assert accepted
    assert all(r["parent"] and r["feedback"] for r in accepted)
    assert (run / "report.html").stat().st_size > 10_000
    assert metrics[-1]["kind"] == "end"


def test_a_run_is_evaluated_again_under_every_prompt(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "rollouts" / "rollouts.jsonl").read_bytes()
    monkeypatch.delattr("torch.optim.AdamW")  # of a large model it would not fit beside vLLM
    evaluate.main([str(run), "--problems", "32", "--samples", "1"])
    *shown, record = capsys.readouterr().out.splitlines()
    found = json.loads(record)
    assert (found["step"], found["task"], found["problems"]) == (10, "glyph:A", 32)
    assert found["reward"] > 0.6
    assert found["reward_none"] == found["reward_seed"] == 0
    saved = [r for r in lines(run / "population.jsonl") if r["kind"] == "population"][-1]
    population = [m["id"] for m in saved["members"][:4]]
    assert set(found["reward_by_prompt"]) == {*population, Prompt("transform the letters.").id, Prompt("").id}
    assert found["reward"] == found["reward_by_prompt"][found["best_prompt"]]
    for name, what in evaluate.LABELS.items():
        (line,) = (line for line in shown if f" {what} " in line)
        assert f" {found[name]:.3f} " in line
    assert (run / "rollouts" / "rollouts.jsonl").read_bytes() == before  # what it sampled is not the run's


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_lm_folder_and_any_jsonl_file_run_on_day_one(family: str, tmp_path: Path) -> None:
    """A random model cannot solve anything; what counts is that every part takes it, the policy reflector included."""
    folder = save_tiny(family, tmp_path / "model")
    data = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{a} + {b} = ?", "answer": str(a + b)} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "model.path": folder, "stream": f"jsonl:{data}@2", "jsonl.verifier": "numeric", "run-dir": tmp_path / "run",
        "rollout.problems": 4, "rollout.group-size": 4, "rollout.max-new-tokens": 8,
        "fast.population": 2, "fast.every": 2, "fast.minibatch": 3, "fast.scoring-problems": 6,
        "fast.first-proposals": 2, "fast.proposals": 2, "reflector.max-new-tokens": 16,
        "eval.every": 2, "eval.problems": 4, "eval.samples": 1, "slow.lr": 1e-3, "threads": 1,
        "tensorboard": False, "progress": False,
    }  # fmt: skip
    main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["kind"] for r in metrics] == ["eval", "evolve", "step", "step", "eval", "end"]
    assert metrics[1]["reflection"]["calls"] == 2
    rollouts = lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")
    cut = [r["finish_reason"] == "length" for r in rollouts if r["purpose"] == "eval" and r["step"] == 0]
    assert metrics[0]["truncated"] == sum(cut) / len(cut) > 0
    for step in metrics[2:4]:
        used = [r for r in rollouts if r["id"] in step["reuse"]["taken"]]
        used += [r for r in rollouts if r["purpose"] == "rl" and r["step"] == step["step"] - 1]
        assert len(used) == 16
        assert step["truncated"] == sum(r["finish_reason"] == "length" for r in used) / 16 > 0


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, "130", "interrupted"), (signal.SIGTERM, "143", "stopped by SIGTERM")]
)
def test_interrupted_a_run_says_how_it_goes_on(
    number: int,
    code: str,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(number)

    run = tmp_path / "my run"
    argv = ["train", "--run-dir", str(run), "--stream", "glyph:A@1", "--mode", "rl", "--eval.problems", "2"]
    argv += ["--jsonl.verifier", "regex"]  # which no task of it reads
    monkeypatch.setattr(sys, "argv", [*argv, "--progress", "False", "--tensorboard", "False"])
    for when, said in (
        ("__init__", ""),  # no run directory yet
        ("learn", f"; python -m fst_fast.train --resume '{run}' continues from the last checkpoint"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, when, interrupted)
            with pytest.warns(UserWarning, match=r"--jsonl\.\* have no effect"), pytest.raises(SystemExit, match=code):
                cli.run(main)
        assert capsys.readouterr().err == f"{word}{said}\n"
        assert run.exists() == (when == "learn")


def test_published_tasks_run_as_one_unlabelled_stream_from_one_agnostic_prompt(tmp_path: Path) -> None:
    data = Path(__file__).parent / "data"
    spec = f"math:{data / 'polaris.jsonl'}+hover:{data / 'hover'}>physics:{data / 'ugphysics'}"
    flags = {
        "model.path": save_tiny("qwen3", tmp_path / "model"), "stream": f"{spec}@2", "run-dir": tmp_path / "run",
        "data.prompt": "agnostic", "rollout.problems": 4, "rollout.group-size": 2, "rollout.max-new-tokens": 4,
        "fast.population": 1, "fast.every": 2, "fast.scoring-problems": 4, "fast.first-proposals": 1,
        "reflector.max-new-tokens": 8, "eval.problems": 2, "eval.samples": 1, "threads": 1,
        "tensorboard": False, "progress": False,
    }  # fmt: skip
    main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    evals = [r for r in lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert [[part["weight"] for part in r["by_task"].values()] for r in evals] == [[0.5, 0.5, 0], [0, 0, 1]]
    rollouts = lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")
    said = {r["problem_id"].partition(":")[0]: r["feedback"] for r in rollouts}
    assert {task: "expected: " in feedback for task, feedback in said.items()} == dict.fromkeys(
        ("math", "hover", "physics"), True
    )
    assert {r["prompt"] for r in rollouts if r["purpose"] == "eval"} >= {"Solve the problem."}


@pytest.mark.parametrize("mode", ["rl", "gepa", "rl-then-gepa", "fst-distill"])
def test_each_mode_moves_only_its_own_channels(mode: str, tmp_path: Path) -> None:
    config = small(preset("glyph", mode), stream="glyph:A@2,glyph:B@2", run_dir=str(tmp_path))  # type: ignore[arg-type]
    if mode == "gepa":
        config = replace(config, rollout=RolloutConfig(problems=2, group_size=2, max_new_tokens=20))
        config = replace(config, fast=replace(config.fast, scoring_problems=4))
    train(config, tmp_path / "run")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    last = [r for r in metrics if r["kind"] == "eval"][-1]
    cycles = [r for r in metrics if r["kind"] == "evolve"]
    purposes = {r["purpose"] for r in lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")}
    assert len(cycles) == {"rl": 0, "gepa": 2, "rl-then-gepa": 1, "fst-distill": 2}[mode]
    assert ("rl" in purposes) == (mode != "gepa")
    assert ("gepa" in purposes) == (mode != "rl")
    if mode == "gepa":
        assert last["kl"] == pytest.approx(0, abs=1e-6)  # frozen weights
    if mode == "rl-then-gepa":
        assert cycles[0]["step"] == 4
    if mode == "fst-distill":  # distillation uses no reward: every group counts
        steps = [r for r in metrics if r["kind"] == "step"]
        assert all(r["live_groups"] == r["groups"] and r["kl_teacher"] >= 0 for r in steps)
    if mode in ("rl", "fst-distill"):  # the deployed policy works without an evolved prompt
        assert last["reward"] == last["reward_seed"]


@pytest.mark.parametrize(("policy", "carried"), [("keep", True), ("reset", False)])
def test_prompts_are_kept_or_reset_when_the_task_switches(policy: str, carried: bool, tmp_path: Path) -> None:
    config = small(preset("glyph", "fst"), stream="glyph:A@2,glyph:B@2", run_dir=str(tmp_path))
    config = replace(config, fast=replace(config.fast, at_switch=policy, first_proposals=24, parallel=24))
    assert isinstance(config.fast, FastConfig)
    train(config, tmp_path / "run")
    pools = [r for r in lines(tmp_path / "run" / "population.jsonl") if r["kind"] == "population"]
    before = {m["id"] for m in pools[0]["members"]}
    scored_at_switch = {
        r["prompt_id"]
        for r in lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")
        if r["purpose"] == "gepa" and r["step"] == 2
    }
    assert len(before) > 1
    assert (before <= scored_at_switch) == carried


def test_a_mixture_is_one_stage_and_evaluations_tell_its_tasks_apart(tmp_path: Path) -> None:
    config = small(preset("glyph", "fst"), stream="glyph:A>glyph:B@4", run_dir=str(tmp_path))
    train(config, tmp_path / "run")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert {(r["stage"], r["task"]) for r in metrics if r["kind"] != "end"} == {(0, "glyph:A>glyph:B")}
    evals = [r for r in metrics if r["kind"] == "eval"]
    weights = [[part["weight"] for part in r["by_task"].values()] for r in evals]
    assert [w for pair in weights for w in pair] == pytest.approx([1, 0, 1 / 3, 2 / 3, 0, 1])
    for r in evals:
        parts = r["by_task"].values()
        assert list(r["by_task"]) == ["glyph:A", "glyph:B"]
        for key in ("reward", "kl", "entropy", "reward_seed"):
            assert r[key] == pytest.approx(sum(part["weight"] * part[key] for part in parts))
    rollouts = lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")
    of = {s: {r["problem_id"] for r in rollouts if (r["purpose"], r["step"]) == ("rl", s)} for s in range(4)}
    scored = {s: {r["problem_id"] for r in rollouts if (r["purpose"], r["step"]) == ("gepa", s)} for s in (0, 2)}
    assert all(x.startswith("glyph:A/") for x in of[0])
    assert all(x.startswith("glyph:B/") for x in of[3])
    # GEPA's problems are those of the next batches, whose groups they fill in part
    assert scored[0] == of[0] | of[1]
    assert scored[2] == of[2] | of[3]
    assert all(r["reuse"]["fraction"] > 0 for r in metrics if r["kind"] == "step" and r["step"] in (1, 3))


def test_a_task_that_is_not_trained_on_is_evaluated_under_its_seed_prompt(tmp_path: Path) -> None:
    unseen = tmp_path / "unseen.jsonl"
    problem = {"problem": "a b c d", "answer": "(?s).*", "verifier": "regex"}
    unseen.write_text("".join(json.dumps({**problem, "problem": f"a b c {x}"}) + "\n" for x in "abcdefghij"))
    config = small(preset("glyph", "fst"), stream="glyph:A@2", run_dir=str(tmp_path))
    config = replace(config, eval=replace(config.eval, ood=f"jsonl:{unseen}"), jsonl=JsonlOptions(verifier="regex"))
    train(config, tmp_path / "run")
    evals = [r for r in lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["reward_ood"] for r in evals] == [1.0, 1.0]  # any answer is right
    asked = [r for r in lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl") if "unseen" in r["problem_id"]]
    assert {r["purpose"] for r in asked} == {"eval"}
    assert len({r["prompt_id"] for r in asked}) == 1


def test_failed_problems_go_to_the_reflection_first_and_a_group_to_its_slice_s_prompt(tmp_path: Path) -> None:
    config = small(preset("glyph", "fst"), stream="glyph:A/B@4", run_dir=str(tmp_path))
    config = replace(config, fast=replace(config.fast, failed_first=True, route="slice", minibatch=2, reuse=False))
    train(config, tmp_path / "run")
    rollouts = [r for r in lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl") if r["purpose"] == "rl"]
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for r in rollouts:
        groups.setdefault((r["step"], r["problem_id"], r["slice"]), []).append(r)
    # one of the two prompts solves some of a-e; none solves any of f-j, whose rollouts are spread over both
    used = {(x, len({r["prompt_id"] for r in group})) for (step, _, x), group in groups.items() if step < 2}
    assert used == {("a-e", 1), ("f-j", 2)}
    failed = {x for (step, x, _), group in groups.items() if step < 2 and not any(r["reward"] for r in group)}
    proposals = [r for r in lines(tmp_path / "run" / "population.jsonl") if r["kind"] == "candidate"]
    read = [set(r["problems"]) for r in proposals if r["cycle"] == 1]
    assert any(minibatch <= failed for minibatch in read)  # no longer among the problems of the next batches


def test_a_run_whose_problems_were_changed_is_not_resumed(tmp_path: Path) -> None:
    data = tmp_path / "echo.jsonl"
    rows = [{"problem": f"a {i}", "answer": f"a {i}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(preset("glyph", "rl"), stream=f"jsonl:{data}@1", run_dir=str(tmp_path / "run"))
    train(config, tmp_path / "run")
    main(["--resume", str(tmp_path / "run")])  # nothing changed: nothing to do
    data.write_text("".join(json.dumps(row | {"answer": "b"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"not those that .* was begun with; put the old ones back"):
        main(["--resume", str(tmp_path / "run")])


def test_a_file_to_evaluate_on_is_used_whole_but_for_what_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, texts: list[str]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"problem": x, "answer": x}) + "\n" for x in texts))
        return f"jsonl:{tmp_path / name}"

    trained, new = [f"a {i}" for i in range(40)], [f"b {i}" for i in range(6)]
    config = small(preset("glyph", "rl"), stream=write("trained", trained) + "@1", run_dir=str(tmp_path / "run"))
    config = replace(config, eval=replace(config.eval, ood=write("ood", [*new, trained[0]])))
    train(config, tmp_path / "run")
    rollouts = lines(tmp_path / "run" / "rollouts" / "rollouts.jsonl")
    texts = {f"jsonl:{tmp_path}/{name}/{i}": x for name in ("trained", "ood")
             for i, x in enumerate(trained if name == "trained" else [*new, trained[0]], start=1)}  # fmt: skip
    assert all(r["problem"] == texts[r["problem_id"]] for r in rollouts)
    fitted = {r["problem"] for r in rollouts if r["purpose"] == "rl"}
    held_out = {r["problem"] for r in rollouts if r["purpose"] == "eval" and "/trained/" in r["problem_id"]}
    assert len(held_out) == 4
    assert not fitted & held_out
    left = set(new) | ({trained[0]} & held_out)
    assert {r["problem"] for r in rollouts if "/ood/" in r["problem_id"]} == left
    for spec, count in (("", 4), (write("both", [*new, *trained]), 10)):
        capsys.readouterr()
        evaluate.main([str(tmp_path / "run"), "--samples", "1", "--task", spec])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["problems"] == count
    write("ood", new[:5])
    with pytest.raises(UserError, match=r"those of eval\.ood among them, .* are not those that .* was begun with"):
        main(["--resume", str(tmp_path / "run")])
    state, *_ = (tmp_path / "run").glob("checkpoints/*/state.json")
    saved = json.loads(state.read_text())
    with pytest.raises(UserError, match="was begun by an older version"):
        check_inputs("".join(saved["inputs"]), saved["inputs"], tmp_path / "run")
