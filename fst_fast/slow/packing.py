"""Rollouts → token-trie micro-batches: a step's shared prefixes are computed once, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fst_fast.errors import UserError
from fst_fast.model import Model
from fst_fast.prefix_tree import Ragged, build, trie
from fst_fast.records import Prompt, Rollout
from fst_fast.slow.tree_attention import Call, calls_of, tree_hidden

MIN_SAVING = 32  # tokens; a stretch that saves fewer is computed by each sequence: every node costs kernel calls


@dataclass(frozen=True, slots=True)
class Pack:
    """Token sequences as one row of T tokens, every shared prefix once."""

    ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]: depth in the trie
    wanted: torch.Tensor  # int64 [N]: where in the row the asked-for positions of the sequences are, one after another
    calls: list[Call]

    @staticmethod
    def of(
        sequences: Sequence[Sequence[int]], first: Sequence[int], device: torch.device, *, min_saving: int = MIN_SAVING
    ) -> Pack:
        """Asked for are the positions of sequence i from first[i] to its end."""
        tree = build(sequences, min_saving=min_saving)
        at = np.cumsum([0] + [node.end - node.start for node in tree.nodes])
        wanted: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
        for leaf, node in enumerate(tree.nodes):
            for i in node.leaves:
                path, k = [], leaf
                while k >= 0 and tree.nodes[k].end > first[i]:
                    skipped = max(0, first[i] - tree.nodes[k].start)
                    path.append(np.arange(at[k] + skipped, at[k + 1]))
                    k = tree.nodes[k].parent
                wanted[i] = np.concatenate(path[::-1])
        ids = [t for node in tree.nodes for t in sequences[node.sequence][node.start : node.end]]
        positions = np.concatenate([np.arange(node.start, node.end) for node in tree.nodes])
        rows = (ids, positions, np.concatenate(wanted))
        on_device = [torch.as_tensor(row, dtype=torch.int64, device=device) for row in rows]
        return Pack(on_device[0], on_device[1], on_device[2], calls_of(tree, device))


def pack(rollouts: Sequence[Rollout], device: torch.device, contexts: Sequence[tuple[int, ...]] | None = None) -> Pack:
    """Rollouts, or the same responses under other `contexts`; asked for are the positions that predict responses."""
    heads = contexts if contexts is not None else [r.prompt_ids for r in rollouts]
    return Pack.of(_sequences(rollouts, heads), [len(head) - 1 for head in heads], device)


def packed_hidden(model: Model, packed: Pack) -> torch.Tensor:
    """Final hidden states [N, H] at the positions that were asked for, in the order of the sequences."""
    return tree_hidden(model, packed.ids, packed.positions, packed.calls).index_select(0, packed.wanted)


def packed_batches(rollouts: Sequence[Rollout], budget: int, ranks: int = 1) -> list[list[list[int]]]:
    """Per rank its micro-batches, as indices of rollouts, of at most `budget` tokens of their trie (or one rollout).

    Every rank has equally many, and those that ranks work on together are of similar sizes; empty ones where there are
    too few rollouts. A prompt is spread over micro-batches only where it does not fit into one, or for want of as many;
    the ends of several share one.
    """
    sequences = _sequences(rollouts, [r.prompt_ids for r in rollouts])
    of_prompt: dict[Prompt, list[int]] = {}
    for i, r in enumerate(rollouts):
        of_prompt.setdefault(r.prompt, []).append(i)
    pieces = [piece for indices in of_prompt.values() for piece in _cut(indices, sequences, budget)]
    batches: list[tuple[int, list[int]]] = []  # with their tokens
    for tokens, piece in sorted(pieces, key=lambda p: -p[0]):  # first fit decreasing
        fits = (b for b, (used, _) in enumerate(batches) if used + tokens <= budget)
        if (b := next(fits, None)) is None:
            batches.append((tokens, piece))
        else:
            batches[b] = (batches[b][0] + tokens, batches[b][1] + piece)
    while len(batches) % ranks:
        batches.sort(key=lambda batch: (len(batch[1]) > 1, batch[0]))
        largest = batches.pop()[1]
        halves = largest[: (len(largest) + 1) // 2], largest[(len(largest) + 1) // 2 :]
        batches += [(trie(Ragged.of([sequences[i] for i in half])).tokens, half) for half in halves]
    batches.sort(key=lambda batch: -batch[0])
    out: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in range(0, len(batches), ranks):  # the largest of each round to who has the least so far
        least = sorted(range(ranks), key=load.__getitem__)
        for rank, (tokens, batch) in zip(least, batches[i : i + ranks], strict=True):
            out[rank].append(batch)
            load[rank] += tokens
    return out


def _cut(indices: Sequence[int], sequences: Sequence[Sequence[int]], budget: int) -> list[tuple[int, list[int]]]:
    """Sequences in the order of their trie, cut wherever its tokens would exceed the budget; with the tokens."""
    tree = trie(Ragged.of([sequences[i] for i in indices]))
    added = np.zeros(len(indices), np.int64)  # tokens that each adds to those before it
    np.add.at(added, tree.first[:-1], tree.end - tree.start)
    pieces: list[tuple[int, list[int]]] = []
    for i, new in zip((indices[i] for i in tree.order.tolist()), added.tolist(), strict=True):
        if pieces and pieces[-1][0] + new <= budget:
            pieces[-1] = (pieces[-1][0] + new, [*pieces[-1][1], i])
        else:
            pieces.append((len(sequences[i]), [i]))
    return pieces


def _sequences(rollouts: Sequence[Rollout], heads: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What the model reads: the last token predicts nothing that is needed."""
    return [head + r.response_ids[:-1] for head, r in zip(heads, rollouts, strict=True)]


@torch.no_grad()
def unpackable(model: Model) -> str:
    """Why the model cannot be trained packed; "" when it can, which two sequences with a common prefix have shown."""
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    if getattr(model.config, "attn_logit_softcapping", None):
        return "the model caps its attention logits, which tree attention does not know"
    if model.window is not None:
        return f"the model has a sliding window of {model.window} tokens, which tree attention does not know"
    if not getattr(model.lm, "_supports_attention_backend", False):
        return f"{type(model.lm).__name__} has an attention of its own, which tree attention cannot replace"
    if model.device.type not in ("cpu", "cuda"):
        return f"tree attention has no kernels for {model.device.type}"
    if model.device.type == "cuda" and (model.lm.dtype == torch.float32 or head_dim % 8 or head_dim > 256):
        return "tree attention on a GPU takes bfloat16 (model.dtype) and attention heads of 8, 16, ... 256"
    rows = [[i % model.config.vocab_size for i in row] for row in ((1, 2, 3, 4, 5), (1, 2, 3, 6, 7))]
    plain = model.hidden(torch.tensor(rows, device=model.device), use_cache=False)[:, 2:].flatten(0, 1)
    try:
        packed = packed_hidden(model, Pack.of(rows, [2, 2], model.device, min_saving=1))
    except UserError as error:
        return str(error)
    tolerance = 1e-3 if model.lm.dtype == torch.float32 else 0.1
    if not torch.allclose(packed, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max())):
        return "the model's hidden states are others when packed: its layers see more than a token's ancestors"
    return ""
