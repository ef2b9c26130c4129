"""Confidence exits for classifiers: a sample leaves at the first readout that is sure enough of its class.

How sure is enough is calibrated on held-out samples, for a loss of accuracy that one is ready to bear. The readouts are
those of stages (``rule.exits``), or the paths along the rim and then the chain; what they share is evaluated once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor

from hbll.calls import Context, Readout, check_shape, evaluate
from hbll.carry import map_tensors
from hbll.network import Chain
from hbll.tree import Path

__all__ = ["Exited", "calibrate", "classify", "confidence", "costs", "first_exits", "logits_at", "outputs_at"]


@dataclass(frozen=True)
class Exited:
    """Samples classified at the first readout that was sure enough."""

    logits: Tensor
    """Of that readout, (B, C)."""

    exits: Tensor
    """Its number, from 0, (B,)."""

    blocks: float
    """Blocks that were evaluated for a sample, on average."""


def confidence(logits: Tensor) -> Tensor:
    """The largest probability of a class: (..., C) -> (...)."""
    return logits.softmax(-1).amax(-1)


def costs(readouts: Sequence[Readout]) -> list[int]:
    """Blocks evaluated for a sample that leaves at each of the readouts, those before it having been tried.

    Blocks that a readout shares with earlier ones from the start on are evaluated once.
    """
    seen: set[tuple[int, ...]] = set()
    steps = []
    for readout in readouts:
        new = {readout.path[:n] for n in range(1, len(readout.path) + 1)} - seen
        steps.append(len(new) + readout.blocks - len(readout.path))  # and those of its own
        seen |= new
    return list(accumulate(steps))


def first_exits(confidences: Tensor, threshold: float) -> Tensor:
    """The first of S readouts with a confidence of at least the threshold, the last if there is none: (S, n) -> (n,)."""
    sure = confidences >= threshold
    sure[-1] = True
    return sure.int().argmax(0)


def calibrate(confidences: Tensor, right: Tensor, loss: float) -> float:
    """The smallest threshold, one for all readouts, with which accuracy is at most ``loss`` below the last readout's.

    Smaller thresholds cost less. Those between two neighbouring confidences let the same samples go: what is returned is one
    of the confidences, or infinity if no sample may leave before the end.

    Args:
        confidences: of S readouts in the order in which they are tried, (S, n).
        right: whether each is right, (S, n).
        loss: share of the samples.

    Raises:
        ValueError: the loss is negative.
    """
    if not loss >= 0:
        raise ValueError(f"the loss of accuracy to bear must not be negative; got {loss}")
    count = right.shape[1]
    # A sample leaves at a readout for the thresholds above all confidences before it, and up to its own.
    ends = confidences.double().cummax(0).values
    ends[-1] = torch.inf
    begins = torch.cat([torch.full_like(ends[:1], -torch.inf), ends[:-1]])
    places, order = torch.cat([begins.flatten(), ends.flatten()]).sort()
    weights = torch.cat([right.long().flatten(), -right.long().flatten()])[order]
    rights = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    thresholds = torch.cat([ends[:-1].unique(), ends.new_full((1,), torch.inf)])
    kept = rights[torch.searchsorted(places, thresholds)]
    allowed = int(right[-1].sum()) - kept <= loss * count + 1e-9  # which rounds
    return float(thresholds[allowed.nonzero()[0]])


@torch.no_grad()
def outputs_at(network: Chain, readouts: Sequence[Readout], x: Any) -> Iterator[Any]:
    """What each of the readouts makes of a batch, one after the other; blocks that they share from the start on are
    evaluated once.

    Raises:
        ValueError: as ``network(x, path=readout)``.
    """
    state, context = network.embedded(x)
    states: dict[Path, Tensor] = {(): state}
    forks = _forks(readouts)
    for readout in readouts:
        yield _output(network, readout, context, states, forks)


def logits_at(network: Chain, readouts: Sequence[Readout], x: Any) -> Tensor:
    """What each of the readouts makes of a batch, (S, B, C), as ``outputs_at`` has it."""
    return torch.stack(list(outputs_at(network, readouts, x)))


@torch.no_grad()
def classify(network: Chain, readouts: Sequence[Readout], x: Any, threshold: float) -> Exited:
    """Classifies a batch, each sample by the first of the readouts that is sure enough, and evaluates those no further that
    have left. With an infinite threshold all samples go straight to the last readout. Network and readouts should be in
    evaluation mode.

    Args:
        readouts: in the order in which they are tried; the last one takes all that are left.
        x: what embed takes, tensors whose first dimension is the sample.
        threshold: the least confidence to leave with, as ``calibrate`` gives it.
    """
    first = len(readouts) - 1 if threshold == torch.inf else 0
    readouts = readouts[first:]
    state, context = network.embedded(x)
    states: dict[Path, Tensor] = {(): state}
    forks = _forks(readouts)
    left = torch.arange(len(state), device=state.device)
    logits, exits = None, torch.zeros_like(left)
    for number, readout in enumerate(readouts):
        found = _output(network, readout, context, states, forks)
        logits = found.clone() if logits is None else logits.index_copy(0, left, found)
        exits[left] = number
        stay = confidence(found) < threshold
        left = left[stay]
        if not len(left):
            break
        states = {path: state[stay] for path, state in states.items()}
        if context:  # what of it is of each sample the embed alone knows
            context = network.embedded(_rows(x, left))[1]
    assert logits is not None
    evaluated = torch.tensor(costs(readouts), dtype=torch.float64)[exits.cpu()]
    return Exited(logits, first + exits, evaluated.mean().item())


def _forks(readouts: Sequence[Readout]) -> set[Path]:
    """The beginnings of paths up to which each readout shares the most blocks with one before it."""
    paths = [readout.path for readout in readouts]
    return {
        max((_common(path, before) for before in paths[:number]), key=len, default=())
        for number, path in enumerate(paths)
    }


def _common(path: Path, other: Path) -> Path:
    """The blocks that both begin with."""
    return tuple(n for n, m in takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False)))


def _output(network: Chain, readout: Readout, context: Context, states: dict[Path, Tensor], forks: set[Path]) -> Any:
    """What a readout makes of a batch, whose states after some beginnings of paths are known; those that it finds at forks
    are added to them."""
    path, of_stage = readout.path, readout.head is not None
    known = max((done for done in states if path[: len(done)] == done), key=len)
    state = states[known]
    if known and path != network.tree.chain and not of_stage:  # which the readouts that were here before may have been
        check_shape(f"block {known[-1]}", state, states[()])
    for place in range(len(known), len(path)):
        state = network.passed(path, place, state, context, of_stage)
        if (done := path[: place + 1]) in forks:
            states[done] = state
    return evaluate(network.reader(readout), state, context)


def _rows(x: Any, which: Tensor) -> Any:
    return map_tensors(lambda tensor: tensor[which], x)
