from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, TokenizersBackend

from fst_fast.errors import UserError
from fst_fast.model import Model, _through_two_layers, load_model
from fst_fast.rollout import torch_engine
from fst_fast.rollout.check import check_engine
from fst_fast.rollout.torch_engine import TorchEngine
from fst_fast.shape import read_shape
from tests.models import save_tiny, tiny

CHAT = [{"role": "system", "content": "use upper case."}, {"role": "user", "content": "a b"}]


def with_template(folder: Path, template: str) -> str:
    save_tiny("llama", folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_an_empty_system_prompt_is_no_message() -> None:
    model = load_model("")
    assert model.encode_chat([{"role": "system", "content": ""}, CHAT[1]]) == model.encode_chat(CHAT[1:])
    assert len(model.encode_chat(CHAT)) > len(model.encode_chat(CHAT[1:]))


def test_a_template_without_a_system_role_gets_the_prompt_in_the_users_message(tmp_path: Path) -> None:
    gemma2_like = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    )
    model = load_model(with_template(tmp_path, gemma2_like))
    text = model.tokenizer.decode(model.encode_chat(CHAT))
    assert text.replace("Ċ", "\n").split() == ["<user>use", "upper", "case.", "a", "b"]


def test_a_template_that_leaves_the_system_prompt_out_gets_it_in_the_users_message(tmp_path: Path) -> None:
    """Otherwise every prompt of the population is the same to the policy, and no one is told."""
    silent = "{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    model = load_model(with_template(tmp_path, silent))
    text = model.tokenizer.decode(model.encode_chat(CHAT))
    assert text.replace("Ċ", "\n").split() == ["<user>use", "upper", "case.", "a", "b"]
    other = [{"role": "system", "content": "use lower case."}, CHAT[1]]
    assert model.encode_chat(other) != model.encode_chat(CHAT)


def test_an_answer_ends_where_the_template_ends_it_whatever_a_base_model_calls_its_end(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        told = json.loads((tmp_path / name).read_text())
        told |= {"eos_token": "<|pad|>"} if "eos_token" in told else {"eos_token_id": 0}
        (tmp_path / name).write_text(json.dumps(told))
    model = load_model(str(tmp_path))
    pad, end = model.tokenizer.convert_tokens_to_ids(["<|pad|>", "<|end|>"])
    assert model.tokenizer.eos_token_id == pad == 0
    assert model.eos_ids == {pad, end}
    assert model.decode((*model.tokenizer.encode(" a b"), end)) == "a b"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' x' }}{% endfor %}",  # nothing special ends it
        "{% for m in messages if m.role != 'assistant' %}{{ '<|user|> ' + m.content }}{% endfor %}",
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}",
        "{{ messages[-1].content }}",
    ],
)
def test_where_the_template_ends_no_answer_the_configurations_end_is_the_end(tmp_path: Path, template: str) -> None:
    model = load_model(with_template(tmp_path, template))
    assert model.eos_ids == {model.tokenizer.eos_token_id}


def test_thinking_reaches_the_template(tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}{% if enable_thinking is defined and not enable_thinking %} no{% endif %}"
    folder = with_template(tmp_path, template)
    on, off = load_model(folder), load_model(folder, thinking="off")
    assert len(off.encode_chat(CHAT)) > len(on.encode_chat(CHAT))


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_a_template_without_a_switch_for_thoughts_is_a_user_error(tmp_path: Path, thinking: str) -> None:
    folder = with_template(tmp_path, "{{ messages[-1].content }}<think>")
    with pytest.raises(UserError, match=f"model.thinking = '{thinking}': .* has no enable_thinking"):
        load_model(folder, thinking=thinking)


def test_a_template_that_takes_nothing_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not take a user message: never"):
        load_model(with_template(tmp_path, "{{ raise_exception('never') }}"))
    with pytest.raises(UserError, match="does not take a user message: it leaves the content out"):
        load_model(with_template(tmp_path, "<user>hello<assistant>"))
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match=r"does not take a user message: .*multiple chat templates"):
        load_model(str(tmp_path))


def test_a_model_that_is_never_talked_to_needs_no_chat_template() -> None:
    """Those of the benchmarks."""
    tokenizer = SimpleNamespace(eos_token_id=0, apply_chat_template=lambda: None)
    assert Model(load_model("").lm, tokenizer, "").context == load_model("").context


def test_weights_that_the_model_has_no_place_for_are_named(tmp_path: Path) -> None:
    """A Qwen2 under a Llama's config.json loses the biases of its attention, and is another model."""
    save_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(tensors | bias, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="holds 1 tensors that its config.json has no place for, e.g. model.layers.0"):
        load_model(str(tmp_path))


def test_quantized_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bitsandbytes a 4-bit Llama was loaded, sampled from, and learned in its norms, embedding and head alone."""
    save_tiny("llama", tmp_path)
    load = AutoModelForCausalLM.from_pretrained

    def quantized(*args: Any, **kwargs: Any) -> Any:
        lm, found = load(*args, **kwargs)
        lm.is_quantized = True  # as transformers says of any that it left quantized
        return lm, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", quantized)
    with pytest.raises(UserError, match="are quantized, and cannot be trained"):
        load_model(str(tmp_path))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    """transformers puts it into the model by itself: it would be trained with, and missing in what is exported."""
    peft = pytest.importorskip("peft")
    lm = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path))
    peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds an adapter beside the model; merge it"):
        load_model(str(tmp_path))


def test_a_sequence_has_the_same_states_whatever_is_beside_it_up_to_the_context(tmp_path: Path) -> None:
    """LongRoPE: one sequence beyond the original length would turn the tokens of all."""
    save_tiny("llama", tmp_path)  # for its tokenizer
    sizes = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(
        **sizes, num_attention_heads=3, num_key_value_heads=3, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        max_position_embeddings=512, original_max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Phi3ForCausalLM(config)
    with torch.no_grad():  # large enough that positions matter
        for p in lm.parameters():
            p.mul_(3.0) if p.ndim > 1 else None
    lm.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert read_shape(str(tmp_path), field="model.path").context == model.context  # a plan knows it too
    rows = torch.randint(5, 300, (2, model.context))
    with torch.no_grad():
        alone, beside = model.hidden(rows[:1, :20]), model.hidden(rows)[:1, :20]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_a_response_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Some tokenizers are set to take spaces before punctuation out: of answers that are verified."""
    folder = save_tiny("llama", tmp_path)
    words = Tokenizer(Unigram([("<unk>", 0.0), *((f"▁{w}", -1.0) for w in ("a", ",", "b", "<end>"))], unk_id=0))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = TokenizersBackend(
        tokenizer_object=words, eos_token="▁<end>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert Model(lm, tokenizer, str(folder)).decode((1, 2, 3, 4)) == "a , b"


def test_an_engine_that_attends_otherwise_than_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("mistral", tmp_path)
    check_engine(TorchEngine(model), model)
    model.window = None  # what an engine does that does not know the window
    with pytest.raises(UserError, match="log-probs are off by"):
        check_engine(TorchEngine(model), model)


def test_an_architecture_the_engine_cannot_run_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", tmp_path)

    def broken(*_: object) -> None:
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(torch_engine, "additive", broken)
    with pytest.raises(UserError, match=r"cannot sample from .*too many values"):
        check_engine(TorchEngine(model), model)


def test_unknown_layers_are_refused(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["linear_attention"] * config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="linear_attention"):
        load_model(str(tmp_path))


def test_the_head_gives_the_models_own_logits(tmp_path: Path) -> None:
    model = tiny("gemma2", tmp_path)  # tied and softcapped
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(model.logits(model.hidden(ids)[0]), model.lm(input_ids=ids).logits[0], atol=1e-5)


def test_liger_is_judged_by_two_layers_which_leaves_the_model_whole() -> None:
    """bf16's rounding grows with depth until another computation could not be told from it."""
    lm = load_model("").lm
    ran = [0] * len(lm.model.layers)

    def count(i: int) -> None:
        ran[i] += 1

    for i, layer in enumerate(lm.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: count(i))
    states = _through_two_layers(lm)
    assert ran == [1, 1] + [0] * (len(ran) - 2)
    assert len(ran) > 2
    lm.model(torch.arange(32)[None] % lm.config.vocab_size)
    assert ran == [2, 2] + [1] * (len(ran) - 2)
    lm.model.layers = lm.model.layers[:2]
    assert torch.equal(states, lm.model(torch.arange(32)[None] % lm.config.vocab_size).last_hidden_state)
