"""The cost model: its limits, and its operations against those that torch counts."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hbll.recurrent import CELLS, Backpropagation, DepthCells, RecurrentNetwork, ScanRule
from hbll.recurrent.cost import Machine, backpropagation_cost, newton_cost, paper_cost, scan_cost

SIZES = {"batch": 128, "width": 64, "gates": 3}
COSTS = [
    backpropagation_cost(64),
    newton_cost(64, iterations=5),
    paper_cost(64, sweeps=4),
    scan_cost(64, chunk=4, sweeps=3, credit_sweeps=1, tree=True),
    scan_cost(64, chunk=4, sweeps=3, credit_sweeps=1, shared=True),
]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("other", COSTS)
def test_a_machine_of_endless_throughput_takes_the_spans(cost, other):
    machine = Machine(latency=1e-5, throughput=math.inf)
    assert machine.seconds(cost, **SIZES) / machine.seconds(other, **SIZES) == pytest.approx(cost.span / other.span)


@pytest.mark.parametrize("cost", COSTS)
def test_a_machine_without_latency_takes_the_operations(cost):
    machine, one = Machine(latency=0, throughput=1e12), backpropagation_cost(1)
    ratio = machine.seconds(cost, **SIZES) / machine.seconds(one, **SIZES)
    assert ratio == pytest.approx(cost.flops(**SIZES) / one.flops(**SIZES))
    if cost.carried == cost.products == 0:
        assert ratio == pytest.approx(cost.work / one.work)


# In place it takes as many.
COUNTED = {**flop_registry, torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm]}


class Operations(TorchDispatchMode):
    """Counts those of products; torch's FlopCounterMode cannot stand autograd.grad inside of a step."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in COUNTED:
            self.total += COUNTED[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def counted(rule, x, y) -> int:
    """Operations of a step's products, but for those of the input map and of the head."""
    with Operations() as operations:
        rule.backward(x, y)
    network = rule.network
    samples, length, _ = x.shape
    labels = length if network.every_step else 1
    apart = 2 * network.cell.weight_ih.numel() * length + 3 * network.head.weight.numel() * labels
    return operations.total - 2 * samples * apart


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("length", "chunk", "sweeps", "credit_sweeps"), [(8, 1, 3, 2), (24, 3, 2, 0), (16, 16, 1, 1)])
@pytest.mark.parametrize(("kind", "radix"), [("gru", 2), ("elman", 2), ("gru", 3), ("gru", 8)])
def test_the_operations_of_a_scan(kind, length, chunk, sweeps, credit_sweeps, radix, shared, every_step):
    network = RecurrentNetwork(DepthCells(CELLS[kind], 2, 5, 1), nn.Linear(5, 3), every_step)
    options = {"chunk": chunk, "sweeps": sweeps, "credit_sweeps": credit_sweeps}
    options |= {"radix": radix, "shared": shared}
    x, y = torch.randn(4, length, 2), torch.zeros(4, length, dtype=torch.long)
    cost = scan_cost(length, **options, every_step=every_step)
    found = counted(ScanRule(network, length, **options), x, y if every_step else y[:, 0])
    assert found == cost.flops(4, 5, network.cell.gates)


def test_the_operations_of_backpropagation():
    network = RecurrentNetwork(DepthCells(CELLS["gru"], 2, 5, 1), nn.Linear(5, 3))
    found = counted(Backpropagation(network), torch.randn(4, 8, 2), torch.zeros(4, dtype=torch.long))
    # Nobody asks for the gradient in the state before the first step.
    assert found == backpropagation_cost(8).flops(4, 5, 3) - 2 * 4 * network.cell.weight_hh.numel()
