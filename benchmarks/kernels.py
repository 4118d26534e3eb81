"""fst_kernels against every peer that is installed: one interleaved run an operation, errors against float64.

    python benchmarks/kernels.py [--shape cpu|quick|qwen3-8b|...] [--dtype float32] [--rounds 7] [--only NAME ...]
                                 [--ops loss logprobs kl row-kernel rows] [--json FILE] [--plot FILE.png]

Per contender: median seconds, its ratio to the best peer that does the same and to the bare matrix products (of what
its rows need, in the precision ours has: fp32 logits, dW summed in fp32), peak memory beyond inputs and gradients,
errors on 256 rows. A contender that does not run is listed with its reason; on a GPU whoever has kernels of its own is
first tried in a process of its own, so that a hang or a spoilt context there costs only its place. README.md: how to
read it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, copy_bandwidth, free_memory, interleaved, peak_bytes_of, reason, save, setting
from peers import CISPO, ENTROPY, GIVEN_LOGITS, KL, LOGPROBS, LOSSES, LOSSES_WITH_KL, ROW_KERNELS, Contender, Found
from problems import CAP, ROWS, SEQUENCE, SHAPES, Problem, make_problem
from report import KL as WITH_KL
from report import LOSS, ROW_KERNEL, goals, names, plot, print_goals, table
from torch import Tensor

from fst_kernels import reference
from fst_kernels.blocks import Ask
from fst_kernels.objective import PolicyRows
from fst_kernels.types import Logits

TRIAL_SECONDS = 120  # of a contender's trial, compilation included
FAR = 5  # times slower than the fastest with all rows: left out of the runs with fewer rows
Result = dict[str, Any]
Calls = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = DEVICE == "cuda"
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b" if gpu else "cpu")
    parser.add_argument("--tokens", type=_tokens, help=f"N instead of the shape's, a multiple of {SEQUENCE}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the loss")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians are reported")
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose name contains one of these")
    parser.add_argument("--untried", action="store_true", help="on a GPU: no trial of each contender beforehand")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here, after every operation")
    parser.add_argument("--plot", type=Path, help="draw them here (matplotlib)")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.trial:
        sys.exit(trial(args))

    bandwidth, shape = copy_bandwidth(), _shape(args)
    about = {
        "shape": {"name": args.shape, **vars(shape)},
        "dtype": args.dtype,
        "copy_bytes_per_s": bandwidth,
        **setting(),
    }
    title = f"{args.shape}: N {shape.n}, H {shape.h}, V {shape.v}, {args.dtype}, {args.threads} thread(s)"
    print(f"{title}\n{setting()}\ncopy: {bandwidth / 1e9:.1f} GB/s\n", flush=True)
    failed = trials(args) if gpu and not args.untried else {}
    results: list[Result] = []
    said: set[tuple[str, str]] = set()
    for op in args.ops:
        for result in OPS[op](args, failed):
            results.append(result)
            print("\n".join(table(result, bandwidth, said)), flush=True)
            if args.json:
                save(args.json, title=title, **about, results=results, goals=goals(results, bandwidth, gpu))
    print_goals(goals(results, bandwidth, gpu))
    if args.plot:
        plot(results, f"{title}, {(about['gpu'] or about['cpu'])['name' if gpu else 'model']}", args.plot)


def _tokens(text: str) -> int:
    if int(text) < SEQUENCE or int(text) % SEQUENCE:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of {SEQUENCE}")
    return int(text)


def _shape(args: argparse.Namespace) -> Any:
    return replace(SHAPES[args.shape], n=args.tokens or SHAPES[args.shape].n)


def _problem(args: argparse.Namespace, rows: str = "all rows") -> Problem:
    return make_problem(_shape(args), ROWS[rows], getattr(torch, args.dtype))


# ---- who takes part ------------------------------------------------------------------------------------------------


def trials(args: argparse.Namespace) -> dict[str, str]:
    """Why contenders with kernels of their own do not run, each from a process of its own; eight at a time."""
    own = [name for name, c in _asked(LOSSES, args).items() if not c.plain]
    with ThreadPoolExecutor(8) as pool:
        reasons = pool.map(lambda name: _trial_of(name, args), own)
        return {name: why for name, why in zip(own, reasons, strict=True) if why}


def _trial_of(name: str, args: argparse.Namespace) -> str:
    options = ["--shape", args.shape, "--dtype", args.dtype, "--tokens", str(_shape(args).n), "--trial", name]
    command = [sys.executable, __file__, *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"did not finish within {TRIAL_SECONDS} s"
    lines = [x for x in (run.stdout + run.stderr).splitlines() if x.strip()]
    return "" if run.returncode == 0 else (lines[-1] if lines else f"exit status {run.returncode}")[:150]


def trial(args: argparse.Namespace) -> int:
    """The loss with 256 rows and with all; the last line says why it failed. Returns the exit status."""
    try:
        p, step = _problem(args), LOSSES[args.trial].make()
        step(p.first(SEQUENCE))
        step(p)
        free_memory()
    except Exception as error:  # any: it is the parent that decides
        print(reason(error), flush=True)
        return 1
    return 0


def _asked(contenders: dict[str, Contender], args: argparse.Namespace) -> dict[str, Contender]:
    return {name: c for name, c in contenders.items() if not args.only or any(x in name for x in args.only)}


def _make(
    contenders: dict[str, Contender], args: argparse.Namespace, excluded: dict[str, str], call: Callable[[Any], object]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The contenders that take a first small call, and why the others do not."""
    made, failed = {}, {}
    for name, contender in _asked(contenders, args).items():
        if name in excluded:
            failed[name] = excluded[name]
            continue
        try:
            step = contender.make()
            call(step)
            made[name] = step
        except Exception as error:  # any: it is printed, and the others go on
            failed[name] = reason(error)
            del error
            free_memory()
    return made, failed


def _peaks(calls: Calls, failed: dict[str, str], clean: Callable[[], object]) -> dict[str, int | None]:
    """Peak bytes of each call, after one that compiles and fills caches. What fails, of memory most likely, goes."""
    peaks = {}
    for name, call in list(calls.items()):
        try:
            call()
            clean()
            peaks[name] = peak_bytes_of(call)
        except Exception as error:  # any, as above
            failed[name] = reason(error)
            del calls[name], error
            free_memory()
        clean()
    return peaks


def _only(contenders: dict[str, Contender]) -> dict[str, str]:
    return {name: c.only for name, c in contenders.items() if c.only}


# ---- the bare products ---------------------------------------------------------------------------------------------


class Products:
    """The matrix products of a pass, a chunk at a time: operands as they are, fp32 logits, dW summed in fp32."""

    def __init__(self, p: Problem) -> None:
        self.fp32_out = p.hidden.is_cuda and p.hidden.dtype != torch.float32
        dtype = p.hidden.dtype if p.hidden.is_cuda else torch.float32
        self.hidden, self.ref_hidden = p.hidden.detach().to(dtype), p.ref_hidden.to(dtype)
        self.weight = p.weight.detach().to(dtype)
        v, self.rows = len(self.weight), 4096 if p.hidden.is_cuda else max(256, 2**24 // len(p.weight))
        self.logits = torch.empty(self.rows, v, device=DEVICE)
        self.grad = torch.randn(self.rows, v, device=DEVICE, dtype=dtype) * 1e-3
        self.of_weight = torch.zeros_like(self.weight, dtype=torch.float32)
        self.learn = (p.mask & (p.advantages != 0)).nonzero().squeeze(1)
        self.quiet = (p.mask & (p.advantages == 0)).nonzero().squeeze(1)
        self.every = torch.arange(len(p.hidden), device=DEVICE)

    def forward(self, hidden: Tensor) -> None:
        out = self.logits[: len(hidden)]
        options = {"out_dtype": torch.float32} if self.fp32_out else {}
        torch.mm(hidden, self.weight.T, out=out, **options)

    def backward(self, hidden: Tensor) -> None:
        grad = self.grad[: len(hidden)]
        if self.fp32_out:
            torch.mm(grad, self.weight, out_dtype=torch.float32)
            torch.addmm(self.of_weight, grad.T, hidden, out_dtype=torch.float32, out=self.of_weight)
        else:
            torch.mm(grad, self.weight)
            self.of_weight.addmm_(grad.T, hidden)

    def narrow(self) -> None:
        """Forward and backward of the rows that learn, every result in the operands' dtype: what cuBLAS does best."""
        for rows in self.learn.split(self.rows):
            hidden, grad = self.hidden[rows], self.grad[: len(rows)]
            torch.mm(hidden, self.weight.T)
            torch.mm(grad, self.weight)
            torch.mm(grad.T, hidden)

    def of_loss(self) -> None:
        for rows in self.learn.split(self.rows):
            self.forward(self.hidden[rows])
            self.backward(self.hidden[rows])
        for rows in self.quiet.split(self.rows):
            self.forward(self.hidden[rows])

    def of_logprobs(self) -> None:
        for rows in self.every.split(self.rows):
            self.forward(self.hidden[rows])

    def of_loss_with_kl(self) -> None:
        for rows in self.every.split(self.rows):
            self.forward(self.hidden[rows])
            self.forward(self.ref_hidden[rows])
            self.backward(self.hidden[rows])


# ---- the operations ------------------------------------------------------------------------------------------------


def run_losses(args: argparse.Namespace, excluded: dict[str, str]) -> Iterable[Result]:
    small = _problem(args).first(SEQUENCE)
    made, failed = _make(LOSSES, args, excluded, lambda step: step(small.first(SEQUENCE)))
    slow: dict[str, str] = {}
    for rows in args.rows:
        steps = {name: step for name, step in made.items() if name not in slow}
        result = _run_loss(_problem(args, rows), steps, failed | slow, args.rounds)
        yield result | {"rows": rows}
        if rows == "all rows":
            seconds = {name: min(result["seconds"][name]) for name in names(result)}
            times = {name: x / min(seconds.values()) for name, x in seconds.items()}
            slow = {k: f"left out: {x:.0f} times the fastest with all rows" for k, x in times.items() if x > FAR}


def _run_loss(p: Problem, steps: dict[str, Callable[[Problem], Found]], failed: dict[str, str], rounds: int) -> Result:
    errors = _loss_errors(p, steps)
    calls: Calls = {name: _step(p, step) for name, step in steps.items()}
    memory = _beyond_gradients(p, _peaks(calls, failed, p.forget))
    products = Products(p)
    floors: Calls = {"products": products.of_loss}
    if products.fp32_out:
        floors["products, bf16 out"] = products.narrow
    times = interleaved(floors | calls, rounds)
    own = {"memory": memory, "errors": errors, "failed": failed, "only": _only(LOSSES), "floors": list(floors)}
    sums = products.of_weight.nbytes - p.weight.nbytes
    return {"op": LOSS, **times, **own, "chunk_bytes": products.logits.nbytes, "fp32_sums_bytes": sums}


def _step(p: Problem, step: Callable[[Problem], Found]) -> Callable[[], None]:
    def call() -> None:
        p.forget()
        step(p)

    return call


def _beyond_gradients(p: Problem, peaks: dict[str, int | None]) -> dict[str, int | None]:
    gradients = p.hidden.nbytes + p.weight.nbytes
    return {name: None if peak is None else max(0, peak - gradients) for name, peak in peaks.items()}


def _exact(p: Problem) -> Problem:
    """The same numbers in float64: bf16 operands as they are."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    return replace(p, hidden=hidden, weight=weight)


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def _loss_errors(p: Problem, steps: dict[str, Callable[[Problem], Found]]) -> dict[str, dict[str, float]]:
    """On the first 256 rows: loss and log-probs (absolute), and ‖error‖ / ‖gradient‖."""
    small, exact = p.first(SEQUENCE), _exact(p.first(SEQUENCE))
    rows = small.targets, small.behavior, small.advantages, small.mask
    options: dict[str, Any] = {"kind": "cispo", "weight_max": CAP, "softcap": p.softcap}
    policy = reference.linear_policy_loss(exact.hidden, exact.weight, *rows, **options)
    truth = reference.linear_token_logprobs(exact.hidden, exact.weight, small.targets, softcap=p.softcap)
    cross_entropy = -(truth.logprobs * small.mask).sum() / small.mask.sum()
    inputs = exact.hidden, exact.weight
    of_policy = torch.autograd.grad(policy.loss, inputs)
    of_cross_entropy = torch.autograd.grad(cross_entropy, inputs)
    found = {}
    for name, step in steps.items():
        own = p.first(SEQUENCE)
        loss, logprobs = step(own)
        ce = LOSSES[name].only == "CE"
        gradients = zip(
            ("dX", "dW"), (own.hidden.grad, own.weight.grad), of_cross_entropy if ce else of_policy, strict=True
        )
        found[name] = {
            "loss": abs(loss.item() - (cross_entropy if ce else policy.loss).item()),
            **({} if logprobs is None else {"logp": (logprobs - truth.logprobs)[small.mask].abs().max().item()}),
            **{key: _relative(a, b) for key, a, b in gradients if a is not None},
        }
    return found


@torch.no_grad()
def run_logprobs(args: argparse.Namespace, excluded: dict[str, str]) -> Iterable[Result]:
    p = _problem(args)
    made, failed = _make(LOGPROBS, args, excluded, lambda step: step(p.first(SEQUENCE)))
    small, exact = p.first(SEQUENCE), _exact(p.first(SEQUENCE))
    truth = reference.linear_token_logprobs(exact.hidden, exact.weight, small.targets, softcap=p.softcap, entropy=True)
    assert truth.entropy is not None
    errors = {}
    for name, step in made.items():
        logprobs, entropy = step(small)
        errors[name] = {"logp": (logprobs - truth.logprobs).abs().max().item()}
        if entropy is not None:
            errors[name]["entropy"] = (entropy - truth.entropy).abs().max().item()
    calls: Calls = {name: (lambda step=step: step(p)) for name, step in made.items()}
    memory = _peaks(calls, failed, lambda: None)
    times = interleaved({"products": Products(p).of_logprobs} | calls, args.rounds)
    own = {"memory": memory, "errors": errors, "failed": failed, "only": _only(LOGPROBS), "floors": ["products"]}
    yield {"op": "log-probs and entropy, no gradient", "rows": "all rows", **times, **own}


def run_kl(args: argparse.Namespace, excluded: dict[str, str]) -> Iterable[Result]:
    p = _problem(args)
    excluded = {name: excluded[ours] for name in LOSSES_WITH_KL if (ours := name.split(",")[0]) in excluded}
    made, failed = _make(LOSSES_WITH_KL, args, excluded, lambda step: step(p.first(SEQUENCE)))
    exact, small = _exact(p.first(SEQUENCE)), p.first(SEQUENCE)
    options: dict[str, Any] = {"weight_max": CAP, "softcap": p.softcap, "entropy_coef": ENTROPY, "kl_coef": KL}
    ref = {"ref_hidden": small.ref_hidden, "ref_weight": small.ref_weight}
    rows = small.targets, small.behavior, small.advantages, small.mask
    truth = reference.linear_policy_loss(exact.hidden, exact.weight, *rows, kind="cispo", **options, **ref).loss
    gradients = torch.autograd.grad(truth, (exact.hidden, exact.weight))
    errors = {}
    for name, step in made.items():
        own = p.first(SEQUENCE)
        loss = step(own).loss
        pairs = zip(("dX", "dW"), (own.hidden.grad, own.weight.grad), gradients, strict=True)
        errors[name] = {
            "loss": abs(loss.item() - truth.item()),
            **{k: _relative(a, b) for k, a, b in pairs if a is not None},
        }
    del exact, gradients
    calls: Calls = {name: _step(p, step) for name, step in made.items()}
    memory = _beyond_gradients(p, _peaks(calls, failed, p.forget))
    products = Products(p)
    times = interleaved({"products": products.of_loss_with_kl} | calls, args.rounds)
    about = {"memory": memory, "errors": errors, "failed": failed, "only": {}, "floors": ["products"]}
    yield {"op": WITH_KL, "rows": "all rows", **times, **about}


def run_rows(args: argparse.Namespace, excluded: dict[str, str]) -> Iterable[Result]:
    """Logits that are given, in fp32 and on a GPU in bf16; a chunk of them on a GPU twice what one of ours is."""
    shape = _shape(args)
    n = min(shape.n, 8192)
    g = torch.Generator(DEVICE).manual_seed(0)
    targets = torch.randint(shape.v, (n,), generator=g, device=DEVICE)
    upstream = torch.randn(n, generator=g, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,):
        logits = torch.randn(n, shape.v, generator=g, device=DEVICE, dtype=dtype).mul_(3).requires_grad_()
        small = logits.detach()[:SEQUENCE].clone().requires_grad_()
        made, failed = _make(GIVEN_LOGITS, args, excluded, lambda step, x=small: step(x, targets[:SEQUENCE]))
        truth = reference.token_logprobs(small, targets[:SEQUENCE]).logprobs
        (of_truth,) = torch.autograd.grad((truth * upstream[:SEQUENCE]).sum(), small)
        for backward in (False, True):
            steps = {k: f for k, f in made.items() if not (backward and GIVEN_LOGITS[k].only == "forward")}
            errors = {k: _row_errors(f, small, targets, upstream, truth, of_truth, backward) for k, f in steps.items()}
            calls: Calls = {k: _row_call(f, logits, targets, upstream, backward) for k, f in steps.items()}
            out = dict(failed)
            memory = _peaks(calls, out, lambda x=logits: setattr(x, "grad", None))
            if backward:
                memory = {k: None if x is None else max(0, x - logits.nbytes) for k, x in memory.items()}
            times = interleaved(calls, args.rounds)
            about = {"memory": memory, "errors": errors, "failed": out, "only": {}, "floors": []}
            moved = logits.nbytes * (3 if backward else 1)  # read; then read and written
            name = f"log-probs of {str(dtype).split('.')[1]} logits, forward{' + backward' if backward else ''}"
            yield {"op": name, "rows": f"{n} rows", "bytes": moved, **times, **about}


def run_row_kernel(args: argparse.Namespace, excluded: dict[str, str]) -> Iterable[Result]:
    """The step between the products of a loss's pass: a chunk of fp32 logits into measures and d logits; ours only."""
    shape = _shape(args)
    n, dtype = min(shape.n, 4096), torch.bfloat16 if DEVICE == "cuda" else torch.float32
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = Logits(torch.randn(n, shape.v, generator=g, device=DEVICE) * 3, None, torch.ones(()), shape.softcap, False)
    targets = torch.randint(shape.v, (n,), generator=g, device=DEVICE)
    each = torch.randn(2, n, generator=g, device=DEVICE)
    live = torch.ones(n, dtype=torch.bool, device=DEVICE)
    batch = PolicyRows(targets, each[0] - 12, each[1], live, torch.full_like(each[0], 1 / n), CISPO, 0.0, 0.0)
    grad = torch.empty(n, shape.v, dtype=dtype, device=DEVICE)
    made, failed = _make(ROW_KERNELS, args, excluded, lambda step: step(logits, Ask(targets, True), batch, grad))
    calls: Calls = {k: (lambda f=f: f(logits, Ask(targets, True), batch, grad)) for k, f in made.items()}
    memory = _peaks(calls, failed, lambda: None)
    about = {"memory": memory, "errors": {}, "failed": failed, "only": {}, "floors": []}
    moved = 2 * logits.products.nbytes + grad.nbytes  # read twice, written once
    yield {"op": ROW_KERNEL, "rows": f"{n} rows", "bytes": moved, **interleaved(calls, args.rounds), **about}


def _row_call(
    step: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, upstream: Tensor, backward: bool
) -> Callable[[], object]:
    def call() -> None:
        with torch.set_grad_enabled(backward):
            logits.grad = None
            out = step(logits, targets)
            if backward:
                out.backward(upstream.to(out.dtype))

    return call


def _row_errors(
    step: Callable[[Tensor, Tensor], Tensor], small: Tensor, targets: Tensor, upstream: Tensor, truth: Tensor,
    of_truth: Tensor, backward: bool,
) -> dict[str, float]:  # fmt: skip
    small.grad = None
    with torch.set_grad_enabled(backward):
        out = step(small, targets[: len(small)])
    found = {"logp": (out.detach() - truth.detach()[: len(out)]).abs().max().item()}
    if backward:
        out.backward(upstream[: len(small)].to(out.dtype))
        assert small.grad is not None
        found["d logits"] = _relative(small.grad, of_truth.double())
    return found


OPS: dict[str, Callable[[argparse.Namespace, dict[str, str]], Iterable[Result]]] = {
    "loss": run_losses,
    "logprobs": run_logprobs,
    "kl": run_kl,
    "row-kernel": run_row_kernel,
    "rows": run_rows,
}


if __name__ == "__main__":
    main()
