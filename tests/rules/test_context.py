"""Whether rules learn from what blocks take beside the state. Oracle: backpropagation on the same batches.

The label is the sign of a number, turned round by a bit that only the blocks' context has: chance is 1/2.
"""

import pytest
import torch
from torch import nn

from hbll import Chain, make_rule

WIDTH = 16

LEARNING = {
    "paper": {},
    "tree": {},
    "scan": {},
    "stream": {},
    "greedy": {},
    "pipeline": {"stage": 2},
    "dgl": {},
    "predsim": {},
    "dfa": {},
    "bll": {},
}
"""Those that come near backpropagation's accuracy within so few steps; forward-forward rules take many more."""


class Embed(nn.Linear):
    def forward(self, x):
        return super().forward(x[:, :4]), {"bit": x[:, 4:]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH + 1, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, state, bit):
        return state + self.outer(torch.tanh(self.inner(torch.cat([state, bit], -1))))


def batch(size, generator):
    x = torch.randn(size, 5, generator=generator)
    x[:, 3] += 0.5 * x[:, 3].sign()
    turned = torch.randint(2, (size,), generator=generator)
    x[:, 4] = 2.0 * turned - 1
    return x, (x[:, 3] > 0).long() ^ turned


def accuracy(name, **options):
    """On new samples, after a hundred steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    network = Chain(Embed(4, WIDTH), [Block() for _ in range(4)], nn.Linear(WIDTH, 2))
    rule = make_rule(name, network, example=batch(4, generator)[0], **options)
    optimizer = torch.optim.AdamW(rule.parameters(), 1e-2)
    for _ in range(100):
        rule.backward(*batch(64, generator))
        optimizer.step()
        optimizer.zero_grad()
    x, y = batch(2000, generator)
    with torch.no_grad():
        return (network.eval()(x).argmax(1) == y).float().mean().item()


@pytest.fixture(scope="module")
def backpropagations():
    return accuracy("bp")


@pytest.mark.parametrize("name", LEARNING)
def test_a_label_that_depends_on_the_context_is_learned(name, backpropagations):
    assert backpropagations > 0.99
    assert accuracy(name, **LEARNING[name]) > backpropagations - 0.01
