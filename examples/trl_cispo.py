"""`FusedCispoTrainer`: TRL's GRPOTrainer with its CISPO loss from fst_kernels; same arguments, losses, gradients, metrics.

`python examples/trl_cispo.py` trains the shipped glyph model with TRL's own loss and with this one, from the same seed
on a CPU, and shows both curves and how far apart they are: freely, and on the same batch from the same weights.
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from fst_fast.model import GLYPH_BASE
from fst_fast.records import Problem
from fst_fast.tasks.glyph import draw_letters, verify
from fst_kernels import linear_policy_loss, linear_token_logprobs


class FusedCispoTrainer(GRPOTrainer):
    """`GRPOTrainer(args=GRPOConfig(loss_type="cispo", ...))` whose LM head runs in fst_kernels. One process, text only.

    One pass gives the loss and its gradients. Settings that need log-probs before the loss is known (beta, sequence
    ratios, top_entropy_quantile, off_policy_mask_threshold, adaptive entropy) go through TRL's own formulas on our
    log-probs, for one more product with the head. Logits are fp32 also under bf16, where TRL rounds them to bf16.
    Raises ValueError on settings it does not reproduce.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if refusal := self._refusal():
            raise ValueError(f"FusedCispoTrainer {refusal}")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._needs_logprobs_first():
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # (B, T)
        tokens = mask.sum().clamp(min=1)
        advantages = inputs["advantages"].view(len(mask), -1)  # (B, 1) or (B, T)
        slopes = advantages
        if self.use_vllm and self.vllm_importance_sampling_correction:
            slopes = slopes * inputs["importance_sampling_ratio"]
        # num_items_in_batch counts a whole generation; the loss of one optimizer step is a mean over that step's tokens
        mode, micro_batches, share = "eval", 1, 1.0
        if self.model.training:
            mode, micro_batches = "train", self.current_gradient_accumulation_steps
            share = micro_batches / self.args.steps_per_generation
        denominator = inputs["num_items_in_batch"].clamp(min=1) * share
        bonus = self.entropy_coef / micro_batches  # of the micro-batch's mean entropy, whatever the denominator
        head, options = self._head(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            mask.shape[1],
        )
        old = inputs.get("old_per_token_logps")  # none: the policy has not moved since it sampled, ρ = 1
        out = linear_policy_loss(
            *head,
            torch.zeros_like(mask.flatten()) if old is None else old.flatten(),
            slopes.expand_as(mask).flatten(),
            mask.flatten(),
            kind="reinforce" if old is None else "cispo",
            weight_max=self.epsilon_high,
            entropy_coef=float(bonus * denominator / tokens) if bonus else 0.0,
            denominator=denominator,
            **options,
        )

        metrics, entropy = self._metrics[mode], out.metrics["entropy_mean"]
        metrics["entropy"].append(entropy.item())
        log_ratio = out.logprobs.new_zeros(mask.shape) if old is None else out.logprobs.view_as(old) - old
        clipped = (log_ratio.exp() > self.epsilon_high) & (advantages > 0)  # TRL counts no others
        metrics["cispo_clip_ratio"].append(((clipped * mask).sum() / tokens).item())
        if self._entropy_bonus_enabled:
            metrics["policy_loss"].append((out.loss + bonus * entropy).item())
            if mode == "train" and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(self.entropy_coef)
        return out.loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,  # never: the models that have one are refused
        **images: Any,  # all None: likewise
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probs (B, logits_to_keep), and entropies if asked for; 0 at padding. Replaces TRL's chunked head."""
        parts = []
        for ids, seen in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
            head, options = self._head(model, ids, seen, logits_to_keep)
            part = linear_token_logprobs(*head, entropy=compute_entropy, **options)
            parts.append([x.view(len(ids), -1) for x in (part.logprobs, part.entropy) if x is not None])
        padding = attention_mask[:, -logits_to_keep:] == 0
        logprobs, *entropies = (torch.cat(x).masked_fill(padding, 0) for x in zip(*parts, strict=True))
        return logprobs, entropies[0] if entropies else None, None

    def _head(
        self, model: Any, ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """(hidden [N,H], weight [V,H], targets [N]) of the completions' N tokens, and the options of the logits."""
        lm = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            states = lm.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        hidden = states[:, -completion_length - 1 : -1].flatten(0, 1)  # a token is predicted from the state before it
        out, softcap = lm.get_output_embeddings(), getattr(lm.config, "final_logit_softcapping", None)
        targets = ids[:, -completion_length:].flatten()
        return (hidden, out.weight, targets), {"bias": out.bias, "softcap": softcap, "temperature": self.temperature}

    def _needs_logprobs_first(self) -> bool:
        return (
            self.beta != 0
            or self.importance_sampling_level != "token"
            or self.top_entropy_quantile < 1
            or self.off_policy_mask_threshold is not None
            or self.use_adaptive_entropy
        )

    def _refusal(self) -> str | None:
        if self.loss_type != "cispo":
            return f'computes loss_type="cispo", got {self.loss_type!r}: use GRPOTrainer for it'
        if self.epsilon_high < 1:
            return (
                f"got epsilon_high={self.epsilon_high}, which cispo takes as the cap of the ratio itself, so that every "
                "token on policy would weigh that little: set it to 1 or more (ScaleRL uses 5)"
            )
        if self.accelerator.num_processes > 1:
            return f"runs in one process, got {self.accelerator.num_processes}: the loss bypasses the model's wrapper"
        if is_peft_model(self.model) or self._is_vlm or self.aux_loss_enabled:
            return "takes plain text models: not PEFT, not multimodal, no router_aux_loss_coef"
        if self.args.cast_lm_head_to_fp32:
            return "computes fp32 logits from weights of any dtype: leave cast_lm_head_to_fp32 off"
        if not self._head_is_linear():
            return f"needs logits = softcap(hidden @ lm_head + bias), which {type(self.model).__name__}'s are not"
        return None

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        """Some architectures scale their logits in ways that the kernels do not know: compare a few."""
        self.model.eval()  # no dropout
        ids = torch.arange(8, device=self.model.device)[None] % self.model.config.vocab_size
        logits = self.model(input_ids=ids).logits[:, :-1].flatten(0, 1).float() / self.temperature
        head, options = self._head(self.model, ids, torch.ones_like(ids), 7)
        found = linear_token_logprobs(*head, **options).logprobs
        expected = logits.log_softmax(-1).gather(1, head[2][:, None]).squeeze(1)
        exact = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        return torch.allclose(found, expected, rtol=1e-3 if exact else 0.1, atol=1e-3 if exact else 0.1)


# ---- the comparison ------------------------------------------------------------------------------------------------


STEPS, STEPS_PER_SAMPLE = 60, 4
RULE = ("reverse", "upper", "comma", "square", "bang")  # abcd → [ D , C , B , A ] !
PROMPT = (
    "reverse the order. use upper case. use square brackets. finish with an exclamation mark."  # not a word of commas
)


def settings(folder: str) -> GRPOConfig:
    """64 samples of 8 problems, four optimizer steps on each: from the second on, the ratio is not 1."""
    return GRPOConfig(
        folder,
        loss_type="cispo",
        epsilon_high=2.0,  # low, so that some tokens meet it
        num_generations=8,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        num_iterations=STEPS_PER_SAMPLE,
        max_completion_length=32,
        max_steps=STEPS,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def arguments(folder: str) -> dict[str, Any]:
    """The glyph world under a prompt that says most of its rule; the reward is the verifier's."""
    rng = random.Random(0)
    letters = [draw_letters(rng) for _ in range(512)]

    def reward(completions: list[list[dict[str, str]]], letters: list[str], **_: Any) -> list[float]:
        problems = [Problem(f"glyph:{x}", {"letters": x, "rule": RULE}) for x in letters]
        return [verify(p, c[0]["content"]).reward for p, c in zip(problems, completions, strict=True)]

    messages = [[{"role": "system", "content": PROMPT}, {"role": "user", "content": " ".join(x)}] for x in letters]
    return {
        "model": str(GLYPH_BASE),
        "reward_funcs": reward,
        "train_dataset": Dataset.from_dict({"prompt": messages, "letters": letters}),
        "args": settings(folder),
    }


class Recorded:
    """Mixed into a trainer: keeps what was sampled, and the time it took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampled: list[list[list[int]]] = []
        self.sampling_seconds = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.perf_counter()
        batch = super()._generate_and_score_completions(inputs)
        self.sampling_seconds += time.perf_counter() - started
        self.sampled.append(batch["completion_ids"].tolist())
        return batch


class Judged(FusedCispoTrainer):
    """Trains with our loss, and on every micro-batch asks TRL's own for loss and gradient at the same weights."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.theirs = GRPOTrainer(**kwargs)
        self.verdicts: list[tuple[float, float]] = []  # (loss difference, relative gradient difference)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.theirs.model.load_state_dict(model.state_dict())
        self.theirs.model.train()
        self.theirs.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps
        expected = self.theirs.compute_loss(self.theirs.model, inputs)
        ours, theirs = (flat_gradient(x, m) for x, m in ((loss, model), (expected, self.theirs.model)))
        difference = (ours - theirs).norm() / theirs.norm().clamp(min=1e-12)
        self.verdicts.append((abs(loss.item() - expected.item()), difference.item()))
        return loss


def flat_gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def train(base: type[GRPOTrainer]) -> dict[str, Any]:
    """A free run in this process: its log, samples, seconds and the memory that training added at its peak."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        trainer = type("Run", (Recorded, base), {})(**arguments(folder))
        trainer.remove_callback(PrinterCallback)
        before, started = peak_mib(), time.perf_counter()
        trainer.train()
    seconds = time.perf_counter() - started
    return {
        "log": trainer.state.log_history[:STEPS],
        "sampled": trainer.sampled,
        "sampling": trainer.sampling_seconds,
        "rest": seconds - trainer.sampling_seconds,
        "memory": peak_mib() - before,
    }


def judge() -> list[tuple[float, float]]:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Judged(**arguments(folder))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.verdicts


def quiet() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(function: Any, *args: Any) -> Any:
    """The result of a call in a process of its own, so that memory and random state are its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def plot(theirs: dict[str, Any], ours: dict[str, Any], verdicts: list[tuple[float, float]], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for axis, key in zip(axes, ("reward", "loss", "grad_norm"), strict=False):
        for run, name, style in ((theirs, "TRL", {"lw": 4, "alpha": 0.35}), (ours, "fst_kernels", {"lw": 1.2})):
            points = [(i + 1, entry[key]) for i, entry in enumerate(run["log"]) if key in entry]
            axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set(title=f"{key}, two free runs", xlabel="step")
    axes[0].legend()
    axes[3].semilogy([d for _, d in verdicts], lw=1.2, color="C1")
    axes[3].set(title="gradient: relative difference, same weights", xlabel="micro-batch", ylim=(1e-8, 1e-3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(out: Path) -> None:
    theirs, ours = alone(train, GRPOTrainer), alone(train, FusedCispoTrainer)
    verdicts = alone(judge)
    print(
        f"{'step':>4} {'reward':>7} {'clipped':>8}   {'loss: TRL':>12} {'ours':>12}   {'gradient: TRL':>14} {'ours':>12}"
    )
    for i, (a, b) in enumerate(zip(theirs["log"], ours["log"], strict=True), 1):
        reward = f"{b['reward']:.3f}" if "reward" in b else ""
        print(
            f"{i:4} {reward:>7} {b['cispo_clip_ratio']:8.4f}   {a['loss']:12.8f} {b['loss']:12.8f}   "
            f"{a['grad_norm']:14.8f} {b['grad_norm']:12.8f}"
        )
    parted = [i for i, (a, b) in enumerate(zip(theirs["sampled"], ours["sampled"], strict=True)) if a != b]
    print(
        f"free runs: sampling {f'differs from step {STEPS_PER_SAMPLE * parted[0] + 1} on' if parted else 'is the same to the end'}; "
        f"largest difference of a loss {largest(theirs, ours, 'loss'):.1e}, of a gradient norm "
        f"{largest(theirs, ours, 'grad_norm'):.1e}"
    )
    print(
        f"same batch, same weights, {len(verdicts)} micro-batches: largest difference of a loss "
        f"{max(x for x, _ in verdicts):.1e}, of a gradient {max(x for _, x in verdicts):.1e} of its norm"
    )
    for name, run in (("TRL", theirs), ("fst_kernels", ours)):
        print(
            f"{name}: sampling {run['sampling']:.1f} s, the rest of training {run['rest']:.1f} s, "
            f"peak memory {run['memory']:.0f} MiB over the loaded process"
        )
    plot(theirs, ours, verdicts, out)
    print(f"wrote {out}")


def largest(theirs: dict[str, Any], ours: dict[str, Any], key: str) -> float:
    return max(abs(a[key] - b[key]) for a, b in zip(theirs["log"], ours["log"], strict=True))


if __name__ == "__main__":
    main(Path("runs/trl_cispo.png"))
