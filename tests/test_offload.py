"""Masters in host memory while their mesh is of GPUs, as FSDP2's CPU offload leaves them: what is done to them between
two passes is done by gloo and the CPU. Ranks are real, over gloo; the GPUs of the mesh are not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from fst_fast import checkpoint
from fst_fast.buckets import gathered
from fst_fast.config import SlowConfig
from fst_fast.model import Model, whole
from fst_fast.ranks import Ranks
from fst_fast.slow.policy import Policy

RANKS = 2
CONFIG = SlowConfig(lr=1e-2, warmup=0, clip=1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a mesh of GPUs would then be a real one")
def test_offloaded_masters_are_clipped_stepped_gathered_and_saved(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=RANKS)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    ranks = Ranks(rank, RANKS, RANKS, init_device_mesh("cuda", (RANKS,)), *(dist.new_group() for _ in range(2)))

    def offloaded(x: torch.Tensor) -> DTensor:
        own = [*x.chunk(RANKS), *[x[:0]] * RANKS][rank].clone()
        meta = TensorMeta(x.shape, x.stride(), x.dtype)
        return DTensor(own, DTensorSpec(ranks.mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)

    torch.manual_seed(0)
    plain = [torch.randn(shape) for shape in ((5, 3), (8, 4), (1,))]  # uneven, even, and none on the last rank
    lm = nn.ParameterList(nn.Parameter(offloaded(x)) for x in plain)
    policy = Policy(cast(Model, SimpleNamespace(lm=lm, device=torch.device("cuda:0"), sharded=True)), CONFIG)
    expected = [nn.Parameter(x.clone()) for x in plain]
    optimizer = torch.optim.AdamW(expected, lr=CONFIG.lr, weight_decay=CONFIG.weight_decay)
    for _ in range(3):
        for master, p in zip(policy.masters, expected, strict=True):
            p.grad = torch.randn_like(p)
            master.grad = offloaded(p.grad)
        assert policy.update() == pytest.approx(float(nn.utils.clip_grad_norm_(expected, CONFIG.clip)))
        optimizer.step()
    for (_, w), p in zip(gathered(lm.named_parameters(), torch.float32, torch.device("cpu")), expected, strict=True):
        assert torch.allclose(w, p, atol=1e-6)

    staged = checkpoint._staged(policy.state_dict())
    before = [whole(m.detach()).clone() for m in policy.masters]
    with torch.no_grad():
        for master in policy.masters:
            master.add_(1.0)
    checkpoint._write(folder / "saved" / "trainer", staged, ranks.beside())
    checkpoint.load_policy(folder / "saved", policy, ranks)
    assert all(torch.equal(whole(m.detach()), b) for m, b in zip(policy.masters, before, strict=True))
    assert {m.device.type for m in policy.masters} == {"cpu"}
    dist.destroy_process_group()
