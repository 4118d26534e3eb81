"""A causal LM as numbers: sizes, parameters, FLOPs and bytes a token. From a config.json alone, no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError

# Public config.json files of the Qwen3 series (dense), so that a plan needs no folder.
_QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
BUILT_IN: dict[str, dict[str, Any]] = {
    name: _QWEN3
    | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }
    for name, hidden, intermediate, layers, heads, tied in (
        ("qwen3-0.6b", 1024, 3072, 28, 16, True),
        ("qwen3-1.7b", 2048, 6144, 28, 16, True),
        ("qwen3-4b", 2560, 9728, 36, 32, True),
        ("qwen3-8b", 4096, 12288, 36, 32, False),
    )
}


@dataclass(frozen=True)
class PassWork:
    """What a forward pass has to compute."""

    tokens: int = 0
    pairs: int = 0  # of a token and one that it sees: itself or one before it
    responses: int = 0  # tokens that the head predicts

    @staticmethod
    def over(stretches: Iterable[tuple[int, int]], responses: int) -> PassWork:
        """Stretches [start, end) of sequences, whose tokens see all before them."""
        tokens = twice = 0
        for start, end in stretches:
            tokens += end - start
            twice += end * (end + 1) - start * (start + 1)
        return PassWork(tokens, twice // 2, responses)

    def __add__(self, other: PassWork) -> PassWork:
        return PassWork(self.tokens + other.tokens, self.pairs + other.pairs, self.responses + other.responses)


@dataclass(frozen=True)
class Shape:
    """A dense decoder. `width` and `kv_width` are heads × head dim of queries and of keys (values alike)."""

    name: str
    layers: int
    hidden: int
    width: int
    kv_width: int
    intermediate: int
    vocab: int
    context: int
    parameters: int  # all of them, tied ones once
    tied: bool  # the head is the embedding

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Parameters every token is multiplied with: neither the embedding, which is looked up, nor the head."""
        return self.parameters - self.head * (1 if self.tied else 2)

    @property
    def kv_elements(self) -> int:
        """Numbers in the KV cache per token."""
        return 2 * self.layers * self.kv_width

    def forward_flops(self, work: PassWork) -> float:
        """Of one forward pass: 2 a parameter and token, the head's for responses alone, and 4 · layers · width for the
        score of a pair and its part of the sum over values. A window does not lower it."""
        body, attention, head = self.body * work.tokens, 2 * self.layers * self.width * work.pairs, self.head
        return 2.0 * (body + attention + head * work.responses)


def shape_of(lm: Any, name: str) -> Shape:
    """Of a transformers model, whose parameters need no memory."""
    text = lm.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        width=heads * head_dim,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        intermediate=getattr(text, "intermediate_size", 4 * text.hidden_size),
        vocab=text.vocab_size,
        context=context_of(text),
        parameters=sum(p.numel() for p in lm.parameters()),
        tied=bool(lm.config.tie_word_embeddings),
    )


def context_of(config: Any) -> int:
    """Tokens of the longest sequence. Under LongRoPE (Phi) no more than it was first trained on: beyond that every
    token is turned otherwise, those before it and those of other sequences in the batch too."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some have one for each kind of layer
    first = [int(r["original_max_position_embeddings"]) for r in kinds if r.get("rope_type") == "longrope"]
    return min([int(getattr(config, "max_position_embeddings", None) or 1 << 30), *first])


def read_shape(path: str, *, field: str) -> Shape:
    """The shape called `path` (BUILT_IN), or that of the config.json in the folder; `field` is named when it is none.

    The model is built on torch's meta device, which counts its parameters without memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

    folder = Path(path)
    if path not in BUILT_IN and not (folder / "config.json").is_file():
        raise UserError(
            f"{field} = {path!r}: there is no {folder / 'config.json'}; give a Hugging Face model folder, or "
            f"--plan.model with one of {', '.join(BUILT_IN)}"
        )
    try:
        config = Qwen3Config(**BUILT_IN[path]) if path in BUILT_IN else AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        return shape_of(lm, folder.name)
    except Exception as error:  # whatever a broken config.json makes transformers raise
        raise UserError(
            f"{field} = {path!r}: its config.json is not one of a causal LM: {error}".split("\n")[0]
        ) from error
