"""Attention over token tries on this device, forward and gradients, against float64.

    python benchmarks/gpu_tree.py [--quick] [--json FILE]

One line a check: the error, the limit, ok or FAILED; exit status 1 if any failed. Tries of awkward shapes against one
dense ancestor mask, operands as they are; then a small Qwen3, packed, against its own separate sequences.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from gpu_correct import Checks
from measure import DEVICE, save, setting
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_fast.model import Model
from fst_fast.slow import tree_attention
from fst_fast.slow.packing import Packed, pack, prepare

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
Lengths = tuple[int, list["Lengths"]]  # of a node, and of what is below it


def comb(length: int, depth: int) -> Lengths:
    """Two branches at every level, one of which ends there."""
    return (length, [(length + 1, []), comb(length + 3, depth - 1)] if depth else [])


def binary(depth: int) -> Lengths:
    return (1, [binary(depth - 1), binary(depth - 1)] if depth else [])


TRIES: dict[str, list[Lengths]] = {
    "one token": [(1, [])],
    "17 tokens, no branch": [(17, [])],
    "lone sequences of 1, 17, 128, 130": [(n, []) for n in (1, 17, 128, 130)],
    "127 nodes of one token": [binary(6)],
    "a root of one token, leaves of 1, 8, 65, 257": [(1, [(n, []) for n in (1, 8, 65, 257)])],
    "12 levels": [comb(5, 12)],
    "200 leaves of 3 tokens below 300": [(300, [(3, [])] * 200)],
    "two prompts, problems, responses": [(517, [(129, [(201, []), (77, [])])] * 2), (333, [(64, [(128, [])] * 2)] * 2)],
    "1500 tokens above 3 x 257": [(1500, [(257, [])] * 3)],
}
HEADS = [(8, 1, 64), (8, 1, 128), (6, 2, 96), (4, 4, 128), (16, 2, 128), (8, 4, 256)]  # heads, KV heads, head dim
QUICK = ["one token", "lone sequences of 1, 17, 128, 130", "127 nodes of one token", "12 levels"]


def sequences(nodes: list[Lengths], above: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """One for each leaf; nodes that stand side by side differ from their first token on."""
    for i, (length, below) in enumerate(nodes):
        row = (*above, *(i + 1000 * k for k in range(length)))
        if below:
            yield from sequences(below, row)
        else:
            yield row


def dense_mask(packed: Packed) -> Tensor:
    """[N, N]: who is an ancestor of whom, or itself."""
    mask = torch.zeros(len(packed.ids), len(packed.ids), dtype=torch.bool, device=DEVICE)
    for place in packed.places:
        at = torch.from_numpy(place).to(DEVICE)
        mask[at[:, None], at] |= torch.ones(len(at), len(at), dtype=torch.bool, device=DEVICE).tril()
    return mask


def error(ours: Tensor, exact: Tensor) -> float:
    """Of [..., N, D]: ‖error‖ / ‖exact‖, or a quarter of the worst token's, by its own norm or their mean, if more. The
    mean is that of elements of 0.1 at least: the gradient of the only key's score is 0."""
    off, norm = (x.detach().double().transpose(-3, -2).flatten(-2) for x in (ours - exact, exact))
    mean = norm.square().mean().sqrt().clamp(min=0.1) * norm.shape[-1] ** 0.5
    off, norm = off.norm(dim=-1), norm.norm(dim=-1)
    return max(float(off.square().mean().sqrt() / mean), float((off / norm.clamp(min=mean)).max()) / 4)


def attention(checks: Checks, name: str, nodes: list[Lengths], heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """In memory as transformers has them: transposed views of [1, N, ...]."""
    torch.manual_seed(0)
    packed = pack(list(sequences(nodes)), min_saving=1)
    n, (h, kv, d) = len(packed.ids), heads
    leaves = [torch.randn(1, n, x, d, device=DEVICE).to(dtype).transpose(1, 2).requires_grad_() for x in (h, kv, kv)]
    upstream = torch.randn(1, n, h, d, device=DEVICE).to(dtype).transpose(1, 2)
    scale = d**-0.5
    tree = tree_attention.Tree.of(packed.spans, leaves[0].device)
    ours = tree_attention.tree_attention(leaves[0], leaves[1], leaves[2], tree, scale)
    found = torch.autograd.grad(ours, leaves, upstream)

    q, k, v = exact = [x.detach().double().requires_grad_() for x in leaves]
    k, v = (x.repeat_interleave(h // kv, 1) for x in (k, v))
    p = (q @ k.mT * scale).masked_fill(~dense_mask(packed), -torch.inf).softmax(-1)
    truth = p @ v
    expected = torch.autograd.grad(truth, exact, upstream.double())
    errors = [error(a, b) for a, b in zip((ours, *found), (truth, *expected), strict=True)]
    note = " ".join(f"{label} {e:.1e}" for label, e in zip(("out", "dq", "dk", "dv"), errors, strict=True))
    checks.add(name, float("nan") if any(e != e for e in errors) else max(errors), LIMITS[dtype], note)


def model(checks: Checks, name: str, head_dim: int, dtype: torch.dtype) -> None:
    """Hidden states and gradients, with QK norm and RoPE, no more wrong than those of separate sequences."""
    rows = [list(s) for s in sequences(TRIES["two prompts, problems, responses"])]
    rows = [[t % 997 for t in row] for row in rows]
    packed = pack(rows)
    config = Qwen3Config(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=head_dim, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(config).to(DEVICE, dtype).eval()
    tokenizer = SimpleNamespace(eos_token_id=0, apply_chat_template=lambda: None)
    small = Model(lm, tokenizer, name)
    upstream = torch.randn(sum(map(len, rows)), 256, device=DEVICE, dtype=torch.float64)

    def gradients(hidden: Tensor) -> list[Tensor]:
        lm.zero_grad()
        (hidden.double() * upstream).sum().backward()
        return [hidden, *(p.grad for p in lm.parameters() if p.grad is not None)]

    def separate() -> list[Tensor]:
        return gradients(torch.cat([small.hidden(torch.tensor([row], device=DEVICE))[0] for row in rows]))

    plain = separate()
    prepare(small)
    ids, positions = (torch.from_numpy(x)[None].to(DEVICE) for x in (packed.ids, packed.positions))
    hidden = small.hidden(ids, position_ids=positions, **tree_attention.inputs(packed.spans, small.device))[0]
    ours = gradients(torch.cat([hidden[torch.from_numpy(place).to(DEVICE)] for place in packed.places]))
    lm.double()
    truth = separate()
    for label, pick in (("hidden states", slice(0, 1)), ("gradients", slice(1, None))):
        flat = [torch.cat([x.detach().double().flatten() for x in y[pick]]) for y in (ours, plain, truth)]
        off, usual = (float((x - flat[2]).norm() / flat[2].norm()) for x in flat[:2])
        checks.add(f"{name}: {label}", off, max(1.5 * usual, LIMITS[torch.float32]), f"separate: {usual:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some shapes of each: a rehearsal on the CPU")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    checks = Checks()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        short = str(dtype).removeprefix("torch.")
        for heads in HEADS[-2:-1] if args.quick or dtype != torch.bfloat16 else HEADS:
            for shape in QUICK if args.quick else TRIES:
                name = f"{short}, {heads[0]}:{heads[1]} x {heads[2]}, {shape}"
                checks.run(name, lambda a=(checks, name, TRIES[shape], heads, dtype): attention(*a))
        if dtype != torch.float16:
            checks.run(f"{short}, model", lambda dtype=dtype, s=short: model(checks, f"{s}, model", 64, dtype))
    failed = [row["check"] for row in checks.rows if not row["ok"]]
    if args.json:
        save(args.json, **setting(), device=DEVICE, failed=failed, checks=checks.rows)
    print(f"{len(checks.rows)} checks on {DEVICE}, {len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
