"""Memory of a GPU and of its machine, part by part: arithmetic from the model's shape, nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fst_fast.config import Recompute
from fst_fast.shape import Shape

When = Literal["always", "loading", "learning", "sampling", "saving"]
GIB = 2**30
CHUNK_ROWS = 4096  # of fp32 logits at a time, the kernels' on a GPU
CONTEXT = 1.5 * GIB  # CUDA, cuBLAS, NCCL and the engine's graphs (assumed)
FRAGMENTS = 1.05  # of what torch allocates (assumed)


@dataclass(frozen=True)
class Part:
    """`when` two parts of different times never meet; "always" meets all."""

    name: str
    bytes: float
    when: When


@dataclass(frozen=True)
class Layout:
    """How a run is laid out on the GPUs."""

    gpus: int
    node: int  # of them in one machine
    recompute: Recompute
    fused: bool  # layers by Liger's kernels
    offload: bool  # masters and moments in the CPU's memory
    bytes: int  # of a weight
    micro_tokens: int
    kl: bool  # the base model's pass and head
    vllm: bool
    sequences: int  # decoded together on one GPU
    tokens: int  # of the longest context with its response
    gpu_fraction: float  # of the GPU, that vLLM takes
    gpu_bytes: float

    @property
    def shards(self) -> int:
        """GPUs that share the trainer's state: those of one machine; each machine has all of it (ranks.py)."""
        return min(self.gpus, self.node)

    @property
    def sharded(self) -> bool:
        return self.gpus > 1 or self.offload


def activations(shape: Shape, recompute: Recompute, tokens: int, size: int, *, fused: bool) -> float:
    """Bytes kept for the backward pass of so many tokens through all layers, weights and activations of `size` bytes.

    Counted in transformers' Qwen3 (test_plan.py counts again): RMSNorm keeps its fp32 input. Liger's keeps what comes
    and what goes, its SwiGLU no SiLU, its RoPE nothing. Selective keeps the products and the attention's result, full
    a layer's input and one layer in full.
    """
    h, i, w = shape.hidden, shape.intermediate, shape.width + shape.kv_width
    layer = (8 + 4 * size) * h + 4 * size * i + (4 + 3 * size) * w
    if fused:
        layer = size * (4 * h + 3 * i + 3 * w)
    kept = {
        "off": layer * shape.layers,
        "selective": size * (2 * h + 2 * i + 2 * w) * shape.layers + layer,
        "full": size * h * shape.layers + layer,
    }
    return float(kept[recompute] * tokens)


def parts(shape: Shape, at: Layout) -> list[Part]:
    """Everything one GPU holds. Of several each has a share of the trainer's state (FSDP2: sharding.py), and an engine
    of its own."""
    n, size, sharded = shape.parameters, at.bytes, at.sharded
    share, tokens = n / at.shards, max(at.micro_tokens, at.tokens)
    layer = (shape.body / shape.layers) * size
    kept = activations(shape, at.recompute, tokens, size, fused=at.fused)
    out = [Part("CUDA context and libraries", CONTEXT, "always")]
    if not at.offload:
        if not sharded and size < 4:
            out.append(Part("weights that are sampled from", size * n, "always"))
        out += [
            Part("weights that are trained, fp32", 4 * share, "always"),
            Part("AdamW's two moments, fp32", 8 * share, "always"),
            Part("base model, for the exact KL and the policy reflector", size * share, "always"),
            Part("gradients, fp32", 4 * share, "learning"),
        ]
    out += [
        Part(f"activations of {tokens:,} tokens, recompute {at.recompute}", kept, "learning"),
        Part("loss: chunks of fp32 logits", (2 if at.kl else 1) * 4 * CHUNK_ROWS * shape.vocab, "learning"),
        # of a sharded head they are there twice: as they were summed, and times the loss's gradient, to be shared out
        Part("loss: fp32 sums of the head's and the hidden states' gradients",
             4 * ((2 if sharded else 1) * shape.head + tokens * shape.hidden), "learning"),
    ]  # fmt: skip
    if sharded:
        heads = (3 if at.kl else 2) * size * shape.head
        # FSDP2 gathers the next layer while one computes; one layer's whole gradients wait to be shared out
        out.append(
            Part("FSDP: embedding, head and two layers gathered, a layer's gradients", 3 * layer + heads, "learning")
        )
        if at.vllm:  # else there is a whole copy always, and it is loaded last
            # not there yet: masters and moments, but for the share that is cut from the whole
            later = 0 if at.offload else (12 - size) * share
            out.append(Part("a whole model, before it is sharded", max(0.0, size * n - later), "loading"))
    kv = size * shape.kv_elements * at.sequences * at.tokens
    if at.vllm:
        share = at.gpu_fraction * at.gpu_bytes  # given back for every training step
        out.append(Part(f"vLLM: weights and KV cache ({at.gpu_fraction:.0%})", share, "sampling"))
    else:
        if sharded:
            out.append(Part("engine's copy of the weights", size * n, "always"))
        out.append(Part("engine's head in fp32", 4 * shape.head if size < 4 else 0, "always"))
        out.append(Part(f"KV cache of {at.sequences} sequences, grown by half", 1.5 * kv, "sampling"))
    return [p for p in out if p.bytes]


def host_parts(shape: Shape, at: Layout) -> list[Part]:
    """What all processes of one machine hold in its own memory beside that."""
    n, size = shape.parameters, at.bytes
    out = [
        Part("a model a process, on its way to the GPU", at.shards * size * n, "loading"),
        Part("copies of masters and moments, while they are written", 12 * n, "saving"),
        Part("copy of the weights, on rank 0", size * n, "saving"),
    ]
    if at.offload:
        out.append(
            Part("offloaded masters, moments and gradients, fp32, and the base model", (16 + size) * n, "always")
        )
    return out


def peak(of: list[Part]) -> float:
    """Bytes at the worst moment, with what fragments."""
    held: dict[When, float] = {}
    for p in of:
        held[p.when] = held.get(p.when, 0.0) + p.bytes
    return FRAGMENTS * (held.pop("always", 0.0) + max(held.values(), default=0.0))


def kv_room(shape: Shape, at: Layout) -> float:
    """Sequences of full length that vLLM's share has KV blocks for; negative: not even the weights fit."""
    left = at.gpu_fraction * at.gpu_bytes - at.bytes * shape.parameters - 2 * GIB  # its own activations, as simulated
    return left / (at.bytes * shape.kv_elements * at.tokens)
