from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.prefix_tree import PrefixTree, _csrc, build, common_prefixes, common_prefixes_python

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=25)


def path(tree: PrefixTree, node: int, given: list[tuple[int, ...]]) -> tuple[int, ...]:
    n = tree.nodes[node]
    above = path(tree, n.parent, given) if n.parent >= 0 else ()
    assert n.start == len(above)
    return above + given[n.sequence][n.start : n.end]


@given(sequences, st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_every_sequence_is_the_path_to_exactly_one_node(given: list[tuple[int, ...]], min_saving: int) -> None:
    tree = build(given, min_saving=min_saving)
    found = {leaf: path(tree, i, given) for i, node in enumerate(tree.nodes) for leaf in node.leaves}
    assert found == dict(enumerate(given))
    assert sum(len(node.leaves) for node in tree.nodes) == len(given)
    assert all(node.parent < i for i, node in enumerate(tree.nodes))
    assert [given[i] for i in tree.order] == sorted(given)


@given(sequences)
@settings(max_examples=300, deadline=None)
def test_without_a_threshold_every_prefix_is_computed_once(given: list[tuple[int, ...]]) -> None:
    assert build(given).tokens == len({s[:n] for s in given for n in range(1, len(s) + 1)})


@given(sequences, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_level_that_saves_too_little_is_computed_again_instead(given: list[tuple[int, ...]], min_saving: int) -> None:
    fine, coarse = build(given), build(given, min_saving=min_saving)
    assert fine.tokens <= coarse.tokens <= sum(map(len, given))
    assert len(coarse.nodes) <= len(fine.nodes)


@given(sequences)
@settings(max_examples=200, deadline=None)
def test_compiled_and_python_prefix_lengths_agree(given: list[tuple[int, ...]]) -> None:
    ordered = sorted(given)
    assert common_prefixes(ordered) == common_prefixes_python(ordered)


def test_csrc_is_built_where_there_is_a_compiler() -> None:
    assert _csrc() is not None
