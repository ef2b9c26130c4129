"""Work and span. Oracle: the tensor operations that really run, each with the depth of what it depends on."""

from math import ceil, log2

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hbll

BATCH, WIDTH = 2, 3
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default}


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
        depth = max((self._depths.get(t.untyped_storage()._cdata, (0, None))[0] for t in inputs), default=0)
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


def network(nodes):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(nodes - 1)]
    return hbll.TreeNetwork(embed=Scale(), blocks=blocks, head=Scale())


def measure(net, objective):
    """Counted and measured (work, span) of a step with its backward pass, the latter after everything is recorded."""
    x, y = torch.randn(BATCH, WIDTH), torch.tensor([0, 2])
    objective(net, x, y)
    parameters = [p for p in net.parameters() if p.requires_grad]
    with Meter() as meter:
        step = objective(net, x, y)
        torch.autograd.grad(step.loss, parameters, torch.ones(()), materialize_grads=True)
    return (step.work, step.span), (meter.work, meter.span)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("scope", ["block", "triplet", "tree"])
@pytest.mark.parametrize("boundary", ["posterior", "prior"])
@pytest.mark.parametrize("nodes", [2, 3, 5, 8, 11])
def test_counts_are_what_really_runs(nodes, boundary, scope, engine):
    objective = hbll.Objective("paper", boundary=boundary, scope=scope, engine=engine if nodes > 2 else "auto")
    counted, measured = measure(network(nodes), objective)
    assert counted == measured


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("inversion", ["none", "exact"])
@pytest.mark.parametrize("nodes", [4, 6, 8])
def test_other_inversions(nodes, inversion, engine):
    counted, measured = measure(
        network(nodes), hbll.Objective("paper", inversion=inversion, iterations=2, engine=engine)
    )
    if inversion == "none":
        assert counted[0] == measured[0]
        # The state's gradient is computed whether or not a target needs it; what nothing waits for may be shorter.
        assert counted[1] >= measured[1]
    else:
        assert counted == measured


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("frozen", ["embed", "head", "blocks.1"])
@pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
def test_frozen_parts(preset, frozen, engine):
    net = network(8)
    net.get_submodule(frozen).requires_grad_(False)
    (work, span), (really, longest) = measure(net, hbll.Objective(preset, engine=engine))
    # Stacked with others, a frozen block's products are made all the same.
    assert (work, span) == (really, longest)


@pytest.mark.parametrize("nodes", [2, 3, 8, 13])
def test_backpropagation(nodes):
    counted, measured = measure(network(nodes), hbll.Objective("bp"))
    assert counted == measured == (3 * (nodes - 1), 2 * (nodes - 1))


@pytest.mark.parametrize(("path", "blocks"), [("4", 1), ("4-6", 2), ("rim", 3), ([1, 2, 4, 6], 4)])
def test_backpropagation_along_a_path(path, blocks):
    counted, measured = measure(network(8), hbll.Objective("bp", path=path))
    assert counted == measured == (3 * blocks, 2 * blocks)


@pytest.mark.parametrize("depth", range(2, 9))
def test_formulas_of_the_specification(depth):
    nodes = 2**depth
    net, x, y = network(nodes), torch.randn(BATCH, WIDTH), torch.tensor([0, 2])
    spans = {"paper": 3 * depth - 1, "tree": depth + 3}
    for preset, span in spans.items():
        level_by_level = hbll.Objective(preset, engine="batched")(net, x, y)
        node_by_node = hbll.Objective(preset, engine="loop")(net, x, y)
        assert level_by_level.span == span
        # The rim's arcs end in the head, which costs nothing: only a level that is waited for has the formula's span.
        assert node_by_node.span == span - 1
        backpropagation = 3 * (nodes - 1)
        assert 1.0 < node_by_node.work / backpropagation <= 2.0
        assert 1.0 < level_by_level.work / backpropagation <= 2.0


@pytest.mark.parametrize("nodes", [3, 5, 6, 7, 13, 100])
@pytest.mark.parametrize("preset", ["paper", "tree"])
def test_span_grows_with_the_logarithm_for_any_number_of_nodes(nodes, preset):
    net, x, y = network(nodes), torch.randn(BATCH, WIDTH), torch.tensor([0, 2])
    depth = ceil(log2(nodes))
    bound = 3 * depth - 1 if preset == "paper" else depth + 3
    for engine in ("loop", "batched"):
        step = hbll.Objective(preset, engine=engine)(net, x, y)
        assert depth < step.span <= bound
        assert step.work <= 2 * 3 * (nodes - 1)


def test_work_by_hand():
    # N = 4, block scope, node by node. Forward: 3 priors and the arc 1 -> 2. Its backward: input and parameters.
    # KL: parameters of 3 blocks, and the input of those that read the embed, blocks 1 and 2.
    counted, measured = measure(network(4), hbll.Objective("paper", engine="loop"))
    assert counted[0] == measured[0] == 3 + 1 + 2 + 3 + 2


def test_counts_are_complete_before_the_backward_pass():
    net, x, y = network(8), torch.randn(BATCH, WIDTH), torch.tensor([0, 2])
    step = hbll.Objective("paper")(net, x, y)
    before = step.work, step.span
    step.loss.backward()
    assert (step.work, step.span) == before
