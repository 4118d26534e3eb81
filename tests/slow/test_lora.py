"""What gets low-rank updates, and what is said of the rest; that they learn is in test_ranks.py."""

import warnings
from pathlib import Path

import pytest

from fst_fast.slow.lora import adapt
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
