"""Heads that are DTensors, in real processes that talk through gloo: FSDP2 modules, and parts of the vocabulary.

pytest runs this file again in every rank of a world; the tests of heads run only there, all ranks in step.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fst_kernels
from fst_kernels import api, linear_kl, linear_policy_loss, linear_token_logprobs, reference

if not dist.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

WORLD = int(os.environ.get("FST_TEST_WORLD", 0))
RANK = int(os.environ.get("FST_TEST_RANK", 0))
in_a_rank = pytest.mark.skipif(not WORLD, reason="runs in test_in_every_rank's processes")
BACKENDS = [x for x in api.BACKENDS if x != "cpu" or api.cpu_backend.LIBRARY is not None]
Fixture = Callable[..., Any]


@pytest.mark.skipif(WORLD > 0, reason="the tests run in this process")
@pytest.mark.parametrize("world", [2, 4])
def test_in_every_rank(world: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "--tb=short", "-p", "no:cacheprovider", __file__]
    common = {"FST_TEST_WORLD": str(world), "FST_TEST_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    if "triton" in BACKENDS:
        common["TRITON_INTERPRET"] = "1"
    ranks = []
    for rank in range(world):
        env = os.environ | common | {"FST_TEST_RANK": str(rank)}
        with (tmp_path / f"{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parents[2], stdout=log, stderr=log))
    failed = [rank for rank, process in enumerate(ranks) if process.wait(timeout=300) != 0]
    assert not failed, "\n".join((tmp_path / f"{rank}.log").read_text()[-5000:] for rank in failed)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    store = f"file://{os.environ['FST_TEST_STORE']}"
    dist.init_process_group("gloo", store, rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60))
    yield init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ranks",))
    dist.destroy_process_group()


def _part(x: Tensor) -> Tensor:
    """This rank's tokens."""
    return x.detach().tensor_split(WORLD)[RANK]


def _full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- data parallel: hidden is plain, the head is gathered ----------------------------------------------------------


class Model(nn.Module):
    """Tokens to hidden states; the head is called by the loss alone."""

    def __init__(self, v: int, h: int, tied: bool) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(v, h), nn.Linear(h, h), nn.Linear(h, v)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.middle(self.embed(tokens)))


def _model(tied: bool, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(1001, 6, tied)


def _shard(model: Model, mesh: DeviceMesh, units: str) -> Model:
    for x in (model.middle, *([model.head] if units == "head" else [])):
        fully_shard(x, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=units != "gathered")
    for x in model.modules():
        if isinstance(x, FSDPModule):
            x.set_gradient_divide_factor(1.0)  # FSDP2 averages otherwise
            x.set_force_sum_reduction_for_comms(True)  # what gloo can do
    return model


@in_a_rank
@pytest.mark.parametrize(("units", "tied"), [("head", False), ("root", True), ("gathered", False)])
@pytest.mark.parametrize("hybrid", [False, True])
def test_fsdp_gradients_are_those_of_the_whole_batch(
    make_problem: Fixture, assert_close: Fixture, mesh: DeviceMesh, units: str, tied: bool, hybrid: bool
) -> None:
    if hybrid and WORLD < 4:
        pytest.skip("needs two dimensions")
    p = make_problem(23, 6, 1001)
    tokens = p.targets.roll(1)
    mask = p.mask & (torch.arange(23) < 23 - 23 // WORLD)  # the last rank has nothing to learn
    options: dict[str, Any] = {"weight_max": 4.0, "denominator": mask.sum(), "entropy_coef": 0.1, "kl_coef": 0.2}

    def loss(f: Any, model: Model, ref: Model, part: Fixture) -> Tensor:
        hidden, head = model(part(tokens)), (model.head.weight, model.head.bias)
        with torch.no_grad():
            ref_hidden = ref(part(tokens))
        rows = [part(x) for x in (*p.rows, mask)]
        assert isinstance(head[0], DTensor) == (f is fst_kernels and units != "gathered")
        kw = dict(zip(("ref_weight", "ref_bias"), (ref.head.weight, ref.head.bias), strict=True))
        total = f.linear_policy_loss(
            hidden, head[0], *rows, bias=head[1], ref_hidden=ref_hidden, **kw, **options
        ).loss
        found = f.linear_token_logprobs(hidden, head[0], rows[0], bias=head[1], entropy=True)
        total = total + ((found.logprobs - found.entropy) * part(p.token_weights)).sum()
        kl = f.linear_kl(hidden, head[0], ref_hidden, kw["ref_weight"], bias_p=head[1], direction="reverse")
        return total + (kl * part(p.token_weights)).sum()

    whole, ref = _model(tied).double(), _model(False, seed=1).double()
    truth = loss(reference, whole, ref, lambda x: x)
    truth.backward()

    on = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")) if hybrid else mesh
    model, ref = _shard(_model(tied), on, units), _shard(_model(False, seed=1), on, units)
    for _ in range(2):  # gradients of micro-batches add up
        own = loss(fst_kernels, model, ref, _part)
        own.backward()
    total = own.detach().clone()
    dist.all_reduce(total)
    assert_close(total, truth.detach(), absolute=0, relative=1e-5)
    for (name, x), y in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(x.grad, DTensor)
        assert x.grad.placements == x.placements, name
        assert_close(x.grad.full_tensor() / 2, y.grad, absolute=0, relative=1e-5)
