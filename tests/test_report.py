"""The report and the README's picture, on synthetic run directories of the real schema: whole, hostile, cut."""

from __future__ import annotations

import hashlib
import html
import html.parser
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fst_fast import excerpts, report
from fst_fast.plots import COLORS, PANELS, draw, group_runs, plot_comparison, svg
from fst_fast.report import write_report
from fst_fast.runs import Run, read_run

HOSTILE = [
    "<script>document.title = 'pwned'; document.documentElement.dataset.pwned = 1</script>",
    "</style><img src=x onerror=\"document.documentElement.dataset.pwned = 2\">",
    "</textarea></pre></title></svg><svg onload=\"document.documentElement.dataset.pwned = 3\">",
    "{{7*7}} {% raw %} {# #}",
    "$\\frac{1}{$ $x_",
    "🦊 é 漢字 שלום \u202eevil\u202c",
    "lone \ud800 surrogate \x00 nul \x1b[31m escape \x07",
    "<a href=\"javascript:alert(1)\" style=\"background:url(http://evil.example/x)\">a</a> --> ]]> &amp; \"'",
]  # fmt: skip

ASPECTS = ["reverse the letters", "write upper case", "put a comma between", "wrap in square brackets", "end with ;"]


def make_run(
    folder: Path,
    mode: str = "fst",
    seed: int = 0,
    *,
    stages: tuple[str, ...] = ("glyph:A", "glyph:B"),
    steps: int = 60,
    hostile: bool = False,
    ended: bool = True,
    extra: str = "",
) -> Path:
    """A run directory with curves like the measured ones (embedded.md); every text from HOSTILE if `hostile`."""
    draw = random.Random(f"{mode}{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollouts").mkdir(exist_ok=True)
    stream = ",".join(f"{task}@{steps}" for task in stages)
    (folder / "config.toml").write_text(
        f'mode = "{mode}"\nstream = {json.dumps(stream)}\nseed = {seed}\nrun_dir = "x"\n{extra}\n'
        '[fast]\nreflector = "phrasebook"\npopulation = 4\n[reflector]\nmodel = "gpt-5.2"\n'
        'base_url = "https://user:hunter2@llm.example/v1"\n[eval]\nlevels = [0.5, 0.9]\n[model]\npath = ""\n'
    )
    metrics: list[dict[str, Any]] = []
    population: list[dict[str, Any]] = []
    rollouts: list[dict[str, Any]] = []
    step = total = gepa = cycle = 0

    def words(i: int, text: str) -> str:
        return HOSTILE[i % len(HOSTILE)] + " " + text if hostile else text

    def level(stage: int, done: int) -> float:
        late, pace = {"fst": (20, 6), "rl": (65, 9), "gepa": (15, 6)}.get(mode, (30, 8))
        top = {"gepa": 0.55, "rl": 0.0 if stage else 1.0}.get(mode, 0.98)
        return max(0.0, top / (1 + math.exp((late + 4 * seed - done) / pace)) + draw.uniform(-0.02, 0.02) * top)

    seed_text = words(3, "transform the letters.")
    names = {seed_text: "seed00000000"}
    population.append(
        {"kind": "candidate", "cycle": 0, "step": 0, "stage": 0, "task": stages[0], "id": names[seed_text]}
        | {"text": seed_text, "parent": None, "status": "seed", "reason": "", "parent_score": None}
        | {"child_score": None, "feedback": [], "mean_score": 0.0}
    )
    best = seed_text
    for stage, task in enumerate(stages):
        for done in range(steps + 1):
            common = {"step": step + done, "stage": stage, "task": task}
            if mode != "rl" and done % 10 == 0 and done < steps:
                cycle += 1
                members = [best]
                for i in range(6):
                    text = words(i, f"{best if len(best) < 300 else seed_text} {ASPECTS[(cycle + i) % 5]}.")
                    name = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
                    status = ("accepted", "rejected", "rejected", "refused")[min(i, 3)] if i else "accepted"
                    population.append(
                        {"kind": "candidate", "cycle": cycle, **common, "id": name, "text": text}
                        | {
                            "parent": names[best],
                            "status": status,
                            "reason": words(i, "sum 1 → 3"),
                            "parent_score": 0.125,
                        }
                        | {"child_score": 0.5, "feedback": [words(i + 1, "the order is wrong; expected dcba")] * 7}
                        | {"mean_score": 0.4 if status == "accepted" else None, "problems": [words(0, f"{task}/{i}")]}
                    )
                    if status == "accepted":
                        names[text] = name
                        members.append(text)
                best = members[-1]
                scores = [{f"{task}/{p}": float(draw.random() < 0.6) for p in range(24)} for _ in members]
                population.append(
                    {"kind": "population", "cycle": cycle, **common, "best": names[best]}
                    | {"members": [
                        {"id": names[m], "mean_score": sum(s.values()) / 24, "scores": s}
                        for m, s in zip(members, scores, strict=True)
                    ]}
                )  # fmt: skip
                gepa, total = gepa + 300, total + 300
                metrics.append(
                    {"kind": "evolve", **common, "cycle": cycle, "proposals": 6, "accepted": 1, "rollouts": 300}
                    | {"best": 0.6, "coverage": 0.9, "population": [names[m] for m in members[:4]]}
                    | {"reflection": {"calls": 6, "prompt_tokens": 900, "completion_tokens": 90, "dollars": 0.01}}
                    | {"time": {"seconds": 1.0}}
                )
            reward = level(stage, done)
            if done % 10 == 0:
                metrics.append(
                    {"kind": "eval", **common, "reward": reward, "reward_by_prompt": {names[best]: reward}}
                    | {
                        "reward_mean_prompt": reward * 0.9,
                        "reward_per_slice": reward,
                        "reward_seed": reward * (mode == "rl"),
                    }
                    | {"kl": {"gepa": 0.0, "rl": 0.66}.get(mode, 0.06) * (reward + stage), "entropy": 1.5 - reward}
                    | {"retention": 0.5, "best_prompt": names[best], "samples": 4, "problems": 64, "rollouts": total}
                    | {"tokens": total * 12, "gepa_rollouts": gepa, "time": {"seconds": 0.5}}
                )
            if done == steps:
                break
            total += 0 if mode == "gepa" else 128
            record = {"kind": "step", **common, "step": step + done + 1, "reward": reward * 0.9, "groups": 16}
            record |= {"rollouts": total, "tokens": total * 12, "gepa_rollouts": gepa, "gepa_tokens": gepa * 12}
            if mode != "gepa":
                record |= {"loss": 0.1, "entropy": 1.5 - reward, "grad_norm": 1.0, "lr": 3e-4, "live_groups": 9}
            metrics.append(record | {"time": {"seconds": 0.3, "tokens_per_second": 900.0}})
            reused = [len(rollouts)] if mode == "fst" else []
            metrics[-1]["reuse"] = {"taken": reused, "fraction": len(reused) / 4}
            for i in range(4):
                rollouts.append(
                    {"id": len(rollouts), "step": step + done, "prompt_id": names[best], "prompt": best}
                    | {
                        "problem_id": words(i, f"{task}/{draw.randrange(99)}"),
                        "problem": words(i + 3, "a b c d, please"),
                        "slice": "",
                        "sample": i,
                        "purpose": "gepa" if len(rollouts) in reused else "rl",
                    }
                    | {"prompt_ids": [1] * 30, "response_ids": [5, 6, 7, 2], "logprobs": [-0.5, -0.25, -1.0, -0.01]}
                    | {"versions": [[step + done, 4]], "sampling": {"temperature": 1.0}, "finish_reason": "stop"}
                    | {"engine": "torch", "response": words(i + done, "[D,C,B,A];"), "parts": {"order": 1.0}}
                    | {"reward": float(draw.random() < reward), "feedback": words(i + 2, "expected [D,C,B,A];")}
                )
        step += steps
    if ended:
        metrics.append({"kind": "end", "step": step, "levels": [], "time": {"seconds": 17.0}})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "population.jsonl", population)
    write_lines(folder / "rollouts" / "rollouts.jsonl", rollouts)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(html.parser.HTMLParser):
    """What a page is made of, and whether every element that was opened is closed."""

    VOID = frozenset(("meta", "br", "link", "img", "input", "hr", "base"))

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_bytes().decode("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "b", "i", "br", "bdi", "dl",
    "dt", "dd", "aside", "table", "tr", "th", "td", "details", "summary", "code", "pre", "ins", "del", "figure",
    "figcaption", "svg", "g", "path", "defs", "use", "text", "clippath", "rect", "label", "input", "a",
}  # fmt: skip


def check_harmless(page: Page) -> None:
    """No element that runs or loads, no handler, no reference that leaves the page, no character that misleads."""
    assert page.open == []
    assert set(page.tags) <= TAGS
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "srcset", "action", "background", "ping", "data")
        if "href" in name:
            assert value.startswith("#")
        assert all(inner.startswith("#") for inner in re.findall(r"url\(\s*['\"]?([^)]*)", value))
    assert any("default-src 'none'" in value for name, value in page.attributes if name == "content")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.text)


def test_a_run_shows_its_numbers_prompts_edits_rollouts_and_what_to_know(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = Page(write_report([run], run / "report.html"))
    check_harmless(page)
    last = [read_run(run).last_eval(stage) for stage in (0, 1)]
    for record in last:
        assert record is not None
        assert f"{record['reward']:.3f}" in page.text
        assert f"{record['kl']:.3f}" in page.text
    for wanted in (
        "fst on glyph:A@60,glyph:B@60, seed 0", "phrasebook: rule-based, offline", "one bit at most", "asymmetry",
        "ln 1280 ≈ 7 nats", "mean nothing with 3 seeds", "18,960, of them GEPA's 3,600 (19%)", "72 calls, $0.12",
        "12 proposals accepted, 24 rejected", "36 refused", "minibatch 0.125 → 0.500",
        "the order is wrong; expected dcba", "[D,C,B,A];", "mean log-prob -0.440", "steps 60 to 74",
        "levels = [0.5, 0.9]", "no other is better on", "72 seconds", "weights 119, torch",
        "a b c d, please", "on problems like",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert "has not ended" not in page.text
    stages = page.text.partition("Stages")[2].partition("Curves")[0]
    assert "best per slice" not in stages  # there are none
    assert "retention" in stages
    assert page.tags.count("svg") == len(PANELS)
    assert "hunter2" not in page.text
    assert page.tags.count("ins") >= 72


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path) -> None:
    tasks = ("glyph:A", "jsonl:" + HOSTILE[1])
    run = make_run(tmp_path / "run</title><script>x()</script>", hostile=True, stages=tasks)
    other = make_run(tmp_path / "other", "rl<script>", hostile=True, stages=tasks, extra='[slow]\nloss = "<b>$x_$"\n')
    for runs in ([run], [run, other]):
        page = Page(write_report(runs, tmp_path / "report.html"))
        check_harmless(page)
        for wanted in (
            "<script>document.title = 'pwned'", "</style><img src=x", "{{7*7}} {% raw %} {# #}", "$\\frac{1}{$ $x_",
            "🦊 é 漢字 שלום ⟨U+202E⟩evil", "lone � surrogate ␀ nul ␛[31m escape ␇", "--> ]]> &amp; \"'",
        ):  # fmt: skip
            assert wanted in page.text, wanted


def test_huge_texts_and_long_lineages_are_cut_and_the_page_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    lines = [json.loads(line) for line in (run / "population.jsonl").read_text().splitlines()]
    proposal = next(line for line in lines if line["status"] == "rejected")
    huge = [proposal | {"text": '"' * 10**6, "feedback": ["<" * 10**6] * 3, "reason": "'" * 10**6} for _ in range(3)]
    many = [proposal | {"text": "\"'<>&" * 1000 + str(i), "feedback": ["<" * 2000] * 30} for i in range(1500)]
    write_lines(run / "population.jsonl", [*lines, *huge, *many])
    rollout = json.loads((run / "rollouts" / "rollouts.jsonl").read_text().splitlines()[0])
    write_lines(
        run / "rollouts" / "rollouts.jsonl",
        [rollout | {"response": "&" * 10**6, "problem": "<" * 10**6, "step": i} for i in range(5)],
    )
    page = Page(out := write_report([run], run / "report.html"))
    check_harmless(page)
    assert out.stat().st_size < report.MAX_BYTES
    assert re.search(r"1,?\d\d\d are left out of this page", page.text)
    assert re.search(r"\[99\d,\d\d\d more characters\]", page.text)


def test_edits_that_failed_are_counted_and_no_prompt_descends_from_them(tmp_path: Path) -> None:
    """They have neither text nor id, and a seed prompt has no parent."""
    run = make_run(tmp_path / "run", steps=20)
    lines = [json.loads(line) for line in (run / "population.jsonl").read_text().splitlines()]
    proposal = next(line for line in lines if line["status"] == "rejected")
    failed = proposal | {"id": None, "text": "", "status": "refused", "reason": "failed: the server said 500"}
    write_lines(run / "population.jsonl", [failed, *lines, failed])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in metrics:
        if record["kind"] == "evolve":
            record["reflection"]["failures"] = 2
    write_lines(run / "metrics.jsonl", metrics)
    page = Page(write_report([run], run / "report.html"))
    assert "failed: the server said 500" in page.text
    assert "24 calls, 8 of them gave no edit" in page.text
    marked = [words for op, words in re.findall(r"<(ins|del)>(.*?)</", (run / "report.html").read_text(), re.DOTALL)]
    assert marked
    assert not any("transform the letters." in words for words in marked)


def test_a_long_rollout_file_is_sampled_over_its_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(excerpts, "SAMPLED_BYTES", 50_000)
    run = make_run(tmp_path / "run")
    page = Page(write_report([run], run / "report.html"))
    assert "a file too large to read whole" in page.text
    for steps in ("glyph:A, steps 0 to", "glyph:B, steps 60 to", "to 119:"):
        assert steps in page.text
    assert "reward 1.000" in page.text
    assert "reward 0.000" in page.text


def test_rollouts_at_a_switch_go_to_the_stage_that_begins(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(
        run / "rollouts" / "rollouts.jsonl",
        [
            {"id": i, "step": at, "problem_id": f"{task}/x", "purpose": "gepa", "reward": 1.0, "response": f"r{i}"}
            for i, (at, task) in enumerate([(59, "glyph:A"), (60, "glyph:B"), (61, "glyph:B")])
        ],
    )
    page = Page(write_report([run], run / "report.html"))
    assert "stage 1 glyph:A, steps 59 to 59: 1 of 1" in page.text
    assert "stage 2 glyph:B, steps 60 to 61: 2 of 2" in page.text


@pytest.mark.parametrize("left", ["config", "no evaluation", "cut", "odd numbers", "no config"])
def test_a_run_that_is_going_or_broken_has_a_page(tmp_path: Path, left: str) -> None:
    run = make_run(tmp_path / "run", ended=False)
    metrics = (run / "metrics.jsonl").read_text()
    if left == "config":
        for path in ("metrics.jsonl", "population.jsonl", "rollouts/rollouts.jsonl"):
            (run / path).unlink()
    elif left == "no evaluation":
        kept = [line + "\n" for line in metrics.splitlines() if '"eval"' not in line]
        (run / "metrics.jsonl").write_text("".join(kept))
    elif left == "cut":
        for path in ("metrics.jsonl", "population.jsonl", "rollouts/rollouts.jsonl"):
            (run / path).write_bytes((run / path).read_bytes()[: -(run / path).stat().st_size // 2])
    elif left == "odd numbers":
        (run / "metrics.jsonl").write_text(re.sub(r'"(kl|entropy)": [0-9.e-]+', r'"\1": NaN', metrics))
    else:
        (run / "config.toml").unlink()
    alone = Page(write_report([run], run / "report.html"))
    check_harmless(alone)
    assert "has not ended" in alone.text
    assert ("No evaluation has been recorded" in alone.text) == (left in ("config", "no evaluation"))
    assert ("unreadable line(s)" in alone.text) == (left == "cut")
    check_harmless(Page(write_report([run, make_run(tmp_path / "whole", seed=1, steps=20)], tmp_path / "both.html")))


def test_several_runs_are_compared_with_every_seed_in_its_cell(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{mode}-{seed}", mode, seed) for mode in ("rl", "fst") for seed in (2, 0, 1)]
    page = Page(write_report(runs, tmp_path / "report.html"))
    check_harmless(page)
    rewards = [read_run(tmp_path / f"fst-{seed}").last_eval(1)["reward"] for seed in range(3)]  # type: ignore[index]
    assert " / ".join(report.short(reward) for reward in rewards) in page.text
    assert "seeds 0 / 1 / 2" in page.text
    assert "– / – / –" in page.text  # RL reaches nothing on B
    assert page.text.index("fst (3 seeds)") < page.text.index("rl (3 seeds)")
    assert "Settings that differ" not in page.text
    assert page.tags.count("svg") == len(PANELS)


def test_a_task_s_table_has_no_numbers_of_runs_on_another(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / task, stages=(f"glyph:{task}",), steps=20) for task in "AB"]
    tables = report.comparison(group_runs([read_run(run) for run in runs]))
    by_title = {table["title"]: table["rows"] for table in tables}
    for row in by_title["Stage 1 glyph:A"]:
        assert row["cells"].count("–") >= 1


def test_seeds_of_different_settings_are_never_pooled(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed, extra=f"[slow]\nlr = {lr}") for seed, lr in enumerate((1, 1, 2))]
    groups = group_runs([read_run(run) for run in runs])
    assert [(group.label, len(group.runs)) for group in groups] == [("fst, slow.lr = 1", 2), ("fst, slow.lr = 2", 1)]
    assert groups[0].color == groups[1].color
    assert groups[0].line != groups[1].line
    assert "Settings that differ" in Page(write_report(runs, tmp_path / "report.html")).text


def test_the_bold_line_is_the_median_of_the_seeds_at_each_evaluation(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    groups = group_runs([read_run(make_run(tmp_path / str(seed), seed=seed)) for seed in range(3)])
    axes = Figure().subplots()
    draw(axes, PANELS[0], groups)
    bold = [line for line in axes.lines if line.get_linewidth() == 2.2 and len(line.get_xdata())]
    assert len(bold) == 2  # one a stage: no line joins the end of a task with the start of the next
    assert list(bold[1].get_xdata()) == [60, 70, 80, 90, 100, 110, 120]
    at_80 = [r["reward"] for run in groups[0].runs for r in run.evals if r["stage"] == 1 and r["step"] == 80]
    assert bold[1].get_ydata()[2] == statistics.median(at_80)


def test_a_curve_that_hardly_moves_lies_below_the_frame() -> None:
    from matplotlib.figure import Figure

    run = Run(Path("run"), {"mode": "rl"}, (), tuple(
        {"kind": "eval", "step": i, "stage": 0, "task": "x", "reward": 0.0, "entropy": 6.1 + i / 1e4} for i in range(9)
    ), (), ())  # fmt: skip
    (panel,) = (p for p in PANELS if p.y == "entropy")
    axes = Figure().subplots()
    draw(axes, panel, group_runs([run]))
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top > 6.3


def test_a_column_that_nothing_was_measured_for_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [{k: v for k, v in r.items() if k != "retention"} for r in metrics])
    rollouts = [json.loads(line) for line in (run / "rollouts" / "rollouts.jsonl").read_text().splitlines()]
    write_lines(run / "rollouts" / "rollouts.jsonl", [r | {"slice": "ab"[i % 2]} for i, r in enumerate(rollouts)])
    shown = Page(write_report([run], run / "report.html")).text.partition("Stages")[2].partition("Curves")[0]
    assert "best per slice" in shown
    assert "retention" not in shown.lower()


def test_labels_with_dollars_and_markup_are_drawn_as_they_stand(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=("$\\frac$", "</svg><b>\x00"))
    text = svg(PANELS[0], group_runs([read_run(run)]), number=0)
    assert ">$\\frac$<" in text.replace("> ", ">")
    assert "&lt;/svg&gt;&lt;b&gt;" in text
    assert "<b>" not in text
    assert "http" not in text


def test_the_picture_for_the_readme_has_each_modes_own_colour(tmp_path: Path) -> None:
    from matplotlib.image import imread

    runs = [make_run(tmp_path / mode, mode) for mode in ("rl", "fst")]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    image = imread(plot_comparison([*runs, tmp_path / "empty"], tmp_path / "comparison.png"))
    height, width, _ = image.shape
    assert width > 2 * height
    drawn = {tuple(pixel) for pixel in (image[:, :, :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    rgb = {mode: tuple(bytes.fromhex(color[1:])) for mode, color in COLORS.items()}
    assert [mode for mode in COLORS if rgb[mode] in drawn] == ["fst", "rl"]


def test_each_run_s_best_prompt_stands_beside_the_others_with_its_descent(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"fst-{seed}", seed=seed, steps=20) for seed in (0, 1)]
    page = Page(write_report(runs, tmp_path / "both.html")).text
    side = page[page.index("Best prompts side by side") : page.index("The runs")]
    assert side.count("edits from the seed prompt") == 2
    assert side.count("transform the letters.") >= 4  # each with the seed at its descent's end
    alone = Page(write_report(runs[:1], tmp_path / "one.html")).text
    assert "Which prompt wins on which problem" in alone


def test_the_command_writes_the_page_and_says_where_or_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-m", "fst_fast.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == run / "report.html"
    assert Page(run / "report.html").text
    report.main([str(run), str(run), "--out", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").is_file()


def chromium(page: Path, profile: Path, *flags: str) -> str:
    """The page's document after Chromium has loaded it; flags may add a picture of it."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", *flags]
    command += [f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_renders_the_hostile_page_and_runs_nothing_of_it(tmp_path: Path) -> None:
    from matplotlib.image import imread

    bait = tmp_path / "bait.html"  # the same texts unescaped do run: the check below can fail
    bait.write_text("<html><body>" + "".join(HOSTILE).encode(errors="replace").decode())
    assert "data-pwned" in chromium(bait, tmp_path / "profile")
    run = make_run(tmp_path / "run", hostile=True)
    picture = tmp_path / "page.png"
    page = write_report([run], run / "report.html")
    document = chromium(page, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1200,1600")
    assert "data-pwned" not in document.partition("<body>")[0]
    assert "<title>fst on glyph:A@60,glyph:B@60, seed 0</title>" in document
    assert document.count("<svg") == len(PANELS)
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
    assert (pixels == [*bytes.fromhex(COLORS["fst"][1:])]).all(axis=2).sum() > 500  # curves are drawn, in their colour


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_shows_the_rollouts_that_the_filters_leave(tmp_path: Path) -> None:
    """In a copy of the page that may run scripts: one presses the buttons and counts what can be seen."""
    run = make_run(tmp_path / "run", steps=20)
    page = write_report([run], run / "report.html").read_text()
    script = """<script>
      const seen = {}, cards = [...document.querySelectorAll(".rollout")];
      const show = (of) => { for (const value of of) document.querySelector(`input[value="${value}"]`).checked = true;
        seen[of] = [cards.filter(c => c.checkVisibility()).length,
          cards.filter(c => of.every(value => c.classList.contains(value))).length];
        for (const all of document.querySelectorAll("input:not([value])")) all.checked = true; };
      show([]); show(["failed"]); show(["reused"]); show(["p0"]); show(["p0", "failed", "fresh"]);
      document.title = JSON.stringify(seen);
    </script>"""
    copy = tmp_path / "copy.html"
    copy.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", script))
    document = chromium(copy, tmp_path / "profile")
    seen = json.loads(html.unescape(re.search("<title>(.*)</title>", document)[1]))  # type: ignore[index]
    total = seen[""][0]
    assert total > 20
    for shown, wanted in seen.values():
        assert shown == wanted
    assert all(0 < seen[name][0] < total for name in ("failed", "reused", "p0", "p0,failed,fresh"))
