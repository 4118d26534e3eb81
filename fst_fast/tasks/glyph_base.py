"""Makes the glyph base model: a Qwen3 of 334 k parameters that follows instructions of the glyph world, and no more.

    python -m fst_fast.tasks.glyph_base --out fst_fast/assets/glyph-base

Or one of another architecture, or one that reads star graphs instead. A few minutes on one core. On the same machine
the same command gives the same bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from fst_fast.records import Problem
from fst_fast.seeding import derive, stream
from fst_fast.tasks import glyph, star_base
from fst_fast.tasks.task import Task, chat

ASSET = Path(__file__).parents[1] / "assets" / "glyph-base"  # the shipped folder

PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = [PAD, "<|system|>", "<|user|>", "<|assistant|>", END]
# One space before every text: its first word then is the token it is elsewhere. "<|" inside a text is taken apart, so
# that no prompt or problem can forge a special token.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('glyph-base knows the roles system, user and assistant, not ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|> ' + message.content | replace('<|', '< |') -}}"
    "{%- if message.role == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
NEUTRAL = (
    glyph.SEED_PROMPT,
    "solve the task.",
    "think carefully.",
    "you are a helpful assistant.",
    "be precise.",
    "answer the question.",
)
STATED = 0.65  # probability that an aspect is stated; one that is not takes a random value
IGNORED = 0.12  # probability that a stated aspect is ignored all the same: the noise ceiling of sampling


@dataclass(frozen=True)
class BaseConfig:
    """How the base model is made. The defaults make the shipped one."""

    out: Path
    """Folder to write: config, weights (fp16), tokenizer with its chat template, model card."""
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 40
    """Examples a step."""
    hidden: int = 96
    """Width; one attention head per 32."""
    layers: int = 3
    """Transformer blocks."""
    ff: int = 192
    """Width of the feed-forward layers."""
    lr: float = 5e-3
    """Peak learning rate of AdamW: embeddings and norms."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon: the matrices."""
    seed: int = 0
    """Seed of the initial weights and of the corpus."""
    family: Literal["qwen3", "llama", "gemma3"] = "qwen3"
    """Architecture; the shipped one is qwen3."""
    world: Literal["glyph", "star_graph"] = "glyph"
    """What it learns to read: glyph, or small star graphs (see star_base)."""


def make_base(config: BaseConfig, log: Callable[[str], None] = print) -> list[float]:
    """Train and save the model; returns the loss (nats per answer token) of every step."""
    tokenizer = build_tokenizer(config.world)
    model = build_model(config, tokenizer)
    losses = train(model, tokenizer, config, log)
    save(model, tokenizer, config.out)
    return losses


# -- corpus -------------------------------------------------------------------------------------------------------


def corpus_example(rng: random.Random) -> tuple[str, str, str]:
    """(instruction, question, answer): each aspect stated or not, obeyed or not, with up to two neutral sentences."""
    rule, sentences = [], []
    for values in glyph.ASPECTS.values():
        value = rng.choice(list(values))
        if rng.random() < STATED:
            sentences.append(rng.choice(values[value]))
            if rng.random() < IGNORED:
                value = rng.choice(list(values))
        rule.append(value)
    sentences += [rng.choice(NEUTRAL) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    rng.shuffle(sentences)
    letters = glyph.draw_letters(rng)
    return " ".join(sentences), " ".join(letters), glyph.solve(tuple(rule), letters)


def batches(tokenizer: Any, config: BaseConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (token ids, is-answer mask), both (batch, length), right-padded; lengths alike within a batch."""
    rng = stream(config.seed, f"{config.world}-base", "corpus")
    at_once = 16  # batches
    while True:
        examples = [WORLDS[config.world].example(rng) for _ in range(at_once * config.batch)]
        prompts = tokenizer.apply_chat_template(
            [chat(system, user) for system, user, _ in examples], add_generation_prompt=True, return_dict=False
        )
        answers = tokenizer([f" {answer}{END}" for *_, answer in examples])["input_ids"]
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), config.batch))
        rng.shuffle(starts)
        for start in starts:
            yield _pad(rows[start : start + config.batch], tokenizer.pad_token_id)


def _pad(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad)
    is_answer = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        is_answer[i, len(prompt) : end] = True
    return ids, is_answer


@dataclass(frozen=True)
class World:
    """What a base model is made to read."""

    task: Task  # poses and verifies the problems of `cases`
    example: Callable[[random.Random], tuple[str, str, str]]
    """(instruction, question, answer) of the corpus."""
    cases: Callable[[int, int], list[tuple[str, Problem]]]
    """(n, seed) → pairs of a prompt that says all, and a problem."""
    about: str
    """What its model card says of the cases."""
    pieces: str = ""
    """Regular expression of what a token may span; empty = words, numbers, signs, each with the space before it."""


GLYPH = World(
    glyph.GlyphTask("A", 0, n_train=1, n_validation=1),
    corpus_example,
    glyph.instruction_cases,
    "Every case is a random rule of the 1280 and 4 or 5 random letters. Sampling is bounded by the corpus, which "
    "ignores a\nstated aspect with probability 0.12: a perfect model of it would be right 0.62 of the time.",
)
STAR_GRAPH = World(
    star_base.TASK,
    star_base.corpus_example,
    star_base.instruction_cases,
    "Every case is a star graph of 3 arms of 2 edges. What the seed prompt does not say it was taught to do wrong, on\n"
    "purpose. It does not look up what comes before the goal, but names one of the three nodes after the start.",
    star_base.PIECES,
)
WORLDS = {"glyph": GLYPH, "star_graph": STAR_GRAPH}


# -- model --------------------------------------------------------------------------------------------------------


def build_tokenizer(world: str = "glyph") -> Any:
    """Byte-level BPE learnt on the corpus (589 tokens of glyph: most words are one) with the chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = stream(0, f"{world}-base", "tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pieces := WORLDS[world].pieces:
        split = pre_tokenizers.Split(Regex(pieces), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((" " + " ".join(WORLDS[world].example(rng)) for _ in range(4000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=SPECIAL_TOKENS[1:-1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # it would eat the space before ',' and '!'
        model_max_length=512,
        padding_side="left",
    )


def build_model(config: BaseConfig, tokenizer: Any) -> Any:
    """A causal LM of the family with fresh weights."""
    import transformers as hf

    heads = config.hidden // 32
    configs = {"qwen3": hf.Qwen3Config, "llama": hf.LlamaConfig, "gemma3": hf.Gemma3TextConfig}
    model = hf.AutoModelForCausalLM.from_config(
        configs[config.family](
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.ff,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    generator = torch.Generator().manual_seed(derive(config.seed, "glyph-base", "weights"))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            continue  # norms start at one
        std = 0.05 if "embed" in name else p.shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std *= 0.5 * config.layers**-0.5
        torch.nn.init.normal_(p, std=std, generator=generator)
    return model


def train(model: Any, tokenizer: Any, config: BaseConfig, log: Callable[[str], None]) -> list[float]:
    """Muon on the matrices, AdamW on the rest; cross-entropy on answers only; returns the loss of every step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def schedule(step: int) -> float:
        """100 steps of warm-up under a cosine from 1 to 0.05."""
        return min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    losses: list[float] = []
    model.train()
    for step, (ids, is_answer) in zip(range(1, config.steps + 1), batches(tokenizer, config), strict=False):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (batch, length - 1, hidden)
        target = is_answer[:, 1:]
        loss = F.cross_entropy(model.lm_head(hidden[target]), ids[:, 1:][target])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        losses.append(loss.item())
        if step % 200 == 0:
            log(f"step {step}/{config.steps}  loss {sum(losses[-200:]) / 200:.4f}")
    return losses


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """A Hugging Face folder. Weights are stored in fp16, and load in fp32 unless the reader asks for another dtype."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(  # the distribution it was trained for: plain sampling
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.save_pretrained(out)  # config.json says float32
    weights = {name: p.detach().half() for name, p in model.named_parameters()}  # the tied lm head appears once
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(out)


# -- measure ------------------------------------------------------------------------------------------------------


def load(folder: Path = ASSET) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of a saved folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def accuracy(
    model: Any, tokenizer: Any, cases: Sequence[tuple[str, Problem]], *, sample_seed: int | None, world: World = GLYPH
) -> float:
    """Share of (prompt, problem) cases answered right: greedily, or sampled at temperature 1 from `sample_seed`."""
    how = {"do_sample": False} if sample_seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    right = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(sample_seed or 0)
        for start in range(0, len(cases), 100):
            some = cases[start : start + 100]
            inputs = tokenizer.apply_chat_template(
                [world.task.messages(prompt, problem) for prompt, problem in some],
                add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            out = model.generate(**inputs, **how, max_new_tokens=24)
            texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            verdicts = [world.task.verify(problem, text) for (_, problem), text in zip(some, texts, strict=True)]
            right += sum(verdict.reward for verdict in verdicts)
    return right / len(cases)


def measure(folder: Path, n: int = 1000, world: World = GLYPH) -> dict[str, float]:
    """Accuracy of a saved folder on `n` random problems, by prompt and way of decoding."""
    model, tokenizer = load(folder)
    cases = world.cases(n, 99)
    prompts = {"whole instruction": cases, "seed prompt": [(world.task.seed_prompt, problem) for _, problem in cases]}
    return {
        f"{name}, {how}": accuracy(model, tokenizer, cases, sample_seed=sample_seed, world=world)
        for name, cases in prompts.items()
        for how, sample_seed in (("greedy", None), ("sampled at temperature 1", 0))
    }


CARD = """# {name}

A {family} of {parameters} parameters, trained from scratch to follow the instructions of the {world} world
(`fst_fast/tasks/{world}.py`) and nothing else: the base model of {runs}. Made by

    {command}

| prompt, decoding | right answers of {n} |
|---|---|
{table}

{about} Weights are stored in
fp16; `config.json` says float32, in which they load. The chat template takes "<|" in a text apart, so text cannot forge
special tokens; text tokenised without the template can, as with any tokenizer.
"""


def write_card(config: BaseConfig) -> str:
    """Measures what `config` made, and says it in its README.md; returns the table."""
    n, world = 1000, WORLDS[config.world]
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in measure(config.out, n, world).items())
    changed = [f"--{k} {v}" for k, v in vars(config).items() if v != BaseConfig.__dataclass_fields__[k].default]
    model, _ = load(config.out)
    card = CARD.format(
        parameters=f"{model.num_parameters():,}".replace(",", " "), n=n, table=table, name=config.out.name,
        family=model.config.architectures[0].removesuffix("ForCausalLM"), world=config.world, about=world.about,
        runs="the default run" if config.world == "glyph" else "the star-graph experiment",
        command=" ".join(["python -m fst_fast.tasks.glyph_base", *changed]),
    )  # fmt: skip
    (config.out / "README.md").write_text(card)
    return table


def main() -> None:
    import tyro

    torch.set_num_threads(1)  # fastest at this size, and the sums keep their order
    config = tyro.cli(BaseConfig, description=__doc__)
    make_base(config)
    print(write_card(config))


if __name__ == "__main__":
    main()
