"""What each measure says of runs whose answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fst_fast.config import stages
from fst_fast.experiments.__main__ import choose
from fst_fast.experiments.curves import asymptote, efficiency, kl, saving
from fst_fast.experiments.experiment import Claim, Setting
from fst_fast.experiments.page import Report, write_page
from fst_fast.experiments.prompts import deployment, route
from fst_fast.experiments.streams import drift, plasticity, schedules
from fst_fast.runs import Run
from fst_fast.tasks import make_task
from tests.test_report import Page, check_harmless

SETTING = Setting(tuple(stages("glyph:A@60,glyph:B@60")), (0, 1))


def run(rewards: list[float], *, mode: str = "rl", per_step: int = 100, kl_of_reward: float = 1.0) -> Run:
    """An evaluation every ten steps; learning took a second a step."""
    evals = tuple(
        {"step": 10 * i, "stage": 0, "task": "glyph:A", "reward": r, "kl": kl_of_reward * r, "entropy": 1 - r,
         "rollouts": 10 * i * per_step, "tokens": 100 * i * per_step, "problems": 64, "samples": 2, "reward_seed": 0.0}
        for i, r in enumerate(rewards)
    )  # fmt: skip
    steps = tuple(
        {"step": s + 1, "stage": 0, "entropy": 1.0, "live_groups": 8, "groups": 16, "time": {"seconds": 1.0}}
        for s in range(evals[-1]["step"])
    )
    return Run(Path("."), {"mode": mode, "seed": 0, "eval": {"every": 10}}, steps, evals, (), ())


def both(first: list[float], **kwargs: Any) -> list[Run]:
    return [run(first, **kwargs), run(first, **kwargs)]


RL = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9]
FST = [0.0, 0.5, 0.92, 0.93, 0.94, 0.95, 0.95]
GEPA = [0.0, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_efficiency_counts_to_the_evaluation_at_rl_s_running_peak() -> None:
    runs = {"RL": both(RL), "GEPA": both(GEPA), "FST": both(FST, per_step=200)}
    result = efficiency(SETTING, runs)
    assert result.numbers["ratios"] == {
        "steps": [3.0, 3.0], "rollouts": [1.5, 1.5], "tokens": [1.5, 1.5], "seconds": [3.0, 3.0]
    }  # fmt: skip
    assert [f.verdict for f in result.findings] == ["held", "held", "held"]
    assert "in 2 of 2 seeds; too few for an interval" in result.findings[0].ours
    never = efficiency(SETTING, runs | {"FST": [run(FST), run(GEPA)]})
    assert never.numbers["ratios"]["steps"] == [3.0, 0.0]
    assert [f.verdict for f in never.findings] == ["mixed", "mixed", "mixed"]


def test_where_rl_never_gets_beyond_the_base_both_reach_its_peak_at_once() -> None:
    flat = [run([0.3, 0.3, 0.2]) for _ in range(3)]
    found = efficiency(SETTING, {"RL": flat, "GEPA": flat, "FST": [run([0.3, 0.5, 0.9]) for _ in range(3)]})
    assert found.numbers["ratios"]["steps"] == [1.0, 1.0, 1.0]
    assert found.findings[0].verdict == "unclear"  # and not a sign that FST needs more of them


def test_efficiency_has_gpu_hours_where_the_runs_had_gpus() -> None:
    def on_eight(rewards: list[float]) -> Run:
        of = run(rewards)
        steps = tuple(r | {"time": {"seconds": 1.0, "gpu_hours": 8 / 3600}} for r in of.steps)
        return replace(of, steps=steps)

    result = efficiency(SETTING, {label: [on_eight(r)] * 2 for label, r in (("RL", RL), ("GEPA", GEPA), ("FST", FST))})
    assert result.numbers["ratios"]["GPU-hours"] == pytest.approx([3.0, 3.0])
    (row,) = [row for row in result.rows if row[0].startswith("GPU-hours")]
    assert row[1:4] == ["0.133 / 0.133", "never / never", "0.0444 / 0.0444"]  # 60 and 20 seconds of eight


def test_the_asymptotes_of_clean_curves_are_told_apart() -> None:
    low, high = ([top / (1 + (2000 / (1000 * i)) ** 3) if i else 0.0 for i in range(12)] for top in (0.5, 0.9))
    result = asymptote(SETTING, {"RL": both(low), "FST": both(high)})
    assert result.numbers["gap"] == pytest.approx([0.4, 0.4], abs=0.01)
    assert result.findings[0].verdict == "held"
    same = asymptote(SETTING, {"RL": both(low), "FST": both(low)})
    assert same.findings[0].verdict == "unclear"


def test_the_kl_saved_is_that_over_the_rewards_both_reach() -> None:
    result = kl(SETTING, {"RL": both(RL), "FST": both(FST, kl_of_reward=0.3)})
    assert result.numbers["saved"] == pytest.approx([0.7, 0.7])
    assert result.findings[0].verdict == "held"


def test_seeds_without_a_common_reward_are_left_out_and_said() -> None:
    claim = Claim("a", "b")
    assert saving(claim, [None, None]).verdict == "unclear"
    partly = saving(claim, [0.5, None, -0.2])
    assert "1 without a common reward left out" in partly.ours
    assert partly.verdict == "mixed"


def test_nobody_learning_the_second_task_is_no_sign_of_plasticity() -> None:
    flat, good = both([0.0] * 7), both(RL)
    labels = ("RL from the base", "RL from RL", "RL from FST")
    assert {f.verdict for f in plasticity(SETTING, dict.fromkeys(labels, flat)).findings} == {"unclear"}
    found = plasticity(SETTING, dict(zip(labels, (good, flat, good), strict=True))).findings
    assert [f.verdict for f in found] == ["held", "held"]
    found = plasticity(SETTING, dict(zip(labels, (good, flat, flat), strict=True))).findings
    assert [f.verdict for f in found] == ["not held", "not held"]


def drifting(old: list[float], new: list[float], population: list[list[str]]) -> Run:
    """Two tasks' rewards under the prompts "old" and "new", each of which solves its own task only."""
    n, evals, evolves = len(old) - 1, [], []
    for i, rewards in enumerate(zip(old, new, strict=True)):
        by_task = {
            task: {"weight": w, "reward": r, "reward_by_prompt": {"old": float(task == "A"), "new": float(task == "B")}}
            for task, w, r in zip("AB", (1 - i / n, i / n), rewards, strict=True)
        }
        reward = sum(part["weight"] * part["reward"] for part in by_task.values())
        evals.append({"step": 10 * i, "stage": 0, "task": "A>B", "reward": reward, "by_task": by_task})
        evolves.append({"step": 10 * i, "stage": 0, "task": "A>B", "population": population[i]})
    return Run(Path("."), {"mode": "fst", "seed": 0}, (), tuple(evals), tuple(evolves), ())


def test_arms_that_are_equal_prove_nothing_but_that_they_are_no_worse(tmp_path: Path) -> None:
    """Every experiment measures, and the page takes what all of them say."""
    task = make_task("glyph:A/B", seed=0)
    (tmp_path / "rollouts").mkdir()
    with open(tmp_path / "rollouts" / "rollouts.jsonl", "w") as file:
        for purpose, step in (("rl", 110), ("eval", 120)):
            for i, problem in enumerate([*task.train[:30], *task.validation[:30]]):
                for prompt in ("old", "new"):
                    row = {"purpose": purpose, "problem_id": problem.id, "prompt_id": prompt, "reward": float(i % 2)}
                    file.write(json.dumps({**row, "step": step}) + "\n")
    of = drifting([0.0] + [0.5] * 6, [0.0] + [0.5] * 6, [["old", "new"]] * 7)
    every = dict.fromkeys(("reward_seed", "reward_mean_prompt", "reward_per_slice", "retention", "kl", "entropy"), 0.5)
    every |= {"problems": 64, "samples": 2, "reward": 0.5}
    second = [{**r, **every, "step": 60 + r["step"], "stage": 1} for r in of.evals]
    evals = [{**r, **every, "reward": r["reward"]} for r in of.evals] + second
    evals = [{**r, "task": "glyph:A/B", "rollouts": 100 * r["step"], "tokens": 900 * r["step"]} for r in evals]
    step = {
        "stage": 0,
        "task": "glyph:A/B",
        "entropy": 1.0,
        "live_groups": 8,
        "groups": 16,
        "time": {"seconds": 1.0},
        "tokens": 9,
    }
    evolves = tuple({**r, "proposals": 8, "time": {"seconds": 1.0}} for r in of.evolves)
    config = {"mode": "fst", "seed": 0, "eval": {"every": 10}, "fast": {"reflector": "phrasebook"}}
    steps = tuple({**step, "step": s + 1, "rollouts": 100 * s} for s in range(120))
    whole = Run(tmp_path, config, steps, tuple(evals), evolves, ())
    reports = []
    for experiment in choose("all"):
        if not (why := experiment.unfit(SETTING)):
            result = experiment.measure(SETTING, {arm.label: [whole] * 2 for arm in experiment.arms(SETTING)})
            assert {len(row) for row in result.rows} == {len(result.columns)}
            assert {f.claim for f in result.findings} <= set(experiment.claims)
            reports.append(Report(experiment, result.findings, result, {}))
        assert not why
    held = {f.claim.text for report in reports for f in report.findings if f.verdict == "held"}
    assert held == {
        "Without its optimised prompts FST is at least as good as RL out of distribution",
        "FST that carries its prompts over the switch does no worse than one that resets them",
        "From an FST checkpoint it learns about as well as from the base",
    }
    write_page(reports, tmp_path / "page.html", "all", [], [])
    check_harmless(Page(tmp_path / "page.html"))


def test_under_drift_the_population_that_counts_is_the_one_evaluated() -> None:
    fst = drifting([1, 1, 0.5, 0, 0], [0, 0, 0.5, 1, 1], [["old"], ["old", "new"], ["new"], ["new"], ["old"]])
    rl = drifting([0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [["old"]] * 5)
    arms = {f"{label}, {how}": [run] * 2 for how in ("drifting", "interleaved") for label, run in zip(
        ("RL", "FST"), (rl, fst), strict=True)}  # fmt: skip
    result = drift(SETTING, arms)
    assert result.numbers["newer"][0] == [0, 0, 0.5, 1, 1]  # the last cycle comes after the last evaluation
    assert result.numbers["ahead"] == pytest.approx([(0.75 + 0.5 + 0.75 + 1) / 4 - (0.75 + 0.5 + 0.25) / 4] * 2)
    assert [f.verdict for f in result.findings] == ["held"] * 3
    shares = [row[1] for row in result.rows]
    assert shares == ["0%", "25%", "50%", "75%", "100%", "50%"]
    lost = drift(SETTING, {label: [rl] * 2 for label in arms})
    assert [f.verdict for f in lost.findings] == ["not held"] * 3


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 60, 200])
def test_every_schedule_makes_about_the_same_number_of_proposals(steps: int) -> None:
    for flags in schedules(steps).values():
        of = dict(zip(flags[::2], map(int, flags[1::2]), strict=True))
        cycles = math.ceil(steps / of["--fast.every"])
        assert of["--fast.first-proposals"] + (cycles - 1) * of["--fast.proposals"] == 48
    assert "at task starts only" in schedules(steps)


def test_the_router_learns_which_prompt_serves_which_problem() -> None:
    learned = [(p, f"{x} q r", float((x in "abcde") == (p == "one"))) for p in ("one", "two") for x in "abcdefghij"]
    assert route(learned, ["a r q", "j r q", "d q"], ["one", "two"]) == ["one", "two", "one"]


def test_a_deployment_is_measured_on_held_out_problems_only(tmp_path: Path) -> None:
    """Prompt "one" solves the slice a-e, "two" f-j: the router finds it in training rollouts and doubles the reward."""
    task = make_task("glyph:A/B", seed=3)
    rows = []
    for purpose, problems, step in (("rl", task.train[:200], 19), ("eval", task.validation[:64], 20)):
        for p in problems:
            for prompt in ("one", "two", "dropped"):
                reward = float((p.slice == "a-e") == (prompt == "one"))
                rows.append(
                    {"purpose": purpose, "problem_id": p.id, "prompt_id": prompt, "reward": reward, "step": step}
                )
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    single = sum(p.slice == "a-e" for p in task.validation[:64]) / 64
    last = {"step": 20, "stage": 0, "task": "glyph:A/B", "reward": single}
    of = Run(tmp_path, {"seed": 3}, (), (last,), ({"population": ["one", "two"]},), ())
    found = deployment(of)
    assert found.single == single
    assert found.router == found.oracle == 1.0
