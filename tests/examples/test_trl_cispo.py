"""FusedCispoTrainer against TRL's own GRPOTrainer: the same batch, the same weights; and a few steps of training."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import save_tiny

trl = pytest.importorskip("trl", reason="trl is not installed")
import peft  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

from examples.fused_cispo_trainer import FusedCispoTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and transformers about their own next versions
LENGTHS = (7, 3, 1, 5)  # of the completions; the longest padded by one
CAP = 1.2
ROOT = Path(__file__).parents[2]
MODULE = "examples.fused_cispo_trainer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture
def make(folder: Path) -> Any:
    """make(trainer class, settings) → trainer of a tiny model; the same weights every time."""
    return partial(build, folder)


def build(folder: Path, cls: Any, model: Any = "qwen3", peft_config: Any = None, **settings: Any) -> Any:
    if isinstance(model, str) and not (folder / model).exists():
        save_tiny(model, folder / model)
    defaults = {
        "loss_type": "cispo",
        "epsilon_high": CAP,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    letters = ["a b c", "d e f g h", "i j"] * 4
    return cls(
        model=str(folder / model) if isinstance(model, str) else model,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": x}] for x in letters]}),
        args=trl.GRPOConfig(str(folder / "out"), **defaults | settings),
        peft_config=peft_config,
    )


def make_batch(trainer: Any, *, off_policy: bool) -> dict[str, Any]:
    """4 completions, padded, of random tokens after prompts padded on the left."""
    draw = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randint(3, 60, shape, generator=draw)  # noqa: E731
    lengths = torch.tensor(LENGTHS)[:, None]
    batch = {
        "prompt_ids": random(4, 6),
        "prompt_mask": (torch.arange(6) >= torch.tensor([0, 2, 4, 1])[:, None]).long(),
        "completion_ids": random(4, 8),
        "completion_mask": (torch.arange(8) < lengths).long(),
        "advantages": torch.tensor([-1.3, -0.7, 0.0, 0.4]),
        "num_items_in_batch": torch.tensor(37),
    }
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logprobs = trl.GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, 8)[0]
    near = lambda: logprobs + 0.4 * torch.randn(logprobs.shape, generator=draw)  # noqa: E731
    if off_policy:
        batch["old_per_token_logps"] = near()
    if trainer.beta:
        batch["ref_per_token_logps"] = near()
    return batch


def outcome(trainer: Any, batch: dict[str, Any], *, micro_batches: int = 1) -> tuple[Any, ...]:
    """(loss, gradients, metrics) of one batch."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}, dict(trainer._metrics["train"])


def agree(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        if expected is None:  # frozen
            assert ours[1][name] is None
            continue
        difference = (ours[1][name] - expected).norm() / expected.norm()
        assert difference < 1e-5, name
    same_metrics(ours[2], theirs[2])


def same_metrics(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), name


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 0.7": {"temperature": 0.7},
    "checkpointing off": {"gradient_checkpointing": False},
    "entropy bonus": {"entropy_coef": 0.03},
    "kl": {"beta": 0.1},
    "kl without bias correction": {"beta": 0.1, "use_bias_correction_kl": False, "temperature": 0.7},
    "kl and entropy bonus": {"beta": 0.1, "entropy_coef": 0.03},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.03, "entropy_target": 9.0},
    "ratio of a sequence": {"importance_sampling_level": "sequence"},
    "top entropy": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 1e-6},
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["on policy", "ratio not 1"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_gradients_and_metrics_are_those_of_trl(make: Any, settings: dict[str, Any], off_policy: bool) -> None:
    theirs, ours = make(trl.GRPOTrainer, **settings), make(FusedCispoTrainer, **settings)
    batch = make_batch(theirs, off_policy=off_policy)
    expected = outcome(theirs, batch)
    agree(outcome(ours, batch), expected)
    if off_policy and settings.get("importance_sampling_level") != "sequence":
        assert expected[2]["cispo_clip_ratio"][0] > 0  # the cap is met


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # an untied head; a soft cap and a tied one (as Qwen3's)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_every_kind_of_head_gives_what_trl_does(make: Any, family: str, beta: float) -> None:
    theirs, ours = (make(c, family, beta=beta, temperature=0.7) for c in (trl.GRPOTrainer, FusedCispoTrainer))
    batch = make_batch(theirs, off_policy=True)
    agree(outcome(ours, batch), outcome(theirs, batch))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.03])
@pytest.mark.parametrize("steps_per_generation", [2, 4])
def test_micro_batches_are_scaled_as_in_trl(make: Any, steps_per_generation: int, entropy_coef: float) -> None:
    settings = {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": steps_per_generation,
        "entropy_coef": entropy_coef,
    }
    theirs, ours = make(trl.GRPOTrainer, **settings), make(FusedCispoTrainer, **settings)
    batch = make_batch(theirs, off_policy=True)
    agree(outcome(ours, batch, micro_batches=2), outcome(theirs, batch, micro_batches=2))
    for trainer in (theirs, ours):
        trainer.model.eval()
        trainer._metrics["eval"].clear()
    with torch.no_grad():
        losses = [t.compute_loss(t.model, batch) for t in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    same_metrics(ours._metrics["eval"], theirs._metrics["eval"])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_log_probs_and_entropies_are_those_of_trl(make: Any, batch_size: int | None) -> None:
    ours = make(FusedCispoTrainer, temperature=0.7)
    batch = make_batch(ours, off_policy=False)
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    arguments = ours.model, ids, mask, 8, batch_size
    found = ours._get_per_token_logps_and_entropies(*arguments, compute_entropy=True)
    expected = trl.GRPOTrainer._get_per_token_logps_and_entropies(ours, *arguments, compute_entropy=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert ours._get_per_token_logps_and_entropies(*arguments)[1] is None


def test_under_bf16_log_probs_are_those_of_exact_logits_where_trl_rounds_them(make: Any) -> None:
    ours = make(FusedCispoTrainer, bf16=True)
    batch = make_batch(ours, off_policy=False)
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        with ours.accelerator.autocast():
            hidden = ours.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -9:-1]
        logits = hidden.double() @ ours.model.lm_head.weight.double().T
        exact = logits.log_softmax(-1).gather(-1, ids[:, -8:, None]).squeeze(-1)
        methods = (c._get_per_token_logps_and_entropies for c in (FusedCispoTrainer, trl.GRPOTrainer))
        found, rounded = (m(ours, ours.model, ids, mask, 8)[0] - exact for m in methods)
    scored = batch["completion_mask"] == 1
    assert found[scored].abs().max() < 1e-5 < 1e-3 < rounded[scored].abs().max()


def test_advantages_per_token_tool_masks_and_vllm_ratios_are_honoured(make: Any) -> None:
    theirs, ours = make(trl.GRPOTrainer), make(FusedCispoTrainer)
    batch = make_batch(theirs, off_policy=True)
    draw = torch.Generator().manual_seed(1)
    batch["advantages"] = torch.randn(4, 8, generator=draw)
    batch["tool_mask"] = torch.randint(0, 2, (4, 8), generator=draw)
    batch["importance_sampling_ratio"] = torch.rand(4, 1, generator=draw)
    plain = outcome(ours, batch)
    agree(plain, outcome(theirs, batch))
    for trainer in (theirs, ours):
        trainer.use_vllm = True
    agree(outcome(ours, batch), outcome(theirs, batch))
    assert outcome(ours, batch)[0] != plain[0]


def test_a_batch_without_any_token_is_a_zero_that_can_be_differentiated(make: Any) -> None:
    theirs, ours = make(trl.GRPOTrainer), make(FusedCispoTrainer)
    batch = make_batch(theirs, off_policy=True)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss, gradients, _ = outcome(ours, batch)
    assert loss == outcome(theirs, batch)[0] == 0
    assert all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_training_ends_with_the_weights_and_the_log_of_trl(folder: Path, beta: float) -> None:
    theirs, ours = trained(folder, beta=beta, gradient_accumulation_steps=2, num_iterations=2)
    same_run(ours, theirs)


def trained(folder: Path, **settings: Any) -> list[tuple[dict[str, Any], list[dict[str, float]]]]:
    """Weights and log of TRL's trainer, and of ours."""
    ends = []
    for cls in (trl.GRPOTrainer, FusedCispoTrainer):  # making one seeds what it samples
        trainer = build(folder, cls, **settings)
        trainer.train()
        ends.append((trainer.model.state_dict(), trainer.state.log_history))
    return ends


def same_run(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    for name, expected in theirs[0].items():
        torch.testing.assert_close(ours[0][name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    clocks = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - clocks:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    assert theirs[1][1]["loss"] != theirs[1][0]["loss"]


def test_two_processes_end_with_the_weights_and_the_log_of_trl(folder: Path) -> None:
    """DDP: run by torchrun, this file as a program."""
    save_tiny("qwen3", folder / "pair" / "qwen3")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, "-m", "tests.examples.test_trl_cispo", folder / "pair"], check=True, cwd=ROOT, timeout=300)
    ends = [torch.load(folder / "pair" / f"{rank}.pt") for rank in range(2)]
    for theirs, ours in ends:
        same_run(ours, theirs)
    for (one, _), (other, _) in zip(*ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another loss": ({"loss_type": "dapo"}, "computes loss_type=\"cispo\", got 'dapo'"),
    "PPO's epsilon": ({"epsilon_high": None}, "got epsilon_high=0.2, in cispo the cap of the ratio itself"),
    "a cast head": ({"cast_lm_head_to_fp32": True}, "leave cast_lm_head_to_fp32 off"),
}


@pytest.mark.parametrize(("settings", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_setting_it_cannot_reproduce_is_refused(make: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^FusedCispoTrainer ") as caught:
        make(FusedCispoTrainer, **settings)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (
            f"{MODULE}.FusedCispoTrainer._is_vlm",
            property(lambda self: True, lambda self, value: None),
            "not multimodal",
        ),
        ("accelerate.Accelerator.distributed_type", DistributedType.FSDP, "whole on every process (DDP), got FSDP"),
    ],
    ids=["images", "sharded"],
)
def test_a_model_it_was_not_tested_with_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch, place: str, value: Any, sentence: str
) -> None:
    trainer = make(FusedCispoTrainer)
    assert trainer._refusal() is None
    monkeypatch.setattr(place, value, raising=False)
    assert sentence in trainer._refusal()


LAYERS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 64, "init_lora_weights": False}


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"gradient_checkpointing": False, "temperature": 0.7}])
def test_lora_of_the_layers_learns_as_with_trl(make: Any, settings: dict[str, Any]) -> None:
    trainers = []
    for cls in (trl.GRPOTrainer, FusedCispoTrainer):
        torch.manual_seed(0)  # of the adapter's weights
        trainers.append(make(cls, peft_config=peft.LoraConfig(**LAYERS), **settings))
    theirs, ours = trainers
    batch = make_batch(theirs, off_policy=True)
    expected = outcome(theirs, batch)
    assert sum(g is not None and bool(g.any()) for g in expected[1].values()) == 2 * 3 * 2  # A and B, of two layers
    agree(outcome(ours, batch), expected)


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),  # as low-rank TRL refuses it, too
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["head", "prompt"],
)
def test_an_adapter_of_the_head_or_the_prompt_is_refused(make: Any, adapter: Any) -> None:
    with pytest.raises(ValueError, match=r"^FusedCispoTrainer takes PEFT that leaves the head and the prompt alone"):
        make(FusedCispoTrainer, "llama", peft_config=adapter, gradient_checkpointing=False)


def test_a_mixture_of_experts_is_refused_while_its_balance_is_part_of_the_loss(make: Any, folder: Path) -> None:
    make(trl.GRPOTrainer)  # saves the tokenizer
    sizes = {"vocab_size": 600, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(num_hidden_layers=1, **sizes, **experts)
    config.name_or_path = str(folder / "qwen3")
    with pytest.raises(ValueError, match="MoE with router_aux_loss_coef=0 only"):
        make(FusedCispoTrainer, Qwen3MoeForCausalLM(config))
    make(FusedCispoTrainer, Qwen3MoeForCausalLM(config), router_aux_loss_coef=0.0)


def test_a_model_that_scales_its_logits_is_refused(make: Any, folder: Path) -> None:
    make(trl.GRPOTrainer)  # saves the model
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3")
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match=r"needs logits = softcap\(hidden @ lm_head \+ bias\), which Qwen3ForCausalLM"):
        make(FusedCispoTrainer, model)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    settings = {"entropy_coef": 0.03, "gradient_accumulation_steps": 2, "num_iterations": 2}
    torch.save(trained(place, **settings), place / f"{os.environ['RANK']}.pt")
