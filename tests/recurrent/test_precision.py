"""Recurrent rules under autocast: maps are evaluated in bfloat16, states stay what they are."""

import pytest
import torch
from torch import nn

from hbll.recurrent import CELLS, RULES, DepthCells, RecurrentNetwork, make_rule


def gradient(rule, x, y):
    rule.zero_grad()
    rule.backward(x, y)
    return torch.cat([p.grad.flatten() for p in rule.network.parameters() if p.grad is not None])


@pytest.mark.parametrize("cell", ["gru", "lstm", "elman"])
@pytest.mark.parametrize("name", RULES)
def test_gradients_in_bfloat16_are_nearly_those_in_float32(name, cell):
    if (name, cell) == ("bptt-fused", "elman"):
        pytest.skip("torch has no recurrent network like Elman")
    torch.manual_seed(0)
    network = RecurrentNetwork(DepthCells(CELLS[cell], 3, 8, 3), head=nn.Linear(8, 4), length=8).float()
    rule = make_rule(name, network).float()
    x, y = torch.randn(32, 8, 3, dtype=torch.float32), torch.randint(4, (32,))
    exact = gradient(rule, x, y)
    rule.reset()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = gradient(rule, x, y)
        assert network.cell(x[:, 0], network.cell.initial(32)).dtype == torch.float32
    assert lowered.dtype == torch.float32
    assert not lowered.equal(exact)
    assert torch.cosine_similarity(lowered, exact, 0) > 0.99
