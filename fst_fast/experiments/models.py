"""Does it carry over: to other losses and learning rates, to other model families?"""

from __future__ import annotations

from fst_fast.cli import config_from
from fst_fast.experiments.curves import kl_saved, saving
from fst_fast.experiments.experiment import (
    Arm,
    Base,
    Claim,
    Experiment,
    Result,
    Runs,
    Setting,
    dots,
    each,
    glyph_only,
    lasts,
    minus,
)

# ------------------------------------------------------------------------------------------------------------- losses

LOSSES = ("cispo", "ppo", "reinforce")
FASTER = 3  # times the mode's own learning rate
SURVIVES = {
    (loss, rate): Claim(
        f"FST is closer to the base at matched reward with {loss}, learning rate × {rate}",
        "cispo only; asked by others",
    )
    for rate in (1, FASTER)
    for loss in LOSSES
}


def cells(setting: Setting) -> list[tuple[str, int]]:
    """(loss, times the learning rate): the whole grid; in miniature its first row and first column."""
    return [(loss, rate) for loss, rate in SURVIVES if not setting.miniature or loss == "cispo" or rate == 1]


def losses_arms(setting: Setting) -> list[Arm]:
    """RL gets the steps it needs to learn, FST half of them."""
    arms = []
    for mode, label, stream in (("rl", "RL", setting.first), ("fst", "FST", setting.stream(setting.short))):
        own = config_from(["--mode", mode, *setting.flags, "--stream", stream]).slow.lr
        for loss, rate in cells(setting):
            flags = ["--slow.loss", loss, *(["--slow.lr", repr(rate * own)] if rate != 1 else [])]
            arms.append(setting.arm(f"{label} {loss} × {rate}", mode, stream, *flags))
    return arms


def losses(setting: Setting, runs: Runs) -> Result:
    rows, findings, finals = [], [], {}
    for loss, rate in cells(setting):
        rl, fst = runs[f"RL {loss} × {rate}"], runs[f"FST {loss} × {rate}"]
        saved = [kl_saved(a, b) for a, b in zip(rl, fst, strict=True)]
        finals[f"{loss} × {rate}"] = lasts(fst)
        rows.append(
            [
                f"{loss} × {rate}",
                each(lasts(rl)),
                each(lasts(fst)),
                each(lasts(rl, "kl"), ".3f"),
                each(lasts(fst, "kl"), ".3f"),
                each(saved, ".0%"),
            ]
        )
        findings.append(saving(SURVIVES[loss, rate], saved))
    columns = ["loss × learning rate", "RL reward", "FST reward", "RL KL", "FST KL", "KL lower by, at matched reward"]
    notes = [
        f"RL after {setting.steps} steps, FST after {setting.short}; × 1 is each mode's own learning rate. PPO here is "
        "GRPO's loss: PPO's clip on group advantages."
    ]
    return Result(findings, columns, rows, dots(finals, "FST's reward at the end"), notes)


# ----------------------------------------------------------------------------------------------------------- families

OTHERS = {"Llama": "llama", "Gemma 3": "gemma3"}
WARM, MINIATURE_WARM = 1500, 1000  # steps of the supervised warm start; the shipped Qwen3 had 4000


def warm(setting: Setting) -> int:
    return MINIATURE_WARM if setting.miniature else WARM


TRANSFERS = {
    family: Claim(f"FST's lead over RL carries over to {family}", "Qwen3 only; asked by others")
    for family in ("Qwen3", *OTHERS)
}


def families_arms(setting: Setting) -> list[Arm]:
    stream, arms = setting.stream(setting.short), []
    for family in TRANSFERS:
        start = Base(OTHERS[family], warm(setting)) if family in OTHERS else None
        arms += [
            setting.arm(f"{family}, {label}", mode, stream, start=start)
            for label, mode in (("RL", "rl"), ("FST", "fst"))
        ]
    return arms


def families(setting: Setting, runs: Runs) -> Result:
    rows = [
        [label, each([run.evals[0]["retention"] for run in of]), each(lasts(of)), each(lasts(of, "kl"), ".3f")]
        for label, of in runs.items()
    ]
    findings = []
    for family, claim in TRANSFERS.items():
        gaps = minus(lasts(runs[f"{family}, FST"]), lasts(runs[f"{family}, RL"]))
        findings.append(claim.judged(gaps, f"after {setting.short} steps FST − RL {each(gaps, '+.2f')}"))
    columns = ["", "base: stated instructions followed", "reward at the end", "KL to the base"]
    notes = [
        f"Llama and Gemma 3 are random weights of the same size after {warm(setting)} supervised steps on the glyph "
        "world (the shipped Qwen3 had 4000), made here: architectures, not those families' weights. RL gets as many "
        "steps as FST."
    ]
    return Result(findings, columns, rows, dots({label: lasts(of) for label, of in runs.items()}, "reward"), notes)


def warm_starts(setting: Setting) -> str:
    return glyph_only(setting) or (
        "" if setting.task.startswith("glyph:") else "its warm start knows the glyph world only"
    )


EXPERIMENTS = (
    Experiment(
        "losses", "Does the KL gap survive other losses and rates?", tuple(SURVIVES.values()), losses_arms, losses
    ),
    Experiment(
        "families",
        "Does it carry over to other architectures?",
        tuple(TRANSFERS.values()),
        families_arms,
        families,
        warm_starts,
    ),
)
