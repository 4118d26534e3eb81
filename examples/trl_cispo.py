"""TRL's own CISPO loss and `FusedCispoTrainer`'s, on a CPU, about a minute: both learn the same curve.

Each trains the shipped glyph model on its own from the same seed. A third run asks both for loss and gradient of every
micro-batch at the same weights, so that what differs there is the arithmetic alone.
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
import warnings
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from fused_cispo_trainer import FusedCispoTrainer
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from fst_fast.model import GLYPH_BASE
from fst_fast.records import Problem
from fst_fast.tasks.glyph import draw_letters, verify

STEPS, STEPS_PER_SAMPLE = 60, 4
RULE = ("reverse", "upper", "comma", "square", "bang")  # abcd → [ D , C , B , A ] !
PROMPT = "reverse the order. use upper case. use square brackets. finish with an exclamation mark."  # no word of commas


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
    print("step  reward  clipped      loss: TRL         ours    gradient: TRL         ours")
    for i, (a, b) in enumerate(zip(theirs["log"], ours["log"], strict=True), 1):
        reward = f"{b['reward']:.3f}" if "reward" in b else ""
        print(
            f"{i:4} {reward:>7} {b['cispo_clip_ratio']:8.4f}   {a['loss']:12.8f} {b['loss']:12.8f}   "
            f"{a['grad_norm']:14.8f} {b['grad_norm']:12.8f}"
        )
    parted = [i for i, (a, b) in enumerate(zip(theirs["sampled"], ours["sampled"], strict=True)) if a != b]
    sampling = f"differs from step {STEPS_PER_SAMPLE * parted[0] + 1} on" if parted else "is the same to the end"
    print(
        f"free runs: sampling {sampling}; largest difference of a loss {largest(theirs, ours, 'loss'):.1e}, "
        f"of a gradient norm {largest(theirs, ours, 'grad_norm'):.1e}"
    )
    print(
        f"same batch, same weights, {len(verdicts)} micro-batches: largest difference of a loss "
        f"{max(x for x, _ in verdicts):.1e}, of a gradient {max(x for _, x in verdicts):.1e} of its norm"
    )
    for name, run in (("TRL", theirs), ("fst_kernels", ours)):
        print(
            f"{name}: sampling and scoring {run['sampling']:.1f} s, the rest of training {run['rest']:.1f} s, "
            f"peak memory {run['memory']:.0f} MiB over the loaded process"
        )
    plot(theirs, ours, verdicts, out)
    print(f"wrote {out}")


def largest(theirs: dict[str, Any], ours: dict[str, Any], key: str) -> float:
    return max(abs(a[key] - b[key]) for a, b in zip(theirs["log"], ours["log"], strict=True))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/trl_cispo.png"), help="the plot (default: %(default)s)")
    main(parser.parse_args().out)
