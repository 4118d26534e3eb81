"""The curves of runs, drawn by matplotlib: one colour per mode, thin lines per seed, a bold median."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast.config import flat
from fst_fast.runs import Record, Run, plain, read_run

# Okabe and Ito's palette, which the colour-blind can tell apart; in a page's SVG each becomes a CSS variable.
COLORS = {"fst": "#0072b2", "rl": "#d55e00", "gepa": "#009e73", "rl-then-gepa": "#cc79a7", "fst-distill": "#e69f00"}
OTHER, INK, FAINT, PAGE = "#7a7a80", "#1d1d21", "#b9b9c0", "#fdfdfc"
VARIABLES = {color: f"--{mode}" for mode, color in COLORS.items()}
VARIABLES |= {OTHER: "--other", INK: "--ink", FAINT: "--faint", PAGE: "--page"}
LINES = (("-", "solid"), ("--", "dashed"), (":", "dotted"))  # several settings of one mode: matplotlib's name, CSS's
MARKERS = dict(zip(COLORS, "osD^v", strict=True))
POINTS = 400  # of one curve; longer ones are thinned

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, escaped
    "svg.hashsalt": "fst",
    "text.parse_math": False,  # a label with dollars is no formula
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titlepad": 18,
    "axes.facecolor": "none",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "grid.color": FAINT,
    "grid.alpha": 0.5,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Panel:
    """One chart: two keys of the eval records against each other."""

    title: str
    x: str
    y: str
    x_label: str
    y_label: str
    caption: str = ""


PANELS = (
    Panel(
        "Held-out reward against steps", "step", "reward", "steps", "reward, mean@k",
        "Mean over held-out problems and k samples, each run under its best prompt.",
    ),
    Panel(
        "Held-out reward against all rollouts", "rollouts", "reward", "rollouts, training and GEPA", "reward, mean@k",
        "The same against what was sampled to get there: GEPA's evaluations count, evaluation does not.",
    ),
    Panel(
        "Exact KL to the base against reward", "reward", "kl", "reward, mean@k", "KL, nats per token",
        "What a reward cost in distance from the base model, under the same prompts; lower is closer. Lines run in "
        "time, markers are hollow after the first stage.",
    ),
    Panel(
        "Entropy against steps", "step", "entropy", "steps", "entropy, nats per token",
        "Of the policy on held-out problems: what is left to explore.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    mode: str
    line: int  # index into LINES
    runs: tuple[Run, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The flattened config without what differs by seed or cannot change a result."""
        return _settings(self.runs[0])

    @property
    def color(self) -> str:
        return COLORS.get(self.mode, OTHER)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by mode and settings. Seeds are pooled only if every setting agrees; labels name what differs in a mode."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.mode, json.dumps(_settings(run), sort_keys=True, default=str)), []).append(run)
    groups: list[Group] = []
    order = [*COLORS, *sorted({mode for mode, _ in found} - set(COLORS))]
    for (mode, _), members in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        peers = [_settings(others[0]) for (other, _), others in found.items() if other == mode]
        mine = _settings(members[0])
        differs = [key for key in sorted(mine) if any(peer.get(key) != mine[key] for peer in peers)]
        label = plain(", ".join([mode] + [f"{key} = {mine[key]}" for key in differs]), 90)
        line = sum(group.mode == mode for group in groups) % len(LINES)
        groups.append(Group(label, mode, line, tuple(sorted(members, key=lambda run: run.seed))))
    return groups


def _settings(run: Run) -> dict[str, Any]:
    free = {"mode", "seed", "run_dir", "threads", "wandb", "tensorboard", "progress"}
    free |= {"checkpoint_every", "keep_checkpoints"}
    return {key: value for key, value in flat(run.config).items() if key not in free}


def plot_comparison(run_dirs: Sequence[Path], out_png: Path) -> Path:
    """Draws reward against steps, reward against rollouts and KL against reward, side by side, all modes in each."""
    from matplotlib.figure import Figure

    groups = group_runs([read_run(run_dir) for run_dir in run_dirs])
    with _style():
        figure = Figure(figsize=(13, 4), layout="constrained", facecolor=PAGE)
        for axes, panel in zip(figure.subplots(1, 3), PANELS, strict=False):
            axes.set_title(panel.title)
            draw(axes, panel, groups)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
        figure.savefig(out_png, format="png", dpi=150)
    return out_png


def svg(panel: Panel, groups: Sequence[Group], *, number: int) -> str:
    """The chart as SVG for inside an HTML page."""

    def paint(axes: Any) -> None:
        draw(axes, panel, groups)
        if len(groups) == len(groups[0].runs) == 1 and panel.y == "reward":
            _more_rewards(axes, panel, groups[0].runs[0])
            lines = {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            lines = {"best prompt": lines.pop(groups[0].label)} | lines
            axes.figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8)

    return to_svg(paint, number=number)


def to_svg(paint: Callable[[Any], None], *, number: int, size: tuple[float, float] = (5.4, 3.3)) -> str:
    """What `paint` draws on axes, as SVG for inside an HTML page: no reference leaves it, colours are the page's CSS
    variables. `number` tells the charts of a page apart."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        paint(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[0-9.]+pt"', "", text, count=4)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>chart{number}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def to_png(paint: Callable[[Any], None], path: Path) -> None:
    """What `paint` draws on axes, as an image file."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(6.5, 4), layout="constrained", facecolor=PAGE)
        paint(figure.subplots())
        figure.savefig(path, format="png", dpi=150)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a PNG cannot show every script
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw(axes: Any, panel: Panel, groups: Sequence[Group]) -> None:
    """Every run of every group as a line per stage, a group's median bold; stage switches marked."""
    for group in groups:
        several = len(group.runs) > 1
        look: dict[str, Any] = {"color": group.color, "linestyle": LINES[group.line][0]}
        for run in group.runs:
            for stage in run.stages:
                points = [p for _, *p in curve(run, stage, panel)]
                thin = {"linewidth": 0.8, "alpha": 0.45} if several else {"linewidth": 1.8}
                axes.plot(*_columns(points), **look, **thin, **({} if several else _marker(group, stage, points)))
        for stage in group.runs[0].stages if several else ():
            points = _median([curve(run, stage, panel) for run in group.runs])
            axes.plot(*_columns(points), **look, linewidth=2.2, **_marker(group, stage, points))
        axes.plot([], [], **look, linewidth=2.2, marker=MARKERS.get(group.mode, "o"), markersize=4, label=group.label)
    for values, limits in ((panel.x, axes.set_xlim), (panel.y, axes.set_ylim)):
        if values == "reward" and all(0 <= r["reward"] <= 1 for g in groups for run in g.runs for r in run.evals):
            limits(-0.03, 1.03)
    if panel.y != "reward":
        bottom, top = axes.get_ylim()
        bottom, highest = min(0, bottom), axes.dataLim.y1  # the margin above is of what varies: a flat curve has none
        axes.set_ylim(bottom, max(top, highest + 0.05 * (highest - bottom)))
    if panel.x != "reward":
        _mark_switches(axes, panel, groups)
        axes.locator_params("x", nbins=7, steps=(1, 2, 5, 10), integer=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axes.grid(axis="y")


def curve(run: Run, stage: int, panel: Panel) -> list[tuple[int, float, float]]:
    """(step, x, y) of one stage's evaluations, thinned to POINTS."""
    points = [
        (r["step"], r[panel.x], r[panel.y])
        for r in run.evals
        if r["stage"] == stage and all(_finite(r.get(key)) for key in (panel.x, panel.y))
    ]
    return thinned(points)


def thinned(points: Sequence[Any]) -> list[Any]:
    """At most about POINTS of them, evenly spaced, always the last."""
    return list(points[-1 :: -max(1, math.ceil(len(points) / POINTS))])[::-1]


def _median(curves: Sequence[list[tuple[int, float, float]]]) -> list[list[float]]:
    """Medians of x and of y over the seeds, at the steps that all of them have."""
    by_step = [{step: (x, y) for step, x, y in points} for points in curves]
    common = sorted(set.intersection(*(set(points) for points in by_step)))
    return [[statistics.median(points[step][i] for points in by_step) for i in (0, 1)] for step in common]


def _marker(group: Group, stage: int, points: Sequence[Any]) -> dict[str, Any]:
    """A shape per mode, hollow after the first stage; on about a dozen points."""
    face = {"markerfacecolor": PAGE} if stage else {}
    return {
        "marker": MARKERS.get(group.mode, "o"),
        "markersize": 4,
        "markevery": max(1, len(points) // 12),
        **face,
    }


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [p[0] for p in points], [p[1] for p in points]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mark_switches(axes: Any, panel: Panel, groups: Sequence[Group]) -> None:
    """A vertical line where a stage begins: one grey line with the task's name if all runs agree, else one per run."""
    starts = {
        (run.start(stage, panel.x), stage, task) for g in groups for run in g.runs for stage, task in run.stages.items()
    }
    later = {start for start in starts if start[1] > 0}
    if len({stage for _, stage, _ in later}) == len(later):
        for x, _, task in sorted(starts) if later else ():
            axes.axvline(x, color=FAINT, linewidth=1, linestyle="--" if x else "none", zorder=0)
            label = axes.text(x, 1.02, f" {plain(task, 16)}", transform=axes.get_xaxis_transform(), fontsize=8)
            label.set_color(OTHER)
        return
    for group in groups:
        for run in group.runs:
            for stage in run.stages:
                if stage:
                    axes.axvline(run.start(stage, panel.x), color=group.color, linewidth=0.7, linestyle="--", alpha=0.5)


def _more_rewards(axes: Any, panel: Panel, run: Run) -> None:
    """For one run alone: training reward as dots, the seed prompt and the best prompt per slice as further lines."""
    steps: list[Record] = thinned([r for r in run.steps if _finite(r.get("reward")) and panel.x in r])
    axes.plot(
        [r[panel.x] for r in steps], [r["reward"] for r in steps], ".", color=OTHER, markersize=3, alpha=0.6, zorder=1,
        label="training rollouts",
    )  # fmt: skip
    for i, task in enumerate(dict.fromkeys(task for r in run.evals for task in r.get("by_task", ()))):
        parts = [(r[panel.x], r["by_task"][task]["reward"]) for r in run.evals if task in r.get("by_task", ())]
        axes.plot(*_columns(thinned(parts)), color=OTHER, linestyle=LINES[i % len(LINES)][0], linewidth=1, label=task)
    for key, label, style in (("reward_per_slice", "best prompt per slice", "-."), ("reward_seed", "seed prompt", ":")):
        other = Panel("", panel.x, key, "", "")
        for stage in run.stages:
            points = [p for _, *p in curve(run, stage, other)]
            best = [p for _, *p in curve(run, stage, panel)]
            if any(abs(y - y_best) > 0.05 for (_, y), (_, y_best) in zip(points, best, strict=False)):
                axes.plot(*_columns(points), color=INK, linestyle=style, linewidth=1.2, label=label)
