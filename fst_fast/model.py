"""A causal LM folder of Hugging Face, opened the one way both channels use it: hidden states, LM head, chat format."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fst_fast.buckets import gathered
from fst_fast.errors import UserError
from fst_fast.shape import context_of

if TYPE_CHECKING:
    import numpy as np

    from fst_fast.tasks.task import Message

GLYPH_BASE = Path(__file__).parent / "assets" / "glyph-base"
PROBES = ("a", "Z", "7", "(", "é")  # contents that begin differently
_TRIALS: list[list[Message]] = [  # which no chat template may show alike
    [{"role": "system", "content": prompt}, {"role": "user", "content": problem}]
    for prompt, problem in (("a prompt", "a problem"), ("another prompt", "a problem"), ("a prompt", "another problem"))
]
MAX_HEADS = 1024
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Head:
    """The LM head as the kernels take it: logits = softcap(hidden @ weight.T + bias)."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    softcap: float | None


class Model:
    """A transformers causal LM with its tokenizer. `self.lm` is the module whose parameters are trained in place."""

    def __init__(self, lm: Any, tokenizer: Any, path: str, *, template_kwargs: dict[str, Any] | None = None):
        self.lm, self.tokenizer, self.path = lm, tokenizer, path
        self.config = lm.config.get_text_config()
        self._dtype: torch.dtype = lm.dtype
        self.device = lm.device
        self.context = context_of(self.config)
        layer_types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        # older configurations (Mistral, Phi-3) have one window for all layers, and their models take one plain mask
        self.one_window = not layer_types and window is not None and getattr(self.config, "use_sliding_window", True)
        layer_types = layer_types or ["sliding_attention" if self.one_window else "full_attention"]
        if unknown := set(layer_types) - SUPPORTED_LAYERS:
            raise UserError(
                f"model.path: {path} has {', '.join(sorted(unknown))} layers; "
                f"models with {' and '.join(sorted(SUPPORTED_LAYERS))} layers are supported"
            )
        self.window: int | None = window if "sliding_attention" in layer_types else None
        generation_eos = getattr(lm.generation_config, "eos_token_id", None)
        eos = {tokenizer.eos_token_id, *(generation_eos if isinstance(generation_eos, list) else [generation_eos])}
        self.eos_ids: frozenset[int] = frozenset(int(i) for i in eos if i is not None)
        if not self.eos_ids:
            raise UserError(
                f"model.path: {path} names no end token; set eos_token in its tokenizer or generation config"
            )
        self.sharded = False  # over ranks: the parameters are DTensors, fp32 masters of what is computed with
        self.update_of: Callable[[str], torch.Tensor | None] | None = None  # by LoRA (slow/lora.py), by parameter
        self._folds_system = False
        self._template_kwargs = template_kwargs or {}
        self._heads: dict[tuple[tuple[str, str], ...], tuple[int, ...]] = {}  # ids up to the last message's content
        forward = inspect.signature(lm.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in forward else "past_key_values"  # older transformers
        self._sanitizes = "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters
        self._check_head()

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed with, in training and in sampling."""
        return self._dtype if self.sharded else self.lm.dtype

    @property
    def head(self) -> Head:
        """Of a sharded model with tensors that are DTensors."""
        out = self.lm.get_output_embeddings()
        bias = None if out.bias is None else out.bias.to(self.device, self.dtype)
        return Head(out.weight.to(self.device, self.dtype), bias, getattr(self.config, "final_logit_softcapping", None))

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all parameters, in the type that is computed with, a tied one once; LoRA added in.

        Of a sharded model they are gathered a bucket at a time (buckets.py): all ranks go through them together, and
        none has room to keep them.
        """
        trained = self.lm.named_parameters()
        named: Iterator[tuple[str, torch.Tensor]] = ((name, p) for name, p in trained if ".lora_" not in name)
        if self.sharded:
            named = gathered(named, self.dtype, self.device)
        for name, p in named:
            value, update = p.detach(), self.update_of and self.update_of(name)
            if update is not None:
                value = (value.float() + update.to(self.device)).to(self.dtype)
            yield name.replace(".base_layer.", "."), value

    def hidden(self, ids: torch.Tensor, cache: Any = None, **kwargs: Any) -> torch.Tensor:
        """Final hidden states [B, T, H] (after the last norm) of token ids [B, T]; `cache`: keys and values so far."""
        if cache is not None:
            kwargs |= {self._cache_name: cache, "use_cache": True}
        return self.lm.base_model(input_ids=ids, **kwargs).last_hidden_state

    def logits(self, hidden: torch.Tensor, head: Head | None = None) -> torch.Tensor:
        """fp32 logits [N, V] of hidden states [N, H]: what is sampled from and trained on must be the same numbers.

        `head` can be the model's head in fp32 already: converting a bf16 one takes long for every token.
        """
        head = head or self.head
        logits = hidden.float() @ whole(head.weight).float().T
        if head.bias is not None:
            logits = logits + whole(head.bias).float()
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def encode_chat(self, messages: list[Message]) -> tuple[int, ...]:
        """Token ids of the chat template, ready for the assistant's answer. Ids are the truth from here.

        Contents are data: lone surrogates are replaced, and special tokens written in them stay plain text. An empty
        system prompt is none; a template without a system role (Gemma 2) gets it at the head of the user's message.
        What comes before the last message's content has the same ids whatever that content is, so that requests under
        one system prompt share its KV blocks: a token that would reach over this seam is split there.
        """
        ids = self._apply_template(messages)
        key = tuple((m["role"], m["content"]) for m in messages[:-1])
        if key not in self._heads:
            if len(self._heads) == MAX_HEADS:
                self._heads.clear()
            self._heads[key] = self._head(messages)
        return self._with_head(self._heads[key], ids)

    def _head(self, messages: list[Message]) -> tuple[int, ...]:
        """Ids of the chat up to its last content: those that chats with other contents have in common, and what is left
        of the text. A space at the seam goes with the content, where tokenizers are used to it."""
        probes = [self._apply_template([*messages[:-1], messages[-1] | {"content": c}]) for c in PROBES]
        head = probes[0][: min(_common(probes[0], p) for p in probes)]
        texts = [self._text(p[len(head) :]) for p in probes]
        left = texts[0][: min(_common(texts[0], t) for t in texts)].rstrip(" ")
        return (*head, *self._plain(left))

    def _with_head(self, head: tuple[int, ...], ids: tuple[int, ...]) -> tuple[int, ...]:
        """`ids` with the tokens `head` at its beginning, spelled as the same text; `ids` where that cannot be."""
        same = _common(head, ids)
        missing = self._text(head[same:])
        for end in range(same, len(ids) + 1):
            melted = self._text(ids[same:end])
            whole = melted.rstrip("\ufffd")  # what the first bytes of a character are decoded to
            if not (whole.startswith(missing) or missing.startswith(whole)):
                break
            if len(missing) <= len(whole) == len(melted):
                respelled = (*head, *self._plain(melted[len(missing) :]))
                if self._text(respelled[same:]) == melted:
                    return (*respelled, *ids[end:])
        return ids

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else ()

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _apply_template(self, messages: list[Message]) -> tuple[int, ...]:
        clean = [m | {"content": m["content"].encode("utf-8", "replace").decode()} for m in messages]
        clean = [m for m in clean if m["role"] != "system" or m["content"]]
        if self._folds_system and clean[0]["role"] == "system":
            system, user, *rest = clean
            clean = [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]
        apply = partial(
            self.tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True, **self._template_kwargs
        )
        if self._sanitizes:  # transformers 5.20 and newer
            with suppress(ValueError):  # a Unigram model has the token in its vocabulary, and makes it of plain text
                return tuple(apply(clean, sanitize_control_tokens=True)["input_ids"])
        split = [m | {"content": self._control.sub(lambda t: "\u200b".join(t[0]), m["content"])} for m in clean]
        return tuple(apply(split)["input_ids"])

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """What a text could forge a turn with: special tokens, and added ones that the template writes (</think>)."""
        template = self.tokenizer.get_chat_template()
        added = [t for t in self.tokenizer.added_tokens_decoder.values() if t.special or t.content in template]
        longest_first = sorted((t.content for t in added if not t.content.isspace()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def check_template(self) -> None:
        """Whether the chat template takes a system prompt, or can do without. UserError when it takes neither.

        Some raise on a system message, some leave it out without a word.
        """
        problem: Exception = ValueError("it leaves the content out")
        for self._folds_system in (False, True):
            self._heads.clear()
            try:
                if len({self._apply_template(chat) for chat in _TRIALS}) == len(_TRIALS):
                    self.encode_chat(_TRIALS[0])
                    self.eos_ids |= self._end_of_turn()
                    return
            except Exception as error:  # a template is a program
                problem = error
        raise UserError(
            f"model.path: the chat template of {self.path} does not take a user message: {_first_line(problem)}"
        ) from problem

    def _end_of_turn(self) -> set[int]:
        """The special token that the template ends an answer with. Base models' configurations name another, and their
        answers would go on behind it."""
        answered = [[*_TRIALS[0], {"role": "assistant", "content": content}] for content in ("yes", "no")]
        try:
            one, other = (self._apply_template(chat)[::-1] for chat in answered)
        except Exception:  # a template may refuse to go on from an answer
            return set()
        if not (same := _common(one, other)) or one == other:
            return set()
        ends = one[same - 1]
        token = self.tokenizer.added_tokens_decoder.get(ends)
        return {ends} if token is not None and token.special else set()

    def room(self, messages: list[Message], max_new_tokens: int) -> int:
        """Tokens of the context left over when `messages` are answered at full length; negative: they do not fit."""
        return self.context - len(self.encode_chat(messages)) - max_new_tokens

    def decode(self, response_ids: tuple[int, ...]) -> str:
        """Text of a response, without its end token and without surrounding white space."""
        return self._text([i for i in response_ids if i not in self.eos_ids]).strip()

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale logits in ways the kernels do not know: refuse them instead of learning wrongly."""
        ids = torch.arange(8, device=self.device)[None] % self.config.vocab_size
        ours, theirs = self.logits(self.hidden(ids)[0]), self.lm(input_ids=ids).logits[0].float()
        tolerance = 1e-3 if self.lm.dtype == torch.float32 else 0.1
        if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())):
            raise UserError(
                f"model.path: {self.path} computes its logits in a way that is not hidden @ lm_head (+ bias, softcap); "
                "architectures such as Qwen3, Llama and Gemma work"
            )


def load_model(path: str, *, dtype: str = "float32", device: str = "auto", thinking: str = "default") -> Model:
    """Open a Hugging Face causal LM folder. Raises UserError when weights, tokenizer or chat template are missing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = model_folder(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # not a device, not built in, no driver, none of that number
        raise UserError(f"model.device = {device!r}: {_first_line(error)}; use auto or cpu") from None
    # the run has a progress display of its own, and the faults that loading reports are checked here
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder)
        # SDPA has no softcapped attention (Gemma 2): transformers refuses it there
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
        lm, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a broken folder makes transformers, safetensors and pickle raise
        raise UserError(f"model.path: {folder} cannot be loaded as a causal LM: {_first_line(error)}") from error
    if getattr(lm, "is_quantized", False):  # they get no gradient: the norms and the embedding alone would learn
        raise UserError(
            f"model.path: the weights of {folder} are quantized, and cannot be trained; use the model in bf16 or fp32"
        )
    if getattr(lm, "_hf_peft_config_loaded", False):  # in what is trained and not in `Model.weights`
        raise UserError(
            f"model.path: {folder} holds an adapter beside the model; merge it into the weights, or remove its "
            "adapter_config.json"
        )
    # transformers draws these at random
    if unfit := sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"]):
        raise UserError(
            f"model.path: the weights of {folder} do not fit its config.json: {len(unfit)} tensors are missing or of "
            f"another shape, e.g. {unfit[0]}"
        )
    if extra := sorted(found["unexpected_keys"]):  # no error: some folders hold more, for other uses
        warnings.warn(
            f"model.path: {folder} holds {len(extra)} tensors that its config.json has no place for, e.g. {extra[0]}: "
            "they are left out; if they belong to the model, its config.json is another model's",
            stacklevel=2,
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"model.path: {folder} has no tokenizer; save one there with tokenizer.save_pretrained(...)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise UserError(f"model.path: the tokenizer of {folder} cannot be loaded: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path: {folder} has no chat template; use an instruction-tuned model or add chat_template.jinja"
        )
    lm.to(device)
    fuse_layers(lm)
    if not all(bool(p.isfinite().all()) for p in lm.parameters()):
        raise UserError(f"model.path: the weights of {folder} are not all finite numbers")
    lm.eval()  # no dropout: the trained distribution must be the sampled one
    kwargs = {} if thinking == "default" else {"enable_thinking": thinking == "on"}
    model = Model(lm, tokenizer, str(folder), template_kwargs=kwargs)
    model.check_template()
    if kwargs:
        _check_thinking(model, thinking)
    return model


def _check_thinking(model: Model, thinking: str) -> None:
    """A template is not told apart from one that ignores a variable: the run would think, or not, as it did before."""
    write = partial(model.tokenizer.apply_chat_template, [_TRIALS[0][-1]], add_generation_prompt=True, tokenize=False)
    if write(enable_thinking=True) == write(enable_thinking=False):
        raise UserError(
            f"model.thinking = {thinking!r}: the chat template of {model.path} has no enable_thinking, so nothing "
            'would change; leave it at "default"'
        )


def fuse_layers(lm: Any) -> bool:
    """RMSNorm, RoPE and SwiGLU/GeGLU by Liger's kernels, where it is installed, knows the architecture and the model is
    on a GPU; the LM head stays as it is. Parameters and their names do not change. Returns whether it did.

    Raises UserError when the fused layers compute something else: Liger is made for some versions of transformers.
    """
    if lm.device.type != "cuda":
        return False
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
    except ImportError:
        return False
    if lm.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    before = _through_two_layers(lm)
    _apply_liger_kernel_to_instance(lm, cross_entropy=False, fused_linear_cross_entropy=False)
    after = _through_two_layers(lm)
    apart = float((after - before).norm() / before.norm())
    if not apart < (1e-4 if lm.dtype == torch.float32 else 0.05):
        raise UserError(
            f"model.path: with liger-kernel the hidden states of this {lm.config.model_type} are {apart:.2g} of their "
            "norm off; install a version made for this transformers, or uninstall it"
        )
    return True


@torch.no_grad()
def _through_two_layers(lm: Any) -> torch.Tensor:
    """Final hidden states of the model's first layers: through all 36 of a random Qwen3-8B what bf16 rounds away grows
    to 5 % of them (measured on an H100), through two it stays far below what another computation would change."""
    decoder = lm.base_model
    ids = torch.arange(32, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    layers = getattr(decoder, "layers", None)
    try:
        if layers is not None:
            decoder.layers = layers[:2]
        return cast(torch.Tensor, decoder(input_ids=ids).last_hidden_state.float())
    finally:
        if layers is not None:
            decoder.layers = layers


def model_folder(path: str) -> Path:
    """The folder that `model.path` names. UserError when it is none."""
    folder = Path(path or GLYPH_BASE)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {folder} is not a Hugging Face model folder (it has no config.json)")
    return folder


def on_device(x: torch.Tensor | np.ndarray | Sequence[Any], device: torch.device) -> torch.Tensor:
    """A tensor of host memory on `device`, without waiting for what a GPU still computes, as a plain copy does."""
    here = torch.as_tensor(x)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def whole(x: torch.Tensor) -> torch.Tensor:
    """A DTensor gathered from its ranks, which all ask for it; a plain tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
