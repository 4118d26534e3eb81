"""`python -m fst_fast.report RUN [RUN...] [--out FILE]`: runs → one self-contained HTML page, no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_report(run_dirs: Sequence[Path | str], out: Path | str) -> Path:
    """Writes the page about one run, or about several overlaid, to `out`. UserError when a folder is no run."""
    raise NotImplementedError
