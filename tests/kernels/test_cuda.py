"""The CUDA row kernel: on a Hopper GPU as nvcc built it, elsewhere its source built by g++ with cuda_emulation.h."""

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels import (
    api,
    cuda_backend,
    linear_kl,
    linear_policy_loss,
    linear_token_logprobs,
    reference,
    token_logprobs,
    torch_backend,
)
from fst_kernels.blocks import WIDTH, Ask, Measures
from fst_kernels.objective import Objective, PolicyRows
from fst_kernels.types import Logits

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() and not cuda_backend.refusal(torch.empty(1, 4, device="cuda")) else "cpu"
ON_GPU = DEVICE == "cuda"
CLUSTERS = 1, 2, 4, 8, 16
Fixture = Callable[..., Any]


def _emulation(folder: Path, change: Callable[[str], str] = lambda source: source) -> cuda_backend._Library:
    """The kernel for a CPU, with blocks of 64 threads."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to build the emulation")
    source, here = folder / "row_cluster.cu", Path(__file__).parent
    source.write_text(change((ROOT / "csrc/row_cluster.cu").read_text()))
    command = ["g++", "-x", "c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([*command, "-DEMULATED_THREADS=64", "-I", here, source, "-o", folder / "emulation.so"], check=True)
    return cuda_backend._Library(ctypes.CDLL(str(folder / "emulation.so")))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cuda_backend.LIBRARY if ON_GPU else _emulation(tmp_path_factory.mktemp("emulation"))


def _use(patch: pytest.MonkeyPatch, library: Any) -> None:
    """Make it the backend's, which elsewhere than on a GPU takes CPU tensors then."""
    if not ON_GPU:
        patch.setattr(cuda_backend, "LIBRARY", library)
        patch.setattr(cuda_backend, "_is_hopper", lambda device: True)
        patch.setattr(cuda_backend, "_stream", lambda device: None)


@pytest.fixture
def backend(library: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    _use(monkeypatch, library)
    return "cuda"


@pytest.fixture(scope="module")
def kernel(library: Any) -> Fixture:
    """The row step of the backend, with clusters of a size of one's choice."""

    def step(
        logits: Logits,
        ask: Ask,
        upstream: Measures | PolicyRows | None = None,
        grad: Tensor | None = None,
        cluster: int = 2,
        library: Any = library,
    ) -> Measures:
        with pytest.MonkeyPatch.context() as patch:
            _use(patch, library)
            patch.setattr(library, "cluster_size", lambda *_: cluster)
            return cuda_backend.row_step(logits, ask, upstream, grad)

    return step


def _rows(values: Tensor, bias: Tensor | None = None, temperature: Any = 1.0, softcap: float | None = None) -> Logits:
    """These logits (n, V) in padded rows, the padding NaN."""
    n, v = values.shape
    memory = torch.full((n, -(-v // WIDTH) * WIDTH), math.nan, dtype=values.dtype)
    memory[:, :v] = values
    products = memory.to(DEVICE)[:, :v]
    bias = None if bias is None else bias.to(DEVICE)
    return Logits(products, bias, torch.as_tensor(temperature).to(DEVICE), softcap)


def _exact(logits: Logits) -> Logits:
    """The same in float64 and in memory of its own."""
    bias = None if logits.bias is None else logits.bias.double()
    return replace(logits, products=logits.products.double(), bias=bias, temperature=logits.temperature.double())


def _room(logits: Logits, dtype: torch.dtype, in_place: bool) -> Tensor:
    return logits.room(dtype) if in_place else _rows(torch.full(logits.products.shape, math.nan, dtype=dtype)).products


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    v = draw(st.sampled_from([1, 7, 16, 255, 256, 257, 1000, 1100, 1537, 2053]))
    return {
        "n": draw(st.integers(1, 2)),
        "v": v,
        "cluster": draw(st.sampled_from([1, 2, 4, 8] if v > 16 else [1, 2])),
        "seed": draw(st.integers(0, 2**20)),
        "scale": draw(st.sampled_from([0.1, 3.0, 30.0, 1e4])),
        "kind": draw(st.sampled_from(["given", "cispo", "ppo", "reinforce"])),
        "offset": draw(st.sampled_from([0.0, 1.0, -60.0, 60.0])),  # of the behaviour's log-prob: ρ overflows at −60
        "weight_max": draw(st.sampled_from([4.0, 1e30])),
        "entropy": draw(st.booleans()),
        "kl": draw(st.sampled_from([None, "forward", "reverse"])),
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "temperature": draw(st.sampled_from(["none", "one", "per row"])),
        "bias": draw(st.sampled_from([None, "finite", "-inf"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "in_place": draw(st.booleans()),
    }


def _problem(case: dict[str, Any]) -> tuple[Logits, Ask, Measures | PolicyRows]:
    n, v, seed = case["n"], case["v"], case["seed"]
    bias = None if case["bias"] is None else _randn(v, seed=seed + 1)
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(v, (n,), generator=g)
    if case["bias"] == "-inf" and bias is not None:
        bias[torch.rand(v, generator=g) < 0.5] = -math.inf
        bias[targets] = 0.0
    temperature = {"none": 1.0, "one": 0.6, "per row": 0.3 + torch.rand(n, generator=g)}[case["temperature"]]
    shape = {"bias": bias, "temperature": temperature, "softcap": case["softcap"]}
    logits = _rows(_randn(n, v, seed=seed + 2) * case["scale"], **shape)
    ref = None
    if case["kl"] is not None:
        ref = _rows(logits.products.cpu() + _randn(n, v, seed=seed + 3), **shape)
    ask = Ask(targets.to(DEVICE), case["entropy"], ref, case["kl"] != "reverse")
    slopes, advantages = _randn(4, n, seed=seed + 4).to(DEVICE), _randn(n, seed=seed + 5).to(DEVICE)
    if case["kind"] == "given":
        entropy, kl = slopes[1] if case["entropy"] else None, None if ref is None else slopes[2]
        return logits, ask, Measures(slopes[0], entropy, kl, slopes[3])
    logprobs = torch_backend.row_step(_exact(logits), Ask(targets.to(DEVICE), False), None, None).logprobs
    assert logprobs is not None
    objective = Objective(case["kind"], weight_max=case["weight_max"])
    coefficients = 0.3 if case["entropy"] else 0.0, 0.0 if ref is None or case["kl"] == "reverse" else 0.5
    behavior = logprobs.float() + case["offset"]
    weights = slopes[3].abs()
    return logits, ask, PolicyRows(ask.targets, behavior, advantages, weights >= 0, weights, objective, *coefficients)


@settings(max_examples=120)
@given(case=_cases())
def test_measures_and_gradients_are_those_of_float64(kernel: Fixture, case: dict[str, Any]) -> None:
    logits, ask, upstream = _problem(case)
    exact_ask = ask if ask.ref is None else ask._replace(ref=_exact(ask.ref))
    exact = torch.empty_like(logits.products, dtype=torch.float64)
    truth = torch_backend.row_step(_exact(logits), exact_ask, upstream, exact)
    largest = logits.products.abs().max().item() / (logits.temperature.min().item()) + 1
    if logits.softcap is not None:
        largest = min(largest, logits.softcap / logits.temperature.min().item()) + 1
    grad = _room(logits, case["dtype"], case["in_place"])
    found = kernel(logits, ask, upstream, grad, case["cluster"])
    for ours, true in zip(found, truth, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None and true is not None:
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), true, atol=1e-5 + 2e-7 * largest, rtol=1e-6)
    assert found.logprobs is not None
    assert (found.logprobs <= 0).all()
    if isinstance(upstream, PolicyRows):
        upstream = Measures(upstream.logprob_slopes(found.logprobs), *upstream.term_slopes())
    steep = sum(g.abs().max().item() for g in upstream if g is not None)  # a gradient has terms of up to steep · logits
    rounding = 2.0**-8 if case["dtype"] == torch.bfloat16 else 1e-5
    error = (grad.double() - exact).abs()
    assert (error <= rounding * exact.abs() + 3e-7 * steep * largest * (1 + largest * (ask.ref is not None))).all()


@pytest.mark.parametrize(
    ("given_dtype", "grad_dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_gradient_in_the_logits_own_memory_has_the_bits_of_one_beside_it(
    kernel: Fixture, given_dtype: torch.dtype, grad_dtype: torch.dtype, cluster: int
) -> None:
    values, targets = (_randn(2, 1900) * 5).to(given_dtype), torch.tensor([3, 1899], device=DEVICE)
    slopes = Measures(torch.tensor([0.3, -1.7], device=DEVICE))
    beside = _rows(torch.full((2, 1900), math.nan)).products
    measures = kernel(_rows(values), Ask(targets, True), slopes, beside, cluster)
    logits = _rows(values)
    grad = logits.room(grad_dtype)
    for a, b in zip(kernel(logits, Ask(targets, True), slopes, grad, cluster), measures, strict=True):
        assert (a is b is None) or torch.equal(a, b)
    assert torch.equal(grad, beside.to(grad_dtype))  # torch rounds to the nearest even


@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, 8, 1000, 1099])
def test_nothing_but_the_logits_is_read_or_written(kernel: Fixture, given_dtype: torch.dtype, v: int) -> None:
    values = _randn(3, v).to(given_dtype)
    memory = torch.full((3, 1120), math.nan, dtype=given_dtype, device=DEVICE)
    memory[:, :v] = values
    grad = torch.full((3, 1152), 7.0, dtype=given_dtype, device=DEVICE)
    targets = torch.tensor([0, v - 1, v // 2], device=DEVICE)
    before = memory.clone()
    logits = Logits(memory[:, :v], None, torch.tensor(1.0), None)
    found = kernel(logits, Ask(targets, False), Measures(torch.ones(3, device=DEVICE)), grad[:, :v])
    truth = torch.log_softmax(values.double(), -1).gather(1, targets.cpu()[:, None]).squeeze(1)
    torch.testing.assert_close(found.logprobs, truth.float().to(DEVICE), atol=1e-5, rtol=0)
    assert torch.equal(memory[:, :v], before[:, :v])
    assert memory[:, v:].isnan().all()
    assert grad[:, :v].isfinite().all()
    assert (grad[:, v:] == 7).all()


def test_two_runs_have_the_same_bits_and_any_cluster_the_same_measures(kernel: Fixture) -> None:
    case = {"n": 2, "v": 3001, "seed": 5, "scale": 4.0, "kind": "cispo", "offset": 0.3, "entropy": True}
    case |= {"weight_max": 4.0}
    case |= {"kl": "forward", "softcap": 30.0, "temperature": "per row", "bias": "finite"}

    def everything(cluster: int) -> list[Tensor]:
        logits, ask, upstream = _problem(case)
        grad = logits.room(torch.float32)
        return [*kernel(logits, ask, upstream, grad, cluster), grad]

    first = everything(4)
    for a, b in zip(first, everything(4), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first, everything(2), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 30.0}, {"softcap": 5.0, "temperature": 1.3}])
def test_no_logprob_is_above_0_where_one_item_has_all_the_probability(kernel: Fixture, options: dict[str, Any]) -> None:
    n = 40
    values, targets = _randn(n, 40) * 0.1, torch.randint(40, (n,), generator=torch.Generator().manual_seed(0))
    values[torch.arange(n), targets] += torch.linspace(5, 500, n)
    found = kernel(_rows(values, _randn(40, seed=1), **options), Ask(targets.to(DEVICE), True), cluster=1)
    assert found.logprobs is not None
    assert (found.logprobs <= 0).all()
    assert (found.logprobs.max() == 0) == ("softcap" not in options or options["softcap"] > 20)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 1.0, 30.0, 1e4])
def test_the_softcap_and_its_slope_are_exact_to_the_last_digits_at_any_size(kernel: Fixture, softcap: float) -> None:
    z = torch.cat([torch.logspace(-6, 3, 20), -torch.logspace(-5, 2, 20), torch.zeros(1)])[None]
    slopes = Measures(torch.ones(1, device=DEVICE))
    logits, exact = _rows(z, softcap=softcap), torch.empty(1, 41, dtype=torch.float64, device=DEVICE)
    ask = Ask(torch.tensor([25], device=DEVICE), False)
    truth = torch_backend.row_step(_exact(logits), ask, slopes, exact)
    grad = _room(logits, torch.float32, False)
    found = kernel(logits, ask, slopes, grad, cluster=1)
    scale = min(softcap, 1e3)
    torch.testing.assert_close(found.logsumexp.double(), truth.logsumexp, atol=2e-6 + 2e-7 * scale, rtol=0)
    seen = exact.abs() > 1e-30  # below, fp32 has no digits to show
    torch.testing.assert_close(grad.double()[seen], exact[seen], atol=0, rtol=1e-5 + 3e-7 * scale)


@pytest.mark.parametrize("temperature", [0.6, 0.7, 1.3, 1e-3, 1e4])
def test_logits_are_divided_by_the_temperature_to_the_last_bit(kernel: Fixture, temperature: float) -> None:
    z = _randn(300, 1) * 40
    found = kernel(_rows(z, temperature=temperature), Ask(None, False), cluster=1)
    assert torch.equal(found.logsumexp.cpu(), z[:, 0] / temperature)  # of one item: itself


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 70, 1099])
def test_a_nan_or_inf_logit_makes_its_row_nan_and_no_other(kernel: Fixture, value: float, place: int) -> None:
    values = _randn(2, 1100)
    values[0, place] = value
    logits, ask = _rows(values), Ask(torch.tensor([5, 5], device=DEVICE), True, _rows(_randn(2, 1100, seed=1)))
    grad = _room(logits, torch.float32, True)
    slopes = Measures(*torch.ones(4, 2, device=DEVICE))
    for x in kernel(logits, ask, slopes, grad, cluster=4):
        assert x[0].isnan()
        assert x[1].isfinite()
    assert grad[0].isnan().any()
    assert grad[1].isfinite().all()


def test_a_nan_in_what_makes_the_slope_stays_a_nan(kernel: Fixture) -> None:
    targets, ones = torch.tensor([5, 1100, -1, 7, 7], device=DEVICE), torch.ones(5, device=DEVICE)
    behavior, advantages = -7 * ones, ones.clone()
    behavior[3], advantages[4] = math.nan, math.nan
    for kind in ("cispo", "ppo"):
        logits = _rows(_randn(5, 1100))
        grad = logits.room(torch.bfloat16)
        batch = PolicyRows(targets, behavior, advantages, ones > 0, ones, Objective(kind, weight_max=4.0), 0.0, 0.0)
        found = kernel(logits, Ask(targets, False), batch, grad)
        assert found.logprobs is not None
        assert found.logprobs.isnan().tolist() == [False, True, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, True, True, True, True]


def test_rows_without_a_slope_get_0_whatever_their_logits(kernel: Fixture) -> None:
    values = torch.full((1, 1100), math.nan)
    logits = _rows(values, softcap=3.0, temperature=0.5)
    grad = logits.room(torch.float32)
    zero = torch.zeros(1, device=DEVICE)
    kernel(logits, Ask(torch.tensor([3], device=DEVICE), True), Measures(zero, zero, None, zero), grad)
    assert (grad == 0).all()


@pytest.mark.parametrize("slope", [math.inf, -math.inf])
def test_items_of_probability_0_count_nothing_even_where_the_slope_is_infinite(kernel: Fixture, slope: float) -> None:
    values = _randn(1, 1100)
    values[0, 500:600] = -math.inf
    logits = _rows(values)
    grad = logits.room(torch.float32)
    kernel(logits, Ask(torch.tensor([3], device=DEVICE), False), Measures(torch.tensor([slope], device=DEVICE)), grad)
    assert (grad[0, 500:600] == 0).all()
    assert grad[0, 600:].isinf().all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_kl_is_infinite_where_support_is_missing_and_only_there(kernel: Fixture, direction: str) -> None:
    p, q = _randn(2, 1100), _randn(2, 1100, seed=1)
    missing, there = (q, p) if direction == "forward" else (p, q)
    missing[0, 600] = -math.inf  # possible in the one, impossible in the other
    there[1, 600] = -math.inf  # counts nothing
    kl = kernel(_rows(p), Ask(None, False, _rows(q), direction == "forward"), cluster=8).kl
    assert kl is not None
    a, b = (x.double().log_softmax(-1) for x in (there, missing))
    exact = (a.exp() * (a - b)).nan_to_num(nan=0.0)[1].sum()
    assert kl[0] == math.inf
    torch.testing.assert_close(kl[1].double().cpu(), exact, atol=1e-5, rtol=0)


# ---- the public functions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cispo", "ppo", "reinforce"])
@pytest.mark.parametrize("v", [17, 1100])
def test_the_policy_loss_is_the_references(
    backend: str, make_problem: Fixture, assert_same_loss: Fixture, kind: str, v: int
) -> None:
    p = make_problem(7, 5, v)
    for name, x in vars(p).items():
        setattr(p, name, x.detach().to(DEVICE).requires_grad_(x.requires_grad))
    options: dict[str, Any] = {"kind": kind, "weight_max": 4.0, "entropy_coef": 0.1, "kl_coef": 0.3, "bias": p.bias}
    options |= {"softcap": 3.0, "temperature": 0.6, **p.ref}
    ours = linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, **options, chunk_rows=3, backend=backend)
    truth = reference.linear_policy_loss(p.hidden, p.weight, *p.rows, p.mask, **options)
    assert_same_loss(ours, truth, (p.hidden, p.weight, p.bias))


def test_the_measures_and_their_gradients_are_the_references(
    backend: str, make_problem: Fixture, assert_close: Fixture
) -> None:
    p = make_problem(5, 6, 1100)
    hidden, weight = (x.detach().to(DEVICE).requires_grad_() for x in (p.hidden, p.weight))
    targets = torch.stack([p.targets] * 2, 1).to(DEVICE)[:, 0]  # apart in memory
    ref = [x.to(DEVICE) for x in p.ref.values()]

    def measures(module: Any, **options: Any) -> list[Tensor]:
        out = module.linear_token_logprobs(hidden, weight, targets, entropy=True, **options)
        kl = module.linear_kl(hidden, weight, *ref, direction="reverse", **options)
        of_logits = module.token_logprobs(hidden.detach() @ weight.T, targets, temperature=0.7, **options)
        return [out.logprobs, out.entropy, out.logsumexp, kl, of_logits.logprobs]

    class Ours:
        linear_token_logprobs, linear_kl, token_logprobs = map(
            staticmethod, (linear_token_logprobs, linear_kl, token_logprobs)
        )

    for a, b in zip(measures(Ours, backend=backend), measures(reference), strict=True):
        assert_close(a, b, absolute=1e-5)
        of_ours, of_truth = (torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (a, b))
        assert_close(of_ours, of_truth, absolute=1e-6, relative=1e-5)


def test_nothing_to_do_launches_nothing(kernel: Fixture) -> None:
    found = kernel(_rows(torch.empty(0, 37)), Ask(torch.empty(0, dtype=torch.int64, device=DEVICE), True))
    assert found.logsumexp is not None
    assert found.logsumexp.shape == (0,)


# ---- what it takes, and how ------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused_and_auto_leaves_them_to_others(make_problem: Fixture) -> None:
    p = make_problem(4, 3, 7)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available: .* Hopper GPUs .* got a tensor on cpu"):
        linear_token_logprobs(p.hidden, p.weight, p.targets, backend="cuda")
    assert api._backend("auto", p.hidden, p.weight) != "cuda"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_given_logits_of_other_dtypes_are_refused(backend: str, dtype: torch.dtype) -> None:
    logits, targets = torch.zeros(2, 8, dtype=dtype, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=f"backend='cuda' is not available: .*float{dtype.itemsize * 8}"):
        token_logprobs(logits, targets, backend=backend)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2, 9),
        torch.zeros(2, 12, dtype=torch.bfloat16),
        torch.zeros(2, 10)[:, :8],
        torch.zeros(20)[1:17].view(2, 8),
    ],
)
def test_given_logits_in_rows_that_bulk_copies_cannot_take_are_refused(backend: str, logits: Tensor) -> None:
    targets = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    rows = torch.empty_strided((40,), (1,), dtype=logits.dtype, device=DEVICE).zero_()
    logits = rows.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    with pytest.raises(ValueError, match=r"rows are multiples of 16 bytes, got \[2, .*: use 'triton'"):
        token_logprobs(logits, targets, backend=backend)


def test_rows_that_no_cluster_holds_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="no room for rows of 1000000 logits"):
        token_logprobs(
            torch.zeros(1, 10**6, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE), backend=backend
        )


def test_a_caller_compiles_into_one_graph(backend: str, make_problem: Fixture) -> None:
    p = make_problem(5, 6, 37)
    hidden, weight, *rows = (x.detach().to(DEVICE) for x in (p.hidden, p.weight, *p.rows))
    hidden.requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        return linear_policy_loss(hidden, weight, *rows, weight_max=4.0, backend=backend).loss * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(compiled, loss(hidden))
    (a,), (b,) = torch.autograd.grad(compiled, hidden), torch.autograd.grad(loss(hidden), hidden)
    assert torch.equal(a, b)


@pytest.mark.skipif(ON_GPU, reason="this GPU's driver is there")
def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "LIBRARY", None)
    monkeypatch.setattr(cuda_backend, "_is_hopper", lambda device: True)
    assert "FST_CUDA=1" in str(cuda_backend.refusal(torch.empty(2, 8)))


@pytest.mark.skipif(ON_GPU, reason="of the emulation")
@pytest.mark.parametrize(
    ("line", "without"),
    [
        ("  cluster_wait();  // every block has read its slice, and its state is here\n", ""),
        ("(items * sizeof(In) + 15) / 16 * 16", "items * sizeof(In)"),
        ("  cluster_arrive();\n", "  if (rank == 0) cluster_arrive();\n"),
        ("  cluster_wait();  // every block has started: its memory may be written\n", ""),
        ("  cluster_arrive();\n", "  cluster_arrive();\n  if (rank > 0) return;\n"),
    ],
)
def test_the_emulation_refuses_a_kernel_that_breaks_the_rules(
    kernel: Fixture, tmp_path: Path, line: str, without: str
) -> None:
    def broken(source: str) -> str:
        assert source.count(line) == 1
        return source.replace(line, without)

    logits = _rows(_randn(1, 1099))
    ask, upstream, grad = Ask(torch.tensor([3]), True), Measures(torch.ones(1)), logits.room(torch.bfloat16)
    with pytest.raises(RuntimeError, match="the CUDA row kernel did not start"):
        kernel(logits, ask, upstream, grad, cluster=4, library=_emulation(tmp_path, broken))


# ---- on a GPU only ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU and an install with FST_CUDA=1")
@pytest.mark.parametrize("v", [128256, 151936, 256000])
@pytest.mark.parametrize("kl", [None, "forward"])
def test_whole_vocabularies_in_the_clusters_it_chooses(v: int, kl: str | None) -> None:
    case = {"n": 300, "v": v, "seed": 1, "scale": 4.0, "kind": "cispo", "offset": 0.3, "entropy": True, "kl": kl}
    case |= {"weight_max": 4.0, "softcap": None, "temperature": "none", "bias": None}
    logits, ask, upstream = _problem(case)
    exact = torch.empty_like(logits.products, dtype=torch.float64)
    exact_ask = ask if ask.ref is None else ask._replace(ref=_exact(ask.ref))
    truth = torch_backend.row_step(_exact(logits), exact_ask, upstream, exact)
    grad = logits.room(torch.bfloat16)
    found = cuda_backend.row_step(logits, ask, upstream, grad)
    for ours, true in zip(found, truth, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None and true is not None:
            torch.testing.assert_close(ours.double(), true, atol=1e-5, rtol=1e-6)
    assert (grad.double() - exact).norm() <= 3e-3 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU and an install with FST_CUDA=1")
def test_more_than_two_to_the_31_logits() -> None:
    n, v = 14500, 151936
    products = torch.empty(n, v, device=DEVICE).normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    targets, slopes = torch.arange(n, device=DEVICE), Measures(torch.linspace(-1, 1, n, device=DEVICE))
    last = products[-3:].clone()

    def measured(x: Tensor, rows: slice) -> tuple[Measures, Tensor]:
        logits = Logits(x, None, torch.tensor(1.0), None)
        grad = logits.room(torch.bfloat16)
        ask, of_rows = Ask(targets[rows], True), Measures(slopes.logprobs[rows])
        return cuda_backend.row_step(logits, ask, of_rows, grad), grad

    (all_rows, grad), (few, few_grad) = measured(products, slice(None)), measured(last, slice(-3, None))
    assert torch.equal(grad[-3:], few_grad)
    for a, b in zip(all_rows, few, strict=True):
        assert (a is b is None) or torch.equal(a[-3:], b)
