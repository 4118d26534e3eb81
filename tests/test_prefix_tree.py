from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast import prefix_tree
from fst_fast.errors import UserError
from fst_fast.prefix_tree import Node, Ragged, Trie, _csrc, build, trie, trie_python

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=25)
with_empty = st.lists(st.lists(st.integers(0, 2), max_size=9).map(tuple), max_size=25)


def path(nodes: list[Node], node: int, given: list[tuple[int, ...]]) -> tuple[int, ...]:
    n = nodes[node]
    above = path(nodes, n.parent, given) if n.parent >= 0 else ()
    assert n.start == len(above)
    return above + given[n.sequence][n.start : n.end]


@given(sequences, st.integers(1, 12))
@settings(max_examples=300)
def test_every_sequence_is_the_path_to_exactly_one_node(given: list[tuple[int, ...]], min_saving: int) -> None:
    nodes = build(given, min_saving=min_saving)
    found = {leaf: path(nodes, i, given) for i, node in enumerate(nodes) for leaf in node.leaves}
    assert found == dict(enumerate(given))
    assert sum(len(node.leaves) for node in nodes) == len(given)
    assert all(node.parent < i for i, node in enumerate(nodes))


def tokens(nodes: list[Node]) -> int:
    return sum(node.end - node.start for node in nodes)


@given(sequences)
@settings(max_examples=300)
def test_without_a_threshold_every_prefix_is_computed_once(given: list[tuple[int, ...]]) -> None:
    assert tokens(build(given, min_saving=1)) == len({s[:n] for s in given for n in range(1, len(s) + 1)})


@given(sequences, st.integers(1, 12))
@settings(max_examples=200)
def test_a_level_that_saves_too_little_is_computed_again_instead(given: list[tuple[int, ...]], min_saving: int) -> None:
    fine, coarse = build(given, min_saving=1), build(given, min_saving=min_saving)
    assert tokens(fine) <= tokens(coarse) <= sum(map(len, given))
    assert len(coarse) <= len(fine)


def columns(tree: Trie) -> list[list[int]]:
    names = ("parent", "start", "end", "size", "first", "leaf", "order", "subtree_sequences")
    return [getattr(tree, name).tolist() for name in names]


@given(with_empty)
@settings(max_examples=400)
def test_the_compiled_trie_is_its_python_twin(given: list[tuple[int, ...]]) -> None:
    assert columns(trie(Ragged.of(given))) == columns(trie_python(Ragged.of(given)))


def test_long_sequences_that_differ_anywhere_are_told_apart() -> None:
    """Common prefixes around the lengths that are compared at once, token ids over all 31 bits."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 1 << 31, 300).tolist()
    given = [tuple(base)]
    for at in (0, 1, 63, 64, 65, 127, 128, 129, 191, 255, 299):
        given += [tuple(base[:at]), (*base[:at], base[at] ^ 1, *base[at + 1 :]), (*base[:at], base[at] ^ (1 << 30))]
    found = trie(Ragged.of(given))
    assert columns(found) == columns(trie_python(Ragged.of(given)))
    assert found.tokens == len({s[:n] for s in given for n in range(1, len(s) + 1)})


def test_many_children_and_many_equal_sequences_grow_the_tables() -> None:
    given = [(i % 700, i % 3, *range(i % 5)) for i in range(3000)]
    assert columns(trie(Ragged.of(given))) == columns(trie_python(Ragged.of(given)))


@given(with_empty)
@settings(max_examples=200)
def test_a_subtree_holds_the_sequences_that_begin_with_its_tokens(given: list[tuple[int, ...]]) -> None:
    tree = trie(Ragged.of(given))
    for k in range(len(tree)):
        inside = tree.order[tree.first[k] : tree.first[k + tree.size[k]]].tolist()
        prefix = given[inside[0]][: tree.end[k]]
        assert sorted(inside) == [i for i, s in enumerate(given) if s[: len(prefix)] == prefix]
        assert tree.subtree_sequences[k] == len(inside)


@given(
    with_empty.flatmap(lambda s: st.tuples(st.just(s), st.lists(st.integers(0, 9), min_size=len(s), max_size=len(s))))
)
@settings(max_examples=300)
def test_the_cost_order_is_depth_first_with_the_costliest_branch_first(
    drawn: tuple[list[tuple[int, ...]], list[int]],
) -> None:
    given, cost = drawn
    tree = trie(Ragged.of(given))
    ranked = tree.by_cost(np.array(cost, float)).tolist()
    assert sorted(ranked) == list(range(len(given)))
    branches: dict[
        tuple[int, ...], list[tuple[int, int, int]]
    ] = {}  # of each prefix: costs of the branches below, as they come
    for k in range(len(tree)):
        inside = set(tree.order[tree.first[k] : tree.first[k + tree.size[k]]].tolist())
        places = [r for r, i in enumerate(ranked) if i in inside]
        assert places == list(range(places[0], places[0] + len(places)))  # never left and entered again
        prefix = given[next(iter(inside))][: tree.start[k]]
        branches.setdefault(prefix, []).append((places[0], -max(cost[i] for i in inside), k))
    for found in branches.values():
        ranks = [(c, k) for _, c, k in sorted(found)]
        assert ranks == sorted(ranks)  # equal ones in the order of their tokens


def test_shared_storage_gives_what_copies_give_and_is_not_read_again() -> None:
    one, other = tuple(range(50)), (*range(30), 99)
    shared = Ragged.of([one, other, one, one])
    assert len(shared.ids) == len(one) + len(other)
    copies = Ragged.of([one, other, (*one[:-1], one[-1]), (*one[:-1], one[-1])])
    assert len(copies.ids) == 3 * len(one) + len(other)
    assert columns(trie(shared)) == columns(trie(copies))
    overlapping = Ragged(np.arange(50, dtype=np.int32), np.array([0, 0, 10]), np.array([50, 20, 5]))
    assert columns(trie(overlapping)) == columns(trie_python(overlapping))


def test_prefixes_nested_a_thousand_deep_are_no_recursion() -> None:
    given = [(7,) * n for n in range(1, 1500)]
    assert columns(trie(Ragged.of(given))) == columns(trie_python(Ragged.of(given)))
    assert [node.parent for node in build(given, min_saving=1)] == list(range(-1, 1498))


def test_a_sequence_outside_the_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 is \[2, 2 \+ 3\) of 4 token ids"):
        trie(Ragged(np.zeros(4, np.int32), np.array([0, 2]), np.array([4, 3])))


def test_csrc_is_built_where_there_is_a_compiler() -> None:
    assert _csrc() is not None


def test_a_library_built_from_older_code_is_one_sentence_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = importlib.util.find_spec("_ctypes")  # some library without our functions
    monkeypatch.setattr(prefix_tree, "_csrc", functools.cache(_csrc.__wrapped__))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: stale)
    for _ in range(2):
        with pytest.raises(UserError, match=r"_ctypes\S* is older than this code: install again"):
            trie(Ragged.of([(1, 2)]))
