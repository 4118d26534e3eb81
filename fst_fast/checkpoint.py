"""Atomic checkpoints of everything a run needs to go on: weights, optimizer, and the loop's state.

A checkpoint is a folder written under a temporary name, fsynced and renamed. Its manifest, written last, holds a
checksum of every file: a folder that does not match is passed over for the one before.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fst_fast.errors import UserError
from fst_fast.files import sync_directory, write_atomic
from fst_fast.model import Model
from fst_fast.slow.policy import Policy


def save(run_dir: Path, policy: Policy, state: dict[str, Any], *, keep: int) -> Path:
    """Write checkpoints/step-NNNNNN and drop all but the newest `keep`. `state` is plain JSON and holds "step"."""
    root = run_dir / "checkpoints"
    root.mkdir(exist_ok=True)
    final = root / f"step-{state['step']:06d}"
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model_dir = temporary / "model"  # a Hugging Face folder of its own: loads anywhere
        policy.model.lm.save_pretrained(model_dir)
        policy.model.tokenizer.save_pretrained(model_dir)
        buffer = io.BytesIO()
        torch.save(policy.state_dict(), buffer)
        (temporary / "optimizer.pt").write_bytes(buffer.getvalue())
        (temporary / "state.json").write_text(json.dumps(state))
        manifest = {}
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            with open(file, "rb+") as handle:
                manifest[str(file.relative_to(temporary))] = hashlib.file_digest(handle, "sha256").hexdigest()
                os.fsync(handle.fileno())
        write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        sync_directory(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in folders(run_dir)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest; None when there is none."""
    return next((folder for folder in folders(run_dir) if intact(folder)), None)


def intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, digest in manifest.items():
            with open(folder / name, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    return False
    except (OSError, ValueError):
        return False
    return True


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def load_policy(folder: Path, policy: Policy) -> None:
    """Weights and optimizer of a checkpoint into `policy`, bit for bit."""
    load_weights(folder, policy.model)
    policy.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location=policy.model.device))


def load_weights(folder: Path, model: Model) -> None:
    """The weights of a checkpoint into a model of the same architecture."""
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=model.lm.dtype)
    model.lm.load_state_dict(saved.state_dict())


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this process; a second one is told so at once. The lock dies with its process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run_dir: {run_dir} is in use by another process; wait for it or choose another") from None
        yield
