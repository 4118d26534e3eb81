"""One worker a GPU: `python -m fst_fast.train` starts them by itself, through torch's elastic launcher.

Several nodes: `torchrun --nnodes N --nproc-per-node G -m fst_fast.train ...` on each.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fst_fast.errors import UserError, visible
from fst_fast.ranks import LAUNCHER, launched

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from fst_fast.config import Config

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a worker says why it ended
PATIENCE = 3  # seconds, fewer than a worker that is stopped has until SIGKILL
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds for stopped workers to end; torch 2.11 waits 30


def workers(ranks: int, config: Config) -> int:
    """Processes to start for `--ranks`; 0: this process does it all, or is a worker itself. Raises UserError."""
    if launched():
        return 0
    gpus = torch.cuda.device_count() if config.model.device in ("auto", "cuda") else 0
    if gpus and ranks > gpus:
        raise UserError(f"ranks = {ranks}: this machine has {gpus} GPUs; use {gpus} or less, or --model.device cpu")
    wanted = ranks or gpus or 1
    return wanted if wanted > 1 or config.slow.offload else 0


def launch(count: int, argv: Sequence[str]) -> int:
    """Run `python -m fst_fast.train` with `argv` in `count` processes of this machine; the exit code.

    When one dies the others are stopped, and one sentence says which it was and why.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault(SHUTDOWN, "5")
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")  # a worker that a signal kills shows where it was
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        virtual_local_rank=torch.cuda.is_available(),  # each sees its own GPU alone, as vLLM wants it
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "fst_fast.train", *argv)
    except ChildFailedError as error:
        return say(*_sentence(*_cause(error.failures)))
    except SignalException as error:
        sentence = f"stopped by {error.sigval.name}; --resume continues from the last checkpoint, if there is one yet"
        return say(sentence, 128 + error.sigval)
    finally:
        del os.environ[LAUNCHER]
    return 0


def record(error: BaseException, sentence: str, code: int) -> None:
    """In a worker: leave word for the launcher, of either kind."""
    if ERROR_FILE not in os.environ:
        return
    said = {"message": sentence or f"{type(error).__name__}: {error}", "timestamp": int(time.time()), "at": time.time()}
    trace = "" if sentence else "".join(traceback.format_exception(error))
    with open(os.environ[ERROR_FILE], "w") as file:
        json.dump({**said, "code": code, "traceback": trace}, file)


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Rank and failure of who ended by itself: torch counts those among the failed that it stopped because of it, with
    SIGTERM, and seconds later with SIGKILL."""
    first = min(failure.timestamp for failure in failures.values())
    own = {r: f for r, f in failures.items() if f.exitcode != -signal.SIGTERM and f.timestamp - first < PATIENCE}
    return min((own or failures).items(), key=lambda item: _blame(item[1]))


def _blame(failure: ProcessFailure) -> tuple[Any, ...]:
    """The first of these is the cause: a rank that is killed makes the others fail in what they have in common."""
    return failure.exitcode >= 0, failure.error_file_data.get("code") != 2, failure.error_file_data.get("at", 0)


def _sentence(rank: int, failure: ProcessFailure) -> tuple[str, int]:
    said = failure.error_file_data
    if said.get("code") == 2:
        return said["message"], 2
    if failure.exitcode < 0:
        why = f"was killed by {signal.Signals(-failure.exitcode).name}"
        why += " (the system does that when memory runs out)" if failure.exitcode == -signal.SIGKILL else ""
    else:
        why = f"failed: {said['message']}" if "at" in said else f"ended with exit code {failure.exitcode}"
    trace = said.get("traceback", "")
    go_on = "--resume continues from the last checkpoint, if there is one yet"
    return f"{trace}error: rank {rank} {why}; the others were stopped; {go_on}", 1


def say(text: str, code: int) -> int:
    """Prints `text`, which may quote what a server, a file or a verifier said, as the last word of a process that ends
    with `code`."""
    print(visible(text), file=sys.stderr)
    return code
