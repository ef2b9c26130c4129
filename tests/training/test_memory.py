import torch
from torch import nn

from hbll import Objective, TreeNetwork
from hbll.data import Samples
from hbll.training.memory import _cpu_peak, step_memory


def test_the_peak_is_of_what_is_alive_at_once():
    def step():
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first  # 4000
        third = second[:500].view(5, 100)  # a view is nothing new
        third += 1  # nor is what is written in place
        fourth = torch.empty(250, dtype=torch.float64)  # 6000
        del second, fourth

    assert _cpu_peak(step) == 8000


def test_what_was_there_before_does_not_count():
    weight = torch.ones(1000)

    def step():
        (weight.t() * 2).sum()

    assert _cpu_peak(step) == 4000 + 4


def test_backpropagation_holds_every_state_of_the_chain():
    def peak(blocks, batch):
        layers = [nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()) for _ in range(blocks)]
        network = TreeNetwork(embed=nn.Linear(16, 16), blocks=layers, head=nn.Linear(16, 2))
        return step_memory(network, Objective("bp"), Samples(torch.rand(batch, 16), torch.zeros(batch, dtype=int)))

    # A sigmoid keeps its output, which is also what the next layer keeps: one state of 64 bytes a sample and block.
    growth = (peak(40, 512) - peak(20, 512)) / 20
    assert 512 * 64 <= growth <= 512 * 64 + 17 * 16 * 4
