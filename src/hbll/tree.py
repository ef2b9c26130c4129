"""The binary tree over the nodes 0..N of a network, and the paths through it.

Node 0 is the embedded input, node N the label, nodes 1..N-1 own one block each. The interval (0, N) is split at the floor
of its middle, and so are its halves, until every interval has length one. The node that splits an interval (i, j) has the
*left parent* i and the *right parent* j. For N = 2^D the node n lies 2^d(n) from either parent, d(n) being the number of
its trailing zero bits (arXiv 2606.21497, section 3).
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

__all__ = ["Path", "Tree", "format_path"]

Path: TypeAlias = tuple[int, ...]
"""The blocks that a path visits, in order: without node 0 and node N."""


def format_path(path: Path) -> str:
    """The name of a path: its blocks joined by dashes, ``4-6-7``; of one block ``block-4``, for ``4`` is their number."""
    return f"block-{path[0]}" if len(path) == 1 else "-".join(map(str, path))


class Tree:
    """The binary tree over nodes 0..N.

    Args:
        nodes: N, at least 2: the number of blocks plus one.

    Raises:
        ValueError: N is below 2, a network without a block.
    """

    def __init__(self, nodes: int) -> None:
        if nodes < 2:
            raise ValueError(f"a tree needs at least one block, so at least 2 nodes after node 0; got N = {nodes}")
        self.nodes = nodes
        self._parents: dict[int, tuple[int, int]] = {}
        levels = []
        intervals = [(0, nodes)]
        while intervals := [(i, j) for i, j in intervals if j - i > 1]:
            level = {(i + j) // 2: (i, j) for i, j in intervals}
            self._parents.update(level)
            levels.append(tuple(level))
            intervals = [half for n, (i, j) in level.items() for half in ((i, n), (n, j))]
        self.levels: tuple[tuple[int, ...], ...] = tuple(levels)
        """The nodes 1..N-1 level by level, coarsest first: ceil(log2 N) levels. Parents lie in earlier levels."""

    def __repr__(self) -> str:
        return f"Tree(nodes={self.nodes})"

    def interval(self, n: int) -> tuple[int, int]:
        """The interval (left parent, right parent) that node n splits."""
        return self._parents[n]

    def left(self, n: int) -> int:
        """The left parent of node n: the node whose state block n reads."""
        return self._parents[n][0]

    def right(self, n: int) -> int:
        """The right parent of node n: the node whose target its own block is to predict from node n's state."""
        return self._parents[n][1]

    @property
    def chain(self) -> Path:
        """The deployed network: all blocks in order."""
        return tuple(range(1, self.nodes))

    @property
    def rim(self) -> Path:
        """The right edge of the tree: the nodes whose right parent is the label, ``4-6-7`` at N = 8."""
        return tuple(n for n in range(1, self.nodes) if self.right(n) == self.nodes)

    @property
    def rim_paths(self) -> list[Path]:
        """The rim cut short after 1, 2, .. blocks: ``block-4``, ``4-6``, ``4-6-7`` at N = 8."""
        return [self.rim[:k] for k in range(1, len(self.rim) + 1)]

    def paths(self) -> Iterator[Path]:
        """All paths from node 0 to node N, lazily, in an order that is not specified otherwise."""
        return (path for path in self._between(0, self.nodes) if path)

    def _between(self, i: int, j: int) -> Iterator[Path]:
        yield ()
        if j - i > 1:
            n = (i + j) // 2
            for before in self._between(i, n):
                for after in self._between(n, j):
                    yield (*before, n, *after)

    def count_paths(self) -> int:
        """The number of paths, P(floor(N/2)) P(ceil(N/2)) with P(1) = 1, P(L) = 1 + P(floor(L/2)) P(ceil(L/2))."""
        known = {1: 1}

        def arcs(length: int) -> int:
            if length not in known:
                known[length] = 1 + arcs(length // 2) * arcs(length - length // 2)
            return known[length]

        return arcs(self.nodes // 2) * arcs(self.nodes - self.nodes // 2)

    def path(self, blocks: int) -> Path:
        """The path with a given number of blocks: of those the lexicographically largest (block-4, 4-6, 4-6-7, 4-5-6-7, ..).

        Raises:
            ValueError: the number of blocks is not within 1..N-1.
        """
        if not 1 <= blocks < self.nodes:
            raise ValueError(f"a path has between 1 and {self.nodes - 1} blocks here; got {blocks}")
        return self._largest(0, self.nodes, blocks)

    def _largest(self, i: int, j: int, blocks: int) -> Path:
        # Every path inside (i, j) but the direct arc visits the middle. The fewer nodes before it, the larger the first one.
        if blocks == 0:
            return ()
        n = (i + j) // 2
        before = max(0, blocks - (j - n))
        return (*self._largest(i, n, before), n, *self._largest(n, j, blocks - 1 - before))

    def check_path(self, path: Sequence[int]) -> Path:
        """The path as a tuple, once every step of it is known to be an arc of the tree.

        Raises:
            ValueError: a block is not in 1..N-1, or a step is no arc; the message names it.
        """
        if not path:
            raise ValueError("a path visits at least one block")
        for n in path:
            if not 1 <= n < self.nodes:
                raise ValueError(f"{format_path(tuple(path))} is not a path: blocks are numbered 1 to {self.nodes - 1}")
        for a, b in pairwise((0, *path, self.nodes)):
            if not (b < self.nodes and self.left(b) == a) and not (a > 0 and self.right(a) == b):
                after = sorted({n for n in self.chain if self.left(n) == a} | ({self.right(a)} if a else set()))
                where = ["the head" if n == self.nodes else str(n) for n in after]
                step = f"from {a or 'the input'} to {'the head' if b == self.nodes else b}"
                raise ValueError(
                    f"{format_path(tuple(path))} is not a path: the tree has no arc {step}, only to {', '.join(where)}"
                )
        return tuple(path)

    def parse(self, text: str) -> Path:
        """The path that a user names: ``4-6-7``, ``block-4``, ``chain`` or ``rim``, or by its number of blocks, ``3``.

        Raises:
            ValueError: the text names no path of this tree.
        """
        if text in ("chain", "rim"):
            return self.chain if text == "chain" else self.rim
        if re.fullmatch(r"\d+", text):
            return self.path(int(text))
        if not re.fullmatch(r"block-\d+|\d+(-\d+)+", text):
            raise ValueError(
                f"{text!r} is not a path: write its blocks joined by dashes, such as 4-6-7, or block-4, or their number"
            )
        return self.check_path([int(block) for block in re.findall(r"\d+", text)])
