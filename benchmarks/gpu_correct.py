"""Every public call of fst_kernels, with every backend that takes this device's tensors, against float64.

    python benchmarks/gpu_correct.py [--quick] [--json FILE]

One line a check: the error, the limit, ok or FAILED; exit status 1 if any failed. bf16 operands are compared as they
are, so what is left is the kernels' own rounding: fp32's in values; in gradients bf16's, of d logits and of the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, free_memory, reason, save, setting
from torch import Tensor

from fst_kernels import (
    api,
    kl_estimate,
    linear_kl,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    reference,
    token_logprobs,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": (FP32, FP32), "bf16": (BF16, BF16), "mixed": (BF16, FP32)}  # of hidden and weight
# Of ‖error‖ / ‖gradient‖, by the dtype the gradient is stored in. bf16 operands round d logits too.
GRADIENT_LIMITS = {FP32: 3e-5, BF16: 6e-3, FP16: 2e-3}
VALUE_LIMIT = 3e-5  # absolute, at logits up to about 25


@dataclass
class Inputs:
    """Random arguments; ρ is around 1, and the leaves are hidden, weight and bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    behavior: Tensor
    advantages: Tensor
    mask: Tensor
    token_weights: Tensor
    temperatures: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    def options(self, name: str) -> dict[str, Any]:
        ref = {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight}
        single: dict[str, dict[str, Any]] = {
            "plain": {},
            "ppo": {"kind": "ppo", "clip_high": 0.28},
            "reinforce": {"kind": "reinforce"},
            "softcap": {"softcap": 5.0},
            "bias": {"bias": self.bias},
            "temperature": {"temperature": 0.7},
            "temperatures": {"temperature": self.temperatures},
            "weights": {"token_weights": self.token_weights, "denominator": 17.0},
            "entropy": {"entropy_coef": 0.1},
            "KL": {**ref, "kl_coef": 0.3},
        }
        everything = {
            k: v for x in ("softcap", "bias", "temperatures", "weights", "entropy", "KL") for k, v in single[x].items()
        }
        return {"weight_max": 4.0, **(everything if name == "everything" else single[name])}


OPTIONS = [
    "plain",
    "ppo",
    "reinforce",
    "softcap",
    "bias",
    "temperature",
    "temperatures",
    "weights",
    "entropy",
    "KL",
    "everything",
]


def make(n: int, h: int, v: int, hidden: torch.dtype = FP32, weight: torch.dtype = FP32) -> Inputs:
    g = torch.Generator(DEVICE).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=DEVICE)

    def uniform() -> Tensor:
        return torch.rand(n, generator=g, device=DEVICE)

    x, w = (5 * randn(n, h) / h**0.5).to(hidden), randn(v, h).to(weight)
    targets = torch.randint(v, (n,), generator=g, device=DEVICE)
    own = reference.linear_token_logprobs(x, w, targets).logprobs.float()
    return Inputs(
        hidden=x.requires_grad_(),
        weight=w.requires_grad_(),
        bias=randn(v).requires_grad_(),
        targets=targets,
        behavior=own + randn(n),
        advantages=randn(n) * (uniform() < 0.7),
        mask=uniform() < 0.8,
        token_weights=uniform(),
        temperatures=0.5 + uniform(),
        ref_hidden=(5 * randn(n, h) / h**0.5).to(hidden),
        ref_weight=(w.detach().float() + 0.1 * randn(v, h)).to(weight),
    )


@dataclass
class Checks:
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, error: float, limit: float, note: str = "") -> None:
        ok = error <= limit  # NaN is not
        self.rows.append({"check": name, "error": error, "limit": limit, "ok": ok, "note": note})
        print(f"{'ok    ' if ok else 'FAILED'} {name:72} {error:9.1e} {limit:9.1e} {note}", flush=True)

    def values(self, name: str, ours: Tensor, truth: Tensor) -> None:
        self.add(name, _worst(ours, truth), VALUE_LIMIT * max(1.0, _worst(truth) / 10))

    def gradients(
        self, name: str, ours: Tensor, leaves: Sequence[Tensor], truth: Tensor, exact: Sequence[Tensor]
    ) -> None:
        """In leaves against in exact, their float64 copies. A bias is fp32, but the products before it may round."""
        found, expected = torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, exact)
        narrow = all(x.dtype != FP32 for x in leaves[:2])
        for label, a, b in zip(("dX", "dW", "db"), found, expected, strict=False):
            limit = GRADIENT_LIMITS[BF16 if narrow and a.dtype == FP32 else a.dtype]
            self.add(f"{name}: {label}", _norm(a.double() - b) / _norm(b), limit)

    def run(self, name: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:  # any: the other checks go on
            self.add(name, float("nan"), 0.0, reason(error))
            del error
            free_memory()


def _worst(a: Tensor, b: Tensor | None = None) -> float:
    d = a.detach().double() if b is None else a.detach().double() - b.detach().double()
    return d.abs().max().item() if d.numel() else 0.0


def _norm(x: Tensor) -> float:
    return x.double().norm().item()


def exact(p: Inputs) -> Inputs:
    """The same numbers in float64."""
    leaves = {name: getattr(p, name).detach().double().requires_grad_() for name in ("hidden", "weight", "bias")}
    return replace(p, **leaves)


# ---- the calls -----------------------------------------------------------------------------------------------------


def loss(checks: Checks, name: str, p: Inputs, option: str, **more: Any) -> None:
    rows = p.targets, p.behavior, p.advantages, p.mask
    options = p.options(option)
    ours = linear_policy_loss(p.hidden, p.weight, *rows, **options, **more)
    x = exact(p)
    truth = reference.linear_policy_loss(x.hidden, x.weight, *rows, **({"kind": "cispo"} | x.options(option)))
    checks.values(f"{name}: loss", ours.loss, truth.loss)
    for key, value in truth.metrics.items():
        checks.values(f"{name}: {key}", ours.metrics[key], value)
    for key in ("logprobs", "entropy", "kl"):
        if (expected := getattr(truth, key)) is not None:
            checks.values(f"{name}: {key}", getattr(ours, key), expected)
    leaves, exact_leaves = ([q.hidden, q.weight] + ([q.bias] if "bias" in options else []) for q in (p, x))
    checks.gradients(name, ours.loss, leaves, truth.loss, exact_leaves)


def logprobs(checks: Checks, name: str, p: Inputs, option: str, **more: Any) -> None:
    x = exact(p)
    options, exact_options = (
        {k: v for k, v in q.options(option).items() if k in ("softcap", "bias", "temperature")} for q in (p, x)
    )
    ours = linear_token_logprobs(p.hidden, p.weight, p.targets, entropy=True, **options, **more)
    truth = reference.linear_token_logprobs(x.hidden, x.weight, p.targets, entropy=True, **exact_options)
    upstream = torch.randn(3, len(p.hidden), device=DEVICE)
    total, exact_total = ((upstream * torch.stack([y.logprobs, y.entropy, y.logsumexp])).sum() for y in (ours, truth))
    for key in ("logprobs", "entropy", "logsumexp"):
        checks.values(f"{name}: {key}", getattr(ours, key), getattr(truth, key))
    leaves, exact_leaves = ([q.hidden, q.weight] + ([q.bias] if "bias" in options else []) for q in (p, x))
    checks.gradients(name, total, leaves, exact_total, exact_leaves)


def kl(checks: Checks, name: str, p: Inputs, direction: str, option: str, **more: Any) -> None:
    options = {k: v for k, v in p.options(option).items() if k in ("softcap", "temperature")}
    ref, x = (p.ref_hidden, p.ref_weight), exact(p)
    ours = linear_kl(p.hidden, p.weight, *ref, direction=direction, **options, **more)
    truth = reference.linear_kl(x.hidden, x.weight, *ref, direction=direction, **options)
    upstream = torch.randn(len(p.hidden), device=DEVICE)
    checks.values(f"{name}: values", ours, truth)
    leaves, exact_leaves = ([q.hidden, q.weight] for q in (p, x))
    checks.gradients(name, (upstream * ours).sum(), leaves, (upstream * truth).sum(), exact_leaves)


def given_logits(checks: Checks, name: str, n: int, v: int, dtype: torch.dtype, temperature: Any, **more: Any) -> None:
    logits = (5 * torch.randn(n, v, device=DEVICE)).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=DEVICE)
    upstream = torch.randn(3, n, device=DEVICE)
    ours = token_logprobs(logits, targets, temperature=temperature, entropy=True, **more)
    x = logits.detach().double().requires_grad_()
    truth = reference.token_logprobs(x, targets, temperature=temperature, entropy=True)
    total, exact_total = ((upstream * torch.stack([y.logprobs, y.entropy, y.logsumexp])).sum() for y in (ours, truth))
    for key in ("logprobs", "entropy", "logsumexp"):
        checks.values(f"{name}: {key}", getattr(ours, key), getattr(truth, key))
    checks.gradients(name, total, [logits], exact_total, [x])


def masked_rows_hold_anything(checks: Checks, name: str, p: Inputs, **more: Any) -> None:
    """NaN and inf in masked rows, targets of −100: the same loss, and gradients of exactly 0 there."""
    rows = p.targets, p.behavior, p.advantages, p.mask
    clean = linear_policy_loss(p.hidden, p.weight, *rows, weight_max=4.0, **more)
    spoiled = p.hidden.detach().clone()
    spoiled[~p.mask] = float("nan")
    spoiled.requires_grad_()
    behavior, advantages = (x.where(p.mask, float("inf")) for x in (p.behavior, p.advantages))
    rows = p.targets.where(p.mask, -100), behavior, advantages, p.mask
    ours = linear_policy_loss(spoiled, p.weight, *rows, weight_max=4.0, **more)
    checks.add(f"{name}: same loss", _worst(ours.loss, clean.loss), 0)
    gradients = torch.autograd.grad(ours.loss, (spoiled, p.weight))
    expected = torch.autograd.grad(clean.loss, (p.hidden, p.weight))
    for label, a, b in zip(("dX", "dW"), gradients, expected, strict=True):
        checks.add(f"{name}: same {label}", _worst(a, b), 0)
    checks.add(f"{name}: dX of masked rows", _worst(gradients[0][~p.mask]), 0)


def twice(checks: Checks, name: str, p: Inputs, **more: Any) -> None:
    def everything() -> list[Tensor]:
        rows = p.targets, p.behavior, p.advantages, p.mask
        out = linear_policy_loss(p.hidden, p.weight, *rows, **p.options("everything"), chunk_rows=64, **more)
        measured = linear_token_logprobs(p.hidden, p.weight, p.targets, entropy=True, **more)
        total = (measured.logprobs + measured.entropy).sum()
        leaves = p.hidden, p.weight
        gradients = [g for x in (out.loss, total) for g in torch.autograd.grad(x, leaves)]
        return [out.loss, out.logprobs, out.entropy, out.kl, measured.logprobs, *gradients]

    differ = [i for i, (a, b) in enumerate(zip(everything(), everything(), strict=True)) if not torch.equal(a, b)]
    checks.add(f"{name}: the same bits twice", float(len(differ)), 0)


def chunks(checks: Checks, name: str, p: Inputs, **more: Any) -> None:
    def run(chunk_rows: int | None) -> list[Tensor]:
        rows = p.targets, p.behavior, p.advantages, p.mask
        out = linear_policy_loss(p.hidden, p.weight, *rows, weight_max=4.0, chunk_rows=chunk_rows, **more)
        return [out.logprobs, *torch.autograd.grad(out.loss, (p.hidden, p.weight))]

    whole = run(None)
    for rows in (1, 7, 100):
        for label, a, b, limit in zip(("logp", "dX", "dW"), run(rows), whole, (3e-5, 8e-3, 8e-3), strict=True):
            error = _worst(a, b) if label == "logp" else (_norm(a - b) / _norm(b))
            checks.add(f"{name}: chunk_rows={rows}, {label}", error, limit)


def compiled(checks: Checks, name: str, p: Inputs, **more: Any) -> None:
    def caller(hidden: Tensor, weight: Tensor) -> Tensor:
        h = torch.tanh(hidden)
        rows = p.targets, p.behavior, p.advantages, p.mask
        out = linear_policy_loss(h, weight, *rows, **p.options("KL"), **more)
        measured = linear_token_logprobs(h, weight, p.targets, entropy=True, **more)
        given = policy_loss(measured.logprobs, p.behavior, p.advantages, kind="ppo")
        divergence = linear_kl(h, weight, p.ref_hidden, p.ref_weight, **more)
        plain = token_logprobs((h @ weight.T.to(h.dtype)), p.targets, **more)
        return out.loss + given.loss + (measured.entropy + divergence - plain.logprobs).mean()

    leaves = p.hidden, p.weight
    expected, ours = caller(*leaves), torch.compile(caller, fullgraph=True)(*leaves)
    checks.add(f"{name}: value", _worst(ours, expected), 1e-3 if p.hidden.dtype == FP32 else 5e-2)
    gradients = (torch.autograd.grad(x, leaves) for x in (ours, expected))
    for label, a, b in zip(("dX", "dW"), *gradients, strict=True):
        checks.add(f"{name}: {label}", _norm(a - b) / _norm(b), 1e-4 if p.hidden.dtype == FP32 else 2e-2)


def beyond_two_to_the_31(checks: Checks, name: str, **more: Any) -> None:
    """One chunk of 2.2e9 logits, against the same in small chunks and against float64 in some rows."""
    n, h, v = 14592, 64, 151936
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = (torch.randn(n, h, generator=g, device=DEVICE) * 5 / h**0.5).bfloat16().requires_grad_()
    weight = torch.randn(v, h, generator=g, device=DEVICE).bfloat16()
    targets = torch.randint(v, (n,), generator=g, device=DEVICE)
    behavior, advantages = torch.full((n,), -12.0, device=DEVICE), torch.randn(n, generator=g, device=DEVICE)
    last = slice(n - 64, n)  # beyond 2³¹

    def run(chunk_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        args = hidden, weight, targets, behavior, advantages
        out = linear_policy_loss(*args, weight_max=4.0, chunk_rows=chunk_rows, **more)
        assert out.logprobs is not None
        assert out.entropy is not None
        return out.logprobs, out.entropy, torch.autograd.grad(out.loss, hidden)[0]

    whole, parts = run(n), run(1024)
    truth = reference.linear_token_logprobs(hidden[last], weight, targets[last], entropy=True)
    checks.values(f"{name}: logp of the last rows", whole[0][last], truth.logprobs)
    checks.values(f"{name}: entropy of the last rows", whole[1][last], truth.entropy)
    checks.add(f"{name}: dX as in small chunks", _norm(whole[2] - parts[2]) / _norm(parts[2]), 8e-3)
    del whole, parts, truth
    free_memory()
    logits = torch.randn(n, v, generator=g, device=DEVICE, dtype=BF16).requires_grad_()
    ours = token_logprobs(logits, targets, **more).logprobs
    truth = reference.token_logprobs(logits[last], targets[last]).logprobs
    checks.values(f"{name}: given bf16 logits, the last rows", ours[last], truth)
    (of_logits,) = torch.autograd.grad(ours.sum(), logits)
    (expected,) = torch.autograd.grad(truth.sum(), logits)
    error = _norm(of_logits[last] - expected[last]) / _norm(expected[last])
    checks.add(f"{name}: their gradient", error, GRADIENT_LIMITS[BF16])


def without_backend(checks: Checks) -> None:
    n = 1000
    logp, ref = (-5 * torch.rand(n, device=DEVICE) for _ in range(2))
    logp.requires_grad_()
    behavior, advantages, mask = ref + 1, torch.randn(n, device=DEVICE), torch.rand(n, device=DEVICE) < 0.7
    for kind in ("cispo", "ppo", "reinforce"):
        options: dict[str, Any] = {"kind": kind, "weight_max": 4.0}
        x = logp.detach().double().requires_grad_()
        ours = policy_loss(logp, behavior, advantages, mask, **options).loss
        truth = reference.policy_loss(x, behavior, advantages, mask, **options).loss
        checks.values(f"policy_loss {kind}: loss", ours, truth)
        checks.gradients(f"policy_loss {kind}", ours, [logp], truth, [x])
    for kind in ("k1", "k2", "k3"):
        ours, truth = kl_estimate(logp, ref, kind), reference.kl_estimate(logp, ref, kind)
        checks.add(f"kl_estimate {kind}", _worst(ours, truth) / _worst(truth), 1e-5)


# ---- all of it -----------------------------------------------------------------------------------------------------


def backends() -> Iterator[str]:
    """Those that take tensors of this device."""
    p = make(2, 3, 7)
    for name in api.BACKENDS:
        try:
            linear_token_logprobs(p.hidden, p.weight, p.targets, backend=name)
        except ValueError as error:
            print(f"{name}: left out: {error}")
        else:
            yield name


def sweep(checks: Checks, backend: str, quick: bool) -> None:
    more = {"backend": backend}
    sizes = [(65, 40, 1100)] if quick else [(300, 64, 1100), (130, 128, 4099), (70, 256, 151936)]
    for n, h, v in sizes:
        for dtype, (hidden, weight) in DTYPES.items():
            p = make(n, h, v, hidden, weight)
            where = f"{backend} {dtype} V={v}"
            for option in OPTIONS if v == sizes[0][2] else ("plain", "KL", "everything"):  # each compiles a kernel
                name = f"loss {where} {option}"
                checks.run(name, lambda name=name, p=p, option=option: loss(checks, name, p, option, **more))
            for option in ("plain", "softcap", "bias", "temperatures"):
                name = f"logprobs {where} {option}"
                checks.run(name, lambda name=name, p=p, option=option: logprobs(checks, name, p, option, **more))
            for direction, option in (
                ("forward", "plain"),
                ("reverse", "plain"),
                ("forward", "softcap"),
                ("reverse", "temperatures"),
            ):
                name = f"kl {where} {direction} {option}"
                args = name, p, direction, option
                checks.run(name, lambda args=args: kl(checks, *args, **more))
            for check in (masked_rows_hold_anything, twice, chunks):
                name = f"{check.__name__} {where}"
                checks.run(name, lambda check=check, name=name, p=p: check(checks, name, p, **more))
        for dtype in (FP32, BF16, FP16):
            if backend == "cuda" and (dtype == FP16 or v * dtype.itemsize % 16):
                continue  # refused: its loads are 16 bytes wide
            for label, temperature in (("1", 1.0), ("0.7", 0.7), ("per row", 0.5 + torch.rand(n, device=DEVICE))):
                name = f"token_logprobs {backend} {str(dtype)[6:]} V={v} temperature {label}"
                args = name, n, v, dtype, temperature
                checks.run(name, lambda args=args: given_logits(checks, *args, **more))
    for dtype in ("fp32",) if quick else ("fp32", "bf16"):
        name, p = f"torch.compile {backend} {dtype}", make(60, 40, 1104, *DTYPES[dtype])
        p = replace(p, behavior=p.behavior.clamp(min=-12))
        checks.run(name, lambda name=name, p=p: compiled(checks, name, p, **more))
    if backend == "triton":
        for (n, _, v), dtype in product(sizes, (BF16, FP16)):
            p = make(n, 64, v, dtype, dtype)
            for option in ("plain", "softcap", "bias", "temperatures"):
                name = f"logprobs triton-matrix {str(dtype)[6:]} V={v} {option}"
                args = checks, name, p, option
                checks.run(name, lambda args=args: logprobs(*args, backend="triton-matrix"))
    if DEVICE == "cuda" and not quick:
        name = f"N·V > 2³¹ {backend}"
        checks.run(name, lambda: beyond_two_to_the_31(checks, name, **more))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.manual_seed(0)
    checks = Checks()
    checks.run("without a backend", lambda: without_backend(checks))
    for backend in backends():
        sweep(checks, backend, args.quick)
    failed = [row["check"] for row in checks.rows if not row["ok"]]
    if args.json:
        save(args.json, **setting(), device=DEVICE, failed=failed, checks=checks.rows)
    print(f"{len(checks.rows)} checks on {DEVICE}, {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
