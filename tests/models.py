"""Tiny random models of several families, made on the spot, saved as real Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fst_fast.model import GLYPH_BASE, Model, load_model

FAMILIES = ("qwen3", "llama", "mistral", "gemma2", "gemma3")


def save_tiny(family: str, folder: Path, *, seed: int = 0, head_dim: int = 16) -> Path:
    """A random model of the family with the glyph tokenizer (and its chat template) in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(GLYPH_BASE)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,  # grouped-query attention
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    # windows shorter than the prompts, and a visible softcap: both change the numbers if they are ignored
    if family == "qwen3":
        lm = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    elif family == "llama":
        lm = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    elif family == "mistral":  # one window for all layers, and no layer_types
        lm = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    elif family == "gemma2":
        config = Gemma2Config(**sizes, sliding_window=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0)
        lm = Gemma2ForCausalLM(config)
    elif family == "qwen3-moe":
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        lm = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    else:
        lm = Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
        )
    with torch.no_grad():  # peaked distributions: a wrong mask or a stale cache then shows
        for p in lm.parameters():
            p.mul_(3.0) if p.ndim > 1 else None
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny(family: str, folder: Path, *, seed: int = 0, head_dim: int = 16) -> Model:
    return load_model(str(save_tiny(family, folder, seed=seed, head_dim=head_dim)))
