"""The trained weights: model, optimizer with warm-up, hidden states of responses, and who computes which of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from fst_fast.config import SlowConfig
from fst_fast.model import Model, on_device, whole
from fst_fast.ranks import Ranks
from fst_fast.records import Rollout
from fst_fast.shape import PassWork


class Policy:
    """A model and its AdamW. In one process the engine samples from the same parameters: nothing to copy.

    AdamW works on fp32 masters of bf16 parameters: a step of 1e-6 is far below what bf16 can add to a weight. Gradients
    of micro-batches are summed there too: in bf16 a sum stops growing at 256 times what is added. Of a sharded model
    (sharding.py) the parameters are the masters.
    """

    def __init__(self, model: Model, config: SlowConfig):
        self.model, self.config = model, config
        named = {name: p for name, p in model.lm.named_parameters() if p.requires_grad}
        self._names, self._parameters = list(named), list(named.values())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        for master, p in zip(self.masters, self._parameters, strict=True):
            if master is not p:
                p.register_post_accumulate_grad_hook(partial(_add_gradient, master))
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=model.device.type == "cuda" or None,
        )
        for master in self.masters:  # there from the start: a checkpoint always has the same tensors
            step = torch.zeros((), device=master.device if model.device.type == "cuda" else "cpu")
            moments = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {"step": step, **moments}
        self.updates = 0  # optimizer steps taken

    @property
    def lr(self) -> float:
        """Learning rate of the next optimizer step: linear warm-up, then constant."""
        return self.config.lr * min(1.0, (self.updates + 1) / max(1, self.config.warmup))

    def update(self) -> float:
        """Clip the gradients, take one optimizer step, clear them; returns the norm before clipping.

        A norm that is not finite raises: stepping on it would silently destroy the weights.
        """
        gradients = [master.grad for master in self.masters if master.grad is not None]
        total = whole(torch.nn.utils.get_total_norm(gradients))
        torch.nn.utils.clip_grads_with_norm_(self.masters, self.config.clip, total)
        norm = float(total)
        if not norm < float("inf"):
            raise FloatingPointError(
                f"gradient norm is {norm} at optimizer step {self.updates}; the last checkpoint is good"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        self.updates += 1
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the parameters that are sampled from."""
        for master, p in zip(self.masters, self._parameters, strict=True):
            if master is not p:
                p.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments by the names of the model's parameters, sharded as they are."""
        states = [self.optimizer.state[master] for master in self.masters]
        moments = {key: dict(zip(self._names, [s[key] for s in states], strict=True)) for key in states[0]}
        return {"masters": dict(zip(self._names, self.masters, strict=True)), **moments, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over such a dictionary; tensors may have been read right into those of `state_dict()`."""
        own = self.state_dict()
        self.updates = state["updates"]
        for key in own.keys() - {"updates"}:
            for name, tensor in own[key].items():
                if tensor is not state[key][name]:
                    tensor.copy_(state[key][name])
        self._publish()


def _add_gradient(master: torch.Tensor, p: torch.Tensor) -> None:
    """Called behind every backward pass of `p`: its gradient goes to that of its fp32 master."""
    assert p.grad is not None
    if master.grad is None:
        master.grad = p.grad.float()
    else:
        master.grad += p.grad
    p.grad = None


States = Callable[[Model], torch.Tensor]  # a model's hidden states [N, H] that predict the responses' tokens


def response_states(
    rollouts: Sequence[Rollout], device: torch.device, contexts: Sequence[tuple[int, ...]] | None = None
) -> States:
    """Of the responses' tokens, rollout after rollout, N = their total length; for any number of models.

    `contexts` replaces the rollouts' own prompts (distillation: the same response under another prompt).
    Right padding under a causal mask needs no mask of its own.
    """
    heads = contexts if contexts is not None else [r.prompt_ids for r in rollouts]
    rows = [head + r.response_ids for head, r in zip(heads, rollouts, strict=True)]
    width = max(map(len, rows)) - 1  # the last token predicts nothing that is needed
    ids = on_device([(row + (0,) * width)[:width] for row in rows], device)
    row = on_device([i for i, r in enumerate(rollouts) for _ in r.response_ids], device)
    column = on_device(
        [len(h) - 1 + t for h, r in zip(heads, rollouts, strict=True) for t in range(len(r.response_ids))], device
    )
    return lambda model: model.hidden(ids, use_cache=False)[row, column]


def response_targets(rollouts: Sequence[Rollout], device: torch.device) -> torch.Tensor:
    """Token ids [N] of the responses, in the order of `response_states`."""
    return on_device([t for r in rollouts for t in r.response_ids], device)


def micro_batches(
    rollouts: Sequence[Rollout], budget: int, contexts: Sequence[tuple[int, ...]] | None = None
) -> Iterator[list[int]]:
    """Indices of rollouts in batches of at most `budget` padded tokens, similar lengths together.

    `contexts`: other prompts that the same responses will stand under too; the longer of the two counts.
    """
    heads = [len(r.prompt_ids) for r in rollouts]
    if contexts is not None:
        heads = [max(head, len(context)) for head, context in zip(heads, contexts, strict=True)]
    lengths = [head + len(r.response_ids) for head, r in zip(heads, rollouts, strict=True)]
    batch: list[int] = []
    for i in sorted(range(len(rollouts)), key=lambda i: (lengths[i], i)):
        if batch and lengths[i] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded_work(rollouts: Sequence[Rollout]) -> PassWork:
    """Of a forward pass over the rollouts as rows, padding apart."""
    ends = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    return PassWork.over([(0, end) for end in ends], sum(len(r.response_ids) for r in rollouts))


def padded_tokens(rollouts: Sequence[Rollout]) -> int:
    """What a batch costs: all its rows are as long as the longest."""
    return len(rollouts) * max(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)


def shared_batches(
    ranks: Ranks, rollouts: Sequence[Rollout], batches: Iterable[list[int]], cost: Callable[[list[Rollout]], int]
) -> list[tuple[list[int], bool]]:
    """This rank's part of micro-batches (indices of rollouts), and whether they count.

    All ranks get the same number, since they gather sharded weights together, and what they do at a time is of similar
    `cost`: the largest batches are halved until their number fits. For want of rollouts a rank repeats the cheapest
    one, which must not count.
    """
    sized = [(cost([rollouts[i] for i in batch]), batch) for batch in batches]
    if ranks.size == 1:
        return [(batch, True) for _, batch in sized]
    while len(sized) % ranks.size and any(len(batch) > 1 for _, batch in sized):
        largest = max((b for b in sized if len(b[1]) > 1), key=lambda b: b[0])
        sized.remove(largest)
        middle = len(largest[1]) // 2
        for half in (largest[1][:middle], largest[1][middle:]):
            sized.append((cost([rollouts[i] for i in half]), half))
    sized.sort(key=lambda b: b[0], reverse=True)
    load, own = [0] * ranks.size, []
    for k in range(0, len(sized), ranks.size):  # of each round the largest goes to who has had the least
        now = sized[k : k + ranks.size]
        now += [(0, [])] * (ranks.size - len(now))
        least = sorted(range(ranks.size), key=lambda rank: load[rank])
        for rank, (tokens, batch) in zip(least, now, strict=True):
            load[rank] += tokens
            if rank == ranks.rank:
                own.append((batch or sized[-1][1], bool(batch)))
    return own
