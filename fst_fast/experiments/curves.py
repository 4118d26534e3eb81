"""RL, GEPA and FST on one task: what their learning curves say. All of these share the same runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import numpy as np

from fst_fast.config import INSTRUCTIONS
from fst_fast.experiments.experiment import (
    Arm,
    Claim,
    Experiment,
    Finding,
    Result,
    Runs,
    Setting,
    area,
    curves,
    dots,
    each,
    last,
    lasts,
    minus,
)
from fst_fast.experiments.stats import (
    Curve,
    area_between,
    at_matched,
    bootstrap_asymptotes,
    fit_sigmoid,
    reaches,
    standard_error,
)
from fst_fast.plots import PANELS
from fst_fast.runs import Run, count
from fst_fast.tasks.star_base import ASSET, TASK

REWARD, AGAINST_ROLLOUTS, KL, ENTROPY = PANELS
COSTS = ("steps", "rollouts", "tokens", "seconds", "GPU-hours")


def modes(setting: Setting) -> list[Arm]:
    """RL, GEPA and FST on the first stage."""
    return [setting.arm(label, mode, setting.first) for label, mode in (("RL", "rl"), ("GEPA", "gepa"), ("FST", "fst"))]


def rl_and_fst(setting: Setting) -> list[Arm]:
    return [arm for arm in modes(setting) if arm.label != "GEPA"]


def samples(run: Run) -> int:
    """Of one evaluation."""
    return int(run.evals[0]["problems"] * run.evals[0]["samples"])


# --------------------------------------------------------------------------------------------------------- efficiency


def spent(run: Run, record: dict[str, Any]) -> dict[str, float]:
    """What learning had cost at an evaluation: its wall clock without evaluations, on the machine of this run."""
    done = [r for r in run.steps if r["step"] <= record["step"]]
    done += [r for r in run.evolves if r["step"] < record["step"]]
    time = {name: sum(r["time"].get(name, 0.0) for r in done) for name in ("seconds", "gpu_hours")}
    counts = {"steps": record["step"], "rollouts": record["rollouts"], "tokens": record["tokens"]}
    return counts | {"seconds": time["seconds"], "GPU-hours": time["gpu_hours"]}


def to_level(run: Run, level: float) -> dict[str, float] | None:
    """Costs at the first evaluation that reached `level`; None when none did."""
    hit = next((r for r in run.evals if r["reward"] >= level), None)
    return spent(run, hit) if hit else None


def times(one: float, other: float) -> float:
    """How often `other` goes into `one`; once where both are 0: RL never got beyond what the base can."""
    return 1.0 if one == other else one / max(other, 1e-9)


def peak(run: Run) -> float:
    """The running peak that counts as reached by all: the best evaluation, less its standard error."""
    best = max(r["reward"] for r in run.evals)
    return max(0.0, best - standard_error(best, samples(run)))


FEWER = Claim("FST needs fewer steps to RL's running peak", "3.0× fewer (CodeIO, HoVer), 1.4× (Math)")
HIGHER = Claim("FST's peak is higher than RL's", "47.4 vs 43.0, 49.2 vs 46.4, 25.0 vs 17.3")
CEILING = Claim("GEPA alone ends below both", "a ceiling below RL and FST")


def efficiency(setting: Setting, runs: Runs) -> Result:
    """Steps, rollouts, tokens and seconds, on GPUs their hours too, to RL's running peak."""
    rows, ratios = [], {}
    levels = [peak(run) for run in runs["RL"]]
    found = {label: [to_level(r, level) for r, level in zip(of, levels, strict=True)] for label, of in runs.items()}
    on_gpus = any(costs and costs["GPU-hours"] for of in found.values() for costs in of)
    for cost in COSTS if on_gpus else COSTS[:-1]:
        show = "{:.3g}".format if cost == "GPU-hours" else count
        cells = [" / ".join("never" if c is None else show(c[cost]) for c in costs) for costs in found.values()]
        rl, fst = found["RL"], found["FST"]
        ratios[cost] = [times(a[cost], b[cost]) if a and b else 0.0 for a, b in zip(rl, fst, strict=True)]
        rows.append([f"{cost} to RL's peak", *cells, each(ratios[cost], ".1f")])
    best = {label: [max(r["reward"] for r in run.evals) for run in of] for label, of in runs.items()}
    rows.append(["peak reward", *(each(values) for values in best.values()), each(minus(best["FST"], best["RL"]))])
    logs = [math.log(ratio) if ratio else -math.inf for ratio in ratios["steps"]]
    below = [min(a, b) - c for a, b, c in zip(lasts(runs["RL"]), lasts(runs["FST"]), lasts(runs["GEPA"]), strict=True)]
    findings = [
        FEWER.judged(logs, f"{each(ratios['steps'], '.1f')}× fewer (0: never reached); logarithms"),
        HIGHER.judged(minus(best["FST"], best["RL"]), f"FST − RL {each(minus(best['FST'], best['RL']), '+.3f')}"),
        CEILING.judged(below, f"GEPA ends at {each(lasts(runs['GEPA']))}, the lower of the others {each(below)} above"),
    ]
    error = standard_error(max(max(values) for values in best.values()), samples(runs["RL"][0]))
    notes = [
        f"Reached: within one standard error (about {error:.3f}) of RL's best evaluation; the same rule for all arms. "
        f"Curves are seen every {runs['RL'][0].config['eval']['every']} steps.",
        "Seconds are wall clock of learning on this machine, whatever else ran on it.",
    ]
    return Result(
        findings,
        ["", *runs, "RL / FST (last row: FST − RL)"],
        rows,
        curves(REWARD, runs),
        notes,
        {"level": levels, "ratios": ratios, "costs": found},
    )


# ---------------------------------------------------------------------------------------------------------- asymptote

SIGMOID = Claim("FST's fitted asymptote A is higher than RL's", "higher on all three tasks")


def compute_curve(run: Run) -> tuple[np.ndarray, np.ndarray, float]:
    """(rollouts, reward, R0): validation reward over compute, and the reward before any."""
    points = [(r["rollouts"], r["reward"]) for r in run.evals if r["step"]]
    x, y = np.array(points, float).T
    return x, y, float(run.evals[0]["reward"])


def asymptote(setting: Setting, runs: Runs) -> Result:
    n, rows, draws, fits = samples(runs["RL"][0]), [], {}, {}
    for label, of in runs.items():
        found = [compute_curve(run) for run in of]
        fits[label] = [fit_sigmoid(*curve) for curve in found]
        draws[label] = bootstrap_asymptotes(found, n, np.random.default_rng(0))
        low, high = np.quantile(draws[label], (0.025, 0.975))
        rows.append(
            [
                label,
                each([f.asymptote for f in fits[label]], ".3f"),
                f"[{low:.3f}, {high:.3f}]",
                each([f.middle for f in fits[label]], ".0f"),
                each([f.slope for f in fits[label]], ".1f"),
            ]
        )
    gaps = [f.asymptote - r.asymptote for f, r in zip(fits["FST"], fits["RL"], strict=True)]
    low, high = np.quantile(draws["FST"] - draws["RL"], (0.025, 0.975))
    spread = f"A(FST) − A(RL) {each(gaps, '+.3f')}, mean {fmean(gaps):+.3f} [{low:+.3f}, {high:+.3f}] by bootstrap"
    verdict = "held" if low > 0 else "not held" if high < 0 else "unclear"
    finding = Finding(SIGMOID, spread, verdict)  # type: ignore[arg-type]
    notes = [
        "R − R0 = (A − R0) / (1 + (C_mid / C)^B) over C = rollouts, training and GEPA; A at most 1. "
        + (
            "The interval covers seeds and evaluation noise."
            if len(runs["RL"]) > 2
            else "With fewer than three seeds the interval covers the noise of evaluation only, not that of seeds."
        )
    ]
    drawn = curves(AGAINST_ROLLOUTS, runs)

    def paint(axes: Any) -> None:
        drawn(axes)
        for label, of in runs.items():
            for run, fit in zip(of, fits[label], strict=True):
                x = np.linspace(1, run.evals[-1]["rollouts"], 200)
                axes.plot(x, fit(x), color="#7a7a80", linewidth=0.8, linestyle=":")

    columns = ["", "A by seed", "mean A, 95 %", "C_mid", "B"]
    return Result([finding], columns, rows, paint, notes, {"gap": gaps, "interval": [float(low), float(high)]})


# ----------------------------------------------------------------------------------------------------------------- kl

CLOSER = Claim("FST is closer to the base model than RL at matched reward (exact KL)", "up to 70 % lower KL")


def kl_curve(run: Run) -> Curve:
    """(reward, KL) in the order of time."""
    return [(r["reward"], r["kl"]) for r in run.evals]


def kl_saved(rl: Run, fst: Run) -> float | None:
    """1 − the area under FST's KL over that under RL's, over the rewards both reach; None when there are none."""
    areas = area_between(kl_curve(rl), kl_curve(fst))
    return 1 - areas[1] / areas[0] if areas and areas[0] > 0 else None


def saving(claim: Claim, saved: list[float | None]) -> Finding:
    """The verdict over the seeds in which both arms reach a common reward."""
    known = [s for s in saved if s is not None and math.isfinite(s)]
    if not known:
        return claim.found("no seed in which RL and FST reach a common reward", "unclear")
    without = f" ({len(saved) - len(known)} without a common reward left out)" if len(known) < len(saved) else ""
    return claim.judged(known, f"KL lower by {each(known, '.0%')}{without}")


def kl(setting: Setting, runs: Runs) -> Result:
    rows: list[list[str]] = []
    saved: list[float | None] = []
    for seed, rl, fst in zip(setting.seeds, runs["RL"], runs["FST"], strict=True):
        matched, less = at_matched(kl_curve(rl), kl_curve(fst)), kl_saved(rl, fst)
        saved.append(less)
        ends = [f"{last(rl):.2f}, {last(fst):.2f}", f"{last(rl, 'kl'):.3f}, {last(fst, 'kl'):.3f}"]
        if matched and less is not None:
            low, (reward, a, b) = matched[0][0], matched[-1]
            areas = area_between(kl_curve(rl), kl_curve(fst))
            assert areas
            between = f"{areas[0] - areas[1]:.3f}"
            rows.append([str(seed), *ends, f"{low:.2f}–{reward:.2f}", between, f"{less:.0%}", f"{a:.3f}, {b:.3f}"])
        else:
            rows.append([str(seed), *ends, "no reward that both reach", "–", "–", "–"])
    finding = saving(CLOSER, saved)
    columns = [
        "seed",
        "reward at the end: RL, FST",
        "KL there: RL, FST",
        "rewards matched",
        "area between",
        "lower by",
        "KL at the highest matched reward: RL, FST",
    ]
    notes = [
        "Exact KL(π‖base) in nats per token on held-out problems, under each run's own best prompt; a run's KL at "
        "a reward is that of the first time it reaches it, interpolated between evaluations."
    ]
    return Result([finding], columns, rows, curves(KL, runs), notes, {"saved": saved})


# ------------------------------------------------------------------------------------------------------- ood, entropy

AS_GOOD = Claim("Without its optimised prompts FST is at least as good as RL out of distribution", "FST equals RL")


def ood(setting: Setting, runs: Runs) -> Result:
    """A task that is not trained on, under its seed prompt (--eval.ood); without one, other instructions of the glyph
    world, each stated by its own prompt. No optimised prompt takes part."""
    task = runs["RL"][0].config["eval"].get("ood", "")
    key, what = ("reward_ood", f"reward on {task}") if task else ("retention", "other instructions followed")
    base = [run.evals[0][key] for run in runs["RL"]]
    values = {"base": base, **{label: lasts(of, key) for label, of in runs.items()}}
    seed = {label: lasts(of, "reward_seed") for label, of in runs.items()}
    seed["base"] = [run.evals[0]["reward_seed"] for run in runs["RL"]]
    rows = [[label, each(of), each(seed[label])] for label, of in values.items()]
    gaps = minus(values["FST"], values["RL"])
    n = samples(runs["RL"][0]) if task else INSTRUCTIONS
    error = standard_error(fmean(values["base"]), n)
    finding = AS_GOOD.judged(gaps, f"FST − RL {each(gaps, '+.2f')}, more than −{error:.2f}", more_than=-error)
    columns = ["", what, "own task under the seed prompt"]
    on = f"{task} under its seed prompt" if task else f"{n} random rules, each fully stated by its prompt"
    notes = [
        f"Out of distribution here: {on}; {n} samples (standard error about {error:.2f}). Neither training nor an "
        "optimised prompt has seen them."
    ]
    return Result([finding], columns, rows, dots(values, what), notes, {"out_of_distribution": values})


def has_ood(setting: Setting) -> str:
    if setting.task.startswith("glyph:") or any(flag.startswith("--eval.ood") for flag in setting.flags):
        return ""
    return "it needs a task that no arm trains on: add --eval.ood TASK, e.g. --eval.ood codeio-ood:SOURCE"


ENTROPIES: Mapping[str, Callable[[Run], float]] = {
    "mean over the evaluations": lambda run: area(run, "entropy"),
    "at the end": lambda run: last(run, "entropy"),
    "of training rollouts, mean over the steps": lambda run: fmean(r["entropy"] for r in run.steps),
}
EXPLORES = Claim("Entropy stays higher in FST", "higher: different prompts explore")


def entropy(setting: Setting, runs: Runs) -> Result:
    rows: list[list[str]] = []
    for what, of in ENTROPIES.items():
        of_rl, of_fst = ([of(run) for run in runs[label]] for label in ("RL", "FST"))
        rows.append([what, each(of_rl, ".3f"), each(of_fst, ".3f"), each(minus(of_fst, of_rl), "+.3f")])
    matched = []
    for rl, fst in zip(runs["RL"], runs["FST"], strict=True):
        areas = area_between(*[[(r["reward"], r["entropy"]) for r in run.evals] for run in (rl, fst)])
        matched.append(None if areas is None else areas[1] - areas[0])
    rows.append(["at matched reward, area between", "", "", each(matched, "+.3f")])
    gaps = minus(*([area(run, "entropy") for run in runs[label]] for label in ("FST", "RL")))
    finding = EXPLORES.judged(gaps, f"FST − RL {each(gaps, '+.3f')} nats per token, mean over the evaluations")
    notes = [
        "In nats per token on held-out problems, under each run's best prompt: one that says the rule leaves less "
        "to be uncertain about, which is no loss of exploration. Training rollouts are under all its prompts."
    ]
    return Result([finding], ["", "RL", "FST", "FST − RL"], rows, curves(ENTROPY, runs), notes, {"gap": gaps})


# --------------------------------------------------------------------------------------------------------- star graph

LEAVES = Claim("On the star graph (base reward 0) FST leaves zero reward earlier than RL", "by step ~50, RL by ~250")
ABOVE = 0.05  # the reward that counts as having left zero


def star_graph_arms(setting: Setting) -> list[Arm]:
    """With a model of one's own, on the stream's star graph; else with the shipped tiny model, on the one it reads."""
    if not setting.glyph:
        return rl_and_fst(setting)
    stream, preset = f"{TASK.name}@{setting.steps}", () if "--preset" in setting.flags else ("--preset", "glyph")
    return [
        setting.arm(label, mode, stream, "--model.path", str(ASSET), *preset)
        for label, mode in (("RL", "rl"), ("FST", "fst"))
    ]


def star_graph(setting: Setting, runs: Runs) -> Result:
    steps = {
        label: [reaches([(r["step"], r["reward"]) for r in run.evals], ABOVE) for run in of]
        for label, of in runs.items()
    }
    logs = [
        (math.inf if b is not None else -math.inf) if a is None or b is None else math.log(max(a, 1) / max(b, 1))
        for a, b in zip(steps["RL"], steps["FST"], strict=True)
    ]
    base = {label: [run.evals[0]["reward_seed"] for run in of] for label, of in runs.items()}
    rows = [[label, each(base[label], ".3f"), each(of, ".0f"), each(lasts(runs[label]))] for label, of in steps.items()]
    finding = LEAVES.judged(
        logs, f"steps to reward {ABOVE}: RL {each(steps['RL'], '.0f')}, FST {each(steps['FST'], '.0f')}"
    )
    notes = [
        f"{TASK.name}, by a tiny model (fst_fast/assets/{ASSET.name}) that was taught to read these graphs under "
        "instructions. Its habits where no instruction is given were taught wrong on purpose: the base reward is near "
        "zero, and the phrase book has sentences that help and sentences that hurt. It guesses which of three nodes "
        "comes before the goal: about a third is within its reach at first. --model.path tries a real model."
    ]
    columns = ["", "base reward", f"steps to reward {ABOVE}", "reward at the end"]
    return Result([finding], columns, rows, curves(REWARD, runs), notes if setting.glyph else ())


def no_star_graph(setting: Setting) -> str:
    asked = setting.task.startswith("star_graph:")
    if setting.glyph:
        other = asked and setting.task != TASK.name
        return f"the tiny model that is made for it reads {TASK.name} only; give --model.path" if other else ""
    return "" if asked else "it needs --stream star_graph:ARMSxLENGTH@STEPS"


EXPERIMENTS = (
    Experiment("efficiency", "What does it cost to get as far as RL?", (FEWER, HIGHER, CEILING), modes, efficiency),
    Experiment("asymptote", "How far would each get?", (SIGMOID,), rl_and_fst, asymptote),
    Experiment("kl", "What does a reward cost in distance from the base?", (CLOSER,), rl_and_fst, kl),
    Experiment("ood", "What is left without the prompts?", (AS_GOOD,), rl_and_fst, ood, has_ood),
    Experiment("entropy", "How much is left to explore?", (EXPLORES,), rl_and_fst, entropy),
    Experiment(
        "star-graph", "How soon is there any reward at all?", (LEAVES,), star_graph_arms, star_graph, no_star_graph
    ),
)
