"""Heads that are DTensors, in real processes that talk through gloo: FSDP2 modules, and parts of the vocabulary.

pytest runs this file again in every rank of a world; the tests of heads run only there, all ranks in step.
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fst_kernels
from fst_kernels import api, blocks, linear_policy_loss, linear_token_logprobs, reference

if not dist.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def _old_triton() -> bool:
    return api.HAS_TRITON and tuple(map(int, version("triton").split(".")[:2])) < (3, 7)


WORLD = int(os.environ.get("FST_TEST_WORLD", 0))
RANK = int(os.environ.get("FST_TEST_RANK", 0))
in_a_rank = pytest.mark.skipif(not WORLD, reason="runs in test_in_every_rank's processes")
# Triton runs interpreted here, and 3.6's interpreter cannot count a loop with NumPy 2.4 or newer.
NOT_HERE = {"cuda"} | ({"cpu"} if api.cpu_backend.LIBRARY is None else set()) | ({"triton"} if _old_triton() else set())
BACKENDS = [x for x in api.BACKENDS if x not in NOT_HERE]
Fixture = Callable[..., Any]


@pytest.mark.skipif(WORLD > 0, reason="the tests run in this process")
def test_in_four_ranks(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--tb=short",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    common = {"FST_TEST_WORLD": "4", "FST_TEST_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    common["CUDA_VISIBLE_DEVICES"] = ""  # gloo's ranks are on the CPU
    if "triton" in BACKENDS:
        common["TRITON_INTERPRET"] = "1"
    ranks = []
    for rank in range(4):
        env = os.environ | common | {"FST_TEST_RANK": str(rank)}
        with (tmp_path / f"{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parents[2], stdout=log, stderr=log))
    failed = [rank for rank, process in enumerate(ranks) if process.wait(timeout=300) != 0]
    assert not failed, "\n".join((tmp_path / f"{rank}.log").read_text()[-5000:] for rank in failed)


@pytest.fixture(scope="module")
def grid() -> Iterator[DeviceMesh]:
    store = f"file://{os.environ['FST_TEST_STORE']}"
    dist.init_process_group("gloo", store, rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60))
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def line(grid: DeviceMesh) -> DeviceMesh:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("ranks",))


@pytest.fixture(params=[2, 4])
def mesh(request: pytest.FixtureRequest, grid: DeviceMesh, line: DeviceMesh) -> DeviceMesh:
    """Of two ranks or four."""
    return grid["shards"] if request.param == 2 else line


def _part(x: Tensor) -> Tensor:
    """This rank's tokens."""
    return x.detach().tensor_split(WORLD)[RANK]


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
@pytest.mark.parametrize("dimensions", [1, 2])
def test_fsdp_gradients_are_those_of_the_whole_batch(
    make_problem: Fixture,
    assert_close: Fixture,
    grid: DeviceMesh,
    line: DeviceMesh,
    dimensions: int,
    units: str,
    tied: bool,
) -> None:
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
        total = f.linear_policy_loss(hidden, head[0], *rows, bias=head[1], ref_hidden=ref_hidden, **kw, **options).loss
        found = f.linear_token_logprobs(hidden, head[0], rows[0], bias=head[1], entropy=True)
        total = total + ((found.logprobs - found.entropy) * part(p.token_weights)).sum()
        kl = f.linear_kl(hidden, head[0], ref_hidden, kw["ref_weight"], bias_p=head[1], direction="reverse")
        return total + (kl * part(p.token_weights)).sum()

    whole, ref = _model(tied).double(), _model(False, seed=1).double()
    truth = loss(reference, whole, ref, lambda x: x)
    truth.backward()

    mesh = line if dimensions == 1 else grid
    model, ref = _shard(_model(tied), mesh, units), _shard(_model(False, seed=1), mesh, units)
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


@in_a_rank
def test_every_ranks_weight_gradient_is_summed_as_it_was_accumulated_and_rounded_once(
    make_problem: Fixture, assert_close: Fixture, line: DeviceMesh
) -> None:
    p = make_problem(64, 32, 700, dtype=torch.bfloat16, scale=8.0)
    rows, options = [_part(x) for x in p.rows], {"weight_max": 4.0, "denominator": 64}
    plain = p.weight.detach().clone().requires_grad_()
    plain.grad_dtype = torch.float32  # type: ignore[attr-defined]
    sharded = distribute_tensor(p.weight.detach(), line, [Shard(0)]).requires_grad_()

    def losses(weight: Tensor) -> Iterator[Tensor]:
        hidden = _part(p.hidden)
        yield linear_policy_loss(hidden, weight, *rows, **options).loss
        yield linear_token_logprobs(hidden, weight, rows[0]).logprobs.sum()

    for own, ours in zip(losses(plain), losses(sharded), strict=True):
        (RANK * own).backward()  # the loss may be scaled in every rank by a number of its own
        total = plain.grad.clone()
        dist.all_reduce(total)
        (RANK * ours).backward()
        assert (sharded.grad.full_tensor() - total.bfloat16()).float().norm() <= 1e-4 * total.norm()
        plain.grad = sharded.grad = None


@in_a_rank
def test_a_gathered_head_obeys_the_rules_of_autograd(make_problem: Fixture, line: DeviceMesh) -> None:
    p = make_problem(8, 4, 33)
    weight = distribute_tensor(p.weight.detach(), line, [Shard(0)]).requires_grad_()
    _rules_of_autograd(p, p.hidden, weight)
    frozen = linear_policy_loss(p.hidden, weight.detach(), *p.rows, weight_max=4.0).loss
    assert torch.autograd.grad(frozen, p.hidden)[0].shape == p.hidden.shape
    with torch.no_grad():
        assert not linear_policy_loss(p.hidden, weight, *p.rows, weight_max=4.0).loss.requires_grad


def _rules_of_autograd(p: Any, hidden: Tensor, weight: Tensor) -> None:
    for f in (
        lambda: linear_policy_loss(hidden, weight, *p.rows, weight_max=4.0).loss,
        lambda: linear_token_logprobs(hidden, weight, p.targets).logprobs.sum(),
    ):
        loss = f()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert torch.equal(f(), loss)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, (hidden, weight), create_graph=True)
        for again in (loss, f()):
            for a, b in zip(first, torch.autograd.grad(again, (hidden, weight)), strict=True):
                assert type(a) is type(b)
                assert torch.equal(*(x.full_tensor() if isinstance(x, DTensor) else x for x in (a, b)))
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


class Loss(nn.Module):
    """A head whose forward pass returns one of our records, as a model's may."""

    def __init__(self, weight: Tensor, record: str) -> None:
        super().__init__()
        self.weight, self.record = nn.Parameter(weight.detach().clone()), record

    def forward(self, hidden: Tensor, *rows: Tensor) -> Any:
        if self.record == "TokenLogprobs":
            return linear_token_logprobs(hidden, self.weight, rows[0])
        return linear_policy_loss(hidden, self.weight, *rows, weight_max=4.0)


@in_a_rank
@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("record", ["PolicyLoss", "TokenLogprobs"])
def test_ddp_averages_the_gradients_of_a_module_that_returns_a_record(
    make_problem: Fixture, assert_close: Fixture, line: DeviceMesh, record: str, static_graph: bool
) -> None:
    p = make_problem(12, 4, 33)
    rows = [x.detach() for x in (p.hidden, *p.rows)]

    def gradient(module: Any, weight: Tensor, *rows: Tensor) -> Tensor:
        out = module(*rows)
        (out.loss if record == "PolicyLoss" else out.logprobs.mean()).backward()
        assert weight.grad is not None
        return weight.grad

    whole, part = Loss(p.weight, record), Loss(p.weight, record)
    parallel = DistributedDataParallel(part, process_group=line.get_group(), static_graph=static_graph)
    found = gradient(parallel, part.weight, *(_part(x) for x in rows))
    assert_close(found, gradient(whole, whole.weight, *rows), absolute=0, relative=1e-5)


# ---- vocabulary parallel: hidden is a DTensor, every rank multiplies its part of the head --------------------------


def _distributed(x: Tensor, mesh: DeviceMesh, placement: Any) -> Tensor:
    """With gradients that come back whole to x."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[placement])


def _same_everywhere(*values: Tensor) -> None:
    for x in values:
        every = [torch.empty_like(x) for _ in range(WORLD)]
        dist.all_gather(every, x.detach())
        assert all(torch.equal(x, y) for y in every)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"entropy_coef": 0.1, "softcap": 3.0, "temperature": 0.6},
    {"kind": "ppo", "kl_coef": 0.3, "temperature": "per token"},
    {"kind": "reinforce", "entropy_coef": 0.1, "kl_coef": 0.3, "softcap": 3.0},
]


CASES = [(x, v, o) for x in BACKENDS for v in (5, 1001) for o in OPTIONS]  # five items for four ranks: 2, 2, 1, 0


@in_a_rank
@pytest.mark.parametrize(
    ("backend", "v", "options"), [x for x in CASES if x[0] != "triton" or x == ("triton", 1001, OPTIONS[-1])]
)
def test_the_loss_of_a_divided_vocabulary_is_the_loss(
    make_problem: Fixture, assert_same_loss: Fixture, mesh: DeviceMesh, backend: str, v: int, options: dict[str, Any]
) -> None:
    p = make_problem(7, 5, v)
    options = {"weight_max": 4.0, "token_weights": p.token_weights, "denominator": 7.0, **options}
    if options.get("temperature") == "per token":
        options["temperature"] = torch.linspace(0.5, 2, 7)
    truth_options = options | p.ref | {"bias": p.bias}

    def cut(x: Tensor) -> Tensor:
        return _distributed(x, mesh, Shard(0))

    def whole(x: Tensor) -> Tensor:
        return _distributed(x, mesh, Replicate())

    poison = torch.where(p.mask, 0, math.nan)
    ours = linear_policy_loss(
        whole(p.hidden + poison[:, None]),
        cut(p.weight),
        torch.where(p.mask, p.targets, -100),
        *(x + poison for x in p.rows[1:]),
        p.mask,
        bias=cut(p.bias),
        ref_hidden=whole(p.ref_hidden),
        ref_weight=cut(p.ref_weight),
        backend=backend,
        chunk_rows=4,
        **options,
    )
    truth = reference.linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, **truth_options)
    _same_everywhere(ours.loss, ours.logprobs, ours.entropy, ours.kl)
    assert_same_loss(ours, truth, (p.hidden, p.weight, p.bias))


@in_a_rank
@pytest.mark.parametrize("backend", ["float64", *(x for x in BACKENDS if x != "triton")])  # its interpreter is slow
@pytest.mark.parametrize("v", [5, 1001])
def test_every_measure_of_a_divided_vocabulary_and_its_gradient(
    make_problem: Fixture, assert_close: Fixture, mesh: DeviceMesh, backend: str, v: int
) -> None:
    exact = backend == "float64"
    p = make_problem(9, 5, v, dtype=torch.float64 if exact else torch.float32)
    inputs, weights = (p.hidden, p.weight, p.bias), torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"softcap": 3.0, "temperature": 0.6}

    def measures(f: Any, whole: Fixture, cut: Fixture, **kw: Any) -> list[Tensor]:
        kw |= options
        hidden, weight, bias, ref = (
            whole(p.hidden),
            cut(p.weight),
            cut(p.bias),
            (whole(p.ref_hidden), cut(p.ref_weight)),
        )
        out = f.linear_token_logprobs(hidden, weight, p.targets, bias=bias, entropy=True, **kw)
        kls = [f.linear_kl(hidden, weight, *ref, bias_p=bias, direction=x, **kw) for x in ("forward", "reverse")]
        return [out.logprobs, out.entropy, out.logsumexp, *kls]

    ours = measures(
        fst_kernels,
        lambda x: _distributed(x, mesh, Replicate()),
        lambda x: _distributed(x, mesh, Shard(0)),
        backend="torch" if exact else backend,
        chunk_rows=4,
    )
    truth = measures(reference, lambda x: x, lambda x: x)
    for a, b, w in zip(ours, truth, weights, strict=True):
        assert a.dtype == (torch.float64 if exact else torch.float32)
        assert_close(a, b, absolute=1e-12 if exact else 1e-5)
        gradients = (torch.autograd.grad((w * x).sum(), inputs, retain_graph=True) for x in (a, b))
        for of_ours, of_truth in zip(*gradients, strict=True):
            assert_close(of_ours, of_truth, absolute=1e-12 if exact else 1e-6, relative=0 if exact else 1e-5)


@in_a_rank
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_that_is_impossible_counts_nothing(
    make_problem: Fixture, assert_same_loss: Fixture, mesh: DeviceMesh, backend: str
) -> None:
    p, live = make_problem(4, 5, 40), 40 - 40 // mesh.size()
    forbidden = torch.where(torch.arange(40) < live, 0, -math.inf)  # the last rank's items
    rows, options = (p.targets % 20, *p.rows[1:]), {"weight_max": 4.0, "entropy_coef": 0.1}

    def loss(bias: Tensor | None = None, ref_bias: Tensor | None = None, **kw: Any) -> Any:
        return linear_policy_loss(
            _distributed(p.hidden, mesh, Replicate()),
            _distributed(p.weight, mesh, Shard(0)),
            *rows,
            bias=None if bias is None else _distributed(bias, mesh, Shard(0)),
            ref_hidden=_distributed(p.ref_hidden, mesh, Replicate()),
            ref_weight=_distributed(p.ref_weight, mesh, Shard(0)),
            ref_bias=None if ref_bias is None else _distributed(ref_bias, mesh, Shard(0)),
            backend=backend,
            **options,
            **kw,
        )

    ref = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight[:live]}
    truth = reference.linear_policy_loss(p.hidden, p.weight[:live], *rows, kl_coef=0.3, **ref, **options)
    assert_same_loss(loss(forbidden, forbidden, kl_coef=0.3), truth, (p.hidden, p.weight))
    measured = loss(None, forbidden)  # without a coefficient an infinite KL stays out of loss and gradients
    assert (measured.kl == math.inf).all()
    truth = reference.linear_policy_loss(p.hidden, p.weight, *rows, **p.ref, **options)
    assert_same_loss(dataclasses.replace(measured, kl=truth.kl, metrics=truth.metrics), truth, (p.hidden, p.weight))


@in_a_rank
def test_ranks_take_the_same_chunks_whatever_their_part_of_the_vocabulary(
    make_problem: Fixture, assert_same_loss: Fixture, line: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CHUNK_LOGITS", 600)
    p = make_problem(600, 2, 5)
    args = _distributed(p.hidden, line, Replicate()), _distributed(p.weight, line, Shard(0)), *p.rows
    truth = reference.linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0)
    assert_same_loss(linear_policy_loss(*args, weight_max=4.0), truth, (p.hidden, p.weight))


@in_a_rank
def test_gradients_lie_as_their_tensors_do(make_problem: Fixture, assert_close: Fixture, line: DeviceMesh) -> None:
    p = make_problem(11, 5, 33)
    truth = torch.autograd.grad(
        reference.linear_policy_loss(p.hidden, p.weight, *p.rows, weight_max=4.0).loss, (p.hidden, p.weight)
    )
    for of_hidden, of_gradient in ((Replicate(), Partial()), (Shard(0), Shard(0))):
        hidden = distribute_tensor(p.hidden.detach(), line, [of_hidden]).requires_grad_()
        weight = distribute_tensor(p.weight.detach(), line, [Shard(0)]).requires_grad_()
        linear_policy_loss(hidden, weight, *p.rows, weight_max=4.0).loss.backward()
        assert hidden.grad.placements == (of_gradient,)
        assert weight.grad.placements == (Shard(0),)
        for x, y in zip((hidden, weight), truth, strict=True):
            assert_close(x.grad.full_tensor(), y, absolute=1e-6, relative=1e-5)


@in_a_rank
def test_a_divided_vocabulary_obeys_the_rules_of_autograd(make_problem: Fixture, line: DeviceMesh) -> None:
    p = make_problem(8, 4, 33)
    hidden, weight = (
        distribute_tensor(x.detach(), line, [y]).requires_grad_()
        for x, y in ((p.hidden, Replicate()), (p.weight, Shard(0)))
    )
    _rules_of_autograd(p, hidden, weight)
    loss = linear_token_logprobs(hidden, weight, p.targets).logprobs.sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@in_a_rank
def test_a_rank_multiplies_its_part_three_times_and_no_more(
    make_problem: Fixture, watcher: Any, line: DeviceMesh
) -> None:
    n, h, v = 12, 8, 500
    p = make_problem(n, h, v)
    hidden, weight = _distributed(p.hidden, line, Replicate()), _distributed(p.weight, line, Shard(0))
    with watcher:
        rows = p.targets, p.behavior_logprobs, torch.ones(n)
        linear_policy_loss(hidden, weight, *rows, weight_max=4.0, chunk_rows=4, backend=BACKENDS[-1]).loss.backward()
    assert watcher.multiply_adds == 3 * n * h * v // WORLD
    assert watcher.largest <= v * h  # of the gradient that this test wants whole: no logits of all tokens


@in_a_rank
def test_every_rank_refuses_what_lies_otherwise(make_problem: Fixture, grid: DeviceMesh, line: DeviceMesh) -> None:
    p = make_problem(8, 4, 32)

    def on(mesh: DeviceMesh, x: Tensor, *placements: Any) -> Tensor:
        return DTensor.from_local(x.detach(), mesh, placements, run_check=False)

    part = p.weight.detach()[:8]
    whole, cut, bias = on(line, p.hidden, Replicate()), on(line, part, Shard(0)), on(line, p.bias[:8], Shard(0))

    def refused(message: str, hidden: Tensor, weight: Tensor, rows: tuple[Tensor, ...] = p.rows, **kw: Any) -> None:
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(hidden, weight, *rows, weight_max=4.0, **kw)

    refused(r"with a DTensor hidden, weight must be \(Shard\(0\),\).*got a plain tensor", whole, p.weight)
    refused(r"weight must be.*got \(Shard\(dim=1\),\)", whole, on(line, p.weight[:, :1], Shard(1)))
    refused(r"weight must be.*got \(Replicate\(\),\)", whole, on(line, p.weight, Replicate()))
    refused("weight must be.*(shards=2)", whole, on(grid["shards"], p.weight[:16], Shard(0)))
    refused("bias must be.*got a plain tensor", whole, cut, bias=p.bias)
    refused("a DTensor hidden must be", on(line, p.hidden, Partial()), cut)
    refused("a DTensor hidden must be", on(grid, p.hidden, Replicate(), Replicate()), cut)
    refused("weight must be sharded or replicated", p.hidden, on(line, p.weight, Partial()))
    refused("both be plain or both DTensors", p.hidden, cut, bias=p.bias)
    refused("both be plain or both DTensors", p.hidden, p.weight, bias=bias)
    refused("both be plain or both DTensors on one mesh", whole, cut, **p.ref)
    refused("targets must be a plain tensor", whole, cut, (on(line, p.targets, Replicate()), *p.rows[1:]))
    refused(r"targets must be in \[0, 32\)", whole, cut, (p.targets + 32, *p.rows[1:]))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 32\)"):
        linear_token_logprobs(p.hidden, cut, p.targets + 32)
    if api.HAS_TRITON:
        with pytest.raises(ValueError, match="'triton-matrix' takes plain tensors"):
            linear_token_logprobs(p.hidden, cut, p.targets, backend="triton-matrix")
