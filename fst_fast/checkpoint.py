"""Atomic checkpoints of everything a run needs to go on: weights, optimizer, and the loop's state.

A checkpoint is a folder written under a temporary name, fsynced and renamed: `trainer/` (torch.distributed.checkpoint:
masters and moments, read back on any number of ranks), `model/` (a Hugging Face folder, with prompts.json),
`state.json`. Its manifest, written last, holds a checksum of every file: a folder that does not match is passed over
for the one before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from fst_fast.errors import UserError
from fst_fast.files import DISK_FULL, sync_directory, write_atomic
from fst_fast.model import Model
from fst_fast.ranks import ALONE, Ranks
from fst_fast.slow.policy import Policy

SOME_SPACE = 1 << 20  # bytes; with less left, a write that failed found the disk full


class Saver:
    """Writes a run's checkpoints. Beside a GPU this happens in a thread, from copies in host memory, while the run goes
    on; what fails there is raised by the next `save` or `settle`."""

    def __init__(self, run_dir: Path, ranks: Ranks, *, keep: int, background: bool):
        self.run_dir, self.keep = run_dir, keep
        self._ranks, self._thread = ranks, ThreadPoolExecutor(1) if background else None
        self._pending: Future[None] | None = None

    def save(self, policy: Policy, state: dict[str, Any]) -> None:
        """Write checkpoints/step-NNNNNN and drop all but the newest `keep`. `state` is plain JSON: State.to_dict(), at
        least "step", and the texts "best" and "population"."""
        self.settle()
        ranks, trained = self._ranks, policy.state_dict()
        export = _export(policy.model, ranks, copied=self._thread is not None)
        if self._thread is None:
            save(self.run_dir, export, trained, state, ranks, keep=self.keep)
            return
        self._pending = self._thread.submit(
            save, self.run_dir, export, _staged(trained), state, ranks.beside(), keep=self.keep
        )

    def settle(self) -> None:
        """Until the last checkpoint is on disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


class Export(NamedTuple):
    """What becomes a Hugging Face folder; `weights` replace those of `lm`, which then has no memory."""

    lm: Any
    tokenizer: Any
    weights: dict[str, torch.Tensor] | None = None


def save(
    run_dir: Path, export: Export, trained: dict[str, Any], state: dict[str, Any], ranks: Ranks, *, keep: int
) -> None:
    """One checkpoint: `trained` is the policy's state_dict."""
    root = run_dir / "checkpoints"
    final = root / f"step-{state['step']:06d}"
    temporary = root / f".{final.name}.tmp"
    try:
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        ranks.wait()
        _write(temporary / "trainer", trained, ranks)
        if ranks.main:
            save_model(export, temporary / "model")
            prompts = {"best": state["best"], "population": state["population"]}
            (temporary / "model" / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False))
            (temporary / "state.json").write_text(json.dumps(state))
        files = [p for p in temporary.rglob("*") if p.is_file() and _writer(p) == ranks.rank]
        manifest = dict(sorted(ranks.join([(str(p.relative_to(temporary)), _sealed(p)) for p in files])))
        if ranks.main:
            for folder in ("model", "trainer"):
                sync_directory(temporary / folder)
            write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            sync_directory(root)
            for old in folders(run_dir)[keep:]:
                shutil.rmtree(old, ignore_errors=True)
        ranks.wait()
    except BaseException:
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: Path, trained: dict[str, Any], ranks: Ranks) -> None:
    """This rank's shards, in one file."""
    import torch.distributed.checkpoint as dcp

    # all is in host memory; to copy ahead, torch would make a CUDA context on the first GPU, of every rank's thread
    writer, group = dcp.FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0), ranks.group
    with _plain_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.save(trained, storage_writer=writer, process_group=group, no_dist=group is None)


def _writer(file: Path) -> int:
    """Rank that wrote a file of a checkpoint: shards are named after theirs, __RANK_N.distcp, the rest is rank 0's."""
    shard = re.fullmatch(r"__(\d+)_\d+\.distcp", file.name)
    return int(shard[1]) if shard else 0


def _sealed(file: Path) -> str:
    """SHA-256 of a file that is safe on disk."""
    with open(file, "rb+") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
    return digest


def _staged(trained: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory, of a sharded tensor's own part: one pass over it (torch's stager copies what is on a GPU
    twice)."""
    if isinstance(trained, dict):
        return {key: _staged(value) for key, value in trained.items()}
    return trained.detach().to("cpu", copy=True) if isinstance(trained, torch.Tensor) else trained


def _export(model: Model, ranks: Ranks, *, copied: bool) -> Export:
    """The model itself or, where its weights are sharded, LoRA's or `copied`, all of them in host memory on rank 0."""
    if not (model.sharded or model.update_of or copied):
        return Export(model.lm, model.tokenizer)
    found = {name: w.to("cpu", copy=True) if ranks.main else None for name, w in model.weights()}
    if not ranks.main:
        return Export(None, model.tokenizer)
    from transformers import AutoModelForCausalLM

    # A model without memory gives the format: type, ties, names. Not made in the thread that saves: meanwhile
    # transformers sets torch's default dtype, which all threads share.
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model.lm.config, dtype=model.dtype)
    lm.generation_config = model.lm.generation_config
    return Export(lm, model.tokenizer, {name: w for name, w in found.items() if w is not None})


def save_model(export: Export, folder: Path) -> None:
    """A Hugging Face folder of its own: loads anywhere."""
    try:
        export.lm.save_pretrained(folder, state_dict=export.weights)
        export.tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers hide what the system said in types of their own
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first; a copy that someone keeps beside them under another name is none."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(
        (folder for folder in found if folder.name.removeprefix("step-").isdecimal()),
        key=lambda folder: int(folder.name.removeprefix("step-")),
        reverse=True,
    )


def latest(run_dir: Path, ranks: Ranks = ALONE) -> Path | None:
    """The newest checkpoint whose files match its manifest; None when none was written yet.

    UserError when there are some and none is good: to start over would destroy what is left of the run.
    """
    found = ranks.first(lambda: folders(run_dir))
    good = next((folder for folder in found if all(ranks.join([_intact(folder, ranks)]))), None)
    if found and not good:
        raise UserError(f"run_dir: no checkpoint of {run_dir} is intact any more; start again in another run_dir")
    if good and good != found[0] and ranks.main:
        passed = ", ".join(folder.name for folder in found[: found.index(good)])
        warnings.warn(f"{run_dir}: files of {passed} are damaged or gone; {good.name} is taken", stacklevel=2)
    return good


def _intact(folder: Path, ranks: Ranks) -> bool:
    """This rank's part of the files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, digest in ranks.share(list(manifest.items())):
            with open(folder / name, "rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    return False
    except (OSError, ValueError):
        return False
    return True


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def load_policy(folder: Path, policy: Policy, ranks: Ranks = ALONE) -> None:
    """Weights and optimizer of a checkpoint into `policy`, bit for bit, whatever the number of ranks that saved it."""
    import torch.distributed.checkpoint as dcp

    trained, group = policy.state_dict(), ranks.group
    with torch.no_grad(), _plain_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.load(trained, checkpoint_id=folder / "trainer", process_group=group, no_dist=group is None)
    policy.load_state_dict(trained)


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """torch.distributed.checkpoint wraps what went wrong on any rank, and torch.save what the system said: here it is
    itself again."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause: BaseException = next(iter(error.failures.values()))[0]
        if isinstance(cause.__context__, OSError):
            cause = cause.__context__
        # it came from another process, without its context; rank 0 may have removed the checkpoint's folder already
        elif shutil.disk_usage(folder.parents[1]).free < SOME_SPACE:
            cause = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise cause from error


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
