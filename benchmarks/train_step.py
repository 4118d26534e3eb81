"""One training step over rollouts that share prompts: packed as a token trie against padded rows, in one run.

    python benchmarks/train_step.py [--shape tiny] [--prompt 1000] [--responses 500 1000] [--json FILE]

Random weights of a real shape; K prompts on P problems, one rollout each, through the trainer's own Learner: forward,
loss, backward, clipped AdamW step. Gradients of all are compared. MFU counts the tokens run, padding apart.
"""

from __future__ import annotations

import argparse
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args
from unittest.mock import patch

import torch
from measure import DEVICE, interleaved, medians, peak_bytes_of, save, setting
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_fast.config import Recompute, SlowConfig
from fst_fast.model import Model, fuse_layers
from fst_fast.records import Group, Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.shape import PassWork, shape_of
from fst_fast.slow import tree_attention
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner
from fst_fast.slow.packing import packed_batches, packed_work
from fst_fast.slow.policy import Policy, micro_batches, padded_work
from fst_fast.slow.sharding import recompute

# hidden, layers, heads, KV heads, head dim, intermediate, vocabulary: tiny has a vocabulary as small against its layers
# as Qwen3-8B's; the others are those of their config.json, but for a head of its own
SHAPES = {
    "tiny": (256, 4, 8, 4, 32, 768, 1024),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151936),
    "qwen3-1.7b": (2048, 28, 16, 8, 128, 6144, 151936),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, 151936),
}
GOAL = 0.85  # of the token ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b" if DEVICE == "cuda" else "tiny")
    parser.add_argument("--prompts", type=int, default=2, help="of the K, how many the measured rollouts have")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--problem", type=int, default=200, help="tokens of a problem")
    parser.add_argument("--responses", type=int, nargs="+", default=[500, 1000], help="tokens of a response: mean")
    parser.add_argument("--spread", type=float, default=0.0, help="sigma of the lognormal response lengths")
    parser.add_argument("--micro-tokens", type=int, default=16384)
    parser.add_argument("--recompute", choices=get_args(Recompute), default="off", help="activation checkpointing")
    parser.add_argument("--kl", type=float, default=0.0, help="coefficient of the exact KL: a second forward pass")
    parser.add_argument(
        "--attention", choices=ATTENTION, nargs="+", default=[], help="other ways for packed rows, on a GPU"
    )
    parser.add_argument("--loss", choices=["cispo", "ppo", "reinforce"], default="cispo")
    parser.add_argument("--plain-layers", action="store_true", help="without Liger's layers where it is installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bf16, dense (H100 SXM: 989)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.shape}, {args.prompts} prompts of {args.prompt} + {args.problem} tokens x {args.problems} problems, ",
        end="",
    )
    print(
        f"{args.loss}, kl {args.kl:g}, recompute {args.recompute}, {args.micro_tokens} tokens a micro-batch, ", end=""
    )
    print(f"{DEVICE}, {setting()}")
    columns = {"response": 8, "": 8, "tokens run": 11, "live": 6, "batches": 8, "wall s": 9, "CPU s": 9, "peak MB": 9}
    print("".join(f" {name:>{width - 1}}" for name, width in columns.items()), "  MFU" if DEVICE == "cuda" else "")
    results = {str(length): measure(args, length) for length in args.responses}
    if args.json:
        save(args.json, **setting(), arguments={k: str(v) for k, v in vars(args).items()}, results=results)


def measure(args: argparse.Namespace, length: int) -> dict[str, Any]:
    """All ways on the same rollouts and the same weights."""
    model = random_model(args.shape, 0, args.plain_layers)
    recompute(model, args.recompute)
    shape = shape_of(model.lm, args.shape)
    base = random_model(args.shape, 1, args.plain_layers) if args.kl else model
    groups = make_groups(model, args, length)
    rollouts = [r for g in groups for r in g.rollouts]
    slow = SlowConfig(lr=1e-12, warmup=0, micro_tokens=args.micro_tokens, kl_coef=args.kl, loss=args.loss)
    policy = Recording(model, slow)
    learners = {pack_: Learner(policy, base, replace(slow, pack=pack_)) for pack_ in ("off", "on")}

    def step(name: str) -> None:
        with ATTENTION[name]() if name in ATTENTION else contextlib.nullcontext():
            learners["off" if name == "padded" else "on"].step(groups, random.Random(0))

    calls: dict[str, Callable[[], object]] = {n: partial(step, n) for n in ("padded", "packed", *args.attention)}
    times = interleaved(calls, args.rounds, budget=120)
    middles = {clock: medians(seconds) for clock, seconds in times.items()}
    clock = "cpu_seconds" if "cpu_seconds" in times else "seconds"  # other people's load moves CPU seconds less
    rows = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    found: dict[str, Any] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, middle in middles["seconds"].items():
        if name == "padded":
            batches = list(micro_batches(rollouts, args.micro_tokens))
            work = padded_work(rollouts)
            run = sum(len(b) * max(rows[i] for i in b) for b in batches)
        else:
            batches = list(packed_batches(rollouts, args.micro_tokens))
            work = sum((packed_work([rollouts[i] for i in b]) for b in batches), PassWork())
            run = work.tokens
        peak = peak_bytes_of(calls[name])
        policy.seen = []
        calls[name]()
        gradients[name], policy.seen = policy.seen, None
        apart = distance(gradients[name], gradients["padded"])
        tokens = run if name == "padded" else found["padded"]["tokens"]
        flops = shape.forward_flops(work) * (4 if args.kl else 3)  # backward is two forward
        mfu = flops / middle / args.peak_tflops / 1e12 if DEVICE == "cuda" else None
        found[name] = {
            **{k: x[name] for k, x in times.items()}, "tokens": run, "live": sum(rows) / run, "batches": len(batches),
            "peak_bytes": peak, "mfu": mfu, "gradients_apart": apart,
            "speed_ratio": middles[clock]["padded"] / middles[clock][name], "token_ratio": tokens / run,
        }  # fmt: skip
        print(
            f"{length:8} {name:7}{run:11}{sum(rows) / run:6.2f}{len(batches):8}{middle:9.3f}"
            f"{middles['cpu_seconds'][name] if mfu is None else 0:9.3f}{(peak or 0) / 1e6:9.0f}",
            f"{mfu:5.2f}" if mfu else "",
            flush=True,
        )
    for name in [x for x in found if x != "padded"]:
        faster, tokens, apart = (found[name][k] for k in ("speed_ratio", "token_ratio", "gradients_apart"))
        met = "met" if faster >= GOAL * tokens else "missed"
        print(
            f"{length:8} {name} is {faster:.2f}x faster (by {clock}) on 1/{tokens:.2f} of the tokens: "
            f"{faster / tokens:.2f} of that (goal {GOAL}: {met}); gradients {apart:.1e} of their norm apart"
        )
    return found


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """‖a − b‖ / ‖b‖ of gradients tensor by tensor."""
    apart = sum(float((x - y).float().norm()) ** 2 for x, y in zip(a, b, strict=True))
    return (apart / sum(float(x.float().norm()) ** 2 for x in b)) ** 0.5


class Recording(Policy):
    """Keeps the gradients of its next updates where `seen` is a list."""

    seen: list[torch.Tensor] | None = None

    def update(self) -> float:
        if self.seen is not None:
            self.seen += [m.grad.clone() for m in self.masters if m.grad is not None]
        return super().update()


@contextlib.contextmanager
def flex() -> Iterator[None]:
    """FlexAttention with a block mask: token j is above token i if j ≤ i and i stands below j's node."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def of(spans: list[tree_attention.Span], device: torch.device) -> Any:
        lengths = torch.tensor([s.end - s.start for s in spans], device=device)
        stop = torch.tensor([s.stop for s in spans], device=device).repeat_interleave(lengths)
        n = len(stop)
        return create_block_mask(lambda _b, _h, i, j: (j <= i) & (i < stop[j]), None, None, n, n, device=device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
        return cast(torch.Tensor, compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True))

    with patch.object(tree_attention.Tree, "of", of), patch.object(tree_attention, "tree_attention", attend):
        yield


@contextlib.contextmanager
def sorted_sums() -> Iterator[None]:
    """Gradients of copied keys added as an embedding's are, by sorting: no atomics, and the same bits in every run."""

    def add(total: torch.Tensor, at: torch.Tensor, parts: torch.Tensor) -> None:
        total += torch.ops.aten.embedding_dense_backward(parts.flatten(1), at, len(total), -1, False).view_as(total)

    with patch.object(tree_attention, "_add", add):
        yield


ATTENTION = {"flex": flex, "sorted sums": sorted_sums}  # on a GPU, besides the trainer's


def make_groups(model: Model, args: argparse.Namespace, length: int) -> list[Group]:
    """One rollout per prompt and problem, rewarded 1 under every other prompt."""
    rng = random.Random(0)
    draw = lambda n: tuple(rng.randrange(model.config.vocab_size) for _ in range(n))  # noqa: E731
    prompts, problems = (
        [draw(args.prompt) for _ in range(args.prompts)],
        [draw(args.problem) for _ in range(args.problems)],
    )
    rollouts = []
    for x, problem in enumerate(problems):
        for k, prompt in enumerate(prompts):
            n = max(1, round(length * rng.lognormvariate(-(args.spread**2) / 2, args.spread)))
            rollouts.append(
                Rollout(
                    Prompt(f"{k}"),
                    Problem(f"{x}", {}),
                    0,
                    "rl",
                    prompt + problem,
                    draw(n),
                    (-7.0,) * n,
                    ((0, n),),
                    SamplingParams(1.0),
                    "stop",
                    "none",
                    "",
                    Verdict(float(k % 2), ""),
                )
            )
    return group_by_problem(rollouts)


def random_model(shape: str, seed: int, plain_layers: bool = False) -> Model:
    """What Learner needs of a Model, without a folder."""
    hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary = SHAPES[shape]
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=40960,
    )  # fmt: skip
    with torch.device(DEVICE):
        lm = Qwen3ForCausalLM(config).to(torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    if not plain_layers:
        fuse_layers(lm)
    tokenizer = SimpleNamespace(eos_token_id=0, apply_chat_template=lambda: None)
    return Model(lm.eval(), tokenizer, shape)


if __name__ == "__main__":
    main()
