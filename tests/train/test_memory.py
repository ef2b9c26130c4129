"""The meter of peak memory; what rules need is in tests/rules/test_memory.py."""

import pytest
import torch
from torch import nn

from hbll import Chain, make_rule
from hbll.train.memory import peak_memory, step_memory

CPU = torch.device("cpu")


def test_the_peak_is_of_what_is_alive_at_once():
    def step():
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first  # 4000
        third = second[:500].view(5, 100)  # a view is nothing new
        third += 1  # nor is what is written in place
        fourth = torch.empty(250, dtype=torch.float64)  # 6000
        del second, fourth

    assert peak_memory(step, CPU) == 8000


def test_what_was_there_before_does_not_count():
    weight = torch.ones(1000)

    def step():
        (weight.t() * 2).sum()

    assert peak_memory(step, CPU) == 4000 + 4


def test_what_a_graph_keeps_counts_until_it_is_walked_back():
    weight = torch.ones(1000, requires_grad=True)

    def walked(blocks):
        def step():
            state = weight
            for _ in range(blocks):
                state = state.exp()  # keeps its result, which nothing else does
            state.sum().backward()

        return step

    # Forward all results are there, back besides the gradient that comes in and the one that goes out.
    assert peak_memory(walked(8), CPU) - peak_memory(walked(4), CPU) == 4 * 4000


@pytest.mark.parametrize("by", ["backward", "forward"])
def test_backpropagation_holds_every_state_of_the_chain(by):
    def peak(blocks, batch):
        layers = [nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(blocks)]
        network = Chain(embed=nn.Linear(16, 16), blocks=layers, head=nn.Linear(16, 2))
        return step_memory(make_rule("bp", network), torch.rand(batch, 16), torch.zeros(batch, dtype=int), by=by)

    # A sigmoid keeps its output, which is also what the next layer keeps: one state of 64 bytes a sample and block.
    growth = (peak(40, 512) - peak(20, 512)) / 20
    assert 512 * 64 <= growth <= 512 * 64 + 17 * 16 * 4
