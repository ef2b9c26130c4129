"""One step of scan, transcribed stage by stage from the pseudo-code of the specification (section 6).

It shares no code with hbll. Networks have no context; stages are of ``size`` blocks, the last one may be shorter.
"""

import math
from itertools import islice

import torch
import torch.nn.functional as F
from tests.oracles.tree_step import parents
from torch import nn


def label_loss(net, state, y):
    """The mean cross-entropy of all samples, or of all their tokens."""
    return F.cross_entropy(net.head(state).flatten(0, -2), y.flatten())


def stages(net, size):
    """The stages as functions."""
    blocks = list(net.blocks)
    return [nn.Sequential(*blocks[start : start + size]) for start in range(0, len(blocks), size)]


def scan_step(net, x, y, sweeps, credit_sweeps, size=1, guess=None):
    """A step from guesses of h_1, h_2, .., by default z_0.

    Returns the loss, the corrected states h_0 .. h_S, those of the sweep before, and b_0 .. b_S.
    """
    f = stages(net, size)
    last = len(f)
    z0 = net.embed(x)
    start = z0.detach()
    h = [start, *([start] * last if guess is None else guess)]
    for _ in range(sweeps - 1):
        with torch.no_grad():
            rest = [f[m - 1](h[m - 1]) - h[m - 1] for m in range(1, last + 1)]
        h = [start] + [start + sum(rest[:n]) for n in range(1, last + 1)]
    before = h
    o = [None] + [f[n - 1](h[n - 1].detach()) for n in range(1, last + 1)]
    corrected = [z0] + [z0 + sum(o[m] - h[m - 1] for m in range(1, n + 1)) for n in range(1, last + 1)]
    corrected = [state.detach() for state in corrected]
    leaf = corrected[last].detach().requires_grad_()
    loss = label_loss(net, leaf, y)
    (at_head,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    b = [at_head] * (last + 1)
    for _ in range(credit_sweeps):
        differences = [None]
        for m in range(1, last + 1):
            source = h[m - 1].detach().requires_grad_()
            (pulled,) = torch.autograd.grad(f[m - 1](source), source, b[m])
            differences.append(pulled - b[m])
        b = [at_head + sum(differences[n + 1 :]) for n in range(last)] + [at_head]
    total = loss + sum((o[n] * b[n].detach()).sum() for n in range(1, last + 1)) + (z0 * b[0].detach()).sum()
    return total, corrected, before, b


def relative_change(states, before):
    """||new - old|| / ||new|| of h_1 .. h_S."""
    new, old = torch.stack(states[1:]), torch.stack(before[1:])
    return ((new - old).norm() / new.norm()).item()


def predicted(jumps, z0, guess="tree"):
    """T_n = jump_n(T_left(n)), or jump_n(z_0); every jump reads a detached state."""
    if guess == "star":
        return torch.stack([jump(z0.detach()) for jump in jumps])
    states = {0: z0.detach()}
    for level in parents(len(jumps) + 1):
        for n, left, _ in level:
            states[n] = jumps[n - 1](states[left].detach())
    return torch.stack([states[n] for n in range(1, len(jumps) + 1)])


def delay(stages, sweeps, credit_sweeps):
    """Steps that a batch needs to pass all stages but the last, at most K + K_c + 1 of them in each."""
    return math.ceil((stages - 1) / (sweeps + credit_sweeps + 1))


class AheadStep:
    """scan from the states of older weights, batch by batch and stage by stage; states as lists h_0, h_1, .."""

    def __init__(self, net, size, sweeps, credit_sweeps):
        self.net, self.size, self.sweeps, self.credit_sweeps = net, size, sweeps, credit_sweeps
        self.f = stages(net, size)
        self.delay = delay(len(self.f), sweeps, credit_sweeps)
        self.turns = math.ceil((len(self.f) - 1) / self.delay) if self.delay else 0
        self.queue = []

    def loss(self, x, y):
        """The loss of a step."""
        self.queue.append((x, y, [self.net.embed(x).detach()]))
        for _, _, states in self.queue:
            for stage in islice(self.f, len(states) - 1, len(states) - 1 + self.turns):
                states.append(stage(states[-1]).detach())
        if len(self.queue) > self.delay:
            x, y, states = self.queue.pop(0)
        else:
            states = [self.net.embed(x).detach()]
            for stage in self.f:
                states.append(stage(states[-1]).detach())
        return scan_step(self.net, x, y, self.sweeps, self.credit_sweeps, self.size, guess=states[1:])[0]
