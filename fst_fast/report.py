"""`python -m fst_fast.report RUN [RUN...] [--out FILE]`: runs → one self-contained HTML page, no network, no script.

Every text of a model, data set or reflector is hostile: jinja2 escapes it, `clean` makes control characters visible.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fst_fast import cli
from fst_fast.errors import UserError
from fst_fast.excerpts import FILTER_TAGS, Caps, Texts, choose_rollouts, lineage, matrix, members
from fst_fast.files import write_atomic
from fst_fast.plots import LINES, PANELS, VARIABLES, Group, group_runs, svg
from fst_fast.runs import Record, Run, cost_facts, count, number, plain, read_run

MAX_BYTES = 3_000_000  # of a page
MODES = {
    "fst": "prompts evolved by GEPA and weights trained by CISPO, interleaved",
    "rl": "weights trained by CISPO under the seed prompt alone",
    "gepa": "prompts evolved by GEPA, weights frozen",
    "rl-then-gepa": "weights trained by CISPO, then prompts evolved by GEPA",
    "fst-distill": "prompts evolved by GEPA, their effect distilled into the weights",
}
MEASURES = (
    ("reward", "reward, best single prompt"),
    ("reward_per_slice", "reward, best prompt per slice (cross-fitted)"),
    ("reward_mean_prompt", "reward, mean over the prompts"),
    ("reward_seed", "reward, seed prompt"),
    ("kl", "exact KL to the base, nats per token"),
    ("entropy", "entropy, nats per token"),
    ("retention", "other instructions still followed"),
    ("reward_ood", "reward on a task not trained on, its seed prompt"),
)


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes the page about one run, or about several overlaid, to `out`. UserError when a folder is no run."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    if not runs:
        raise UserError("write_report needs at least one run directory")
    groups = group_runs(runs)
    shared = {
        "title": _title(runs, groups),
        "charts": [(panel, svg(panel, groups, number=i)) for i, panel in enumerate(PANELS)],
        "groups": groups,
        "css_lines": [css for _, css in LINES],
        "variables": VARIABLES,
        "comparison": comparison(groups),
        "caveats": caveats(runs),
        "filter_tags": FILTER_TAGS,
    }
    texts = [Texts(run) for run in runs]
    for by in (1, 2, 4, 8, 16, 32, 64, 128):  # until it fits
        caps = Caps(160 // by + 1, 24 // by + 1, 48 // by + 1, max(2000 // by, 100))
        views = [view(run, read, caps) for run, read in zip(runs, texts, strict=True)]
        page = template("report.html.j2").render(**shared, views=views).encode(errors="replace")
        if len(page) <= MAX_BYTES:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page)
    return out


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m fst_fast.report", description="Write runs as one HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--out", type=Path, help="the page; default: RUN/report.html, for several beside the first")
    options = parser.parse_args(argv)
    beside = options.runs[0] if len(options.runs) == 1 else options.runs[0].resolve().parent
    print(write_report(options.runs, options.out or beside / "report.html"))


def template(name: str) -> Any:
    """A page's template, which escapes all it is given."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": clean, "plain": plain, "count": count, "number": number}
    return environment.get_template(name)


def clean(text: object, limit: int) -> str:
    """Text for a page: control and direction-changing characters made visible, lone surrogates replaced, cut."""
    text = "" if text is None else str(text)
    cut = f" … [{len(text) - limit:,} more characters]" if len(text) > limit else ""
    text = text[:limit].replace("\r\n", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    text = re.sub(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return re.sub(r"[\ud800-\udfff\ufffe\uffff]", "�", text) + cut


def _title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    if len(runs) == 1:
        return f"{runs[0].mode} on {stream(runs[0])}, seed {runs[0].seed}"
    modes = ", ".join(dict.fromkeys(group.mode for group in groups))
    return f"{len(runs)} runs: {modes} on {' and '.join(dict.fromkeys(stream(run) for run in runs))}"


def stream(run: Run) -> str:
    return plain(str(run.config.get("stream", ", ".join(map(str, run.stages.values())) or "?")), 120)


def reflector(run: Run) -> str:
    """Who rewrote the prompts, in words."""
    name = run.config.get("fast", {}).get("reflector", "?")
    endpoint = run.config.get("reflector", {})
    if run.mode == "rl":
        return "none: this mode has the seed prompt alone"
    return {
        "phrasebook": "phrasebook: rule-based, offline",
        "policy": "policy: the frozen base model itself",
        "openai": f"{endpoint.get('model', '?')} at {hide_secrets(endpoint.get('base_url') or 'the default endpoint')}",
    }.get(name, str(name))


def reflection_facts(run: Run) -> str:
    calls, failures = run.reflection("calls"), run.reflection("failures")
    failed = f", {failures:,.0f} of them gave no edit" if failures else ""
    return f"{calls:,.0f} calls{failed}, ${run.reflection('dollars'):.2f}"


def caveats(runs: Sequence[Run]) -> list[str]:
    """What a reader must know to read the numbers right (measured: docs/glyph.md)."""
    found = []
    if any(run.config.get("fast", {}).get("reflector") == "phrasebook" and run.mode != "rl" for run in runs):
        found.append(
            "The reflector is rule-based and offline. It sees feedback that names the wrong aspects of a response; the "
            "scalar reward that trains the weights carries one bit at most. That asymmetry is the mechanism on show."
        )
    if any("glyph" in stream(run) and not run.config.get("model", {}).get("path") for run in runs):
        found += [
            "KL is close to arithmetic in this world: reaching reward 1 from a prompt that never says the rule costs "
            "ln 1280 ≈ 7 nats a response; from a prompt that says it, almost nothing.",
            "From the reference experiment in this world, 3 seeds, not from the runs shown here: on one task, GEPA "
            "once and then RL does as well as FST; the switch of tasks is where interleaving shows, as insurance when "
            "the first attempt found no good prompt. At equal proposals it gained nothing.",
            "Where one rule governs all problems, K = 4 prompts gain nothing over K = 1 if its one prompt finds the "
            "rule, and everything if it does not. With sliced tasks K > 1 pays, per slice: read the best single "
            "prompt, the best per slice and the mean side by side.",
            "Differences under about .05 mean nothing with 3 seeds. All of this is a 334 k-parameter model.",
        ]
    return found


def comparison(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A table per stage: a row per measure, a column per group, all seeds in a cell."""
    tables = []
    runs = [run for group in groups for run in group.runs]
    for stage, task in sorted({item for run in runs for item in run.stages.items()}):
        last = {run.dir: (run.stages.get(stage) == task and run.last_eval(stage)) or {} for run in runs}
        rows = [_row(label, groups, {at: r.get(key) for at, r in last.items()}, short) for key, label in MEASURES]
        same = [
            i > 0 and key.startswith("reward") and rows[i]["cells"] == rows[0]["cells"]
            for i, (key, _) in enumerate(MEASURES)
        ]
        rows = [row for row, repeats in zip(rows, same, strict=True) if row["known"] and not repeats]
        reached = [(run.dir, r) for run in runs for r in run.levels() if (r["stage"], r["task"]) == (stage, task)]
        for level, key in product(sorted({r["level"] for _, r in reached}), ("steps", "rollouts")):
            spent = {at: r[key] for at, r in reached if r["level"] == level}
            rows.append(_row(f"{key} to reward {level:g}", groups, spent, count))
        tables.append({"title": f"Stage {stage + 1} {task}", "rows": rows})
    totals = [_row(label, groups, {run.dir: total(run) for run in runs}, count) for label, total in TOTALS]
    tables.append({"title": "Whole run", "rows": totals})
    settings = [group.settings for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    differ = [key for key in keys if len({str(each.get(key)) for each in settings}) > 1]
    rows = [{"label": key, "cells": [plain(str(s.get(key, "–")), 60) for s in settings]} for key in differ]
    return [*tables, {"title": "Settings that differ", "rows": rows}] if rows else tables


TOTALS: tuple[tuple[str, Callable[[Run], float]], ...] = (
    ("steps", lambda run: run.total("step")),
    ("rollouts", lambda run: run.total("rollouts")),
    ("of them GEPA's", lambda run: run.total("gepa_rollouts")),
    ("tokens", lambda run: run.total("tokens")),
    ("reflection calls", lambda run: run.reflection("calls")),
)


def _row(label: str, groups: Sequence[Group], values: Mapping[Path, Any], form: Callable[[float], str]) -> Record:
    """Per group one cell with every seed, ".97 / .98 / –", and the median where there are at least three."""
    row: Record = {"label": label, "cells": [], "medians": [], "known": False}
    for group in groups:
        seeds = [values.get(run.dir) for run in group.runs]
        known = [v for v in seeds if v is not None]
        row["cells"].append(" / ".join("–" if v is None else form(v) for v in seeds))
        row["medians"].append(form(statistics.median(known)) if len(known) == len(seeds) > 2 else "")
        row["known"] |= bool(known)
    return row


def short(value: float) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}")


def view(run: Run, texts: Texts, caps: Caps) -> dict[str, Any]:
    """Everything the page shows of one run, as plain data."""
    shown = members(run, texts, caps)
    slices = {str(r["problem_id"]): str(r["slice"]) for r in texts.rollouts if r.get("slice")}
    rollouts, gepa, toml = run.total("rollouts"), run.total("gepa_rollouts"), run.dir / "config.toml"
    facts = [
        ("mode", f"{run.mode}: {MODES.get(run.mode, 'unknown')}"),
        ("task stream", stream(run)),
        ("seed", str(run.seed)),
        ("model", run.config.get("model", {}).get("path", "?") or "the embedded glyph model, 334 k parameters"),
        ("reflector", reflector(run)),
        ("reflection", reflection_facts(run)),
        ("rollouts", f"{rollouts:,}, of them GEPA's {gepa:,} ({gepa / max(rollouts, 1):.0%})"),
        ("tokens", f"{run.total('tokens'):,}, of them GEPA's {run.total('gepa_tokens'):,}"),
        ("steps", f"{run.total('step'):,}"),
        *cost_facts(run),
    ]
    return {
        "name": plain(run.dir.resolve().name, 60),
        "mode": run.mode,
        "seed": run.seed,
        "facts": facts,
        "stages": [
            {
                "stage": stage + 1,
                "task": task,
                "last": run.last_eval(stage),
                "steps": run.spans[stage][1] - run.spans[stage][0],
                "levels": [r for r in run.levels() if r["stage"] == stage],
            }
            for stage, task in run.stages.items()
        ],
        "lineage": lineage(texts, caps),
        "members": shown,
        "matrix": matrix(shown, texts.population or {}, slices),
        "sliced": bool(slices),
        "pool": len((texts.population or {}).get("members", [])),
        "rollouts": choose_rollouts(run, texts, caps),
        "config": hide_secrets(toml.read_text(errors="replace") if toml.is_file() else ""),
        "notes": [*run.notes, *texts.notes],
        "chars": caps.chars,
    }


def hide_secrets(text: str) -> str:
    """User names and passwords inside addresses are not for a page that is passed on."""
    return re.sub(r"//[^/@\s\"']+@", "//…@", text)


if __name__ == "__main__":
    cli.run(main)
