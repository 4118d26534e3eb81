"""Measures what this machine's GPU can do, and writes it into fst_fast/rates.json, which `train --plan` computes with.

    PYTHONPATH=.:kernels python3 benchmarks/rates.py        about a minute on a GPU; needs torch and transformers alone

Layers and head of Qwen3-8B with random weights, a few layers of them: what is measured is the time of one. Without a
GPU everything is small, and the table's "cpu" is what is replaced: a rehearsal (--table COPY.json keeps the real one).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from measure import DEVICE, copy_bandwidth, seconds_of, setting
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from fst_fast.model import GLYPH_BASE, Model, fuse_layers
from fst_fast.rates import TABLE, Hardware, kind_of, read_table
from fst_fast.rollout.torch_engine import KVBlock
from fst_fast.shape import BUILT_IN, PassWork, shape_of
from fst_kernels import linear_policy_loss

GPU = DEVICE == "cuda"
LAYERS, FEW = (6, 2) if GPU else (3, 1)
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "vocab_size": 1024}  # fmt: skip
SEQUENCES, PROMPT, RESPONSE = (16, 512, 512) if GPU else (4, 24, 24)  # one micro-batch, 16384 tokens
DECODED, STEPS = (64, 40) if GPU else (8, 6)  # sequences at a time, tokens of each that are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="table to read and write")
    args = parser.parse_args()
    about = setting()
    kind = kind_of(about["gpu"]["name"]) if GPU else "cpu"
    if not kind:
        parser.error(f"{about['gpu']['name']} is not in {args.table}: add it with the data sheet's numbers first")
    table = json.loads(args.table.read_text())
    versions = f"torch {about['versions']['torch']}, transformers {about['versions']['transformers']}"
    source = f"measured: benchmarks/rates.py at {about['commit']} on {(about['gpu'] or {}).get('name', 'a CPU')}"
    for name, value in measured(read_table(args.table)[kind]):
        print(f"{kind} {name}: {table[kind][name]['value']:g} -> {value:.4g}", flush=True)
        table[kind][name] = {"value": float(f"{value:.4g}"), "source": f"{source}, {versions}"}
        write(table, args.table)


def measured(hardware: Hardware) -> Iterator[tuple[str, float]]:
    """Rates by name, as they are found."""
    if GPU:
        yield "memory_gib", torch.cuda.get_device_properties(0).total_memory / 2**30
    yield "bandwidth_reached", copy_bandwidth() / 1e12 / hardware["bandwidth_tbs"]
    if GPU:
        yield "pcie_gbs", _copied(torch.empty(2**30, dtype=torch.uint8, pin_memory=True), "cuda:0") / 1e9
    if torch.cuda.device_count() > 1:
        yield "link_gbs", _copied(torch.empty(2**30, dtype=torch.uint8, device="cuda:0"), "cuda:1") / 1e9
    model = random_model()
    shape = shape_of(model.lm, "qwen3-8b, some layers")
    rows = [(0, PROMPT + RESPONSE)] * SEQUENCES
    flops = shape.forward_flops(PassWork.over(rows, SEQUENCES * RESPONSE))
    yield "train_mfu", 3 * flops / _best(lambda: learn(model)) / hardware.peak
    model.lm.zero_grad(set_to_none=True)
    with torch.inference_mode():
        ids = _ids(model, SEQUENCES, PROMPT + RESPONSE)
        flops = shape.forward_flops(PassWork.over(rows, 0))
        yield "prefill_mfu", flops / _best(lambda: model.hidden(ids, use_cache=False)) / hardware.peak
    whole = decode(model)
    model.lm.model.layers, model.lm.config.num_hidden_layers = model.lm.model.layers[:FEW], FEW
    yield "torch_layer_us", 1e6 * (whole - decode(model)) / (LAYERS - FEW)


def random_model() -> Model:
    tokenizer = AutoTokenizer.from_pretrained(GLYPH_BASE)
    sizes = BUILT_IN["qwen3-8b"] | ({} if GPU else SMALL) | {"num_hidden_layers": LAYERS}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if GPU else torch.float32)
    with torch.device(DEVICE):
        lm = Qwen3ForCausalLM(Qwen3Config(**sizes, eos_token_id=tokenizer.eos_token_id))
    torch.set_default_dtype(torch.float32)
    fuse_layers(lm)  # as load_model does: the rates of a run are Liger's where it is installed
    return Model(lm, tokenizer, "random weights")


def learn(model: Model) -> None:
    """Forward and backward pass of one micro-batch through model and loss, as the learner does it."""
    ids = _ids(model, SEQUENCES, PROMPT + RESPONSE)
    hidden = model.hidden(ids, use_cache=False)[:, PROMPT - 1 : -1].flatten(0, 1)
    targets = ids[:, PROMPT:].flatten()
    behaviour = torch.full(targets.shape, -10.0, device=DEVICE)
    advantages = torch.ones_like(behaviour)
    linear_policy_loss(hidden, model.head.weight, targets, behaviour, advantages, weight_max=4.0).loss.backward()


def decode(model: Model) -> float:
    """Seconds in which the embedded engine decodes one token of every sequence, without sampling it."""
    block = KVBlock.empty(DECODED)
    with torch.inference_mode():
        block.extend(model, [[1] * (PROMPT // 4)] * DECODED)
        return _best(lambda: block.extend(model, [[1]] * DECODED), STEPS)


def _ids(model: Model, rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, tokens), device=DEVICE)


def _copied(source: torch.Tensor, device: str) -> float:
    """Bytes a second, from one place to another."""
    target = torch.empty_like(source, device=device, pin_memory=False)
    return source.nbytes / _best(lambda: target.copy_(source, non_blocking=True))


def _best(call: Callable[[], object], rounds: int = 4) -> float:
    """Seconds of the fastest of some calls after one that warms up."""
    call()
    return min(seconds_of(call) for _ in range(rounds))


def write(table: Mapping[str, Mapping[str, object]], path: Path) -> None:
    """One line a rate."""
    kinds = [
        f' "{kind}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(rate)}' for name, rate in rates.items()) + "\n }"
        for kind, rates in table.items()
    ]
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n")


if __name__ == "__main__":
    main()
