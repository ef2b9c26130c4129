"""Work and span as they really are: every tensor operation that runs, with the depth of what it depends on."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbll import Chain

BATCH, WIDTH, CLASSES = 2, 3, 3
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.bmm.default}
FRESH = {aten.ones_like.default, aten.zeros_like.default, aten.new_zeros.default, aten.empty_like.default}
"""What looks at the shape of a tensor alone, and so waits for nothing."""


class Meter(TorchDispatchMode):
    """Counts matrix products, and the longest chain of them in which each needs the one before.

    A block is one matrix here, and embed and head are none: its forward, its vector-Jacobian product for the input and
    that for the parameters are one product each. Depths belong to storages, so that views and detached tensors keep them.
    """

    def __init__(self):
        super().__init__()
        self.work = self.span = 0
        self._depths = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        out = func(*args, **(kwargs or {}))
        read = [] if func in FRESH else inputs
        depth = max((self._depths.get(t.untyped_storage()._cdata, (0, None))[0] for t in read), default=0)
        if func in PRODUCTS:
            self.work += out.numel() * inputs[0].shape[-1] / (BATCH * WIDTH * WIDTH)
            depth += 1
            self.span = max(self.span, depth)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self._depths[storage._cdata] = depth, storage  # kept alive: its address must not be used again
        return out


class Scale(nn.Module):
    """One factor per feature: parameters without a matrix product."""

    def __init__(self):
        super().__init__()
        self.factors = nn.Parameter(torch.randn(WIDTH))

    def forward(self, state):
        return self.factors * state


def countable(nodes):
    """A network whose blocks are one matrix each; embed and head are none."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(nodes - 1)]
    return Chain(embed=Scale(), blocks=blocks, head=Scale())


def batch():
    """A mini-batch for it."""
    return torch.randn(BATCH, WIDTH), torch.tensor([0, 2])


def measure(rule, steps=1):
    """Counted and measured (work, span) of a step, after so many others: the first ones record and fill pipelines."""
    for _ in range(steps):
        rule(*batch())
    x, y = batch()
    parameters = [p for p in rule.parameters() if p.requires_grad]
    with Meter() as meter:
        step = rule(x, y)
        torch.autograd.grad(step.loss, parameters, torch.ones(()), materialize_grads=True)
    return (step.work, step.span), (meter.work, meter.span)
