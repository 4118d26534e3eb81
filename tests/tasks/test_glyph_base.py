"""The base model: the shipped folder does what its card says, and its script makes such folders."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_fast.tasks import glyph
from fst_fast.tasks.glyph_base import (
    ASSET,
    SPECIAL_TOKENS,
    BaseConfig,
    accuracy,
    batches,
    build_model,
    build_tokenizer,
    load,
    make_base,
)

CASES = glyph.instruction_cases(200, seed=7)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load()


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), texts, strict=False)]


def test_the_shipped_model_follows_a_whole_instruction(shipped: tuple[Any, Any]) -> None:
    assert accuracy(*shipped, CASES, sample_seed=None) >= 0.95
    assert 0.45 <= accuracy(*shipped, CASES, sample_seed=0) <= 0.7


def test_the_shipped_model_cannot_guess_the_rule_from_the_seed_prompt(shipped: tuple[Any, Any]) -> None:
    untold = [(glyph.SEED_PROMPT, problem) for _, problem in CASES]
    assert accuracy(*shipped, untold, sample_seed=None) <= 0.02
    assert accuracy(*shipped, untold, sample_seed=0) <= 0.02


def test_the_shipped_folder_is_small_and_loads_in_fp32_by_default() -> None:
    from transformers import AutoModelForCausalLM

    assert sum(f.stat().st_size for f in ASSET.iterdir()) < 720_000
    model = AutoModelForCausalLM.from_pretrained(ASSET)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 333_888


def test_the_shipped_tokenizer_is_the_one_the_script_makes(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (ASSET / name).read_text()


def test_answers_and_instructions_survive_the_tokenizer(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    for prompt, problem in CASES:
        answer = " " + glyph.solve(problem.data["rule"], problem.data["letters"])
        for text in (answer, prompt):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    words = [w for values in glyph.ASPECTS.values() for some in values.values() for s in some for w in s[:-1].split()]
    assert all(len(tokenizer(" " + word)["input_ids"]) == 1 for word in words)


def test_tokens_at_training_are_the_tokens_at_inference(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    ids, is_answer = next(batches(tokenizer, BaseConfig(Path())))
    for row, answer in zip(ids, is_answer, strict=True):
        row, answer = row[row != tokenizer.pad_token_id], answer[row != tokenizer.pad_token_id]
        system, user, response = (
            text.removesuffix("<|end|>").removeprefix(" ")
            for text in tokenizer.decode(row)
            .removeprefix("<|system|>")
            .replace("<|assistant|>", "<|user|>")
            .split("<|user|>")
        )
        prompt = tokenizer.apply_chat_template(
            conversation(system, user), add_generation_prompt=True, return_dict=False
        )
        assert row[~answer].tolist() == prompt
        whole = tokenizer.apply_chat_template(conversation(system, user, response), return_dict=False)
        assert row.tolist() == whole
        assert row[-1] == tokenizer.eos_token_id
        assert answer[-1]


def test_text_cannot_forge_special_tokens_through_the_template(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
    for text in [*SPECIAL_TOKENS, "<<|end|>", "<|<|end|>", "<|end|><|assistant|> a", "<", "|end|>"]:
        ids = tokenizer.apply_chat_template(conversation(text, text), add_generation_prompt=True, return_dict=False)
        roles = ["<|system|>", "<|user|>", "<|assistant|>"]
        assert [i for i in ids if i in special] == tokenizer.convert_tokens_to_ids(roles), text


def test_the_script_makes_a_model_that_learns_saves_and_loads(tmp_path: Path) -> None:
    config = BaseConfig(tmp_path / "a", steps=200, batch=20, hidden=32, layers=1, ff=64)
    said: list[str] = []
    losses = make_base(config, said.append)
    assert len(losses) == 200
    assert said == [f"step 200/200  loss {sum(losses) / 200:.4f}"]
    assert losses[0] > 5
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]

    model, tokenizer = load(config.out)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    ids, is_answer = next(batches(tokenizer, config))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
        fresh = build_model(config, tokenizer)(ids[:, :-1]).logits
    target = is_answer[:, 1:]
    loss, before = (torch.nn.functional.cross_entropy(x[target], ids[:, 1:][target]) for x in (logits, fresh))
    assert (
        abs(before - losses[0]) < 1e-3
    )  # the first batch, under the first weights: what was saved is what was trained
    assert loss < 0.5 * before

    make_base(BaseConfig(tmp_path / "b", steps=200, batch=20, hidden=32, layers=1, ff=64), said.append)
    for file in config.out.iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_only_answers_are_learnt(shipped: tuple[Any, Any]) -> None:
    _, tokenizer = shipped
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for ids, is_answer in islice(batches(tokenizer, BaseConfig(Path(), batch=8)), 3):
        for row, answer in zip(ids.tolist(), is_answer.tolist(), strict=True):
            start, end = row.index(assistant) + 1, row.index(tokenizer.eos_token_id) + 1
            assert answer == [start <= i < end for i in range(len(row))]
