"""Token trie over requests: who shares which prefix. Rollout scheduling walks it; the hot loop is in csrc/."""

from __future__ import annotations

import ctypes
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Node:
    """Tokens [start, end) of sequence `sequence` (any one that passes here), below `parent`."""

    sequence: int  # index of a sequence that contains this node's tokens
    start: int
    end: int
    parent: int  # index into PrefixTree.nodes; -1 = top level
    leaves: list[int] = field(default_factory=list)  # sequences that end exactly here


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """`nodes` in depth-first order (parents before children); `order` = sequences in trie order, siblings adjacent."""

    nodes: list[Node]
    order: list[int]

    @property
    def tokens(self) -> int:
        """Tokens to compute when every node is computed once."""
        return sum(node.end - node.start for node in self.nodes)


def build(sequences: Sequence[Sequence[int]], *, min_saving: int = 1) -> PrefixTree:
    """Radix trie of token sequences. A shared stretch becomes a node of its own only where computing it once saves at
    least `min_saving` tokens; a smaller one is computed again by each child (every level costs one forward pass)."""
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    shared = common_prefixes([sequences[i] for i in order])
    nodes: list[Node] = []

    def grow(low: int, high: int, depth: int, parent: int) -> None:
        """Nodes for order[low:high], which share their first `depth` tokens, already covered by `parent`."""
        while low < high:
            # the run of sequences that go on together after `depth`
            end = low + 1
            while end < high and shared[end] > depth:
                end += 1
            first = order[low]
            if end == low + 1:
                nodes.append(Node(first, depth, len(sequences[first]), parent, [first]))
            else:
                add_run(low, end, depth, parent)
            low = end

    def add_run(low: int, end: int, depth: int, parent: int) -> None:
        common = min(shared[low + 1 : end])
        first = order[low]
        here = [i for i in order[low:end] if len(sequences[i]) == common]  # they sort first
        children = end - low - len(here)
        groups = children + bool(here)
        if here or (common - depth) * (groups - 1) >= min_saving:
            nodes.append(Node(first, depth, common, parent, here))
            grow(low + len(here), end, common, len(nodes) - 1)
            return
        # not worth a level: split at the shared stretch but let each child compute it from `depth`
        start = low
        for i in range(low + 1, end + 1):
            if i == end or shared[i] <= common:
                if i - start == 1:
                    nodes.append(Node(order[start], depth, len(sequences[order[start]]), parent, [order[start]]))
                else:
                    add_run(start, i, depth, parent)
                start = i

    grow(0, len(order), 0, -1)
    return PrefixTree(nodes, order)


def common_prefixes(ordered: Sequence[Sequence[int]]) -> list[int]:
    """Length of the common prefix of each sequence with the one before it (0 for the first)."""
    if not ordered:
        return []
    library = _csrc()
    if library is None:
        return common_prefixes_python(ordered)
    lengths = np.fromiter((len(s) for s in ordered), dtype=np.int64, count=len(ordered))
    flat = np.fromiter((t for s in ordered for t in s), dtype=np.int64, count=int(lengths.sum()))
    out = np.empty(len(ordered), dtype=np.int64)
    library.fst_common_prefixes(flat.ctypes.data, lengths.ctypes.data, len(ordered), out.ctypes.data)
    return out.tolist()


def common_prefixes_python(ordered: Sequence[Sequence[int]]) -> list[int]:
    """The same in Python: oracle of the tests, and the fallback where csrc was not built."""
    out = [0] * len(ordered)
    for i in range(1, len(ordered)):
        a, b = ordered[i - 1], ordered[i]
        n = min(len(a), len(b))
        out[i] = next((k for k in range(n) if a[k] != b[k]), n)
    return out


_library: list[ctypes.CDLL | None] = []


def _csrc() -> ctypes.CDLL | None:
    """The compiled helpers, loaded once; None (and one warning) where the install had no compiler."""
    if not _library:
        spec = importlib.util.find_spec("fst_fast._csrc")
        if spec is None or spec.origin is None:
            warnings.warn("fst_fast._csrc is not built (no C++ compiler at install?): using Python", stacklevel=3)
            _library.append(None)
        else:
            library = ctypes.CDLL(spec.origin)
            pointer = ctypes.c_void_p
            library.fst_common_prefixes.argtypes = [pointer, pointer, ctypes.c_int64, pointer]
            library.fst_common_prefixes.restype = None
            _library.append(library)
    return _library[0]
