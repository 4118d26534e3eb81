"""What is computed again in a backward pass changes no gradient, and what is kept is not computed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fst_fast.model import Model
from fst_fast.slow import tree_attention as tree
from fst_fast.slow.packing import pack, prepare
from fst_fast.slow.sharding import Recompute, layers, recompute
from tests.models import tiny
from tests.slow.test_tree_attention import RAGGED, Flash, loss_and_gradients, separate, together, whole

LAYERS = 2


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flash]:
    """As on a GPU: aten's own operators, which checkpointing sees, with kernels for a CPU."""
    emulated = Flash()

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        out, lse, *_ = emulated.forward(*args, **kwargs)
        return out, lse, *(torch.empty(0) for _ in range(3))

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_flash_attention_forward", forward, "CPU")
    kernels.impl("_flash_attention_backward", emulated.backward, "CPU")
    monkeypatch.setattr(tree, "_on_flash", lambda _: True)
    monkeypatch.setattr(tree.Tree, "of", staticmethod(whole))
    yield emulated
    kernels._destroy()


def gradients(model: Model, which: Recompute, *, packed: bool) -> list[torch.Tensor]:
    for layer in layers(model):
        layer.__dict__.pop("forward", None)  # what an earlier call put over it
    recompute(model, which)
    return loss_and_gradients(model, together(model, pack(RAGGED, min_saving=1)) if packed else separate(model))


@pytest.mark.parametrize("which", ["selective", "full"])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_the_same_bits_however_activations_are_kept(
    which: Recompute, packed: bool, tmp_path: Path
) -> None:
    model = tiny("qwen3", tmp_path)
    prepare(model)
    expected = gradients(model, "off", packed=packed)
    for a, b in zip(gradients(model, which, packed=packed), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("which", "calls"), [("off", 1), ("selective", 1), ("full", 2)])
def test_packed_attention_on_a_gpu_is_kept_by_selective_checkpointing(
    which: Recompute, calls: int, flash: Flash, tmp_path: Path
) -> None:
    model = tiny("qwen3", tmp_path)
    prepare(model)
    expected = gradients(model, "off", packed=True)
    flash.calls = 0
    found = gradients(model, which, packed=True)
    assert flash.calls == calls * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
