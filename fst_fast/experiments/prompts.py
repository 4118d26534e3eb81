"""Several prompts: how many, spread or routed, which problems they learn from, and what their evaluations save."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from fst_fast.experiments.experiment import (
    Arm,
    Claim,
    Experiment,
    Result,
    Runs,
    Setting,
    area,
    dots,
    each,
    glyph_only,
    lasts,
    minus,
)
from fst_fast.runs import Run
from fst_fast.tasks import make_task

LIVE_STEPS = 10  # the last steps of a run, over which groups that carry a gradient are counted


def k_arm(setting: Setting, stream: str, k: int, *flags: str, label: str = "") -> Arm:
    return setting.arm(label or f"K = {k}", "fst", stream, "--fast.population", str(k), *flags)


def sliced_stream(setting: Setting) -> str:
    """One rule for the first half of the letters, another for the second."""
    return f"glyph:A/B@{setting.short if setting.miniature else max(1, setting.steps * 2 // 3)}"


def live(run: Run) -> float:
    """Share of the groups whose rewards differ, in the last steps."""
    tail = run.steps[-LIVE_STEPS:]
    return sum(r["live_groups"] for r in tail) / sum(r["groups"] for r in tail)


# ------------------------------------------------------------------------------------------------- population, sliced

MORE = Claim("A population of K prompts learns more than one prompt", "K = 4 (8 on the star graph)")
SPECIALISTS = Claim(
    "Where the rule depends on the problem, K = 2 prompts solve, each on its slice, what one cannot",
    "populations are kept for this; no number",
)
INFORMED = Claim("... and make more groups carry a gradient", "no number")
SPREAD = Claim(
    "Spreading a group over K = 4 prompts learns more than giving it to the best of them", "spreads; no number"
)


def population_arms(setting: Setting) -> list[Arm]:
    stream, sizes = setting.stream(setting.short), (1, 2, 4) if setting.miniature else (1, 2, 4, 8)
    arms = [k_arm(setting, stream, k) for k in sizes]
    return [*arms, k_arm(setting, stream, 4, "--fast.route", "slice", label="K = 4, routed")]


def population(setting: Setting, runs: Runs) -> Result:
    areas = {label: [area(run) for run in of] for label, of in runs.items()}
    rows = [
        [
            label,
            each(areas[label], ".3f"),
            each(lasts(of)),
            each(lasts(of, "reward_mean_prompt")),
            each([live(run) for run in of]),
        ]
        for label, of in runs.items()
    ]
    gaps = minus(areas["K = 4"], areas["K = 1"])
    spread = minus(areas["K = 4"], areas["K = 4, routed"])
    findings = [
        MORE.judged(gaps, f"K = 4 − K = 1 {each(gaps, '+.3f')} in mean reward over the run"),
        SPREAD.judged(spread, f"spread − routed {each(spread, '+.3f')} in mean reward over the run"),
    ]
    columns = [
        "",
        "mean reward over the run",
        "reward at the end, best prompt",
        "mean over the prompts",
        "groups with a gradient, last 10 steps",
    ]
    notes = [
        "One rule governs all problems of this task, so routed means: to the prompt that scored best on the others. "
        "Where problems differ: see sliced and routing."
    ]
    return Result(findings, columns, rows, dots(areas, "mean reward over the run"), notes, {"areas": areas})


def sliced_arms(setting: Setting) -> list[Arm]:
    stream = sliced_stream(setting)
    return [setting.arm("RL", "rl", stream), *(k_arm(setting, stream, k) for k in (1, 2, 4))]


def sliced(setting: Setting, runs: Runs) -> Result:
    per_slice = {label: lasts(of, "reward_per_slice") for label, of in runs.items()}
    carry = {label: [live(run) for run in of] for label, of in runs.items()}
    rows = [[label, each(lasts(of)), each(per_slice[label]), each(carry[label])] for label, of in runs.items()]
    gaps, informed = (minus(values["K = 2"], values["K = 1"]) for values in (per_slice, carry))
    findings = [
        SPECIALISTS.judged(gaps, f"best prompt per slice, K = 2 − K = 1: {each(gaps, '+.2f')}"),
        INFORMED.judged(
            informed, f"share of such groups in the last 10 steps, K = 2 − K = 1: {each(informed, '+.2f')}"
        ),
    ]
    columns = [
        "",
        "best single prompt",
        "best prompt per slice (cross-fitted)",
        "groups with a gradient, last 10 steps",
    ]
    notes = [f"Task {sliced_stream(setting)}. Without choosing the prompt per problem, K = 2 gains nothing."]
    return Result(
        findings, columns, rows, dots(per_slice, "reward, best prompt per slice"), notes, {"per_slice": per_slice}
    )


# ------------------------------------------------------------------------------------------------------------ routing

FAILED = Claim(
    "Sending all-failed problems to the reflection first speeds learning up", "no such rule; from an article"
)
TRAINED = Claim(
    "Training each problem under its slice's best prompt beats spreading it over the prompts", "no such rule"
)
ROUTED = Claim("A small learned router beats the best single prompt at deployment", "no number")


def routing_arms(setting: Setting) -> list[Arm]:
    stream, first = sliced_stream(setting), setting.stream(setting.short)
    return [
        k_arm(setting, stream, 2, label="sliced, spread"),
        k_arm(setting, stream, 2, "--fast.route", "slice", label="sliced, routed"),
        setting.arm("plain", "fst", first),
        setting.arm("plain, failed first", "fst", first, "--fast.failed-first", "True"),
    ]


def routing(setting: Setting, runs: Runs) -> Result:
    areas = {label: [area(run) for run in of] for label, of in runs.items()}
    deployed = {label: [deployment(run) for run in runs[label]] for label in ("sliced, spread", "sliced, routed")}
    rows = []
    for label, of in runs.items():
        found = deployed.get(label)
        rows.append(
            [
                label,
                each(areas[label], ".3f"),
                each(lasts(of)),
                each(lasts(of, "reward_per_slice")),
                each([d.router for d in found]) if found else "",
                each([d.oracle for d in found]) if found else "",
            ]
        )
    failed = minus(areas["plain, failed first"], areas["plain"])
    same = not any(failed)  # the rule never spoke: no group failed wholly before a cycle
    per_slice = {label: lasts(of, "reward_per_slice") for label, of in runs.items()}
    trained = minus(per_slice["sliced, routed"], per_slice["sliced, spread"])
    gained = [d.router - d.single for d in deployed["sliced, spread"]]
    findings = [
        FAILED.found("the same run with and without it: no group failed wholly before a cycle", "unclear")
        if same
        else FAILED.judged(failed, f"mean reward over the run, failed first − not: {each(failed, '+.3f')}"),
        TRAINED.judged(trained, f"best prompt per slice, routed − spread: {each(trained, '+.2f')}"),
        ROUTED.judged(gained, f"router − best single prompt, K = 2 spread: {each(gained, '+.2f')}"),
    ]
    columns = ["", "mean reward over the run", "best single prompt", "best per slice", "learned router", "oracle"]
    notes = [
        "Router: for each prompt a ridge regression of the reward on the problem's words and word pairs, fitted on the "
        "training rollouts of the last steps, tested on the held-out problems. Oracle: each problem's best prompt in "
        "hindsight, which counts luck as skill."
    ]
    return Result(findings, columns, rows, dots(areas, "mean reward over the run"), notes, {"areas": areas})


@dataclass(frozen=True)
class Deployment:
    """Held-out reward by how the prompt is chosen."""

    single: float
    router: float
    oracle: float


def deployment(run: Run, steps: int = 20) -> Deployment:
    """The last population on the last evaluation's problems; the router learns from training rollouts of `steps`."""
    end, last = run.evals[-1]["step"], run.evals[-1]
    task = make_task(last["task"], seed=run.seed)
    texts = {p.id: task.messages("", p)[-1]["content"] for p in (*task.train, *task.validation)}
    prompts = run.evolves[-1]["population"]
    learned: list[tuple[str, str, float]] = []
    tested: dict[str, dict[str, list[float]]] = {}
    with open(run.dir / "rollouts" / "rollouts.jsonl") as file:
        for line in file:
            r = json.loads(line)
            if r["prompt_id"] not in prompts or r["problem_id"] not in texts:
                continue
            if r["purpose"] == "eval" and r["step"] == end:
                tested.setdefault(r["problem_id"], {}).setdefault(r["prompt_id"], []).append(r["reward"])
            elif r["purpose"] != "eval" and end - steps <= r["step"] < end:
                learned.append((r["prompt_id"], texts[r["problem_id"]], r["reward"]))
    chosen = route(learned, [texts[problem] for problem in tested], prompts)
    scores = [{p: fmean(rewards) for p, rewards in by_prompt.items()} for by_prompt in tested.values()]
    return Deployment(
        single=last["reward"],
        router=fmean(of[p] for of, p in zip(scores, chosen, strict=True)),
        oracle=fmean(max(of.values()) for of in scores),
    )


def route(learned: Sequence[tuple[str, str, float]], texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The prompt id expected to do best on each text, from (prompt id, text, reward): ridge regression on bags of words
    and word pairs."""
    words = {w: i for i, w in enumerate(dict.fromkeys(w for _, text, _ in learned for w in features(text)))}

    def bags(of: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(of), len(words) + 1))
        rows[:, -1] = 1
        for row, text in zip(rows, of, strict=True):
            for w in features(text):
                if w in words:
                    row[words[w]] = 1
        return rows

    wanted, expected = bags(texts), []
    for prompt in prompts:
        own = [(text, reward) for p, text, reward in learned if p == prompt]
        x, y = bags([text for text, _ in own]), np.array([reward for _, reward in own])
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        expected.append(wanted @ weights)
    return [prompts[i] for i in np.argmax(expected, axis=0)]


def features(text: str) -> list[str]:
    words = ["^", *text.split()]
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


# -------------------------------------------------------------------------------------------------------------- reuse

THIRD = Claim("GEPA's evaluations serve about a third of the RL rollouts", "about a third (second-hand)")
CHEAPER = Claim("Reuse and racing make an FST run cheaper in generated tokens", "steps ~29 % faster (second-hand)")
ABOUT_A_THIRD = 0.28


def reuse_arms(setting: Setting) -> list[Arm]:
    stream = setting.stream(setting.short)
    scoring = ("--fast.scoring-problems", "160") if setting.glyph else ()  # all of the next T batches, as the paper's
    how: Mapping[str, tuple[str, ...]] = {
        "neither": ("--fast.race", "False", "--fast.reuse", "False"),
        "race": ("--fast.reuse", "False"),
        "race and reuse": (),
    }
    return [setting.arm(label, "fst", stream, *scoring, *flags) for label, flags in how.items()]


def reuse(setting: Setting, runs: Runs) -> Result:
    def reused(run: Run) -> float:
        return fmean(r.get("reuse", {}).get("fraction", 0.0) for r in run.steps)

    tokens = {label: [float(run.total("tokens")) for run in of] for label, of in runs.items()}
    rows = [
        [
            label,
            each([t / 1e3 for t in tokens[label]], ".0f"),
            each([reused(run) for run in of], ".0%"),
            each([area(run) for run in of], ".3f"),
            each(lasts(of)),
        ]
        for label, of in runs.items()
    ]
    fraction = [reused(run) for run in runs["race and reuse"]]
    saved = [1 - b / a for a, b in zip(tokens["neither"], tokens["race and reuse"], strict=True)]
    findings = [
        THIRD.judged(fraction, f"{each(fraction, '.0%')} of them, more than {ABOUT_A_THIRD:.0%}", ABOUT_A_THIRD),
        CHEAPER.judged(saved, f"{each(saved, '.0%')} fewer tokens than with neither"),
    ]
    columns = ["", "tokens, thousands", "RL rollouts reused", "mean reward over the run", "reward at the end"]
    notes = [
        "Prompts are scored on all problems of the next T batches; whole runs with three seeds: benchmarks/reuse.py."
    ]
    return Result(findings, columns, rows, dots(tokens, "tokens generated"), notes, {"tokens": tokens})


EXPERIMENTS = (
    Experiment("population", "How many prompts?", (MORE, SPREAD), population_arms, population),
    Experiment("sliced", "Where do several prompts pay?", (SPECIALISTS, INFORMED), sliced_arms, sliced, glyph_only),
    Experiment(
        "routing",
        "Which channel and which prompt for which problem?",
        (FAILED, TRAINED, ROUTED),
        routing_arms,
        routing,
        glyph_only,
    ),
    Experiment("reuse", "What do GEPA's rollouts save?", (THIRD, CHEAPER), reuse_arms, reuse),
)
