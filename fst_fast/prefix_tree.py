"""Token trie: who shares which prefix. Scheduling, prefill and packing walk it; the hot loop is in csrc/."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fst_fast.errors import UserError


@dataclass(frozen=True, slots=True)
class Ragged:
    """Token sequences in one array: number i is ids[starts[i] : starts[i] + lengths[i]]. Equal ones may share storage,
    and are then not read twice."""

    ids: np.ndarray  # int32 [tokens]
    starts: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int64 [n]

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> Ragged:
        """From Python sequences; one object that comes several times is stored once."""
        stored: dict[int, int] = {}  # id of an object -> its place in `unique`
        place = [stored.setdefault(id(s), len(stored)) for s in sequences]
        unique: list[Sequence[int]] = [()] * len(stored)
        for s, i in zip(sequences, place, strict=True):
            unique[i] = s
        lengths = np.fromiter(map(len, unique), np.int64, len(unique))
        ids = np.empty(int(lengths.sum()), np.int32)
        starts = np.cumsum(lengths) - lengths
        for s, start in zip(unique, starts.tolist(), strict=True):
            ids[start : start + len(s)] = np.fromiter(s, np.int32, len(s))
        return Ragged(ids, starts[place], lengths[place])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.starts[i] : self.starts[i] + self.lengths[i]]


@dataclass(frozen=True, slots=True)
class Trie:
    """Radix trie as arrays over its nodes, depth-first (parents before children, children by their first token).

    Node k holds the tokens [start[k], end[k]) of every sequence that passes it; its subtree is the nodes
    [k, k + size[k]), its sequences are order[first[k] : first[k + size[k]]].
    """

    parent: np.ndarray  # int64 [nodes]; -1 = top level
    start: np.ndarray  # int64 [nodes]
    end: np.ndarray  # int64 [nodes]
    size: np.ndarray  # int64 [nodes]
    first: np.ndarray  # int64 [nodes + 1]
    leaf: np.ndarray  # int64 [n]: the node at which each sequence ends; -1 for an empty one
    order: np.ndarray  # int64 [n]: sequences depth-first, siblings adjacent, equal ones by index

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def tokens(self) -> int:
        """Tokens to compute when every shared prefix is computed once."""
        return int((self.end - self.start).sum())

    @property
    def subtree_sequences(self) -> np.ndarray:
        """int64 [nodes]: sequences that end at each node or below it."""
        return self.first[np.arange(len(self)) + self.size] - self.first[:-1]

    def by_cost(self, cost: np.ndarray) -> np.ndarray:
        """int64 [n]: depth-first, but of siblings the one with the costliest sequence below it first.

        `cost` is float [n], one per sequence; ties keep the order of tokens.
        """
        n, leaf, costs = len(self.order), self.leaf[self.order], cost[self.order].astype(np.float64)
        if not len(self):
            return self.order
        ends = np.stack([self.first[:-1], self.first[np.arange(len(self)) + self.size]], 1)
        costliest = np.maximum.reduceat(np.append(costs, -np.inf), ends.ravel())[::2]  # of each node's subtree
        # what hangs on a node, its sequences and then its children, shares out the node's places by cost
        above = np.concatenate([leaf, self.parent])
        worth = np.concatenate([np.where(leaf < 0, np.inf, costs), costliest])  # empty sequences hang on no node
        ranked = np.lexsort((-worth, above))
        taken = np.concatenate([np.ones(n, np.int64), self.subtree_sequences])[ranked]
        place = np.cumsum(taken) - taken
        first_of_node = np.append(True, np.diff(above[ranked]) != 0)
        place -= place[np.maximum.accumulate(np.where(first_of_node, np.arange(len(place)), 0))]
        offset = np.empty_like(place)
        offset[ranked] = place
        # where a node's places begin: the sum of the offsets on its path, by doubling; [-1] is the root
        begin, up = np.append(offset[n:], 0), np.append(self.parent, -1)
        while (up >= 0).any():
            begin, up = begin + begin[up], up[up]
        out = np.empty(n, np.int64)
        out[offset[:n] + begin[leaf]] = self.order
        return out


def trie(sequences: Ragged) -> Trie:
    """The radix trie of `sequences`. Raises ValueError when one reaches outside `ids`."""
    inside = (sequences.starts >= 0) & (sequences.lengths >= 0)
    inside &= sequences.starts + sequences.lengths <= len(sequences.ids)
    if not inside.all():
        i = int(np.flatnonzero(~inside)[0])
        raise ValueError(
            f"sequence {i} is [{sequences.starts[i]}, {sequences.starts[i]} + {sequences.lengths[i]}) of "
            f"{len(sequences.ids)} token ids; starts and lengths must lie inside"
        )
    library = _csrc()
    if library is None:
        return trie_python(sequences)
    n = len(sequences)
    given = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in ((sequences.ids, np.int32), (sequences.starts, np.int64), (sequences.lengths, np.int64))
    ]
    parent, start, end, size, first = (np.empty(2 * n + 1, np.int64) for _ in range(5))
    leaf, order = np.empty(n, np.int64), np.empty(n, np.int64)
    out = [parent, start, end, size, first, leaf, order]
    pointers = [array.ctypes.data for array in (*given, *out)]
    count = library.fst_prefix_tree(*pointers[:3], n, *pointers[3:])
    first[count] = n
    parent, start, end, size = (a[:count].copy() for a in (parent, start, end, size))
    return Trie(parent, start, end, size, first[: count + 1].copy(), leaf, order)


def trie_python(sequences: Ragged) -> Trie:
    """The same in Python, by sorting: oracle of the tests, and the fallback where csrc was not built."""
    given = [tuple(sequences[i].tolist()) for i in range(len(sequences))]
    order = sorted(range(len(given)), key=lambda i: given[i])  # stable: equal ones by index
    parent: list[int] = []
    start: list[int] = []
    end: list[int] = []
    first: list[int] = []
    leaf = [-1] * len(given)

    # ranges of `order` that all go on after their first `depth` tokens, those of node `above`
    stack = [(sum(not s for s in given), len(given), 0, -1)]
    while stack:
        low, high, depth, above = stack.pop()
        if low == high:
            continue
        a, stop = given[order[low]], low + 1
        while stop < high and given[order[stop]][depth] == a[depth]:
            stop += 1
        b = given[order[stop - 1]]  # sorted: what the first and the last share, all share
        common = next((k for k in range(depth, min(len(a), len(b))) if a[k] != b[k]), min(len(a), len(b)))
        node = len(parent)
        parent.append(above)
        start.append(depth)
        end.append(common)
        first.append(low)
        stack.append((stop, high, depth, above))
        while low < stop and len(given[order[low]]) == common:
            leaf[order[low]] = node
            low += 1
        stack.append((low, stop, common, node))
    size = [1] * len(parent)
    for k in range(len(parent) - 1, -1, -1):
        if parent[k] >= 0:
            size[parent[k]] += size[k]
    first.append(len(given))
    int64 = [np.array(column, np.int64) for column in (parent, start, end, size, first, leaf, order)]
    return Trie(*int64)


@dataclass(slots=True)
class Node:
    """Tokens [start, end) of sequence `sequence` (any one that passes here), below `parent`."""

    sequence: int  # index of a sequence that contains this node's tokens
    start: int
    end: int
    parent: int  # index of a node; -1 = top level
    leaves: list[int] = field(default_factory=list)  # sequences that end exactly here


def build(sequences: Sequence[Sequence[int]], *, min_saving: int) -> list[Node]:
    """Trie of non-empty token sequences for a prefill level by level, its nodes depth-first (parents before children).
    A shared stretch becomes a node of its own only where computing it once saves at least `min_saving` tokens; a
    smaller one is computed again by each child (every level costs one forward pass)."""
    fine = trie(Ragged.of(sequences))
    leaves: list[list[int]] = [[] for _ in range(len(fine))]
    for i in fine.order.tolist():
        leaves[fine.leaf[i]].append(i)
    sharing = fine.subtree_sequences.tolist()
    representative = fine.order[fine.first[:-1]].tolist()
    nodes: list[Node] = []
    kept: list[int] = []  # of each fine node: the coarse node that covers it or, if dissolved, its parent
    for k, (parent, end) in enumerate(zip(fine.parent.tolist(), fine.end.tolist(), strict=True)):
        above = kept[parent] if parent >= 0 else -1
        depth = nodes[above].end if above >= 0 else 0
        if leaves[k] or (end - depth) * (sharing[k] - 1) >= min_saving:
            nodes.append(Node(representative[k], depth, end, above, leaves[k]))
            above = len(nodes) - 1
        kept.append(above)
    return nodes


@functools.cache
def _csrc() -> ctypes.CDLL | None:
    """The compiled helpers, loaded once; None (and one warning) where the install had no compiler. UserError when they
    were built from older code."""
    spec = importlib.util.find_spec("fst_fast._csrc")
    if spec is None or spec.origin is None:
        warnings.warn("fst_fast._csrc is not built (no C++ compiler at install?): using Python", stacklevel=3)
        return None
    library = ctypes.CDLL(spec.origin)
    if not hasattr(library, "fst_prefix_tree"):
        raise UserError(f"{spec.origin} is older than this code: install again, e.g. pip install -e .")
    pointer = ctypes.c_void_p
    library.fst_prefix_tree.argtypes = [pointer, pointer, pointer, ctypes.c_int64, *[pointer] * 7]
    library.fst_prefix_tree.restype = ctypes.c_int64
    return library
