"""What a run of kernels.py says: its table, the goals it meets or misses, and its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from measure import medians
from peers import OURS

Result = dict[str, Any]
LOSS, KL = "loss, forward + backward", "loss + entropy + exact KL, forward + backward"
ROW_KERNEL = "row kernel of the loss: fp32 logits to measures and d logits"


def names(result: Result) -> list[str]:
    """Of the contenders that ran, in order."""
    return [name for name in result["seconds"] if name not in result["floors"]]


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def peers(result: Result) -> list[str]:
    """Those that do the same as ours."""
    return [name for name in names(result) if not is_ours(name) and name not in result["only"]]


# ---- the table -----------------------------------------------------------------------------------------------------


def table(result: Result, bandwidth: float, said: set[tuple[str, str]]) -> Iterator[str]:
    """One line a contender: ratios above 1 mean faster than the best peer, and slower than the products.

    `said`: who did not run and why, as far as other tables have said it; this one's are added.
    """
    clocks = [clock for clock in ("seconds", "cpu_seconds") if clock in result]
    middle = [medians(result[clock]) for clock in clocks]
    yield f"{result['op']}; {result['rows']}"
    for name in result["floors"]:
        yield f"  {name:28}" + "".join(f"{m[name]:9.4f}" + " " * 25 for m in middle).rstrip()
    last = "GB/s of copy" if "bytes" in result else "it/products"
    heads = "".join(f"{x:>9}{'±':>5}{'peer/it':>8}{last:>13}" for x in ("wall s", "CPU s")[: len(clocks)])
    chunks = f"{'chunks':>8}" if "chunk_bytes" in result else ""
    yield f"  {'':28}{heads}{'peak MB':>9}{chunks}  errors"
    for name in names(result):
        line = f"  {name:28}"
        for clock, m in zip(clocks, middle, strict=True):
            best = min((m[x] for x in peers(result)), default=float("inf"))
            line += f"{m[name]:9.4f}{_spread(result[clock][name]):4.0f}%"
            line += f"{best / m[name]:7.2f}x" if best < float("inf") else f"{'-':>8}"
            if "bytes" in result:
                rate = result["bytes"] / m[name]
                line += f"{rate / 1e9:8.0f}{rate / bandwidth:4.0%} "
            else:
                line += f"{m[name] / m[result['floors'][0]]:12.2f}x"
        peak = result["memory"].get(name)
        errors = ", ".join(f"{k} {x:.1e}" for k, x in result["errors"].get(name, {}).items())
        only = result["only"].get(name)
        line += f"{'?' if peak is None else round(peak / 1e6):>9}"
        if "chunk_bytes" in result:
            line += f"{'?' if peak is None else format(peak / result['chunk_bytes'], '.2f'):>8}"
        yield f"{line}  {errors}{f'  [{only} only]' if only else ''}"
    for name, why in result["failed"].items():
        if (name, why) not in said:
            yield f"  {name:28} not run: {why}"
    said |= set(result["failed"].items())
    yield ""


def _spread(seconds: list[float]) -> float:
    """Half the range of a contender's rounds, in per cent of their median."""
    return 50 * (max(seconds) - min(seconds)) / sorted(seconds)[len(seconds) // 2]


# ---- the goals -----------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    text: str
    measured: float | None  # None: what it needs did not run
    limit: float
    at_least: bool = True

    def row(self) -> dict[str, Any]:
        met = None if self.measured is None else (self.measured >= self.limit) == self.at_least
        sign = "≥" if self.at_least else "≤"
        return {"goal": self.text, "measured": self.measured, "wanted": f"{sign} {self.limit}", "met": met}


def goals(results: list[Result], bandwidth: float, gpu: bool) -> list[dict[str, Any]]:
    """Each goal with what was measured; empty until the loss with all rows has run."""
    found = {(r["op"], r["rows"]): _Medians(r) for r in results}
    dense = found.get((LOSS, "all rows"))
    if dense is None or dense.ours is None:
        return []
    return [goal.row() for goal in (_gpu_goals if gpu else _cpu_goals)(found, dense, results, bandwidth)]


class _Medians:
    """Median seconds of one result; None for whoever did not run."""

    def __init__(self, result: Result) -> None:
        self.of, self.result = medians(result["seconds"]), result
        passes = [x for x in names(result) if is_ours(x) and "," not in x]
        self.best = min(passes, key=self.of.__getitem__, default=None)
        self.ours = self.of.get(self.best) if self.best else None

    def over(self, *peers: str) -> float | None:
        """The fastest of these over ours."""
        there = [self.of[x] for x in peers if x in self.of]
        return min(there) / self.ours if there and self.ours else None


Found = dict[tuple[str, str], _Medians]


def _cpu_goals(found: Found, dense: _Medians, results: list[Result], bandwidth: float) -> Iterator[Goal]:
    yield Goal("eager torch / ours", dense.over("eager torch"), 1)
    yield Goal("Liger GRPO cispo, torch path / ours", dense.over("Liger GRPO cispo", "Liger GRPO cispo, compiled"), 1)
    memory = dense.result["memory"]
    mine, eager = memory.get(dense.best), memory.get("eager torch")
    yield Goal("ours / eager torch, peak memory", mine / eager if mine is not None and eager else None, 0.2, False)


def _gpu_goals(found: Found, dense: _Medians, results: list[Result], bandwidth: float) -> Iterator[Goal]:
    yield Goal("Liger GRPO cispo / ours", dense.over("Liger GRPO cispo", "Liger GRPO cispo, compiled"), 3)
    for name in ("Liger SM90 scaled CE", "CCE", "compiled chunks", "F.linear_cross_entropy"):
        yield Goal(f"{name} / ours", dense.over(name), 1.25)
    yield Goal("QuACK (CE only) / ours", dense.over("QuACK"), 0.95)
    products = dense.over("products")
    yield Goal("ours / the 3 products", 1 / products if products else None, 1.15, False)
    fewer = found.get((LOSS, "48% learn"))
    gain = dense.ours / fewer.ours if fewer and fewer.ours and dense.ours else None
    yield Goal("all rows / 48 % of the rows learn (20 % prompt, 40 % zero advantage)", gain, 1.6)
    kl = found.get((KL, "all rows"))
    separate = kl.over(f"{kl.best}, 2 passes") if kl else None
    yield Goal("KL + loss + entropy: 2 passes (7 products) / 1 pass (4)", separate, 1.6)
    rates = [r["bytes"] / m.ours / bandwidth for r, m in ((r, _Medians(r)) for r in results if "bytes" in r) if m.ours]
    yield Goal("row kernels: bytes/s over copy's, the worst of all cases", min(rates, default=None), 0.85)
    memory, shape = dense.result["memory"].get(dense.best), dense.result["chunk_bytes"]
    beyond = None if memory is None else (memory - dense.result["fp32_sums_bytes"]) / shape
    yield Goal("peak beyond inputs, gradients and the fp32 sum of dW, in fp32 chunks", beyond, 1.2, False)


def print_goals(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.2f}"
        verdict = {True: "met", False: "MISSED", None: ""}[row["met"]]
        print(f"  {row['goal']:70} {measured:>12}  {row['wanted']:>7}  {verdict}")


# ---- the picture ---------------------------------------------------------------------------------------------------

BLUE, GREY, PALE = "#1f6fb4", "#8a9199", "#c9ced3"


def plot(results: list[Result], title: str, path: Path) -> None:
    """Bars of seconds and of peak memory, one row of panels an operation; the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    heights = [1.0 + 0.27 * len(names(r)) for r in results]
    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(12, 1.2 + sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2]},
    )  # fmt: skip
    for (left, right), result in zip(axes, results, strict=True):
        seconds = medians(result["seconds"])
        order = sorted(names(result), key=seconds.__getitem__, reverse=True)
        colors = [BLUE if is_ours(x) else PALE if x in result["only"] else GREY for x in order]
        labels = [f"{x}  ({result['only'][x]} only)" if x in result["only"] else x for x in order]
        _bars(
            left, labels, [1e3 * seconds[x] for x in order], colors, lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
        )
        if result["floors"]:
            left.axvline(1e3 * seconds[result["floors"][0]], color="black", linestyle=":", linewidth=1.2)
        left.set_title(f"{result['op']}; {result['rows']}", fontsize=10, loc="left", fontweight="bold")
        left.set_xlabel("milliseconds", fontsize=8)
        peaks = [(result["memory"].get(x) or 0) / 1e6 for x in order]
        _bars(right, None, peaks, colors, lambda x: f"{x:,.0f}")
        right.set_title("peak memory beyond inputs and gradients", fontsize=9, loc="left")
        right.set_xlabel("MB", fontsize=8)
    handles = [
        Patch(color=BLUE, label="ours"), Patch(color=GREY, label="peers"),
        Patch(color=PALE, label="peers that do less"),
        Line2D([], [], color="black", linestyle=":", label="the bare matrix products"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _bars(
    axis: Any, labels: list[str] | None, values: list[float], colors: list[str], text: Callable[[float], str]
) -> None:
    """The numbers stand at the bars; a bar more than eight times the median one is cut off there."""
    end = 8 * sorted(values)[len(values) // 2] if values else 0
    bars = axis.barh(range(len(values)), [min(x, end) for x in values], color=colors, height=0.72)
    axis.bar_label(bars, [text(x) + (" →" if x > end else "") for x in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(values)), labels or [""] * len(values), fontsize=8)
    axis.margins(x=0.14, y=0.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
