"""Runs over several tasks, or from another run's weights: continual learning, drift, plasticity, when to evolve."""

from __future__ import annotations

from collections.abc import Sequence

from fst_fast.experiments.curves import REWARD, rl_and_fst
from fst_fast.experiments.experiment import (
    Arm,
    Claim,
    Experiment,
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
    two_stages,
    two_tasks,
)
from fst_fast.runs import Record, Run

# ---------------------------------------------------------------------------------------------------------- continual

AHEAD = Claim("After a switch of tasks in one uninterrupted run FST is ahead of RL", "37.7 % vs 20.7 % (CodeIO stage)")
CARRIED = Claim(
    "FST that carries its prompts over the switch does no worse than one that resets them",
    "carried in the paper; one article resets",
)
WORSE = 0.05  # a difference in reward that counts as one


def continual_arms(setting: Setting) -> list[Arm]:
    whole = setting.whole
    arms = [setting.arm(label, mode, whole) for label, mode in (("RL", "rl"), ("GEPA", "gepa"), ("FST", "fst"))]
    arms.append(setting.arm("FST, prompts reset", "fst", whole, "--fast.at-switch", "reset"))
    if not setting.miniature:
        n = max(1, setting.short // 2)
        back = ",".join(f"{stage.task}@{n}" for _ in range(2) for stage in setting.stages)
        arms += [setting.arm(f"{label}, alternating", mode, back) for label, mode in (("RL", "rl"), ("FST", "fst"))]
    return arms


def ends(run: Run) -> list[float]:
    """The reward at the end of each stage."""
    return [last(run, stage=stage) for stage in sorted(run.stages)]


def continual(setting: Setting, runs: Runs) -> Result:
    rows = [[label, *(each(values) for values in zip(*map(ends, of), strict=True))] for label, of in runs.items()]
    stages = max(len(row) for row in rows) - 1
    rows = [row + [""] * (stages + 1 - len(row)) for row in rows]
    final = {label: lasts(of) for label, of in runs.items()}
    gaps, carried = minus(final["FST"], final["RL"]), minus(final["FST"], final["FST, prompts reset"])
    findings = [
        AHEAD.judged(gaps, f"at the end of the last stage FST {each(final['FST'])}, RL {each(final['RL'])}"),
        CARRIED.judged(carried, f"carried − reset {each(carried, '+.2f')}, more than −{WORSE}", more_than=-WORSE),
    ]
    main = {label: of for label, of in runs.items() if "alternating" not in label}
    paint = curves(REWARD, main, {"FST, prompts reset": "fst-distill"})
    columns = ["reward at the end of", *(f"stage {i + 1}" for i in range(stages))]
    notes = ["The loop is told of the switch: FST evolves prompts there at once. Streams without a marker: see drift."]
    return Result(findings, columns, rows, paint, notes, {"final": final})


# -------------------------------------------------------------------------------------------------------------- drift

DRIFTS = Claim("On a task that drifts into another one without a marker FST is ahead of RL", "asked by others")
FOLLOWS = Claim("... and the population follows: at the end its best prompt is better on the new task", "no number")
INTERLEAVES = Claim("On two tasks interleaved without labels FST is ahead of RL", "asked by others")


def drift_arms(setting: Setting) -> list[Arm]:
    one, other, *_ = setting.stages
    drift = f"{one.task}>{other.task}@{one.steps + other.steps}"
    mixed = f"{one.task}+{other.task}@{one.steps}"
    return [
        setting.arm(f"{label}, {how}", mode, stream)
        for how, stream in (("drifting", drift), ("interleaved", mixed))
        for label, mode in (("RL", "rl"), ("FST", "fst"))
    ]


def newer(run: Run, record: Record) -> float:
    """Share of the population at an evaluation that does better on the second task of the mixture than on the first."""
    old, new = (part["reward_by_prompt"] for part in record["by_task"].values())
    before = [r["population"] for r in run.evolves if r["step"] < record["step"]]
    population = before[-1] if before else []
    return sum(new[p] > old[p] for p in population) / max(1, len(population))


def drift(setting: Setting, runs: Runs) -> Result:
    rl, fst = runs["RL, drifting"], runs["FST, drifting"]
    rows = []
    for quarter in range(5):
        at = [[run.evals[quarter * (len(run.evals) - 1) // 4] for run in of] for of in (rl, fst)]
        tasks = [list(r["by_task"].values()) for r in at[1]]
        rows.append(
            [
                f"drifting, step {at[0][0]['step']}",
                f"{tasks[0][1]['weight']:.0%}",
                each([r["reward"] for r in at[0]]),
                each([r["reward"] for r in at[1]]),
                *(each([t[i]["reward"] for t in tasks]) for i in (0, 1)),
                each([newer(run, r) for run, r in zip(fst, at[1], strict=True)], ".0%"),
            ]
        )
    mixed = {label: runs[f"{label}, interleaved"] for label in ("RL", "FST")}
    parts = [list(run.evals[-1]["by_task"].values()) for run in mixed["FST"]]
    rows.append(
        [
            f"interleaved, step {mixed['FST'][0].evals[-1]['step']}",
            "50%",
            *(each(lasts(of)) for of in mixed.values()),
            *(each([p[i]["reward"] for p in parts]) for i in (0, 1)),
            each([newer(run, run.evals[-1]) for run in mixed["FST"]], ".0%"),
        ]
    )
    ahead = minus([area(run) for run in fst], [area(run) for run in rl])
    at_end = [[part["reward"] for part in run.evals[-1]["by_task"].values()] for run in fst]
    followed = [new - old for old, new in at_end]
    shares = each([newer(run, run.evals[-1]) for run in fst], ".0%")
    together = minus([area(run) for run in mixed["FST"]], [area(run) for run in mixed["RL"]])
    findings = [
        DRIFTS.judged(ahead, f"FST − RL {each(ahead, '+.3f')} in mean reward over the run, on the task as it then is"),
        FOLLOWS.judged(followed, f"its reward there − on the old one {each(followed, '+.2f')}; so are {shares} of all"),
        INTERLEAVES.judged(together, f"FST − RL {each(together, '+.3f')} in mean reward over the run"),
    ]
    columns = ["", "share of the second task", "RL reward", "FST reward", "FST on the first", "FST on the second"]
    notes = [
        f"{setting.stages[0].task} fades into {setting.stages[1].task} from the first step to the last; nothing tells "
        "the loop, a prompt or a problem which of the two a problem is from. In glyph a problem does not show it "
        "either: whoever knows both rules can be right on half of two equal parts at most, if they never agree.",
    ]
    numbers = {"ahead": ahead, "newer": [[newer(run, r) for r in run.evals] for run in fst]}
    paint = curves(REWARD, {"RL": rl, "FST": fst})
    return Result(findings, [*columns, "prompts better on the second"], rows, paint, notes, numbers)


# --------------------------------------------------------------------------------------------------------- plasticity

COLLAPSE = Claim(
    "Fresh RL on a second task learns less from an RL checkpoint than from an FST checkpoint",
    "RL-initialised collapse to near zero within 40 steps (Math arm)",
)
STAYS = Claim("From an FST checkpoint it learns about as well as from the base", "close to base-initialised")


def plasticity_arms(setting: Setting) -> list[Arm]:
    second = f"{setting.stages[1].task}@{setting.steps}"  # enough for RL from the base
    first = {arm.label: arm for arm in rl_and_fst(setting)}
    return [
        setting.arm("RL from the base", "rl", second),
        setting.arm("RL from RL", "rl", second, start=first["RL"]),
        setting.arm("RL from FST", "rl", second, start=first["FST"]),
    ]


def plasticity(setting: Setting, runs: Runs) -> Result:
    areas = {label: [area(run) for run in of] for label, of in runs.items()}
    rows = [
        [label, each([run.evals[0]["reward"] for run in of], ".3f"), each(areas[label], ".3f"), each(lasts(of), ".3f")]
        for label, of in runs.items()
    ]
    collapse = minus(areas["RL from FST"], areas["RL from RL"])
    stays = minus(areas["RL from FST"], areas["RL from the base"])
    means = f"mean reward over the run: from FST {each(areas['RL from FST'], '.3f')}"
    from_base = each(areas["RL from the base"], ".3f")
    if max(areas["RL from the base"]) < WORSE:
        none = f"not even the base learned the second task in these steps: {from_base}"
        findings = [claim.found(none, "unclear") for claim in (COLLAPSE, STAYS)]
    else:
        margin = f"from the base {from_base}; by less than {WORSE} worse"
        findings = [
            COLLAPSE.judged(collapse, f"{means}, from RL {each(areas['RL from RL'], '.3f')}"),
            STAYS.judged(stays, f"{means}, {margin}", more_than=-WORSE),
        ]
    colors = {"RL from the base": "?", "RL from RL": "rl", "RL from FST": "fst"}
    notes = [
        f"First {setting.first} by RL or FST, then RL alone with a new optimiser on {setting.stages[1].task} under "
        "its seed prompt; nothing of the first run but its weights is kept."
    ]
    columns = ["fresh RL on the second task", "reward before", "mean reward over the run", "reward at the end"]
    return Result(findings, columns, rows, curves(REWARD, runs, colors), notes, {"areas": areas})


# ------------------------------------------------------------------------------------------- rl-then-gepa and distill

ONCE = Claim("FST ends above GEPA run once on the finished RL checkpoint, at equal proposals", "asked by others")


def rl_then_gepa_arms(setting: Setting) -> list[Arm]:
    lengths = {f"{steps} steps": setting.stream(steps) for steps in (setting.short, setting.steps)}
    how = (("RL", "rl"), ("RL, then GEPA", "rl-then-gepa"), ("FST", "fst"))
    return [setting.arm(f"{label}, {n}", mode, stream) for n, stream in lengths.items() for label, mode in how]


def rl_then_gepa(setting: Setting, runs: Runs) -> Result:
    final = {label: lasts(of) for label, of in runs.items()}
    rows = [
        [
            label,
            each(final[label]),
            each(lasts(of, "kl"), ".3f"),
            each([float(run.total("rollouts")) for run in of], ",.0f"),
        ]
        for label, of in runs.items()
    ]
    gaps = {
        n: minus(final[f"FST, {n} steps"], final[f"RL, then GEPA, {n} steps"]) for n in (setting.short, setting.steps)
    }
    ours = "; ".join(f"after {n} steps FST − (RL, then GEPA) {each(gap, '+.2f')}" for n, gap in gaps.items())
    finding = ONCE.judged(gaps[setting.steps], f"{ours}. After {setting.steps}")
    return Result(
        [finding],
        ["", "reward at the end", "KL to the base", "rollouts"],
        rows,
        dots(final, "reward"),
        numbers={"gaps": gaps},
    )


BELOW = Claim(
    "Distilling the prompted policy into the weights, without RL reward, ends below FST", "plateaus below FST"
)


def distill_arms(setting: Setting) -> list[Arm]:
    stream = setting.stream(setting.short)
    return [setting.arm(label, mode, stream) for label, mode in (("FST", "fst"), ("FST-distill", "fst-distill"))]


def distill(setting: Setting, runs: Runs) -> Result:
    rows = [
        [label, each(lasts(of)), each(lasts(of, "reward_seed")), each(lasts(of, "kl"), ".3f")]
        for label, of in runs.items()
    ]
    gaps = minus(lasts(runs["FST"]), lasts(runs["FST-distill"]))
    finding = BELOW.judged(gaps, f"FST − distilled {each(gaps, '+.2f')} after {setting.short} steps")
    columns = ["", "reward as deployed", "reward under the seed prompt", "KL to the base"]
    notes = ["FST is deployed with its best prompt, the distilled weights alone, under the seed prompt."]
    return Result([finding], columns, rows, curves(REWARD, runs), notes, {"gap": gaps})


# ----------------------------------------------------------------------------------------------------------- schedule

INTERLEAVED = Claim(
    "Evolution interleaved with the steps beats the same number of proposals at the start of a task",
    "T = 6; longer cycles make prompts stale",
)
PROPOSALS = 48  # of a stage, however they are dealt out


def schedules(steps: int) -> dict[str, tuple[str, ...]]:
    """Flags by label: T, and the proposals of the first cycle and of the others, PROPOSALS in all."""
    found: dict[str, tuple[str, ...]] = {}
    for every in dict.fromkeys(max(1, steps // n) for n in (6, 3, 1)):
        others = -(-steps // every) - 1
        later = max(1, round(PROPOSALS / 2 / others)) if others else 1
        label = f"T = {every}" if others else "at task starts only"
        found[label] = (
            "--fast.every",
            str(every),
            "--fast.proposals",
            str(later),
            "--fast.first-proposals",
            str(max(1, PROPOSALS - later * others)),
        )
    return found


def schedule_arms(setting: Setting) -> list[Arm]:
    stream = setting.stream(setting.short, setting.short)
    return [setting.arm(label, "fst", stream, *flags) for label, flags in schedules(setting.short).items()]


def over_stages(run: Run) -> float:
    """Mean over the stages of the areas under their curves."""
    stages: Sequence[int] = sorted(run.stages)
    return sum(area(run, stage=stage) for stage in stages) / len(stages)


def schedule(setting: Setting, runs: Runs) -> Result:
    values = {label: [over_stages(run) for run in of] for label, of in runs.items()}
    stages = len(runs["at task starts only"][0].stages)
    rows = []
    for label, of in runs.items():
        proposals = [float(sum(r["proposals"] for r in run.evolves)) for run in of]
        finals = [each(lasts(of, stage=stage)) for stage in range(stages)]
        rows.append([label, each(values[label], ".3f"), *finals, each(proposals, ".0f")])
    *interleaved, starts = values
    best = max(interleaved, key=lambda label: sum(values[label]))
    gaps = minus(values[best], values[starts])
    finding = INTERLEAVED.judged(gaps, f"{best} − task starts only {each(gaps, '+.3f')} in mean reward over the run")
    columns = ["", "mean reward over the run", *(f"end of stage {i + 1}" for i in range(stages)), "proposals made"]
    notes = [
        f"About {PROPOSALS} proposals a stage in every arm. The best of the interleaved arms is compared, chosen by "
        "the same numbers: that favours interleaving."
    ]
    return Result([finding], columns, rows, dots(values, "mean reward over the run"), notes, {"areas": values})


EXPERIMENTS = (
    Experiment(
        "continual", "What does a switch of tasks cost?", (AHEAD, CARRIED), continual_arms, continual, two_stages
    ),
    Experiment(
        "drift",
        "What if tasks shift or mix without a marker?",
        (DRIFTS, FOLLOWS, INTERLEAVES),
        drift_arms,
        drift,
        two_tasks,
    ),
    Experiment(
        "plasticity", "Can the weights still learn?", (COLLAPSE, STAYS), plasticity_arms, plasticity, two_stages
    ),
    Experiment("rl-then-gepa", "Is one evolution after RL enough?", (ONCE,), rl_then_gepa_arms, rl_then_gepa),
    Experiment("distill", "Can the weights take in the prompts without reward?", (BELOW,), distill_arms, distill),
    Experiment("schedule", "When should prompts evolve?", (INTERLEAVED,), schedule_arms, schedule),
)
