"""The processes of a run as one: who does which share, who writes, and how they tell each other what they found.

Every rank runs the same loop on the same records and comes to the same decisions; rank 0 alone has side effects. A
process on its own is `ALONE`, where all of this does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from fst_fast.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
# The others wait while rank 0 asks a reflector; a rank that dies is noticed by the launcher.
TIMEOUT = timedelta(hours=1)
SILENCE = timedelta(minutes=5)  # of a thread that has nothing else to do
LAUNCHER = "FST_FAST_LAUNCHER"  # process number of launch.py's, which speaks for its workers
GONE = (
    "another process of the run has ended, and says why where it was started; --resume continues from the last "
    "checkpoint, if there is one yet"
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1
    local: int = 1  # ranks on this machine
    mesh: DeviceMesh | None = None  # (ranks,) or (nodes, ranks of a node); None: one process, and nothing is sharded
    group: ProcessGroup | None = None  # objects travel in it, through host memory
    background: ProcessGroup | None = None  # a second one, for a thread beside the loop

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of `items`, neighbours, as many as the others', or one more."""
        start, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(items[start:end])

    def join(self, own: Sequence[T]) -> list[T]:
        """What all ranks have, one after the other: undoes `share`."""
        if self.group is None:
            return list(own)
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(own), group=self.group)
        return [item for part in found for item in part]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; the others do not make it."""
        if self.group is None:
            return make()
        import torch.distributed as dist

        box = [make() if self.main else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return cast(T, box[0])

    def total(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over the ranks, by name, in the same order and so of the same bits everywhere."""
        if self.group is None:
            return sums
        found: dict[str, float] = {}
        for part in self.join([sums]):
            for name, value in part.items():
                found[name] = found.get(name, 0) + value
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self.join([None])

    def beside(self) -> Ranks:
        """For one thread beside the loop: what it tells the others does not mix with what the loop tells them."""
        return replace(self, group=self.background)


ALONE = Ranks()  # a process on its own


def launched() -> bool:
    """Whether a launcher, launch.py or torchrun, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks of a launched process, each with a GPU of its own (`device` "cpu": none); else a process on its own.

    Inside a node parameters are sharded, across nodes replicated (HSDP).
    """
    if not launched():
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if sys.platform == "linux":  # when the launcher is killed nobody would stop this process
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.environ.get(LAUNCHER, parent := str(os.getppid())) != parent:  # it was, while this one began
            sys.exit("its launcher is gone")
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=TIMEOUT)
    rank, size = dist.get_rank(), dist.get_world_size()
    node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    groups = [dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2)]
    if len(sizes := sorted(set(Ranks(rank, size, node, None, *groups).join([node])))) > 1:
        raise UserError(f"machines with {' and '.join(map(str, sizes))} processes; start as many on each")
    shape, names = ((size,), ("shard",)) if node == size else ((size // node, node), ("replicate", "shard"))
    mesh = init_device_mesh("cuda" if gpu else "cpu", shape, mesh_dim_names=names)
    with watched() if node < size else nullcontext():
        yield Ranks(rank, size, node, mesh, *groups)
    dist.destroy_process_group()  # not after an error: the others may never come


@contextmanager
def watched() -> Iterator[None]:
    """End this process when one of another machine is gone. On one machine the launcher does that; over several nobody
    would before NCCL's watchdog, half an hour later. Of a machine that is cut off it is noticed after SILENCE."""
    import torch.distributed as dist

    group, leaving = dist.new_group(backend="gloo", timeout=SILENCE), Event()

    def watch() -> None:
        from fst_fast.launch import record, say

        try:
            while True:
                last = leaving.is_set()
                left = torch.tensor(int(last))
                dist.all_reduce(left, group=group)
                if int(left) == dist.get_world_size():
                    return
                leaving.wait(0.1 if last else 1.0)
        except BaseException as error:
            time.sleep(5)  # what ended the other may be ending this one, with more to say
            record(error, GONE, 1)
            os._exit(say(f"error: {GONE}", 1))

    thread = Thread(target=watch, daemon=True)
    thread.start()
    yield
    leaving.set()
    thread.join()
