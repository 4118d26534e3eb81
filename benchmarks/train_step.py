"""One slow step, rollouts packed as a token trie against padded rows: seconds, peak memory, gradients.

    python benchmarks/train_step.py [--shape cpu|quick|qwen3-0.6b|qwen3-1.7b|qwen3-8b] [--cases NAME ...]
                                    [--losses NAME ...] [--rounds 5] [--threads N] [--json FILE]

A step is what one of K = G = 8 prompts brings to a batch of 8 problems: 8 responses, one to a problem, all under one
prompt of 1000 tokens; forward, backward and update, on random weights of Qwen3's architecture. Both ways take it as one
micro-batch. "of tokens" is the gain in time over that in tokens (padded rows / trie), of which 0.85 is the goal.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, interleaved, medians, peak_bytes_of, save, setting

from fst_fast.config import SlowConfig
from fst_fast.model import GLYPH_BASE, Model
from fst_fast.prefix_tree import Ragged, trie
from fst_fast.records import Problem, Prompt, Rollout, SamplingParams, Verdict
from fst_fast.slow.advantage import group_by_problem
from fst_fast.slow.learner import Learner
from fst_fast.slow.policy import Policy

GOAL = 0.85  # of the token ratio
H100_FLOPS = 989e12  # dense bf16, NVIDIA's data sheet


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int


SHAPES = {
    "quick": Shape(64, 2, 2, 1, 32, 128, 512),
    "cpu": Shape(256, 4, 4, 2, 64, 768, 1024),  # the LM head's share of the work is that of Qwen3-8B
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936),
    "qwen3-1.7b": Shape(2048, 28, 16, 8, 128, 6144, 151936),
    "qwen3-8b": Shape(4096, 6, 32, 8, 128, 12288, 151936),  # 6 of its 36 layers: AdamW's state of all fits no GPU
}


@dataclass(frozen=True)
class Case:
    prompt: int
    problem: int
    shortest: int
    longest: int


CASES = {
    "500": Case(1000, 200, 500, 500),
    "1000": Case(1000, 200, 1000, 1000),
    "100-900": Case(1000, 200, 100, 900),
    "quick": Case(100, 20, 30, 50),
}
LOSSES = {"cispo": 0.0, "cispo + KL": 0.001, "distill": 0.0}  # kl_coef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b" if DEVICE == "cuda" else "cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["500", "1000", "100-900"])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are reported")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the results here, after every case")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.cases, args.rounds = "quick", ["quick"], 1
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    model = make_model(shape)
    base = copy.deepcopy(model)
    base.lm.requires_grad_(False)
    policy = Recorder(model, SlowConfig())
    print(f"{args.shape}: {shape}, {model.lm.dtype}, {args.threads} thread(s)\n{setting()}\n\n{HEADS}", flush=True)
    results = []
    for name in args.cases:
        for loss in args.losses:
            result = {"case": name, "loss": loss, **measure(policy, base, CASES[name], loss, args.rounds)}
            results.append(result)
            print(line(result), flush=True)
            if args.json:
                save(args.json, shape=asdict(shape), **setting(), results=results)


class Recorder(Policy):
    """While `keep` is set it keeps the gradient instead of stepping."""

    keep = False

    def update(self) -> float:
        if not self.keep:
            return super().update()
        self.seen = torch.cat([p.grad.flatten().float() for p in self._parameters])
        for p in self._parameters:
            p.grad = None
        return 0.0


def measure(policy: Recorder, base: Model, case: Case, loss: str, rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of both ways, their tokens and FLOPs, and ‖difference‖ / ‖gradient‖ of their gradients."""
    rollouts = make_rollouts(case, policy.model.config.vocab_size)
    groups = group_by_problem(rollouts)

    def step(pack: str) -> Callable[[], object]:
        config = SlowConfig(pack=pack, kl_coef=LOSSES[loss], micro_tokens=10**9)
        learner = Learner(policy, base, config)
        if loss == "distill":
            contexts = [(*reversed(r.prompt_ids[: case.prompt]), *r.prompt_ids[case.prompt :]) for r in rollouts]
            return lambda: learner.distill(rollouts, contexts, random.Random(0))
        return lambda: learner.step(groups, random.Random(0))

    calls = {"padded": step("off"), "packed": step("on")}
    policy.keep, gradients = True, {}
    for name, call in calls.items():
        call()
        gradients[name] = policy.seen
    policy.keep = False
    error = (gradients["padded"] - gradients["packed"]).norm() / gradients["padded"].norm()
    gradients.clear()
    del policy.seen
    calls["padded"]()  # allocates the optimizer's state
    peaks = {name: peak_bytes_of(call) for name, call in calls.items()}
    rows = [r.prompt_ids + r.response_ids[:-1] for r in rollouts]
    tokens = {"padded": len(rows) * max(map(len, rows)), "packed": trie(Ragged.of(rows)).tokens}
    tokens["rows"] = sum(map(len, rows))
    times = interleaved(calls, rounds, budget=300.0)
    about = {"memory": peaks, "tokens": tokens, "flops": flops(policy.model.config, rollouts, loss)}
    return {**times, **about, "gradient_error": float(error)}


def make_model(shape: Shape) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    config = Qwen3Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab,
        tie_word_embeddings=False,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    with torch.device(DEVICE):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return Model(lm, AutoTokenizer.from_pretrained(GLYPH_BASE), "random weights")


def make_rollouts(case: Case, vocab: int) -> list[Rollout]:
    """8 responses to 8 problems under one prompt, in groups of two, that all carry a signal."""
    rng = random.Random(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(n))

    prompt, out = draw(case.prompt), []
    for i in range(8):
        response = draw(case.shortest + (case.longest - case.shortest) * i // 7)
        behaviour = tuple(rng.gauss(-7, 0.3) for _ in response)
        out.append(
            Rollout(
                Prompt("p"), Problem(f"x{i // 2}", {}), i, "rl", prompt + draw(case.problem), response, behaviour,
                ((0, len(response)),), SamplingParams(), "stop", "random", "", Verdict(float(i % 2), ""),
            )
        )  # fmt: skip
    return out


def flops(config: Any, rollouts: list[Rollout], loss: str) -> dict[str, float]:
    """Of the products that both ways need: 2 per weight and token and pass (3 with a backward; a reference has 1), the
    LM head at the responses, attention 4 · heads · head_dim per layer and pair of tokens. No padding is counted."""
    rows = [r.prompt_ids + r.response_ids[:-1] for r in rollouts]
    tree = trie(Ragged.of(rows))
    width = config.hidden_size
    attention = 2 * width * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)
    head = sum(len(r.response_ids) for r in rollouts) * width * config.vocab_size
    passes = 3 if loss == "cispo" else 4
    pairs = {"padded": sum(n * (n + 1) // 2 for n in map(len, rows))}
    pairs["packed"] = int(((tree.end * (tree.end + 1) - tree.start * (tree.start + 1)) // 2).sum())
    tokens = {"padded": sum(map(len, rows)), "packed": tree.tokens}
    of_pair = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return {k: float(passes * (2 * (weights * tokens[k] + head) + of_pair * pairs[k])) for k in tokens}


HEADS = (
    f"{'response':>9} {'loss':11}{'padded s':>9}{'packed s':>9}{'time':>7}{'tokens':>8}{'of tokens':>11}{'FLOP':>7}"
    f"{'peak MB':>14}{'live':>6}  gradient"
)


def line(r: dict[str, Any]) -> str:
    """Ratios are padded / packed; "live": the tokens of the trie over those of the padded rows."""
    seconds, tokens = medians(r["seconds"]), r["tokens"]
    time, ratio = seconds["padded"] / seconds["packed"], tokens["padded"] / tokens["packed"]
    verdict = "met" if time >= GOAL * ratio else "MISSED"
    peaks = "/".join("?" if x is None else f"{x / 1e6:.0f}" for x in r["memory"].values())
    out = (
        f"{r['case']:>9} {r['loss']:11}{seconds['padded']:9.3f}{seconds['packed']:9.3f}{time:6.2f}x{ratio:7.2f}x"
        f"{time / ratio:5.2f} {verdict:6}{r['flops']['padded'] / r['flops']['packed']:5.2f}x{peaks:>14}"
        f"{1 / ratio:6.0%}  {r['gradient_error']:.1e}"
    )
    if DEVICE == "cuda":
        use = ", ".join(f"{k} {r['flops'][k] / seconds[k] / H100_FLOPS:.0%}" for k in seconds)
        out += f"  MFU of an H100: {use}"
    return out


if __name__ == "__main__":
    main()
