"""What gets low-rank updates, and what is said of the rest; that they learn is in test_ranks.py."""

import warnings
from pathlib import Path

import pytest
import torch

from fst_fast.slow.lora import Unadapted, adapt
from tests.models import tiny


def test_experts_that_do_not_learn_are_named(tmp_path: Path) -> None:
    model = tiny("qwen3-moe", tmp_path)
    experts = [p for name, p in model.lm.named_parameters() if ".experts." in name]
    share = sum(p.numel() for p in experts) / sum(p.numel() for p in model.lm.parameters())
    with pytest.warns(UserWarning, match=f"slow.lora_rank: the experts .* {share:.0%} of its weights, get no low-rank"):
        adapt(model, 4, 0)
    assert experts
    assert not any(p.requires_grad for p in experts)
    assert any(p.requires_grad for p in model.lm.parameters())


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_nothing_is_said_where_all_layers_learn(family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(tiny(family, tmp_path), 4, 0)


def test_the_base_is_the_same_memory_without_the_updates(tmp_path: Path) -> None:
    model = tiny("qwen3", tmp_path)
    ids = torch.arange(5, 17)[None]
    weights, states = {name: w.clone() for name, w in model.weights()}, model.hidden(ids)
    adapt(model, 4, 0)
    base = Unadapted(model)
    for _ in range(2):
        with torch.no_grad():
            for name, p in model.lm.named_parameters():
                if ".lora_B." in name:
                    p.add_(0.1)
        assert torch.equal(base.hidden(ids), states)
        assert not torch.allclose(model.hidden(ids), states, atol=1e-3)
    assert dict(base.weights()).keys() == weights.keys()
    assert all(torch.equal(w, weights[name]) for name, w in base.weights())
    assert any(not torch.equal(w, weights[name]) for name, w in model.weights())
    model.hidden(ids).sum().backward()  # the updates have not lost their gradients
    assert all(p.grad is not None for name, p in model.lm.named_parameters() if ".lora_B." in name)
    adapted = model.hidden(ids)
    with pytest.raises(IndexError):
        base.hidden(ids + 10**6)
    assert torch.equal(model.hidden(ids), adapted)
