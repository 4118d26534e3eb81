"""The curves of runs, drawn by matplotlib: one colour per mode, thin lines per seed, a bold median."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def plot_comparison(run_dirs: Sequence[Path | str], out_png: Path | str) -> Path:
    """Draws reward against steps, reward against rollouts and KL against reward, side by side, all modes in each."""
    raise NotImplementedError
