"""Engines by name: `make_engine(config.rollout, model)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fst_fast.config import RolloutConfig
    from fst_fast.model import Model
    from fst_fast.rollout.engine import RolloutEngine


def make_engine(config: RolloutConfig, model: Model, *, replica: Model | None = None) -> RolloutEngine:
    """The engine that `rollout.engine` names, with the model's weights; UserError when it cannot serve the model.

    `replica`: a whole model for the embedded engine to copy the weights to, when `model` is sharded. Where vLLM has KV
    cache for less than the model's context, that becomes the model's context.
    """
    if config.engine == "torch":
        from fst_fast.rollout.torch_engine import TorchEngine

        return TorchEngine(model, max_batch=config.max_batch, replica=replica)
    from fst_fast.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(model, max_batch=config.max_batch, gpu_memory=config.gpu_memory)
    model.context = engine.context  # what a prompt has to fit into
    engine.load_weights(model, 0)
    return engine
