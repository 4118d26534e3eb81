"""One tree of dataclasses: every field documented, defaults that run. `config.toml` of a run is this, written out.

Defaults are the paper's recipe (its appendix D, second-hand) and serve any real model; the preset `glyph` changes
what the embedded model needs and is the default while no `--model.path` is given.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import Field, TypeAdapter, ValidationError

from fst_fast.errors import UserError, quoted
from fst_fast.tasks import PUBLISHED
from fst_fast.tasks.jsonl import JsonlOptions
from fst_fast.tasks.mixture import drifts
from fst_fast.tasks.published import PublishedOptions

T = TypeVar("T")
Mode = Literal["fst", "rl", "gepa", "rl-then-gepa", "fst-distill"]
Recompute = Literal["off", "selective", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)
INSTRUCTIONS = 64  # cases of an evaluation's "retention", where the stream has glyph

# What a field may hold; the upper ends only catch slips of the keyboard, inf and nan.
Count = Annotated[int, Field(ge=1, le=10**9)]
Few = Annotated[int, Field(ge=1, le=10_000)]
Amount = Annotated[float, Field(ge=0, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Hugging Face folder of a causal LM with tokenizer and chat template; empty = the shipped glyph model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that are trained and sampled from."""
    thinking: Literal["default", "on", "off"] = "default"
    """Sets `enable_thinking` of the chat template, which must have one (Qwen3); default = as the template does."""
    device: str = "auto"
    """"auto" = cuda if present, else cpu; or any torch device."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["torch", "vllm"] = "torch"
    """Who samples: the embedded engine, on the trainer's own weights, or vLLM (needs the extra [vllm])."""
    problems: Count = 32
    """P: problems a step."""
    group_size: Annotated[int, Field(ge=2, le=10_000)] = 8
    """G: rollouts per problem, spread evenly over the population."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Sampling temperature; the behaviour log-probs and the loss use the same."""
    max_new_tokens: Count = 1024
    """Longest response; a longer one is cut and scored as it stands."""
    max_batch: Count = 256
    """Sequences the engine decodes together."""
    lookahead: Annotated[int, Field(ge=0, le=1)] = 0
    """1: while a step's last responses are sampled, the next step's requests fill the engine; the tokens they have by
    then are one version old, and the new weights sample the rest. For GPUs and long responses. Nothing is asked ahead
    over a GEPA cycle, a checkpoint, an evaluation or the end of a stage, and nothing is sampled while weights train:
    the engine sleeps then."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the GPU that vLLM takes for its copy of the weights and its KV cache, while it samples: it gives them
    back for every training step."""
    max_mismatch: Amount = 0.0
    """Largest mean |Δ log p| between the engine and the trainer, over a step's tokens that the present weights sampled;
    above it the run stops. 0 = .001 in float32, .1 in bfloat16, which rounding alone does not reach."""


@dataclass(frozen=True)
class FastConfig:
    population: Few = 4
    """K: prompts that share the rollouts of a group."""
    every: Few = 6
    """T: steps between two GEPA cycles."""
    proposals: Few = 8
    """Children GEPA proposes a cycle. Mode gepa adds what the rollouts of the steps that it does not take would pay
    for; rl-then-gepa proposes all of them after its last step."""
    first_proposals: Few = 24
    """The same for the first cycle of a run or of a stage, where everything has to be found."""
    parallel: Few = 8
    """Proposals made and evaluated at once."""
    minibatch: Count = 3
    """Problems a proposal is reflected and accepted on."""
    scoring_problems: Count = 192
    """Problems of the next T batches on which prompts are scored, or all of them if fewer."""
    race: bool = True
    """Score prompts on a quarter, on half, on all of these problems; those that fall behind drop out on the way."""
    filler: bool = False
    """Mode fst: a GEPA cycle runs beside the T steps before it, one call a step, in the room that the steps' responses
    leave, and an endpoint edits meanwhile; its prompts are found with weights up to T steps old. Only the first cycle
    of a stage is waited for. For GPUs and long responses, where each of a cycle's calls takes as long as its longest
    response."""
    reuse: bool = True
    """Mode fst: rollouts that scored the population fill part of the same problems' groups."""
    reuse_cap: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Largest part of a group that is reused."""
    pool: Few = 10
    """Prompts carried from cycle to cycle, chosen by greedy coverage; the first K of them are the population."""
    newly_solved: Count = 2
    """A child that does not raise its minibatch's sum is accepted too if it newly solves this many problems."""
    route: Literal["spread", "slice"] = "spread"
    """Mode fst: a problem's rollouts are spread over the population, or all go to the prompt that scored best on the
    other problems of its slice (over those that tie)."""
    failed_first: bool = False
    """Mode fst: problems whose whole group failed since the last cycle come first into GEPA's minibatches; the weights
    learn nothing from them."""
    reflector: Literal["openai", "policy", "phrasebook"] = "policy"
    """Who rewrites prompts: an OpenAI-compatible endpoint, the frozen base model, or the offline rule-based editor
    (also as plain --reflector)."""
    at_switch: Literal["keep", "reset"] = "keep"
    """What happens to the prompts when the stream switches task: carried on, or reset to the new task's seed prompt."""
    max_prompt_chars: Count = 8000
    """A proposed prompt longer than this is refused."""


@dataclass(frozen=True)
class ReflectorConfig:
    base_url: str = ""
    """OpenAI-compatible endpoint; empty = the openai client's own default (OPENAI_BASE_URL)."""
    model: str = "gpt-5.2"
    """Model name sent to the endpoint (the paper's reflection LM)."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    timeout: Positive = 120.0
    """Seconds one call may take."""
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    """Retries with back-off on timeouts, rate limits and server errors."""
    concurrency: Few = 8
    """Calls under way at once."""
    max_new_tokens: Count = 2048
    """Longest answer asked for."""
    price_in: Amount = 1.25
    """Dollars per million prompt tokens, for the run's accounting: gpt-5.2's; 0 for a server of your own."""
    price_out: Amount = 10.0
    """Dollars per million completion tokens."""
    max_trace_chars: Count = 4000
    """Longer responses are cut in the middle of a trace, with a mark."""


@dataclass(frozen=True)
class SlowConfig:
    loss: Literal["cispo", "ppo", "reinforce"] = "cispo"
    """Policy loss; only the coefficient per token differs."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """AdamW learning rate after warm-up."""
    warmup: Annotated[int, Field(ge=0, le=10**9)] = 10
    """Optimizer steps of linear warm-up."""
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Amount = 0.0
    clip: Positive = 1.0
    """Largest global gradient norm."""
    minibatches: Count = 1
    """Optimizer steps a batch, whole groups each."""
    micro_tokens: Count = 16384
    """Tokens of one forward and backward pass, padding included: bounds memory, does not change the gradient."""
    pack: Literal["auto", "on", "off"] = "auto"
    """Run rollouts through the model as one token trie, shared prefixes once: the same gradient, for fewer tokens.
    auto = where the model's attention allows it (no windows, no softcap)."""
    weight_max: Positive = 4.0
    """Tau: upper cap of the importance ratio itself (1 + eps_high)."""
    clip_low: Decay = 0.2
    clip_high: Amount = 0.2
    """PPO's clip range, for loss = ppo only."""
    average: Literal["problem", "batch"] = "problem"
    """Token losses averaged over each problem's group, then over problems (the paper's Eq. 4); or over all tokens."""
    baseline: Literal["mean", "leave-one-out"] = "mean"
    """Group baseline of the advantage."""
    kl_coef: Amount = 0.001
    """Coefficient of the exact KL to the base model; 0 skips the base model's forward pass."""
    entropy_coef: Amount = 0.0
    """Coefficient of the entropy bonus."""
    recompute: Recompute = "off"
    """Activation checkpointing: what a layer computed is kept for the backward pass (off), its matrix products and
    attention are (selective), or only its input is and all else is computed again (full)."""
    lora_rank: Annotated[int, Field(ge=0, le=4096)] = 0
    """0 = all weights are trained; else low-rank updates of the blocks' linear layers alone (LoRA, needs the extra
    [lora]). Engines and exported models have them added in. Wants a larger slow.lr."""
    offload: bool = False
    """Masters and optimizer state in host memory; sharded runs on GPUs only (a single GPU counts: --ranks 1)."""


@dataclass(frozen=True)
class EvalConfig:
    every: Count = 10
    """Steps between evaluations; also before the first and after the last step of each stage."""
    problems: Count = 64
    """Held-out problems, or all there are if fewer."""
    samples: Few = 4
    """k of mean@k, at the training temperature."""
    levels: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.5, 0.9)
    """Rewards for which steps, rollouts and tokens to reach them are reported."""
    ood: str = ""
    """A task that is not trained on, e.g. codeio-ood:SOURCE, or jsonl:FILE (all of it): evaluated too, under its seed
    prompt, no evolved one."""


@dataclass(frozen=True)
class Config:
    mode: Mode = "fst"
    """Which channels learn: fst, rl, gepa, rl-then-gepa, fst-distill."""
    stream: str = "glyph:A@60,glyph:B@60"
    """Stages TASK@STEPS in order: glyph:A, glyph:A/B (sliced), star_graph:4x3, jsonl:FILE, codeio:SOURCE, math:SOURCE,
    hover:SOURCE, physics:SOURCE (published data: a file, a folder or a Hugging Face dataset). Within a stage, without
    labels: glyph:A+glyph:B draws each problem from one of them, glyph:A>glyph:B shifts gradually from one to the other,
    glyph:A>>glyph:B switches halfway; in a mixture eval.problems are those of each task."""
    run_dir: str = ""
    """Where the run is written; empty = runs/<mode>-<date>-<time>."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """One seed; every purpose draws from a stream of its own derived from it."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Torch CPU threads; 0 = all cores. Bits are reproducible for the same number."""
    checkpoint_every: Count = 10
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Checkpoints kept."""
    wandb: bool = False
    """Log to Weights & Biases too (needs the extra [wandb])."""
    tensorboard: bool = True
    """Log for TensorBoard."""
    progress: bool = True
    """Live progress on the terminal."""
    price_per_gpu_hour: Amount = 0.0
    """Dollars an hour of one GPU, for the run's accounting; 0 = unknown (a plan takes an assumed one)."""
    peak_tflops: Amount = 0.0
    """Peak dense TFLOP/s of one device in the weights' dtype, for MFU; 0 = the data sheet's bf16, none on a CPU."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    reflector: ReflectorConfig = field(default_factory=ReflectorConfig)
    slow: SlowConfig = field(default_factory=SlowConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    jsonl: JsonlOptions = field(default_factory=JsonlOptions)
    data: PublishedOptions = field(default_factory=PublishedOptions)


@dataclass(frozen=True)
class Stage:
    """`steps` steps on the task named `task`, from step `start` of the run."""

    index: int
    task: str
    start: int
    steps: int

    @property
    def end(self) -> int:
        return self.start + self.steps

    def place(self, step: int) -> float:
        """Where in the stage the run's step `step` (from 0) is: 0 = its first step, 1 = its last, or after it."""
        return min(1.0, (step - self.start) / max(1, self.steps - 1))


def stages(stream: str) -> list[Stage]:
    """Parses --stream: TASK@STEPS, comma-separated."""
    out: list[Stage] = []
    for part in stream.split(","):
        task, _, steps = part.strip().rpartition("@")
        if not (task and steps.isdecimal() and len(steps) < 10 and int(steps) > 0):
            raise UserError(
                f"stream: {quoted(part.strip(), 200)} is not TASK@STEPS with 1 to 10^9 - 1 steps, e.g. glyph:A@60"
            )
        out.append(Stage(len(out), task, out[-1].end if out else 0, int(steps)))
    return out


def lengthened(config: Config, stream: str) -> Config:
    """`config` of a run that is to go on with `stream`: its own with more steps of the last task, more tasks behind
    it, or both. Raises UserError for any other."""
    old, new = stages(config.stream), stages(stream)
    last = old[-1]
    at_most = [replace(s, steps=min(s.steps, last.steps)) if s.index == last.index else s for s in new]
    if at_most[: len(old)] != old:
        raise UserError(
            f"stream = {quoted(stream, 200)}: a run goes on with more steps of its last task, or more tasks behind it, "
            f"and this one had {quoted(config.stream, 200)}"
        )
    if drifts(last.task) and new[last.index] != last:
        raise UserError(
            f"stream: {quoted(last.task, 200)} changes over the {last.steps} steps it was given; add a task behind it"
        )
    if config.mode == "rl-then-gepa" and new != old:
        raise UserError("stream: rl-then-gepa cannot go on: its prompts are evolved for the weights of its last step")
    return replace(config, stream=stream)


# The embedded run, as measured: P 16, G 8, 2 minibatches, T 10, minibatch 8, 24 scored problems, pool 10.
GLYPH = Config(
    # A GPU gains nothing: on an H100 a decoded token waited 2 ms a layer for launches alone (benchmarks/README.md).
    model=ModelConfig(device="cpu"),
    rollout=RolloutConfig(problems=16, max_new_tokens=20),
    fast=FastConfig(every=10, minibatch=8, scoring_problems=24, reflector="phrasebook"),
    slow=SlowConfig(lr=3e-4, beta2=0.99, warmup=0, minibatches=2, kl_coef=0.0, pack="off"),
    eval=EvalConfig(samples=2),
    # Two threads make a step 1.6 times as fast on a quiet machine and many times as slow on a busy one, where they spin
    # waiting for each other; one thread a run lets `compare` use the cores side by side.
    threads=1,
)

# The paper's recipe for Qwen3-8B on a node of eight GPUs. "paper": in the paper itself or its announcement;
# "second-hand": its appendix D as another implementation's documentation gives it; "ours": chosen here.
QWEN3_8B = Config(
    model=ModelConfig(dtype="bfloat16"),  # ours; fp32 masters, moments and reduction
    rollout=RolloutConfig(
        engine="vllm",  # ours
        problems=32,  # second-hand
        group_size=8,  # paper
        temperature=1.0,  # ours: the losses' ratios are of the distribution really sampled from
        gpu_memory=0.4,  # ours: what --plan says fits
    ),
    fast=FastConfig(
        population=4,  # paper
        every=6,  # paper
        minibatch=3,  # second-hand
        scoring_problems=192,  # second-hand: the problems of the next T batches
        proposals=8,  # ours, with racing: a fraction of the 960 evaluations a cycle, second-hand
        first_proposals=24,  # ours
        reflector="openai",  # paper: another, stronger model
    ),
    reflector=ReflectorConfig(model="gpt-5.2"),  # paper; its prices are ours to keep up to date
    slow=SlowConfig(
        loss="cispo",  # paper
        weight_max=4.0,  # second-hand
        average="problem",  # paper, Eq. 4
        lr=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, warmup=10, minibatches=1,  # second-hand
        kl_coef=0.001,  # second-hand
        clip=1.0,  # ours
        pack="auto",  # ours: exact
        micro_tokens=16384, recompute="full",  # ours: what --plan says fits 80 GB
    ),
    eval=EvalConfig(every=20, samples=4),  # mean@4: paper; how often: ours
    checkpoint_every=20,  # ours
)  # fmt: skip
# 200 steps a stage: paper. Longest response: ours, the paper's is not known here.
QWEN3_8B_TASKS = {
    "codeio": ("codeio:hkust-nlp/CodeIO-PyEdu-Reasoning-Raw@200", 4096),
    "hover": ("hover:hover-nlp/hover@200", 2048),
    "math": ("math:POLARIS-Project/Polaris-Dataset-53K@200", 8192),
}
PRESETS = {"glyph": GLYPH, "paper": Config()}
PRESETS |= {
    f"qwen3-8b-{task}": replace(QWEN3_8B, stream=stream, rollout=replace(QWEN3_8B.rollout, max_new_tokens=longest))
    for task, (stream, longest) in QWEN3_8B_TASKS.items()
}


def preset(name: str, mode: Mode) -> Config:
    """The defaults a run starts from. On glyph RL alone learns best at a larger rate (measured)."""
    config = replace(PRESETS[name], mode=mode)
    if name == "glyph" and mode in ("rl", "rl-then-gepa"):
        config = replace(config, slow=replace(config.slow, lr=5e-4))
    return config


def check(config: Config) -> None:
    """Reject what cannot work, before any work. Raises UserError."""
    validated(Config, asdict(config))
    size, k = config.rollout.group_size, config.fast.population
    if config.mode == "fst" and size % k:
        fitting = [d for d in range(1, size + 1) if size % d == 0]
        raise UserError(
            f"rollout.group_size = {size} cannot be spread evenly over fast.population = {k} prompts; "
            f"use a population of {' or '.join(map(str, fitting))}, or a group size divisible by {k}"
        )
    if config.slow.minibatches > config.rollout.problems:
        raise UserError(
            f"slow.minibatches = {config.slow.minibatches}: a minibatch is whole groups, and there are only "
            f"rollout.problems = {config.rollout.problems}"
        )
    if config.rollout.lookahead and config.mode == "fst-distill":
        raise UserError(
            "rollout.lookahead = 1: distillation corrects nothing for rollouts by older weights; use 0 with fst-distill"
        )
    if config.fast.filler and config.mode == "fst" and config.fast.every == 1:
        raise UserError("fast.filler = True: a cycle beside the steps before it needs fast.every of 2 or more")
    stages(config.stream)


def without_effect(config: Config) -> list[str]:
    """Sections of settings that were changed and that no task of the run reads."""
    readers = {"jsonl": ["jsonl"], "data": [*PUBLISHED]}
    tasks, default = f"{config.stream},{config.eval.ood}", Config()
    return [
        section
        for section, names in readers.items()
        if getattr(config, section) != getattr(default, section)
        and not any(f"{name}{end}:" in tasks for name in names for end in ("", "-ood"))
    ]


def check_installed(config: Config) -> None:
    """Reject what this machine has not installed. Raises UserError."""
    if config.wandb and not find_spec("wandb"):
        raise UserError("wandb = True: it is not installed; pip install -e '.[wandb]', or leave it out")
    if config.slow.lora_rank and not find_spec("peft"):
        raise UserError(
            f"slow.lora_rank = {config.slow.lora_rank}: peft is not installed; pip install -e '.[lora]', or use 0"
        )
    if config.rollout.engine == "vllm" and not find_spec("vllm"):
        raise UserError(
            "rollout.engine: vllm is not installed; pip install -e '.[vllm]' on a GPU machine, or use torch"
        )


def pauses(config: Config) -> list[int]:
    """Every how many steps of a stage something comes before the next: a checkpoint, an evaluation, a GEPA cycle."""
    return [config.checkpoint_every, config.eval.every, *([config.fast.every] if evolves(config) else [])]


def evolves(config: Config) -> bool:
    """Whether GEPA cycles are interleaved with the steps."""
    return config.mode in ("fst", "gepa", "fst-distill")


def proposals_of(config: Config, *, first: bool) -> int:
    """Children GEPA proposes in a cycle; `first` of its run or stage."""
    fast = config.fast
    proposals = fast.first_proposals if first else fast.proposals
    if config.mode == "gepa":
        # the rollouts that the steps would take, at what a proposal costs: two minibatches, and a scoring for the third
        # of them that is accepted (measured on glyph)
        steps = fast.every * config.rollout.problems * config.rollout.group_size
        proposals += steps // (2 * fast.minibatch + fast.scoring_problems // 3)
    return proposals


def to_toml(config: Config) -> str:
    """The text of config.toml."""
    import tomli_w

    return tomli_w.dumps(asdict(config))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested settings by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def from_dict(data: dict[str, Any], default: Config, *, source: str) -> Config:
    """`default` with the fields of parsed TOML. Unknown fields and wrong types raise UserError naming them."""
    return validated(Config, _merge(asdict(default), data, source), prefix=f"{source}: ")


def validated(kind: type[T], data: dict[str, Any], *, prefix: str = "") -> T:
    """`kind(**data)`, deeply; UserError for the first field of a wrong type or out of its range."""
    for name, value in flat(data).items():
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{prefix}{name} = {quoted(value)}: is not valid UTF-8; use another name")
    try:
        # JSON mode: strict types, but a list may stand for a tuple
        return TypeAdapter(kind).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        said = first["msg"].replace("Input should be", "must be")
        raise UserError(f"{prefix}{name} = {first['input']!r}: {said}") from None


def _merge(base: dict[str, Any], given: dict[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    out = dict(base)
    for key, value in given.items():
        if key not in base:
            near = difflib.get_close_matches(key, base, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there is: {', '.join(base)}"
            raise UserError(f"{source}: unknown field {prefix}{key}; {hint}")
        if isinstance(base[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {prefix}{key} = {value!r}: must be a table")
            value = _merge(base[key], value, source, f"{prefix}{key}.")
        out[key] = value
    return out
