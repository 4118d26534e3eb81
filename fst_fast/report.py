"""`python -m fst_fast.report RUN [RUN...] [--out FILE]`: runs → one self-contained HTML page, no network, no script.

Every text of a model, data set or reflector is hostile: jinja2 escapes it, `clean` makes control characters visible.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fst_fast import cli
from fst_fast.errors import UserError
from fst_fast.files import write_atomic
from fst_fast.plots import LINES, PANELS, VARIABLES, Group, group_runs, svg
from fst_fast.runs import Record, Run, cost_facts, count, number, parse, plain, read_lines, read_run

MAX_BYTES = 3_000_000  # of a page
MATRIX_COLUMNS = 192  # scoring problems of the paper's recipe
SHOWN_PROBLEMS = 3  # of a minibatch
FILTERED_PROMPTS = 12  # that rollouts can be filtered by
SAMPLED_BYTES = 8_000_000  # read of a run's rollouts: a run of minutes writes 30 MB

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


@dataclass(frozen=True)
class Caps:
    """How much of a run is shown; what is left out is said on the page."""

    proposals: int
    members: int
    rollouts: int
    chars: int  # of one text


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """Writes the page about one run, or about several overlaid, to `out`. UserError when a folder is no run."""
    out, runs = Path(out), [read_run(run_dir) for run_dir in run_dirs]
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
        "filter_tags": [*(f"p{i}" for i in range(FILTERED_PROMPTS)), "p-other", *REWARDS, *SOURCE_LABELS],
    }
    texts = [_Texts(run) for run in runs]
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


# ------------------------------------------------------------------------------------------------------ what is shown


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
    """What a reader must know to read the numbers right (measured; see the project's notes on the embedded world)."""
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


class _Texts:
    """population.jsonl and a sample of rollouts.jsonl, read once."""

    def __init__(self, run: Run) -> None:
        self.notes: list[str] = []
        population = list(read_lines(run.dir / "population.jsonl", self.notes))
        self.candidates = [r for r in population if r.get("kind") == "candidate"]
        self.population = next((r for r in reversed(population) if r.get("kind") == "population"), None)
        self.rollouts, self.whole = sample_lines(run.dir / "rollouts" / "rollouts.jsonl", self.notes)
        named = [r for r in self.candidates if r.get("id")]  # a failed edit has no text
        self.of = {str(r["id"]): str(r.get("text") or "") for r in named}  # prompt id → text
        self.posed = {str(r.get("problem_id")): str(r["problem"]) for r in self.rollouts if r.get("problem")}
        self.taken: dict[str, Record] = {}  # prompt id → how it joined the pool, the first time
        for r in self.candidates:
            if r.get("status") in ("seed", "accepted"):
                self.taken.setdefault(str(r.get("id")), r)


def view(run: Run, texts: _Texts, caps: Caps) -> dict[str, Any]:
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
        "stages": _stages(run),
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


def _stages(run: Run) -> list[dict[str, Any]]:
    reached = run.levels()
    return [
        {
            "stage": stage + 1,
            "task": task,
            "last": run.last_eval(stage),
            "steps": run.spans[stage][1] - run.spans[stage][0],
            "levels": [r for r in reached if r["stage"] == stage],
        }
        for stage, task in run.stages.items()
    ]


def hide_secrets(text: str) -> str:
    """User names and passwords inside addresses are not for a page that is passed on."""
    return re.sub(r"//[^/@\s\"']+@", "//…@", text)


# ------------------------------------------------------------------------------------------------------------ lineage


def lineage(texts: _Texts, caps: Caps) -> dict[str, Any]:
    """Proposals by cycle, each as a word diff against its parent, and the tree of those that were taken."""
    taken = [r for r in texts.candidates if r.get("status") in ("seed", "accepted")]
    shown = taken[-caps.proposals :]
    others = [r for r in texts.candidates if r.get("status") not in ("seed", "accepted")]
    shown_ids = {id(r) for r in shown + others[max(len(others) - caps.proposals + len(shown), 0) :]}
    cycles: dict[tuple[int, int], list[Record]] = {}
    for r in texts.candidates:
        if id(r) in shown_ids:
            text = str(r.get("text") or "")
            diff = word_diff(texts.of.get(str(r.get("parent"))), text, caps.chars) if text else ()
            posed = [texts.posed[x] for x in r.get("problems", ()) if x in texts.posed][:SHOWN_PROBLEMS]
            cycles.setdefault((r.get("stage", 0), r.get("cycle", 0)), []).append({**r, "diff": diff, "posed": posed})
    return {
        "cycles": [{"cycle": cycle, "stage": stage + 1, "of": of} for (stage, cycle), of in cycles.items()],
        "tree": [(depth, r, _added(r, texts)) for depth, r in tree(shown)],
        "counts": Counter(r.get("status") for r in texts.candidates),
        "left_out": len(texts.candidates) - len(shown_ids),
    }


@functools.lru_cache(1000)
def word_diff(old: str | None, new: str, limit: int) -> tuple[tuple[str, str], ...]:
    """(op, text) with op in "same", "del", "ins": from `old` to `new` word by word; without `old` all is the same."""
    cut = (("same", f" … [{len(new) - limit:,} more characters]"),) if len(new) > limit else ()
    if old is None:
        return (("same", new[:limit]), *cut)
    a, b = (re.findall(r"\s*\S+|\s+$", text[:limit]) for text in (old, new))
    words = [[word.strip() for word in side] for side in (a, b)]
    parts: list[tuple[str, str]] = []
    for op, a0, a1, b0, b1 in difflib.SequenceMatcher(None, words[0], words[1], len(b) > 400).get_opcodes():
        parts += [("del", "".join(a[a0:a1]) + " " * (b0 == 0))] if op in ("delete", "replace") else []
        parts += [("same" if op == "equal" else "ins", "".join(b[b0:b1]))] if op != "delete" else []
    return (*parts, *cut)


def tree(taken: Sequence[Record]) -> list[tuple[int, Record]]:
    """(depth, candidate) in reading order, children below their parent; every candidate once, even with odd parents."""
    by_id = {str(r.get("id")): r for r in reversed(taken)}  # the first record of an id counts
    children: dict[str, list[str]] = {}
    for name, r in reversed(by_id.items()):
        children.setdefault(str(r.get("parent")), []).append(name)
    roots = [name for name, r in reversed(by_id.items()) if str(r.get("parent")) not in by_id]
    order: dict[str, int] = {}
    for root in [*roots, *by_id]:  # what hangs on no root (a loop of parents) comes last
        stack = [(root, 0)]
        while stack:
            name, depth = stack.pop()
            if name not in order:
                order[name] = depth
                stack += [(child, depth + 1) for child in reversed(children.get(name, []))]
    return [(depth, by_id[name]) for name, depth in order.items()]


def _added(r: Record, texts: _Texts) -> str:
    """What tells a candidate from its parent in few words: those it added; a seed's own."""
    parent, text = texts.of.get(str(r.get("parent"))), str(r.get("text") or "")
    if parent is None:
        return text
    words = [words for op, words in word_diff(parent, text, 2000) if op == "ins" and words.strip()]
    return "+ " + " … ".join(words) if words else "only removes words"


def members(run: Run, texts: _Texts, caps: Caps) -> list[Record]:
    """The latest population, with the descent of each prompt and on how many problems no other is better."""
    record = texts.population or {}
    best = best_scores(record)
    active = run.evolves[-1].get("population", []) if run.evolves else []
    return [
        {
            **member,
            "best": member["id"] == record.get("best"),
            "active": member["id"] in active,
            "leads": sum(0 < best[problem] == score for problem, score in member["scores"].items()),
            "descent": descent(str(member["id"]), texts, caps),
        }
        for member in record.get("members", [])[: caps.members]
    ]


def descent(name: str, texts: _Texts, caps: Caps) -> list[Record]:
    """From the prompt back to the seed it comes from: each with a word diff against its parent."""
    steps: list[Record] = []
    seen: set[str] = set()
    while name in texts.taken and name not in seen and len(steps) < caps.members:
        seen.add(name)
        record = texts.taken[name]
        parent = record.get("parent")
        diff = word_diff(texts.of.get(str(parent)), texts.of[name], caps.chars)
        steps.append({"id": name, "cycle": record.get("cycle", "?"), "seed": parent is None, "diff": diff})
        name = str(parent)
    return steps or [{"id": name, "cycle": "?", "seed": False, "diff": (("same", texts.of.get(name, "")),)}]


def best_scores(population: Record) -> dict[str, float]:
    """Problem → the best score that any prompt of a population record has on it."""
    best: dict[str, float] = {}
    for problem, score in (item for member in population.get("members", []) for item in member["scores"].items()):
        best[problem] = max(score, best.get(problem, 0))
    return best


def matrix(shown: Sequence[Record], population: Record, slices: Mapping[str, str]) -> dict[str, Any]:
    """Which prompt wins where: a row per prompt, a column per scoring problem. A cell is (score or None, win, problem);
    win: "" = another is better, or nobody solves it; "best" = shared with others; "alone".

    Columns are ordered by slice, then by the first prompt that is best there, so that a prompt's own problems stand
    together; problems that nobody solves come last.
    """
    best = best_scores(population)
    scores = [member["scores"] for member in shown]
    leaders = {x: [i for i, of in enumerate(scores) if 0 < best[x] == of.get(x)] for x in best}

    def place(problem: str) -> tuple[str, bool, list[int]]:
        return slices.get(problem, ""), not leaders[problem], leaders[problem]

    columns = sorted(best, key=place)[:MATRIX_COLUMNS]
    rows = []
    for i, member in enumerate(shown):
        wins = ["" if i not in leaders[x] else "alone" if len(leaders[x]) == 1 else "best" for x in columns]
        cells = [(scores[i].get(x), win, x) for x, win in zip(columns, wins, strict=True)]
        rows.append(
            {"member": member, "cells": cells, "best": len(wins) - wins.count(""), "alone": wins.count("alone")}
        )
    together = [(best[x], "", x) for x in columns]
    used = dict.fromkeys(slices.get(x, "") for x in columns)
    bounds = [(name, sum(slices.get(x, "") == name for x in columns)) for name in used] if any(used) else []
    solved = sum(best[x] > 0 for x in best)
    return {"rows": rows, "together": together, "slices": bounds, "problems": len(best), "solved": solved}


# ----------------------------------------------------------------------------------------------------------- rollouts


def sample_lines(path: Path, notes: list[str]) -> tuple[list[Record], bool]:
    """All records of a file up to SAMPLED_BYTES; of a longer one some lines at 256 evenly spaced places; and if all."""
    size = path.stat().st_size if path.is_file() else 0
    if size <= SAMPLED_BYTES:
        return [_without_ids(record) for record in read_lines(path, notes)], True
    found: list[Record | None] = []
    places = 256
    with path.open("rb") as file:
        for i in range(places):
            file.seek(start := i * (size // places))
            if i:
                file.readline()  # the rest of a line
            while line := file.readline():
                found.append(parse(line))
                if file.tell() - start > SAMPLED_BYTES // places:
                    break
    return [_without_ids(record) for record in found if record is not None], False


def _without_ids(record: Record) -> Record:
    """Token ids and log-probs are most of a rollout's memory; their number and mean are read."""
    more: Record = {"tokens": len(record.get("response_ids") or [])}
    more |= {"logprob": statistics.fmean(record["logprobs"])} if record.get("logprobs") else {}
    return {k: v for k, v in record.items() if k not in ("prompt_ids", "response_ids", "logprobs")} | more


def choose_rollouts(run: Run, texts: _Texts, caps: Caps) -> dict[str, Any]:
    """The best and worst few of each quarter of each stage, from each source: what the page can filter."""
    reused = {i for r in run.steps for i in r.get("reuse", {}).get("taken", ())}
    buckets: dict[tuple[int, int], dict[str, list[Record]]] = {}
    for r in [r for r in texts.rollouts if r.get("purpose") != "eval"] or texts.rollouts:
        stage = next((s for s, (_, end) in run.spans.items() if r.get("step", 0) < end), max(run.spans, default=0))
        first, last = run.spans.get(stage, (0, 0))
        quarter = min(max(4 * (r.get("step", 0) - first) // max(last - first, 1), 0), 3)
        source = "reused" if r.get("id") in reused else SOURCES.get(str(r.get("purpose")), "other")
        buckets.setdefault((stage, quarter), {}).setdefault(source, []).append({**r, "source": source})
    each = max(caps.rollouts // max(len(buckets), 1) // 2, 1)
    parts: list[dict[str, Any]] = []
    for (stage, _), of in sorted(buckets.items())[: caps.rollouts]:
        chosen: list[Record] = []
        for name in sorted(of):
            ranked = sorted(of[name], key=lambda r: (-r.get("reward", 0), r.get("id", 0)))
            chosen += spread(ranked, max(each // len(of), 1))
        steps = [r.get("step", 0) for records in of.values() for r in records]
        parts.append({"stage": stage + 1, "task": run.stages.get(stage, ""), "first": min(steps), "last": max(steps)})
        parts[-1] |= {"rollouts": chosen, "of": len(steps)}
    shown = [r for part in parts for r in part["rollouts"]]
    often = [name for name, _ in Counter(str(r.get("prompt_id")) for r in shown).most_common(FILTERED_PROMPTS)]
    for r in shown:
        name, reward = str(r.get("prompt_id")), r.get("reward", 0)
        r["weights"] = next((version for version, _ in r.get("versions", ())), "?")
        r["tags"] = [
            f"p{often.index(name)}" if name in often else "p-other",
            "solved" if reward >= 1 else "part" if reward > 0 else "failed",
            r["source"],
        ]
    used = {tag for r in shown for tag in r["tags"]}
    filters = {
        "prompt": [(f"p{i}", name) for i, name in enumerate(often)] + [("p-other", "others")] * ("p-other" in used),
        "reward": [(tag, label) for tag, label in REWARDS.items() if tag in used],
        "source": [(tag, label) for tag, label in SOURCE_LABELS.items() if tag in used],
    }
    return {"parts": parts, "whole": texts.whole, "read": len(texts.rollouts), "filters": filters}


SOURCES = {"rl": "fresh", "gepa": "gepa"}  # by purpose, of what was not reused
SOURCE_LABELS = {
    "fresh": "fresh: sampled for a training step",
    "reused": "reused: GEPA's, trained on too",
    "gepa": "GEPA's only",
    "other": "evaluation",
}
REWARDS = {"solved": "solved", "part": "in part", "failed": "failed"}


def spread(ranked: Sequence[Record], each: int) -> list[Record]:
    """`each` from the top and from the bottom, of different problems as far as possible."""

    def pick(records: Iterable[Record]) -> list[Record]:
        first_of: dict[str, Record] = {}
        for record in records:
            first_of.setdefault(str(record.get("problem_id")), record)
        return list(first_of.values())[:each]

    top, bottom = pick(ranked), pick(reversed(ranked))
    return top + [record for record in reversed(bottom) if all(record is not other for other in top)]


if __name__ == "__main__":
    cli.run(main)
