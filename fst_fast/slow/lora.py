"""LoRA through peft: low-rank updates of every linear layer of the blocks are trained, the weights stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fst_fast.model import Model, whole
from fst_fast.seeding import derive

NAME = "default"  # peft's, of a model's only adapter


def adapt(model: Model, rank: int, seed: int) -> None:
    """Put updates of `rank` into the model, in place, and let nothing else learn. They begin as zero.

    Warns of experts: transformers keeps all of a layer in one tensor, which is no linear layer.

    `model.weights()` then gives the weights with the updates added, under the names they had: what engines load and
    what is exported is a plain model. The updates are scaled by 2 (alpha = 2 rank).
    """
    from peft import LoraConfig, inject_adapter_in_model

    sizes = [(p.ndim, p.numel()) for p in model.lm.parameters()]
    if experts := sum(n for ndim, n in sizes if ndim > 2):
        share = experts / sum(n for _, n in sizes)
        warnings.warn(
            f"slow.lora_rank: the experts of {model.path}, {share:.0%} of its weights, get no low-rank "
            "updates and stay as they are; train all weights where they should learn",
            stacklevel=2,
        )
    head = model.lm.get_output_embeddings()
    linear = [name for name, m in model.lm.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "lora"))
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear), model.lm)
    for name, p in model.lm.named_parameters():
        p.requires_grad_(".lora_" in name)
    model.lm.eval()
    model.update_of = partial(_update, model.lm)


class Unadapted(Model):
    """An adapted model as it was before: the same module and memory, computed without the updates."""

    def __init__(self, model: Model):
        self.__dict__ |= model.__dict__ | {"update_of": None}

    def hidden(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with _without_updates(self.lm):
            return super().hidden(*args, **kwargs)


@contextmanager
def _without_updates(lm: Any) -> Iterator[None]:
    """peft's own `enable_adapters` would also take their gradients away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in lm.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _update(lm: Any, name: str) -> torch.Tensor | None:
    """What is added to the parameter `name`, in fp32; None where nothing is."""
    layer, found, kind = name.rpartition(".base_layer.")
    if not found or kind != "weight":
        return None
    module = lm.get_submodule(layer)
    up, down = (whole(getattr(module, part)[NAME].weight.detach()).float() for part in ("lora_B", "lora_A"))
    return module.scaling[NAME] * (up @ down)
