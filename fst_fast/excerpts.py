"""What a page shows of a run's prompts and rollouts: every edit against its parent, which prompt wins where, and some
rollouts to read. Read from population.jsonl and rollouts.jsonl."""

from __future__ import annotations

import difflib
import functools
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast.runs import Record, Run, parse, read_lines

MATRIX_COLUMNS = 192  # scoring problems of the paper's recipe
SHOWN_PROBLEMS = 3  # of a minibatch
FILTERED_PROMPTS = 12  # that rollouts can be filtered by
SAMPLED_BYTES = 8_000_000  # read of a run's rollouts: a run of minutes writes 30 MB
SOURCES = {"rl": "fresh", "gepa": "gepa"}  # by purpose, of what was not reused
SOURCE_LABELS = {
    "fresh": "fresh: sampled for a training step",
    "reused": "reused: GEPA's, trained on too",
    "gepa": "GEPA's only",
    "other": "evaluation",
}
REWARDS = {"solved": "solved", "part": "in part", "failed": "failed"}
FILTER_TAGS = (*(f"p{i}" for i in range(FILTERED_PROMPTS)), "p-other", *REWARDS, *SOURCE_LABELS)


@dataclass(frozen=True)
class Caps:
    """How much of a run is shown; what is left out is said on the page."""

    proposals: int
    members: int
    rollouts: int
    chars: int  # of one text


class Texts:
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
        self.taken = [r for r in self.candidates if r.get("status") in ("seed", "accepted")]
        self.joined = {str(r.get("id")): r for r in reversed(self.taken)}  # prompt id → how, the first time


def lineage(texts: Texts, caps: Caps) -> dict[str, Any]:
    """Proposals by cycle, each as a word diff against its parent, and the tree of those that were taken."""
    shown = texts.taken[-caps.proposals :]
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


def _added(r: Record, texts: Texts) -> str:
    """What tells a candidate from its parent in few words: those it added; a seed's own."""
    parent, text = texts.of.get(str(r.get("parent"))), str(r.get("text") or "")
    if parent is None:
        return text
    words = [words for op, words in word_diff(parent, text, 2000) if op == "ins" and words.strip()]
    return "+ " + " … ".join(words) if words else "only removes words"


def members(run: Run, texts: Texts, caps: Caps) -> list[Record]:
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


def descent(name: str, texts: Texts, caps: Caps) -> list[Record]:
    """From the prompt back to the seed it comes from: each with a word diff against its parent."""
    steps: list[Record] = []
    seen: set[str] = set()
    while name in texts.joined and name not in seen and len(steps) < caps.members:
        seen.add(name)
        record = texts.joined[name]
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


def choose_rollouts(run: Run, texts: Texts, caps: Caps) -> dict[str, Any]:
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


def spread(ranked: Sequence[Record], each: int) -> list[Record]:
    """`each` from the top and from the bottom, of different problems as far as possible."""

    def pick(records: Iterable[Record]) -> list[Record]:
        first_of: dict[str, Record] = {}
        for record in records:
            first_of.setdefault(str(record.get("problem_id")), record)
        return list(first_of.values())[:each]

    top, bottom = pick(ranked), pick(reversed(ranked))
    return top + [record for record in reversed(bottom) if all(record is not other for other in top)]
