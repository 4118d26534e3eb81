"""The parameters of a sharded model made whole, a bucket at a time: how new weights reach an engine.

The engine lives in this process and copies what it is handed: nothing travels through a CUDA IPC handle, which an
engine in a process of its own would need for the same memory to be seen twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BUCKET = 2**28  # bytes: a few dozen gathers for 8 B parameters, and little beside a layer's activations


def gathered(
    named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, device: torch.device, *, limit: int = BUCKET
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole values, in `dtype` on `device`, of parameters that FSDP2 sharded by rows (also under HSDP).

    Consecutive ones of at most `limit` bytes together are gathered at once; a larger one is a bucket of its own. All
    ranks go through them together. Who keeps none of them needs room for two buckets and a shard of one, whatever the
    size of the model.
    """
    bucket: list[tuple[str, DTensor]] = []
    size = 0
    for name, p in named:
        bytes_ = p.numel() * dtype.itemsize
        if bucket and size + bytes_ > limit:
            yield from _whole(bucket, dtype, device)
            bucket, size = [], 0
        bucket.append((name, cast("DTensor", p.detach())))
        size += bytes_
    if bucket:
        yield from _whole(bucket, dtype, device)


def _whole(
    bucket: list[tuple[str, DTensor]], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch.distributed as dist

    mesh = bucket[0][1].device_mesh
    assert all(p.placements[-1].is_shard(0) for _, p in bucket)
    ranks = mesh.size(mesh.ndim - 1)  # that share the rows; other nodes have the same
    # every rank has the same number of rows, except that the last ones have fewer or none: room for them is kept
    widths = [math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) for _, p in bucket]
    own = torch.empty(sum(widths), dtype=dtype, device=device)
    for (_, p), part in zip(bucket, own.split(widths), strict=True):
        shard = p.to_local()
        part[: shard.numel()].view(shard.shape).copy_(shard)
    everyone = torch.empty(ranks * len(own), dtype=dtype, device=device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(everyone, own, group=mesh.get_group(mesh.ndim - 1))
    del own, part
    for (name, p), rows in zip(bucket, everyone.view(ranks, -1).split(widths, 1), strict=True):
        # a lone tensor is the bucket itself, of several each is a copy: none keeps the others alive
        yield name, rows.reshape(-1)[: p.numel()].view(p.shape)
