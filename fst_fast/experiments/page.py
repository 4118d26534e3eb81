"""What an experiment leaves behind: one JSON file, one table, one plot; and of all of them one self-contained page,
and one table of their claims."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fst_fast.experiments.experiment import Experiment, Finding, Result
from fst_fast.files import write_atomic
from fst_fast.plots import to_png, to_svg
from fst_fast.report import template

STYLES = {"held": "green", "not held": "red", "mixed": "yellow", "unclear": "yellow"}


@dataclass(frozen=True)
class Report:
    """A measured experiment, and the command of each run by "arm, seed"; without a result it cannot be tested here."""

    experiment: Experiment
    findings: Sequence[Finding]
    result: Result | None
    commands: Mapping[str, str]


def write_files(report: Report, folder: Path) -> None:
    """NAME.json, NAME.md and NAME.png."""
    name, result = report.experiment.name, report.result
    data = {
        "experiment": name,
        "question": report.experiment.question,
        "findings": [
            {"claim": f.claim.text, "paper": f.claim.paper, "ours": f.ours, "verdict": f.verdict}
            for f in report.findings
        ],
        "runs": dict(report.commands),
    }
    if result:
        data |= {"columns": list(result.columns), "rows": list(result.rows), "notes": list(result.notes)}
        data |= {"numbers": result.numbers}
        to_png(result.paint, folder / f"{name}.png")
    write_atomic(folder / f"{name}.json", (json.dumps(_finite(data), indent=1) + "\n").encode())
    write_atomic(folder / f"{name}.md", _markdown(report).encode())


def show(report: Report, console: Console) -> None:
    """Table and findings on the console."""
    if result := report.result:
        table = Table(title=Text(f"{report.experiment.name}: {report.experiment.question}"))
        for i, column in enumerate(result.columns):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in result.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for f in report.findings:
        console.print(
            Text(f.verdict, STYLES.get(f.verdict, "")), Text(f"{f.claim.text}: {f.ours} (paper: {f.claim.paper})")
        )
    for note in result.notes if result else ():
        console.print(f"- {note}", markup=False, highlight=False)


def write_page(
    reports: Sequence[Report], out: Path, title: str, facts: Sequence[tuple[str, str]], caveats: Sequence[str]
) -> None:
    views: list[dict[str, Any]] = []
    for i, report in enumerate(reports):
        view: dict[str, Any] = {"name": report.experiment.name, "question": report.experiment.question}
        view |= {"findings": report.findings, "arms": list(report.commands.items())}
        if result := report.result:
            view |= {"columns": result.columns, "rows": result.rows, "notes": result.notes}
            view |= {"svg": to_svg(result.paint, number=i, size=(6.5, 3.8))}
        views.append(view)
    page = template("experiments/page.html.j2").render(title=title, facts=facts, caveats=caveats, results=views)
    write_atomic(out, page.encode(errors="replace"))


def write_claims(reports: Sequence[Report], out: Path) -> None:
    """The claims of several experiments as one table of Markdown."""
    lines = [_row(["experiment", "claim", "the paper", "ours", "held?"]), _row(["---"] * 5)]
    for report in reports:
        for f in report.findings:
            verdict = f.verdict if f.verdict == "held" else f"**{f.verdict}**"
            lines.append(_row([report.experiment.name, f.claim.text, f.claim.paper, f.ours, verdict]))
    write_atomic(out, ("\n".join(lines) + "\n").encode())


def _markdown(report: Report) -> str:
    lines = [f"# {report.experiment.name}: {report.experiment.question}", ""]
    lines += [f"- **{f.verdict}**: {f.claim.text}: {f.ours} (paper: {f.claim.paper})" for f in report.findings]
    if result := report.result:
        lines += ["", _row(result.columns), _row(["---"] * len(result.columns)), *map(_row, result.rows), ""]
        lines += [f"{note}\n" for note in result.notes]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _finite(value: Any) -> Any:
    """JSON has no infinity: it is written as text."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
