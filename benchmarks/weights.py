"""Model folders with random weights of a real shape and the embedded model's tokenizer: where only sizes count."""

from __future__ import annotations

from pathlib import Path

import torch
from measure import DEVICE
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from fst_fast.model import GLYPH_BASE
from fst_fast.shape import BUILT_IN

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32}
SHAPES = BUILT_IN | {"rehearsal": BUILT_IN["qwen3-0.6b"] | SMALL}  # a head size that vLLM's CPU build has


def save_random(shape: str, folder: Path) -> Path:
    """`folder`, with a bfloat16 Qwen3 of that shape in it, made on the GPU where there is one."""
    tokenizer = AutoTokenizer.from_pretrained(GLYPH_BASE)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], **special)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)
    return folder
