"""Rollouts → token-trie micro-batches: what several rollouts share is computed once, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fst_fast.errors import UserError
from fst_fast.model import Model, on_device
from fst_fast.prefix_tree import Ragged, build, trie
from fst_fast.records import Prompt, Rollout
from fst_fast.shape import PassWork
from fst_fast.slow import tree_attention
from fst_fast.slow.policy import States
from fst_fast.slow.tree_attention import Span

MIN_SAVING = 32  # tokens that a shared stretch must save: each is one more attention call a layer


@dataclass(frozen=True)
class Packed:
    """Several sequences as one trie, its tokens depth-first."""

    ids: np.ndarray  # int64 [N]
    positions: np.ndarray  # int64 [N]: of each token in its sequences
    spans: list[Span]
    places: list[np.ndarray]  # of each sequence, int64 [its length]: where its tokens are


def pack(sequences: Sequence[Sequence[int]], *, min_saving: int = MIN_SAVING) -> Packed:
    """The trie of non-empty sequences of token ids. A shared prefix comes once, but for stretches of it that would save
    fewer than `min_saving` tokens."""
    nodes = build(sequences, min_saving=min_saving)
    ends = np.cumsum([node.end - node.start for node in nodes]).tolist()
    starts = [0, *ends[:-1]]
    stops = list(ends)
    for k in range(len(nodes) - 1, -1, -1):
        if nodes[k].parent >= 0:
            stops[nodes[k].parent] = max(stops[nodes[k].parent], stops[k])
    places: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    for k, node in enumerate(nodes):
        path, above = [], k
        while node.leaves and above >= 0:
            path.append(np.arange(starts[above], ends[above]))
            above = nodes[above].parent
        for i in node.leaves:
            places[i] = np.concatenate(path[::-1])
    return Packed(
        ids=np.concatenate([np.asarray(sequences[node.sequence][node.start : node.end], np.int64) for node in nodes]),
        positions=np.concatenate([np.arange(node.start, node.end) for node in nodes]),
        spans=[Span(*bounds, nodes[k].parent < 0) for k, bounds in enumerate(zip(starts, ends, stops, strict=True))],
        places=places,
    )


def packed_states(rollouts: Sequence[Rollout], device: torch.device) -> States:
    """`policy.response_states` over the rollouts' trie: the same states [N, H], shared prefixes computed once."""
    # the last token predicts nothing that is needed
    packed = pack([r.prompt_ids + r.response_ids[:-1] for r in rollouts])
    place = on_device(
        np.concatenate([packed.places[i][len(r.prompt_ids) - 1 :] for i, r in enumerate(rollouts)]), device
    )
    states = _states(packed, device)
    return lambda model: states(model)[place]


def packed_work(rollouts: Sequence[Rollout]) -> PassWork:
    """Of a forward pass over the rollouts' trie, as `packed_states` has it."""
    nodes = build([r.prompt_ids + r.response_ids[:-1] for r in rollouts], min_saving=MIN_SAVING)
    return PassWork.over([(node.start, node.end) for node in nodes], sum(len(r.response_ids) for r in rollouts))


def packed_batches(rollouts: Sequence[Rollout], budget: int) -> Iterator[list[int]]:
    """Indices of rollouts in batches whose tries have at most `budget` tokens (one rollout may have more). A prompt is
    spread over batches only where it does not fit into one; the ends of several share one."""
    rows = [r.prompt_ids + r.response_ids for r in rollouts]
    of_prompt: dict[Prompt, list[int]] = {}
    for i, r in enumerate(rollouts):
        of_prompt.setdefault(r.prompt, []).append(i)
    pieces = [piece for indices in of_prompt.values() for piece in _cut(indices, rows, budget)]
    batches: list[tuple[int, list[int]]] = []  # with their tokens
    for tokens, piece in sorted(pieces, key=lambda p: -p[0]):  # first fit decreasing
        for b, (used, batch) in enumerate(batches):
            if used + tokens <= budget:
                batches[b] = (used + tokens, batch + piece)
                break
        else:
            batches.append((tokens, piece))
    yield from (batch for _, batch in batches)


def _cut(indices: Sequence[int], rows: Sequence[Sequence[int]], budget: int) -> list[tuple[int, list[int]]]:
    """Rows in the order of their trie, cut wherever its tokens would exceed the budget; with the tokens."""
    tree = trie(Ragged.of([rows[i] for i in indices]))
    added = np.zeros(len(indices), np.int64)  # tokens that each adds to those before it
    np.add.at(added, tree.first[:-1], tree.end - tree.start)
    pieces: list[tuple[int, list[int]]] = []
    for i, new in zip((indices[k] for k in tree.order.tolist()), added.tolist(), strict=True):
        if pieces and pieces[-1][0] + new <= budget:
            pieces[-1] = (pieces[-1][0] + new, [*pieces[-1][1], i])
        else:
            pieces.append((len(rows[i]), [i]))
    return pieces


def packed_tokens(rollouts: Sequence[Rollout]) -> int:
    """What a batch costs: the tokens of its trie."""
    return trie(Ragged.of([r.prompt_ids + r.response_ids for r in rollouts])).tokens


def prepare(model: Model) -> None:
    """Teach `model` to run packed, and see that it gives what it gives unpacked. Raises UserError when it does not."""
    refusal = f"slow.pack = on: {model.path}"
    if model.window is not None:
        raise UserError(f"{refusal} attends in a window of {model.window} tokens; use --slow.pack off")
    if getattr(model.config, "attn_logit_softcapping", None):
        raise UserError(f"{refusal} caps its attention scores, which no flash kernel does; use --slow.pack off")
    usual, why = model.lm.config._attn_implementation, ""
    try:
        if not (error := _error(model)) < (1e-4 if model.dtype == torch.float32 else 0.1):
            why = f"gives other hidden states when packed (by {error:.2g})"
    except (torch.OutOfMemoryError, torch.distributed.DistError):  # of this rank alone, or of this moment
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as problem:
        why = f"cannot run packed ({problem})"
    if why:
        model.lm.set_attn_implementation(usual)
        raise UserError(f"{refusal} {why}; use --slow.pack off")


@torch.no_grad()
def _error(model: Model) -> float:
    """Of the hidden states of three sequences with a common beginning, packed: the largest, over the largest state.
    The model is left able to run packed."""
    vocabulary = model.config.vocab_size
    stem = [(7 * i + 3) % vocabulary for i in range(40)]
    rows = [[*stem, *((11 * i + k) % vocabulary for i in range(9 + k))] for k in range(3)]
    alone = [model.hidden(torch.tensor([row], device=model.device))[0] for row in rows]
    packed = pack(rows)
    tree_attention.install(model.lm)
    together = _states(packed, model.device)(model)
    return max(
        float((together[torch.from_numpy(place).to(model.device)] - x).abs().max() / x.abs().max())
        for x, place in zip(alone, packed.places, strict=True)
    )


def _states(packed: Packed, device: torch.device) -> States:
    """Final hidden states [N, H] of the packed tokens."""
    ids, positions = (on_device(x, device)[None] for x in (packed.ids, packed.positions))
    inputs = tree_attention.inputs(packed.spans, device)
    return lambda model: model.hidden(ids, position_ids=positions, **inputs)[0]
