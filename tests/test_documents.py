"""The documents hang together: what they link to is there, under the heading they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fst_fast.meter import together
from fst_fast.telemetry import _costs_behind
from fst_fast.train import main

POWER = {"joules": 1.0, "watts": 1.0, "memory": 1.0, "utilisation": 1.0}
ROOT = Path(__file__).parents[1]
FOLDERS = (".", "benchmarks", "docs", "examples", "kernels", "fst_fast/assets/*")
PAGES = sorted(page.relative_to(ROOT) for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_field_and_phase_of_a_runs_records_is_explained(tmp_path: Path) -> None:
    explained = set(re.findall(r"`([\w./]+)`", (ROOT / "docs" / "run.md").read_text()))
    small = [
        "--rollout.problems",
        "4",
        "--rollout.group-size",
        "4",
        "--fast.first-proposals",
        "2",
        "--eval.problems",
        "2",
    ]
    small += ["--fast.scoring-problems", "4", "--fast.every", "2", "--progress", "False", "--tensorboard", "False"]
    runs = {
        "fst": ["--stream", "glyph:A>glyph:B@2", "--eval.ood", "glyph:C", "--slow.kl-coef", "0.01"],
        "distilled": ["--mode", "fst-distill", "--stream", "glyph:A@1"],
    }
    for name, flags in runs.items():
        main([*small, *flags, "--run-dir", str(tmp_path / name)])
        for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert {"kind", record["kind"]} <= explained
            inner = [record.get(key, {}) for key in ("time", "mismatch", "reflection")]
            inner += [*record.get("levels", []), *record.get("by_task", {}).values()]
            known = explained | {f"{age}_{name}" for age in ("older", "reused", "fresh") for name in explained}
            inner.append(record.get("reuse", {}))
            assert {key for fields in (record, *inner) for key in fields} <= known
    assert {"lost", *(_costs_behind(tmp_path / "fst" / "metrics.jsonl", 0) or {})} <= explained
    gpu = {"gpu_hours", "gpu_dollars", "gpu_tokens_per_second", "mfu", "step_mfu", *together([POWER])}
    assert gpu <= explained


@pytest.mark.parametrize("name", PAGES, ids=str)
def test_every_link_within_the_repository_leads_somewhere(name: Path) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target
