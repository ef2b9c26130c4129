"""Steps of stream and greedy, transcribed stage by stage from the pseudo-code of the specification (section 6).

It shares no code with hbll. Networks have no context.
"""

from itertools import accumulate, pairwise

import torch.nn.functional as F
from tests.oracles.tree_step import parents


def next_position(n, position, last, kind):
    """Where the output of stage n jumps from ``position``; None if to the head."""
    if position == last or kind == "none":
        return None
    if kind == "last":
        return last
    if kind == "right":
        (right,) = (j for level in parents(last + 1) for m, _, j in level if m == position)
        return right if right <= last else None
    # n -> n + 1 -> n + 3 -> n + 7 .. -> S
    distance = 2 * (position - n) + 1
    return min(n + distance, last)


def jumps(n, last, kind):
    """All of them."""
    position, found = n, []
    while (position := next_position(n, position, last, kind)) is not None:
        found.append(position)
    return found


class StreamStep:
    """Every stage by itself, with what is in flight; batches are of any size.

    Args:
        size: blocks in a stage, or a number for every stage.
        kind: of spine.
        heads: those of all stages but the last, if not the network's.
        flight: whether stages work on successive batches, or all on the one at hand.
    """

    def __init__(self, net, size, kind="doubling", heads=(), flight=True):
        self.net, self.kind, self.flight = net, kind, flight
        blocks = list(net.blocks)
        borders = [*range(0, len(blocks), size), len(blocks)] if isinstance(size, int) else [0, *accumulate(size)]
        self.stages = [blocks[start:end] for start, end in pairwise(borders)]
        self.heads = [*heads, net.head] if heads else [net.head] * len(self.stages)
        self.inputs, self.labels = {}, {}

    def losses(self, x=None, y=None):
        """The loss of every stage that has an input; without a batch no new one comes in."""
        last = len(self.stages)
        if x is not None:
            self.inputs[1], self.labels[1] = self.net.embed(x), y
        found, later, later_labels = {}, {}, {}
        for n in range(1, last + 1):
            if n not in self.inputs:
                continue
            out = self.inputs[n]
            for block in self.stages[n - 1]:
                out = block(out)
            there = (later, later_labels) if self.flight else (self.inputs, self.labels)
            if n < last:
                there[0][n + 1], there[1][n + 1] = out.detach(), self.labels[n]
            current = out
            for position in jumps(n, last, self.kind):
                current = self.stages[position - 1][-1](current)
            logits = self.heads[n - 1](current)
            found[n] = F.cross_entropy(logits.flatten(0, -2), self.labels[n].flatten())
        self.inputs, self.labels = later, later_labels
        return found

    def loss(self, x=None, y=None):
        """Their sum."""
        return sum(self.losses(x, y).values())
