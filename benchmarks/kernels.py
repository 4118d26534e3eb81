"""The fused policy loss and log-probs against every peer that is installed, in one interleaved run.

    python benchmarks/kernels.py [--shape cpu|quick|qwen3-8b|...] [--dtype float32] [--live 1 0.52 0.1] [--rounds 7]
                                 [--only NAME ...] [--threads 2] [--json FILE] [--plot FILE.png]

Per contender: median seconds of forward + backward, its ratio to the best peer and to the floor (torch's time for the 3
products of the live rows), peak memory beyond inputs and gradients, and errors against float64 on 256 of the rows. A
contender that does not run is listed with its reason. On a CPU the ratios are also given for CPU seconds, all threads
together: other people's load moves them less.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fst_kernels import api, linear_policy_loss, linear_token_logprobs, reference

CAP = 4.0  # of ρ
SEQUENCE = 256  # tokens that share an advantage: Liger takes one a sequence


@dataclass(frozen=True)
class Shape:
    n: int
    h: int
    v: int
    softcap: float | None = None


SHAPES = {
    "quick": Shape(512, 128, 8192),
    "cpu": Shape(2048, 512, 32768),
    "qwen3-0.6b": Shape(32768, 1024, 151936),
    "qwen3-8b": Shape(32768, 4096, 151936),
    "llama-3.1-8b": Shape(32768, 4096, 128256),
    "gemma-2-9b": Shape(16384, 3584, 256000, softcap=30.0),
}


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    behavior: Tensor  # (N,)
    advantages: Tensor  # (N,), one value a sequence
    mask: Tensor  # (N,) bool
    softcap: float | None

    def first(self, n: int) -> Problem:
        rows = {k: getattr(self, k)[:n] for k in ("hidden", "targets", "behavior", "advantages", "mask")}
        rows["hidden"] = rows["hidden"].detach().clone().requires_grad_()
        return replace(self, weight=self.weight.detach().clone().requires_grad_(), **rows)


def make_problem(shape: Shape, live: float, dtype: torch.dtype, device: str) -> Problem:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.n, shape.h, generator=g) * (3 / shape.h**0.5)
    weight = torch.randn(shape.v, shape.h, generator=g)
    targets = torch.randint(shape.v, (shape.n,), generator=g)
    advantages = torch.randn(shape.n // SEQUENCE, generator=g).repeat_interleave(SEQUENCE)
    mask = torch.rand(shape.n, generator=g) < live
    moved = [x.to(device) for x in (hidden.to(dtype), weight.to(dtype), targets, advantages, mask)]
    hidden, weight, targets, advantages, mask = moved
    own = linear_token_logprobs(hidden, weight, targets, softcap=shape.softcap).logprobs
    behavior = own + 0.3 * torch.randn(shape.n, generator=g).to(device)
    learned = hidden.requires_grad_(), weight.requires_grad_()
    return Problem(*learned, targets, behavior, advantages, mask, shape.softcap)


# ---- contenders: a scalar whose backward has run, or log-probs -----------------------------------------------------


def ours(p: Problem, backend: str) -> Tensor:
    rows = p.targets, p.behavior, p.advantages, p.mask
    options: dict[str, Any] = {"weight_max": CAP, "softcap": p.softcap, "backend": backend}
    loss = linear_policy_loss(p.hidden, p.weight, *rows, **options).loss
    loss.backward()
    return loss


def cispo(logits: Tensor, p: Problem) -> Tensor:
    """Σ over the live rows; what autograd users write."""
    if p.softcap is not None:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    logprobs = logits.float().log_softmax(-1).gather(1, p.targets[:, None]).squeeze(1)
    ratio = (logprobs.detach() - p.behavior).exp().clamp(max=CAP)
    return -(p.mask * ratio * p.advantages * logprobs).sum()


def eager(p: Problem) -> Tensor:
    loss = cispo(p.hidden @ p.weight.T, p) / p.mask.sum()
    loss.backward()
    return loss


class CompiledChunks:
    """torch.compile of one chunk's loss; backward at once, so that one chunk of logits exists."""

    def __init__(self) -> None:
        self.chunk = torch.compile(lambda hidden, weight, p: cispo(hidden @ weight.T, p), dynamic=False)

    def __call__(self, p: Problem) -> Tensor:
        rows = max(256, 2**23 // len(p.weight)) if p.hidden.device.type == "cpu" else 4096
        total, tokens = torch.zeros((), device=p.hidden.device), p.mask.sum()
        for part in torch.arange(len(p.hidden), device=p.hidden.device).split(rows):
            names = ("targets", "behavior", "advantages", "mask")
            own = replace(p, **{name: getattr(p, name)[part] for name in names})
            loss = self.chunk(p.hidden[part], p.weight, own) / tokens
            loss.backward()
            total += loss.detach()
        return total


class Liger:
    """`LigerFusedLinearGRPOLoss(loss_type="cispo")`, what a TRL user gets; one sequence a chunk, its default."""

    def __init__(self, compiled: bool) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        options: dict[str, Any] = {"loss_type": "cispo", "epsilon_high": CAP, "beta": 0.0, "use_ref_model": False}
        self.module = LigerFusedLinearGRPOLoss(compiled=compiled, **options)

    def __call__(self, p: Problem) -> Tensor:
        if p.softcap is not None:
            raise NotImplementedError("has no softcap")
        shape = len(p.hidden) // SEQUENCE, SEQUENCE
        loss = self.module(
            p.hidden.view(*shape, -1),
            p.weight,
            p.targets.view(shape),
            p.mask.view(shape).float(),
            p.advantages.view(shape)[:, 0].contiguous(),
            old_per_token_logps=p.behavior.view(shape),
        )[0]
        loss.backward()
        return loss


def linear_cross_entropy(p: Problem) -> Tensor:
    """torch's own; `reduction="none"`, so that the ratio can weigh the rows."""
    if p.softcap is not None:
        raise NotImplementedError("has no softcap")
    logprobs = -F.linear_cross_entropy(p.hidden, p.weight, p.targets, reduction="none").float()
    ratio = (logprobs.detach() - p.behavior).exp().clamp(max=CAP)
    loss = -(p.mask * ratio * p.advantages * logprobs).sum() / p.mask.sum()
    loss.backward()
    return loss


def losses(p: Problem) -> tuple[dict[str, Callable[[Problem], Tensor]], dict[str, str]]:
    """The contenders that can be made here, and why the others cannot."""
    makers: dict[str, Callable[[], Callable[[Problem], Tensor]]] = {
        **{f"fst_kernels {x}": lambda x=x: lambda p: ours(p, x) for x in api.BACKENDS},
        "eager torch": lambda: eager,
        "compiled chunks": CompiledChunks,
        "F.linear_cross_entropy": lambda: linear_cross_entropy,
        "Liger GRPO cispo": lambda: Liger(compiled=False),
        "Liger GRPO cispo, compiled": lambda: Liger(compiled=True),
    }
    made, failed = {}, {}
    for name, make in makers.items():
        try:
            contender = make()
            contender(p.first(SEQUENCE))
            made[name] = contender
        except Exception as error:  # any reason: it is printed and the others go on
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:150]
    return made, failed


def logprobs_of(p: Problem) -> dict[str, Callable[[Problem], Tensor]]:
    def plain(p: Problem) -> Tensor:
        logits = (p.hidden @ p.weight.T).float()
        if p.softcap is not None:
            logits = p.softcap * torch.tanh(logits / p.softcap)
        return logits.log_softmax(-1).gather(1, p.targets[:, None]).squeeze(1)

    def fused(p: Problem, backend: str) -> Tensor:
        return linear_token_logprobs(p.hidden, p.weight, p.targets, softcap=p.softcap, backend=backend).logprobs

    names = [x for x in api.BACKENDS if runs(fused, p.first(2), x)]
    return {**{f"fst_kernels {x}": lambda p, x=x: fused(p, x) for x in names}, "eager torch": plain}


def runs(function: Callable[..., object], *args: object) -> bool:
    try:
        function(*args)
    except ValueError:  # the backend is not for these tensors
        return False
    return True


# ---- measuring -----------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], object], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes_of(call: Callable[[], object], device: str) -> int | None:
    """Most memory in use during the call beyond what was in use before: torch's on a GPU, the process's on Linux."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as in use
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _kilobytes(status, "VmRSS")
    call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1])


def floor_of(p: Problem) -> Callable[[], None]:
    """The 3 products of the live rows, in fp32 logits, a chunk at a time as the torch backend does."""
    gpu = p.hidden.is_cuda
    dtype = p.hidden.dtype if gpu else torch.float32
    hidden, weight = p.hidden.detach()[p.mask].to(dtype), p.weight.detach().to(dtype)
    of_weight = torch.zeros_like(weight, dtype=torch.float32)
    rows = 4096 if gpu else max(256, 2**23 // len(weight))

    def products() -> None:
        for part in hidden.split(rows):
            logits = part @ weight.T
            logits @ weight
            of_weight.addmm_(logits.T, part) if dtype == torch.float32 else of_weight.add_(logits.T @ part)

    return products


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by torch's copy of 256 MiB."""
    a = torch.ones(2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(seconds_of(lambda: b.copy_(a), device) for _ in range(5))


def errors_of(p: Problem, contenders: dict[str, Callable[[Problem], Tensor]]) -> dict[str, dict[str, float]]:
    """Largest error of loss (absolute) and gradients (relative to their largest entry) on the first 256 rows."""
    small = p.first(SEQUENCE)
    exact = small.hidden.detach().double().requires_grad_(), small.weight.detach().double().requires_grad_()
    rows = small.targets, small.behavior, small.advantages, small.mask
    truth = reference.linear_policy_loss(*exact, *rows, kind="cispo", weight_max=CAP, softcap=p.softcap).loss
    gradients = torch.autograd.grad(truth, exact)
    found = {}
    for name, contender in contenders.items():
        own = p.first(SEQUENCE)
        loss = contender(own)
        grads = own.hidden.grad, own.weight.grad
        found[name] = {
            "loss": abs(loss.item() - truth.item()),
            **{
                key: ((a.double() - b).abs().max() / b.abs().max()).item()
                for key, a, b in zip(("d_hidden", "d_weight"), grads, gradients, strict=True)
                if a is not None
            },
        }
    return found


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Of every round but the first, which warms up: wall seconds, and the process's CPU seconds."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            before = time.process_time()
            taken = seconds_of(call, device)
            if round_:
                wall[name].append(taken)
                cpu[name].append(time.process_time() - before)
    return {"seconds": wall, "cpu_seconds": cpu}


def reset(p: Problem) -> None:
    p.hidden.grad = p.weight.grad = None


def run_loss(shape: Shape, live: float, args: argparse.Namespace, device: str) -> dict[str, Any]:
    p = make_problem(shape, live, args.dtype, device)
    contenders, failed = losses(p)
    if args.only:
        contenders = {k: f for k, f in contenders.items() if any(x in k for x in args.only)}

    def step(contender: Callable[[Problem], Tensor]) -> Callable[[], None]:
        def call() -> None:
            reset(p)
            contender(p)

        return call

    memory: dict[str, int | None] = {}
    gradients = sum(x.nbytes for x in (p.hidden, p.weight))
    for name, contender in list(contenders.items()):
        try:
            step(contender)()  # compiles, and fills the caches of the allocator
            reset(p)
            peak = peak_bytes_of(step(contender), device)
            memory[name] = None if peak is None else max(0, peak - gradients)
        except (RuntimeError, NotImplementedError) as error:  # out of memory, most likely
            failed[name] = str(error).strip().splitlines()[0][:150]
            del contenders[name]
        reset(p)
    products = floor_of(p)
    calls: dict[str, Callable[[], object]] = {"floor": products, **{k: step(f) for k, f in contenders.items()}}
    times = interleaved(calls, args.rounds, device)
    reset(p)
    return {
        "op": "loss forward + backward",
        "live": live,
        **times,
        "memory": memory,
        "errors": errors_of(p, contenders),
        "failed": failed,
    }


@torch.no_grad()
def run_logprobs(shape: Shape, args: argparse.Namespace, device: str) -> dict[str, Any]:
    p = make_problem(shape, 1.0, args.dtype, device)
    contenders = logprobs_of(p)
    exact = reference.linear_token_logprobs(p.hidden[:SEQUENCE], p.weight, p.targets[:SEQUENCE], softcap=p.softcap)
    errors = {
        k: {"logprob": (f(p.first(SEQUENCE)).double() - exact.logprobs).abs().max().item()}
        for k, f in contenders.items()
    }
    calls: dict[str, Callable[[], object]] = {k: (lambda f=f: f(p)) for k, f in contenders.items()}
    for call in calls.values():
        call()
    memory = {k: peak_bytes_of(call, device) for k, call in calls.items()}
    operands = (p.hidden.float(), p.weight.float()) if device == "cpu" else (p.hidden, p.weight)
    rows = max(256, 2**23 // shape.v) if device == "cpu" else 4096
    calls["floor"] = lambda: [part @ operands[1].T for part in operands[0].split(rows)].clear()
    times = interleaved(calls, args.rounds, device)
    measured = {**times, "memory": memory, "errors": errors, "failed": {}}
    return {"op": "log-probs, no gradient", "live": 1.0, **measured}


# ---- reports -------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any], gpu: bool) -> Iterator[str]:
    clocks = ["seconds"] if gpu else ["seconds", "cpu_seconds"]
    medians = [{k: statistics.median(x) for k, x in result[clock].items()} for clock in clocks]
    names = [name for name in medians[0] if name != "floor"]
    peers = [name for name in names if not name.startswith("fst_kernels")]
    floors = " / ".join(f"{m['floor']:.3f}" for m in medians)
    yield f"{result['op']}, {result['live']:.0%} of the rows live; the products alone {floors} s"
    heads = "".join(f"{x:>8} {'best peer/it':>13} {'it/floor':>9}" for x in ("wall s", "CPU s")[: len(clocks)])
    yield f"  {'':28}{heads} {'peak MB':>8}  error"
    for name in names:
        best = [min((m[x] for x in peers), default=float("nan")) for m in medians]
        times = "".join(
            f"{m[name]:8.3f} {b / m[name]:12.2f}x {m[name] / m['floor']:8.2f}x"
            for m, b in zip(medians, best, strict=True)
        )
        peak = result["memory"][name]
        shown = "?" if peak is None else f"{peak / 1e6:.0f}"
        errors = ", ".join(f"{k} {x:.1e}" for k, x in result["errors"][name].items())
        yield f"  {name:28}{times} {shown:>8}  {errors}"
    for name, reason in result["failed"].items():
        yield f"  {name:28} not run: {reason}"


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 1 + 2.2 * len(results)), squeeze=False)
    for row, result in zip(axes, results, strict=True):
        names = [k for k in result["seconds"] if k != "floor"][::-1]
        colors = ["tab:blue" if k.startswith("fst_kernels") else "tab:gray" for k in names]
        row[0].barh(names, [statistics.median(result["seconds"][k]) for k in names], color=colors)
        row[0].axvline(statistics.median(result["seconds"]["floor"]), color="black", linestyle=":")
        row[0].set_title(f"{result['op']}, {result['live']:.0%} live: s (dotted: the products)", fontsize=9)
        row[1].barh(names, [(result["memory"][k] or 0) / 1e6 for k in names], color=colors)
        row[1].set_title("peak MB beyond inputs and gradients", fontsize=9)
        row[1].set_yticklabels([])
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def hardware(device: str) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    versions = {}
    for package in ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = {"model": model, "capability": capability, "threads": torch.get_num_threads()}
    return {"cpu": cpu, "gpu": torch.cuda.get_device_name() if device == "cuda" else None, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = device == "cuda"
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b" if gpu else "cpu")
    parser.add_argument("--tokens", type=int, help=f"N instead of the shape's, a multiple of {SEQUENCE}")
    parser.add_argument("--dtype", type=lambda x: getattr(torch, x), default="bfloat16" if gpu else "float32")
    parser.add_argument("--live", type=float, nargs="+", default=[1.0, 0.52, 0.1], help="live fractions of the rows")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are reported")
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name contains one of these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--plot", type=Path, help="draw them here (matplotlib)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = replace(SHAPES[args.shape], n=args.tokens or SHAPES[args.shape].n)

    bandwidth = copy_bandwidth(device)
    title = f"{args.shape}: N {shape.n}, H {shape.h}, V {shape.v}, {args.dtype}, {device}, {args.threads} thread(s)"
    print(f"{title}\n{hardware(device)}\ncopy: {bandwidth / 1e9:.1f} GB/s\n")
    results = []
    for live in (*args.live, None):
        results.append(run_logprobs(shape, args, device) if live is None else run_loss(shape, live, args, device))
        print("\n".join(table(results[-1], gpu)), flush=True)
    if args.json:
        about = {"title": title, "shape": vars(shape), "dtype": str(args.dtype), **hardware(device)}
        args.json.write_text(json.dumps({**about, "copy_bytes_per_s": bandwidth, "results": results}, indent=1))
    if args.plot:
        plot(results, title, args.plot)


if __name__ == "__main__":
    main()
