"""Where a model's memory goes: parameters sharded over ranks (FSDP2), activations computed again in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fst_fast.config import Recompute
from fst_fast.model import Model
from fst_fast.ranks import Ranks


def shard(model: Model, ranks: Ranks, *, offload: bool) -> None:
    """Spread the parameters over the mesh, trained ones as fp32 masters; layers gather them in the type they had.

    Gradients are summed over the ranks, in fp32. `offload`: masters, and with them the optimizer, stay in host memory.
    All is gathered layer by layer and dropped again; the embedding, the last norm and the head are a unit each.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    assert ranks.mesh is not None
    lm = model.lm
    # inputs have the type already, and FSDP would look for tensors to cast in the whole trie of a packed batch
    precision = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = CPUOffloadPolicy() if offload and model.device.type == "cuda" else OffloadPolicy()
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    units = [*layers(model), lm.base_model]
    if not tied:  # the head's forward is never called: fst_kernels gathers it
        units.append(lm.get_output_embeddings())
    for unit in units:
        fully_shard(unit, mesh=ranks.mesh, mp_policy=precision, offload_policy=policy, reshard_after_forward=True)
    if tied:
        lm.get_output_embeddings().weight = lm.get_input_embeddings().weight
    if any(p.requires_grad for p in lm.parameters()):
        lm.float()
    for module in lm.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are of the whole batch: FSDP2 averages otherwise
            module.set_force_sum_reduction_for_comms(True)
    model.sharded = True


def sum_over_machines(model: Model, now: bool) -> None:
    """Whether the next backward pass sums gradients over machines that hold the same shards (HSDP), with those of the
    passes before that did not: networks between machines are slow, and the last micro-batch's time is enough. The
    head's are summed every time: fst_kernels makes them, not FSDP."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.lm.modules() if model.sharded else ():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)


def recompute(model: Model, which: Recompute) -> None:
    """Activation checkpointing of every layer. selective: results of matrix products and of attention are kept, what
    is cheap to compute again is not."""
    if which == "off":
        return
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if which == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept())

    def recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    for layer in layers(model):
        layer.forward = partial(recomputed, layer.forward)


def layers(model: Model) -> list[Any]:
    """The blocks that transformers says belong together."""
    names = set(model.lm._no_split_modules or ())
    return [m for m in model.lm.base_model.modules() if type(m).__name__ in names]


def _kept() -> list[Any]:
    aten = torch.ops.aten
    attention = [
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._flash_attention_forward.default,  # of packed rollouts on a GPU (tree_attention.py)
    ]
    return [aten.mm.default, aten.addmm.default, aten.bmm.default, *attention]
