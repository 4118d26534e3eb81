"""One tree of dataclasses: every field documented, defaults that run. `config.toml` of a run is this, written out.

Defaults are the paper's recipe (fst.md, appendix D, second-hand) and serve any real model; the preset `glyph` changes
what the embedded model needs and is the default while no `--model.path` is given.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fst_fast.errors import UserError
from fst_fast.tasks.jsonl import JsonlOptions

Mode = Literal["fst", "rl", "gepa", "rl-then-gepa", "fst-distill"]
MODES: tuple[Mode, ...] = ("fst", "rl", "gepa", "rl-then-gepa", "fst-distill")


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Hugging Face folder of a causal LM with tokenizer and chat template; empty = the shipped glyph model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that are trained and sampled from."""
    device: str = "auto"
    """"auto" = cuda if present, else cpu; or any torch device."""


@dataclass(frozen=True)
class RolloutConfig:
    problems: int = 32
    """P: problems a step."""
    group_size: int = 8
    """G: rollouts per problem, spread evenly over the population."""
    temperature: float = 1.0
    """Sampling temperature; the behaviour log-probs and the loss use the same."""
    max_new_tokens: int = 1024
    """Longest response; a longer one is cut and scored as it stands."""
    max_batch: int = 256
    """Sequences the embedded engine decodes together."""


@dataclass(frozen=True)
class FastConfig:
    population: int = 4
    """K: prompts that share the rollouts of a group."""
    every: int = 6
    """T: steps between two GEPA cycles."""
    proposals: int = 8
    """Children GEPA proposes a cycle."""
    first_proposals: int = 24
    """The same for the first cycle of a run or of a stage, where everything has to be found."""
    parallel: int = 8
    """Proposals made and evaluated at once."""
    minibatch: int = 3
    """Problems a proposal is reflected and accepted on."""
    scoring_problems: int = 192
    """Problems of the next T batches on which prompts are scored (at most T x P: the lookahead)."""
    pool: int = 10
    """Prompts carried from cycle to cycle, chosen by greedy coverage; the first K of them are the population."""
    newly_solved: int = 2
    """A child that does not raise its minibatch's sum is accepted too if it newly solves this many problems."""
    reflector: Literal["openai", "policy", "phrasebook"] = "policy"
    """Who rewrites prompts: an OpenAI-compatible endpoint, the frozen base model, or the offline rule-based editor."""
    at_switch: Literal["keep", "reset"] = "keep"
    """What happens to the prompts when the stream switches task: carried on, or reset to the new task's seed prompt."""
    max_prompt_chars: int = 8000
    """A proposed prompt longer than this is refused."""


@dataclass(frozen=True)
class ReflectorConfig:
    base_url: str = ""
    """OpenAI-compatible endpoint; empty = the openai client's own default (OPENAI_BASE_URL)."""
    model: str = "gpt-5.2"
    """Model name sent to the endpoint (the paper's reflection LM)."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    timeout: float = 120.0
    """Seconds one call may take."""
    retries: int = 3
    """Retries with back-off on timeouts, rate limits and server errors."""
    concurrency: int = 8
    """Calls under way at once."""
    max_new_tokens: int = 2048
    """Longest answer asked for."""
    price_in: float = 1.25
    """Dollars per million prompt tokens, for the run's accounting."""
    price_out: float = 10.0
    """Dollars per million completion tokens."""
    max_trace_chars: int = 4000
    """Longer responses are cut in the middle of a trace, with a mark."""


@dataclass(frozen=True)
class SlowConfig:
    loss: Literal["cispo", "ppo", "reinforce"] = "cispo"
    """Policy loss; only the coefficient per token differs."""
    lr: float = 1e-6
    """AdamW learning rate after warm-up."""
    warmup: int = 10
    """Optimizer steps of linear warm-up."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global gradient norm."""
    minibatches: int = 1
    """Optimizer steps a batch, whole groups each."""
    micro_tokens: int = 16384
    """Padded tokens of one forward and backward pass: bounds memory, does not change the gradient."""
    weight_max: float = 4.0
    """Tau: upper cap of the importance ratio itself (1 + eps_high)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """PPO's clip range, for loss = ppo only."""
    average: Literal["problem", "batch"] = "problem"
    """Token losses averaged over each problem's group, then over problems (the paper's Eq. 4); or over all tokens."""
    baseline: Literal["mean", "leave-one-out"] = "mean"
    """Group baseline of the advantage."""
    kl_coef: float = 0.001
    """Coefficient of the exact KL to the base model; 0 skips the base model's forward pass."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10
    """Steps between evaluations; also before the first and after the last step of each stage."""
    problems: int = 64
    """Held-out problems."""
    samples: int = 4
    """k of mean@k, at the training temperature."""
    levels: tuple[float, ...] = (0.5, 0.9)
    """Rewards for which steps, rollouts and tokens to reach them are reported."""


@dataclass(frozen=True)
class Config:
    mode: Mode = "fst"
    """Which channels learn: fst, rl, gepa, rl-then-gepa, fst-distill."""
    stream: str = "glyph:A@60,glyph:B@60"
    """Stages TASK@STEPS in order: glyph:A, glyph:A/B (sliced), star_graph:4x3, jsonl:FILE."""
    run_dir: str = ""
    """Where the run is written; empty = runs/<mode>-<date>-<time>."""
    seed: int = 0
    """One seed; every purpose draws from a stream of its own derived from it."""
    threads: int = 0
    """Torch CPU threads; 0 = all cores. Bits are reproducible for the same number."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    wandb: bool = False
    """Log to Weights & Biases too (needs the extra [wandb])."""
    tensorboard: bool = True
    """Log for TensorBoard."""
    progress: bool = True
    """Live progress on the terminal."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    reflector: ReflectorConfig = field(default_factory=ReflectorConfig)
    slow: SlowConfig = field(default_factory=SlowConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    jsonl: JsonlOptions = field(default_factory=JsonlOptions)


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


def stages(stream: str) -> list[Stage]:
    """Parses --stream: TASK@STEPS, comma-separated."""
    out: list[Stage] = []
    for part in stream.split(","):
        task, _, steps = part.strip().rpartition("@")
        if not (task and steps.isdecimal() and int(steps) > 0):
            raise UserError(
                f"stream: {part.strip()!r} is not TASK@STEPS with a positive number of steps, e.g. glyph:A@60"
            )
        out.append(Stage(len(out), task, out[-1].end if out else 0, int(steps)))
    return out


# The embedded run as measured in embedded.md: P 16, G 8, 2 minibatches, T 10, minibatch 8, 24 scored problems, pool 10.
GLYPH = Config(
    rollout=RolloutConfig(problems=16, max_new_tokens=20),
    fast=FastConfig(every=10, minibatch=8, scoring_problems=24, reflector="phrasebook"),
    slow=SlowConfig(lr=3e-4, beta2=0.99, warmup=0, minibatches=2, kl_coef=0.0),
    eval=EvalConfig(samples=2),
    threads=1,  # a second thread makes a model this small slower (benchmarked), and leaves a core for another run
)
PRESETS = {"glyph": GLYPH, "paper": Config()}


def preset(name: str, mode: Mode) -> Config:
    """The defaults a run starts from. On glyph RL alone learns best at a larger rate (measured, embedded.md)."""
    config = replace(PRESETS[name], mode=mode)
    if name == "glyph" and mode in ("rl", "rl-then-gepa"):
        config = replace(config, slow=replace(config.slow, lr=5e-4))
    return config


def check(config: Config) -> None:
    """Reject what cannot work, before any work. Raises UserError."""
    at_least_one = {
        "rollout.problems": config.rollout.problems,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "rollout.max_batch": config.rollout.max_batch,
        "fast.population": config.fast.population,
        "fast.every": config.fast.every,
        "fast.proposals": config.fast.proposals,
        "fast.first_proposals": config.fast.first_proposals,
        "fast.parallel": config.fast.parallel,
        "fast.minibatch": config.fast.minibatch,
        "fast.scoring_problems": config.fast.scoring_problems,
        "fast.pool": config.fast.pool,
        "slow.minibatches": config.slow.minibatches,
        "slow.micro_tokens": config.slow.micro_tokens,
        "eval.every": config.eval.every,
        "eval.problems": config.eval.problems,
        "eval.samples": config.eval.samples,
        "checkpoint_every": config.checkpoint_every,
        "keep_checkpoints": config.keep_checkpoints,
    }
    for name, number in at_least_one.items():
        if number < 1:
            raise UserError(f"{name} = {number}: must be at least 1")
    positive = {
        "rollout.temperature": config.rollout.temperature,
        "slow.lr": config.slow.lr,
        "slow.clip": config.slow.clip,
        "slow.weight_max": config.slow.weight_max,
        "reflector.timeout": config.reflector.timeout,
    }
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{name} = {value}: must be a positive number")
    size, k = config.rollout.group_size, config.fast.population
    if size < 2:
        raise UserError(f"rollout.group_size = {size}: an advantage needs at least 2 rollouts of a problem")
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
    if config.fast.scoring_problems > (ahead := config.fast.every * config.rollout.problems):
        raise UserError(
            f"fast.scoring_problems = {config.fast.scoring_problems}: the next fast.every x rollout.problems = "
            f"{config.fast.every} x {config.rollout.problems} batches hold {ahead}; use at most that"
        )
    stages(config.stream)


def to_toml(config: Config) -> str:
    """The text of config.toml."""
    import tomli_w

    return tomli_w.dumps(asdict(config))


def from_dict(data: dict[str, Any], default: Config, *, source: str) -> Config:
    """`default` with the fields of parsed TOML. Unknown fields and wrong types raise UserError naming them."""
    from pydantic import TypeAdapter, ValidationError

    merged = _merge(asdict(default), data, source)
    try:
        # JSON mode: strict types, but a list may stand for a tuple
        return TypeAdapter(Config).validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{source}: {name} = {first['input']!r}: {first['msg']}") from None
    except TypeError as error:  # dates are TOML, not JSON
        raise UserError(f"{source}: {error}") from None


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
