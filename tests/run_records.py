"""Records of metrics.jsonl as a run writes them, and a console that can be read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console


def step(n: int, reward: float = 0.5, **more: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": n, "stage": 0, "task": "glyph:A", "reward": reward, "entropy": 1.5}
    return record | {"rollouts": 128 * n, "tokens": 1000 * n, "gepa_rollouts": 0, "gepa_tokens": 0} | more


def evaluation(n: int, reward: float = 0.5, **more: Any) -> dict[str, Any]:
    return step(n, reward, **{"kind": "eval", "kl": 0.05, "reward_seed": 0.1, "best_prompt": "aaa", **more})


def evolution(n: int, **more: Any) -> dict[str, Any]:
    record = {"kind": "evolve", "step": n, "stage": 0, "task": "glyph:A", "cycle": 0, "proposals": 8, "accepted": 3}
    record |= {"rollouts": 300, "best": 0.6, "coverage": 0.9, "population": ["aaa"]}
    return record | {"reflection": {"calls": 8, "dollars": 0.25, "failures": 1}, "time": {"seconds": 2.0}} | more


def console(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=400, **options)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def write_run(folder: Path, records: list[dict[str, Any]], config: str = 'mode = "fst"\nseed = 3\n') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
