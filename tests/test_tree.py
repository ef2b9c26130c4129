"""The tree and its paths. Oracles: the definition by recursion, the recurrence, and brute force over all subsets."""

from itertools import combinations, islice, pairwise
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbll.tree import Tree, format_path

NODES = st.integers(2, 200)
SMALL = range(2, 15)


def midpoint(i, j, n):
    """The interval that n splits, found by descending from (i, j)."""
    middle = (i + j) // 2
    if n == middle:
        return i, j
    return midpoint(i, middle, n) if n < middle else midpoint(middle, j, n)


def arcs(last):
    """All arcs of the tree over 0..last but 0 -> last."""
    found = set()
    for n in range(1, last):
        i, j = midpoint(0, last, n)
        found |= {(i, n), (n, j)}
    return found - {(0, last)}


def brute_force(last):
    """Every subset of the blocks whose steps, from 0 to last, are all arcs."""
    allowed = arcs(last)
    found = set()
    for size in range(1, last):
        for blocks in combinations(range(1, last), size):
            if all(step in allowed for step in pairwise((0, *blocks, last))):
                found.add(blocks)
    return found


PATHS = {last: brute_force(last) for last in SMALL}


@given(NODES)
def test_every_block_appears_in_one_level_and_its_parents_lie_before(last):
    tree = Tree(last)
    assert tree.nodes == last
    assert sorted(n for level in tree.levels for n in level) == list(range(1, last))
    seen = {0, last}
    for level in tree.levels:
        for n in level:
            assert tree.left(n) < n < tree.right(n)
            assert {tree.left(n), tree.right(n)} <= seen
        seen |= set(level)


@given(NODES)
def test_number_of_levels_is_the_logarithm_rounded_up(last):
    assert len(Tree(last).levels) == ceil(log2(last))


@given(NODES)
def test_intervals_are_split_at_the_floor_of_the_middle(last):
    tree = Tree(last)
    for n in range(1, last):
        assert tree.interval(n) == (tree.left(n), tree.right(n)) == midpoint(0, last, n)


@pytest.mark.parametrize("depth", range(1, 9))
def test_powers_of_two_give_the_papers_levels(depth):
    tree = Tree(2**depth)
    assert len(tree.levels) == depth
    for n in range(1, 2**depth):
        zeros = len(bin(n)) - len(bin(n).rstrip("0"))
        assert tree.interval(n) == (n - 2**zeros, n + 2**zeros)
        assert n in tree.levels[depth - 1 - zeros]


@pytest.mark.parametrize("last", SMALL)
def test_paths_are_those_of_brute_force_each_once(last):
    found = list(Tree(last).paths())
    assert len(found) == len(set(found))
    assert set(found) == PATHS[last]


@pytest.mark.parametrize("last", SMALL)
def test_count_is_that_of_brute_force(last):
    assert Tree(last).count_paths() == len(PATHS[last])


@given(NODES)
def test_count_follows_the_recurrence(last):
    arcs = [0, 1]
    for length in range(2, last + 1):
        arcs.append(1 + arcs[length // 2] * arcs[length - length // 2])
    assert Tree(last).count_paths() == arcs[last // 2] * arcs[last - last // 2] == arcs[last] - 1


def test_the_counts_that_the_specification_names():
    assert [Tree(2**depth).count_paths() for depth in (1, 2, 3, 4)] == [1, 4, 25, 676]


@settings(deadline=None)
@given(NODES)
def test_paths_are_lazy_and_run_from_the_input_to_the_label(last):
    tree, allowed = Tree(last), arcs(last)
    for path in islice(tree.paths(), 50):  # there are more than 10^20 at N = 200
        assert all(step in allowed for step in pairwise((0, *path, last)))
        assert tree.check_path(path) == path


@pytest.mark.parametrize("last", SMALL)
def test_path_of_k_blocks_is_the_lexicographically_largest(last):
    tree = Tree(last)
    for blocks in range(1, last):
        assert tree.path(blocks=blocks) == max(path for path in PATHS[last] if len(path) == blocks)


@given(NODES, st.data())
def test_a_path_of_every_number_of_blocks_exists(last, data):
    tree = Tree(last)
    blocks = data.draw(st.integers(1, last - 1))
    path = tree.path(blocks=blocks)
    assert len(path) == blocks
    assert tree.check_path(path) == path


def test_the_paths_that_the_specification_names():
    tree = Tree(8)
    assert [tree.path(blocks=k) for k in (1, 2, 3, 4, 7)] == [
        (4,),
        (4, 6),
        (4, 6, 7),
        (4, 5, 6, 7),
        (1, 2, 3, 4, 5, 6, 7),
    ]
    assert sum(len(path) == 3 for path in tree.paths()) == 5
    assert tree.chain == (1, 2, 3, 4, 5, 6, 7)
    assert tree.rim == (4, 6, 7)
    assert tree.rim_paths == [(4,), (4, 6), (4, 6, 7)]


@given(NODES)
def test_chain_and_rim_are_paths(last):
    tree = Tree(last)
    assert tree.check_path(tree.chain) == tuple(range(1, last))
    for path in tree.rim_paths:
        assert tree.check_path(path) == path
    assert tree.rim_paths[-1] == tree.rim
    assert len(tree.rim) == len(tree.rim_paths)
    # Along the rim every node predicts the label.
    assert {tree.right(n) for n in tree.rim} == {last}
    assert {n for n in range(1, last) if tree.right(n) == last} == set(tree.rim)


@pytest.mark.parametrize("last", range(2, 11))
def test_check_path_accepts_exactly_the_paths(last):
    tree = Tree(last)
    for size in range(1, last):
        for blocks in combinations(range(1, last), size):
            if blocks in PATHS[last]:
                assert tree.check_path(list(blocks)) == blocks
                assert tree.parse(format_path(blocks)) == blocks
            else:
                with pytest.raises(ValueError, match=f"{format_path(blocks)} is not a path"):
                    tree.check_path(blocks)
                with pytest.raises(ValueError, match="is not a path"):
                    tree.parse(format_path(blocks))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ((), "a path visits at least one block"),
        ((0, 4), "0-4 is not a path: blocks are numbered 1 to 7"),
        ((4, 8), "4-8 is not a path: blocks are numbered 1 to 7"),
        ((4, -1), "numbered 1 to 7"),
        ((4, 4), "4-4 is not a path"),
        ((6, 4), "6-4 is not a path"),
        ((3, 4), "no arc from the input to 3, only to 1, 2, 4"),
        ((4, 7), "no arc from 4 to 7, only to 5, 6, the head"),
        ((1,), "no arc from 1 to the head, only to 2"),
        ((4, 5), "no arc from 5 to the head, only to 6"),
    ],
)
def test_what_is_no_path_is_named(path, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tree(8).check_path(path)


@pytest.mark.parametrize(
    "text", ["", "four", "4_6", "4--6", "-", "4-6-", "-4", "4,6", "4.0", "full", "block-", "block-4-6", "block-4 "]
)
def test_what_names_no_path_is_quoted(text):
    with pytest.raises(ValueError, match=r"is not a path"):
        Tree(8).parse(text)


def test_names_of_paths():
    tree = Tree(8)
    assert format_path((4, 6, 7)) == "4-6-7"
    assert tree.parse("chain") == tree.chain
    assert tree.parse("rim") == (4, 6, 7)
    assert format_path((4,)) == "block-4"
    assert tree.parse("block-4") == (4,)
    assert [tree.parse(str(blocks)) for blocks in range(1, 8)] == [tree.path(blocks) for blocks in range(1, 8)]
    with pytest.raises(ValueError, match="between 1 and 7 blocks here; got 8"):
        tree.parse("8")


@given(NODES, st.data())
def test_a_name_that_is_printed_is_read_as_the_same_path(last, data):
    path = Tree(last).path(data.draw(st.integers(1, last - 1)))
    assert Tree(last).parse(format_path(path)) == path


@pytest.mark.parametrize("blocks", [0, -1, 8, 100])
def test_number_of_blocks_outside_the_tree(blocks):
    with pytest.raises(ValueError, match=f"between 1 and 7 blocks here; got {blocks}"):
        Tree(8).path(blocks=blocks)


@pytest.mark.parametrize("nodes", [1, 0, -3])
def test_a_tree_needs_a_block(nodes):
    with pytest.raises(ValueError, match=f"at least one block.*got N = {nodes}"):
        Tree(nodes)


def test_nodes_outside_1_to_n_minus_1_have_no_parents():
    for n in (0, 8):
        with pytest.raises(KeyError):
            Tree(8).left(n)
