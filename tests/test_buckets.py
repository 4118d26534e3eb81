"""Sharded parameters come back whole, bucket by bucket, and never all of them at once. Ranks are real, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import _disable_current_modes

from fst_fast import model as model_module
from fst_fast.buckets import gathered
from fst_fast.model import load_model
from fst_fast.ranks import Ranks
from fst_fast.slow.sharding import shard
from tests.kernels.conftest import Watcher
from tests.models import save_tiny

RANKS = 2
CPU = torch.device("cpu")


def test_in_two_ranks(tmp_path: Path) -> None:
    for family in ("qwen3", "llama"):  # a tied head and an untied one
        save_tiny(family, tmp_path / family)
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=RANKS)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    ranks = Ranks(rank, RANKS, RANKS, init_device_mesh("cpu", (RANKS,)))
    with pytest.MonkeyPatch.context() as patch:
        gathers = _counted(patch)
        for family, dtype in (("qwen3", "bfloat16"), ("llama", "bfloat16"), ("llama", "float32")):
            _a_model_comes_back(folder / family, dtype, ranks, gathers, patch)
        _uneven_rows_come_back(ranks, gathers)
        _memory_is_bounded(ranks)
    dist.destroy_process_group()


def _counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each gather from now on."""
    gathers: list[int] = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = getattr(dist, name)

    def gather(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> None:
        gathers.append(out.numel())
        with _disable_current_modes():  # gloo's thread lets go of tensors some time later: of these, which do not count
            everyone = out.clone()
            real(everyone, own.clone(), group=group)
            out.copy_(everyone)

    patch.setattr(dist, name, gather)
    return gathers


def _a_model_comes_back(folder: Path, dtype: str, ranks: Ranks, gathers: list[int], patch: pytest.MonkeyPatch) -> None:
    model, sharded = (load_model(str(folder), dtype=dtype) for _ in range(2))
    shard(sharded, ranks, offload=False)
    expected = {}
    with torch.no_grad():  # an update that bf16 would lose in part: what is handed out is the masters, rounded
        for (name, p), master in zip(model.lm.named_parameters(), sharded.lm.parameters(), strict=True):
            master.mul_(1.003)
            expected[name] = p.float().mul_(1.003).to(p.dtype)
    sizes = [w.numel() * w.itemsize for w in expected.values()]
    one_by_one = len(sizes)
    two = sizes[0] + sizes[1]
    for limit, count in ((1, one_by_one), (two, None), (two - 1, None), (2**28, 1)):
        gathers.clear()
        patch.setattr(model_module, "gathered", lambda *args, limit=limit: gathered(*args, limit=limit))
        found = list(sharded.weights())
        assert [name for name, _ in found] == list(expected)
        for name, w in found:
            assert w.dtype == expected[name].dtype
            assert torch.equal(w, expected[name]), name
        assert count in (None, len(gathers))
        if limit == two:  # a bucket is filled to the last byte
            assert gathers[0] * w.itemsize >= two > gathers[1] * w.itemsize
        if limit == two - 1:
            assert gathers[0] * w.itemsize < two


def _uneven_rows_come_back(ranks: Ranks, gathers: list[int]) -> None:
    """More rows on the first rank, a last rank without any, a scalar's row, and a bucket of all of them."""
    torch.manual_seed(0)
    shapes = [(5, 3), (1,), (1, 4, 2), (7,), (2, 2), (3, 1)]
    plain = [torch.randn(shape) for shape in shapes]
    module = nn.ParameterList(p.clone() for p in plain)
    fully_shard(module, mesh=ranks.mesh)
    for limit in (1, 4 * 16, 10**6):
        found = [w for _, w in gathered(module.named_parameters(), torch.float32, CPU, limit=limit)]
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert len(gathers) > 0


def _memory_is_bounded(ranks: Ranks) -> None:
    module = nn.Sequential(*(nn.Linear(64, 64, bias=i % 3 == 0) for i in range(40)))
    module.append(nn.Linear(64, 257, bias=False))  # larger than a bucket
    fully_shard(module, mesh=ranks.mesh)
    total = sum(2 * p.numel() for p in module.parameters())
    largest = 2 * 64 * 258  # with its padding
    for limit in (1, 10_000, 30_000, 60_000):
        watcher, seen = Watcher(), 0
        with watcher:
            for _, w in gathered(module.named_parameters(), torch.bfloat16, CPU, limit=limit):
                seen += w.numel() * w.itemsize
        del w
        bucket = max(limit, largest)
        assert seen == total > 2.5 * bucket
        assert watcher.peak_bytes <= 2 * bucket + bucket / RANKS + 512
        assert watcher.live_bytes == 0
