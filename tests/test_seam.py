"""Requests under one system prompt share its tokens, also where a BPE tokenizer would merge over the seam."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fst_fast.model import Model, load_model
from fst_fast.tasks.glyph import GlyphTask, instruction_cases

PLAIN = "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content }}{{ '\n\n' if m.role == 'system' }}{% endfor %}"
MARKED = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{{ '<|assistant|>' }}"
SYSTEM = "use upper case. " * 20
PROBLEMS = ["sort the letters", "\nsort", "\n\n\nsort", " sort", "", "é", "\U0001f600 sort", "user\n", "ser the\n\n"]


def bpe_model(template: str, folder: Path) -> Model:
    """A Model whose tokenizer is a byte-level BPE that merges over anything: words, line breaks, headers."""
    text = [f"### system\n{SYSTEM}\n\n### user\n{p}" for p in PROBLEMS * 20]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=template)
    model = load_model("")
    model.tokenizer = fast
    return model


def rendered(model: Model, messages: list[dict[str, str]]) -> str:
    return model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def chat(problem: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": problem}]


def shared(sequences: list[tuple[int, ...]]) -> int:
    return next(i for i, column in enumerate(zip(*sequences, strict=False)) if len(set(column)) > 1)


def test_prompts_share_their_ids_where_whole_strings_merge_over_the_seam(tmp_path: Path) -> None:
    model = bpe_model(PLAIN, tmp_path)
    ours = [model.encode_chat(chat(p)) for p in PROBLEMS if p]
    whole = [tuple(model.tokenizer.encode(rendered(model, chat(p)), add_special_tokens=False)) for p in PROBLEMS if p]
    head = len(model._heads[("system", SYSTEM),])
    print(shared(whole), shared(ours), head)
    assert shared(whole) < head <= shared(ours)
    assert [model._text(ids) for ids in ours] == [rendered(model, chat(p)) for p in PROBLEMS if p]
