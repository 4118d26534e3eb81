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
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from fst_fast.errors import UserError
from fst_fast.files import DISK_FULL, sync_directory, write_atomic
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
        save_model(policy.model, temporary / "model")
        buffer = io.BytesIO()
        torch.save(policy.state_dict(), buffer)
        (temporary / "optimizer.pt").write_bytes(buffer.getvalue())
        (temporary / "state.json").write_text(json.dumps(state))
        manifest = {}
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            with open(file, "rb+") as handle:
                manifest[str(file.relative_to(temporary))] = hashlib.file_digest(handle, "sha256").hexdigest()
                os.fsync(handle.fileno())
        sync_directory(temporary / "model")
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


def save_model(model: Model, folder: Path) -> None:
    """A Hugging Face folder of its own: loads anywhere."""
    try:
        model.lm.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers hide what the system said in types of their own
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files match its manifest; None when none was written yet.

    UserError when there are some and none is good: to start over would destroy what is left of the run.
    """
    found = folders(run_dir)
    good = next((folder for folder in found if intact(folder)), None)
    if found and not good:
        raise UserError(f"run_dir: no checkpoint of {run_dir} is intact any more; start again in another run_dir")
    return good


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
    """Hold a run directory, made if need be, for this process; a second one is told so at once.

    The lock dies with its process. A directory to which nothing was written is left as it was.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    path = run_dir / ".lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except BlockingIOError:
        raise UserError(f"run_dir: {run_dir} is in use by another process; wait for it or choose another") from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"run_dir: {run_dir} cannot be written ({error.strerror}); choose another") from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()


def _lock(path: Path) -> TextIO:
    """BlockingIOError when another process has the lock."""
    lock = open(path, "a")  # noqa: SIM115 (closed by the caller)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):  # its last holder removed it meanwhile
        raise BlockingIOError
    return lock
