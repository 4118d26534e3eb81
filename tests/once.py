"""What several workers of pytest-xdist need is made once, by whoever needs it first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(temporary: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this session, which `make` has filled; it is not there yet when that is called."""
    own = temporary.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = root / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            half = folder.with_name(f"half of {folder.name}")
            make(half)
            half.rename(folder)
    return folder
