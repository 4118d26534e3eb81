"""Which block size, warps and chunk size are fastest here: of the Triton row kernel on a GPU, of the loss everywhere.

    python benchmarks/tune.py [--shape qwen3-8b] [--rounds 5] [--json FILE]

Changes nothing: it prints tables, fastest first, for someone to write the constants of fst_kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from measure import DEVICE, copy_bandwidth, free_memory, interleaved, medians, reason, save, setting
from peers import CISPO, ours
from problems import ROWS, SHAPES, Shape, make_problem

from fst_kernels import blocks, linear_token_logprobs
from fst_kernels.blocks import Ask
from fst_kernels.objective import PolicyRows
from fst_kernels.types import Head, Logits

Calls = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b" if DEVICE == "cuda" else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    shape, bandwidth = SHAPES[args.shape], copy_bandwidth()
    print(f"{args.shape}, copy {bandwidth / 1e9:.1f} GB/s")
    found = {}
    if DEVICE == "cuda":
        for kind in ("loss", "loss + KL", "measures"):
            found[kind] = row_kernel(shape, kind, args.rounds, bandwidth)
            free_memory()
        found["matrix"] = matrix(shape, args.rounds)
    found["chunk_rows"] = chunk_rows(shape, args.rounds)
    if args.json:
        save(
            args.json, **setting(), shape={"name": args.shape, **vars(shape)}, copy_bytes_per_s=bandwidth, seconds=found
        )


def row_kernel(shape: Shape, kind: str, rounds: int, bandwidth: float) -> dict[str, float]:
    """Seconds of one chunk by BLOCK and WARPS: with a gradient in bf16, with a reference too, or measures alone."""
    from fst_kernels import triton_backend

    n = blocks.CHUNK_ROWS
    products = torch.randn(n, shape.v, device=DEVICE) * 3
    logits = Logits(products, None, torch.ones(()), shape.softcap, ours=False)
    ref = replace(logits, products=torch.randn(n, shape.v, device=DEVICE) * 3) if kind == "loss + KL" else None
    grad = None if kind == "measures" else torch.empty(n, shape.v, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(shape.v, (n,), device=DEVICE)
    live, weights = torch.ones(n, dtype=torch.bool, device=DEVICE), torch.full((n,), 1 / n, device=DEVICE)
    each = torch.randn(2, n, device=DEVICE)
    batch = PolicyRows(targets, each[0] - 12, each[1], live, weights, CISPO, 0.0, 0.1 if ref else 0.0)
    passes = 1 if grad is None else 2
    moved = passes * products.nbytes * (2 if ref else 1) + (0 if grad is None else grad.nbytes)

    def call_with(block: int, warps: int) -> Callable[[], object]:
        def call() -> None:
            triton_backend.BLOCK, triton_backend.WARPS = block, warps
            triton_backend.row_step(logits, Ask(targets, True, ref), None if grad is None else batch, grad)

        return call

    was = triton_backend.BLOCK, triton_backend.WARPS
    options = product((512, 1024, 2048, 4096, 8192), (4, 8, 16, 32))
    calls = {f"BLOCK {b:5} WARPS {w:2}": call_with(b, w) for b, w in options if 4 <= b // (32 * w) <= 64}
    seconds = _fastest(f"row kernel, {kind} (now BLOCK {was[0]}, WARPS {was[1]})", calls, rounds, moved / bandwidth)
    triton_backend.BLOCK, triton_backend.WARPS = was
    return seconds


def matrix(shape: Shape, rounds: int) -> dict[str, float]:
    """Seconds of log-probs and entropy without a gradient, by the matrix kernel's tiles, and of the chunks."""
    from fst_kernels import triton_matrix

    p = make_problem(shape, ROWS["all rows"], torch.bfloat16)
    hidden, weight = p.hidden.detach(), p.weight.detach()
    head = Head(hidden, weight, None, torch.tensor(1.0), shape.softcap)
    calls: Calls = {
        "chunks": lambda: linear_token_logprobs(hidden, weight, p.targets, softcap=shape.softcap, entropy=True)
    }
    for tiles in triton_matrix.CONFIGURATIONS:
        name = "x".join(map(str, tiles))
        calls[name] = lambda tiles=tiles: triton_matrix.measure(head, p.targets, True, tiles)
    return _fastest("log-probs and entropy, no gradient", calls, rounds)


def chunk_rows(shape: Shape, rounds: int) -> dict[str, float]:
    """Seconds of the loss, forward and backward, by rows of logits that exist at a time."""
    p = make_problem(shape, ROWS["all rows"], torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    sizes = (1024, 2048, 4096, 8192, 16384) if DEVICE == "cuda" else (128, 256, 512, 1024, 2048)
    calls: Calls = {}
    for rows in sizes:
        step = ours("auto", chunk_rows=rows)
        calls[f"chunk_rows {rows:5}"] = lambda step=step: (p.forget(), step(p))
    return _fastest("loss, forward + backward", calls, rounds)


def _fastest(title: str, calls: Calls, rounds: int, floor: float | None = None) -> dict[str, float]:
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as error:  # any: a setting that does not fit is no answer
            print(f"  {name:28} not run: {reason(error)}")
            del calls[name], error
            free_memory()
    seconds = medians(interleaved(calls, rounds)["seconds"])
    print(f"{title}\n  {'':28} {'ms':>9}" + ("" if floor is None else "  of copy bandwidth"))
    for name, x in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"  {name:28} {1e3 * x:9.3f}" + ("" if floor is None else f"  {floor / x:.0%}"), flush=True)
    return seconds


if __name__ == "__main__":
    main()
