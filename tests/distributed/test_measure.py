"""What is measured of a network: bytes against what its tensors have; of seconds that there are some."""

import pytest
import torch
from tests.networks import BATCH, TOKENS, WIDTH, masked, residual, transformer
from torch import nn

from hbll import Chain, make_rule
from hbll.distributed.cost import by_backpropagation, estimate
from hbll.distributed.measure import measured_costs
from hbll.distributed.simulate import Network
from hbll.losses import cross_entropy
from hbll.train.memory import step_memory


def measured(network, x, y):
    return measured_costs(network, x, y, cross_entropy, lambda: [torch.optim.AdamW(network.parameters())])


def nbytes(module):
    return sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize(
    ("kind", "state"), [(residual, WIDTH * 8), (transformer, TOKENS * WIDTH * 8), (masked, WIDTH * 8)]
)
def test_bytes_are_those_of_the_tensors(kind, state):
    network, x, y = kind(4)
    costs = measured(network, x, y)
    assert len(costs.blocks) == 3
    modules = [network.embed, *network.blocks, network.head]
    for module, part in zip(modules, [costs.embed, *costs.blocks, costs.head], strict=True):
        assert part.parameters == nbytes(module)
        assert part.forward.at(BATCH) > 0
        assert part.backward.at(BATCH) > 0
        assert 0 <= part.inputs.at(BATCH) <= part.backward.at(BATCH)
    assert [part.state for part in (costs.embed, *costs.blocks)] == [state] * 4
    assert costs.labels == y.nbytes / BATCH
    assert costs.update > 0
    assert costs.kept == pytest.approx(2, rel=0.05)  # and a count for each tensor


def test_memory_is_about_that_of_a_step():
    """Of a network whose graph is large beside what is not counted: gradients on their way, results that are not kept."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(16)]
    network = Chain(nn.Linear(8, 32), blocks, nn.Linear(32, 4))
    x, y = torch.randn(256, 8), torch.randint(4, (256,))
    costs = measured(network, x, y)
    found = estimate(by_backpropagation(costs, 256), Network()).memory - 4 * nbytes(network)
    assert found == pytest.approx(step_memory(make_rule("bp", network), x, y), rel=0.25)


def test_a_batch_counts_without_the_data_set_it_is_cut_from():
    torch.manual_seed(0)
    network = Chain(nn.Linear(8, 4), [nn.Linear(4, 4)], nn.Linear(4, 4))
    whole = torch.randn(1000, 8)
    assert measured(network, whole[:4], torch.randint(4, (4,))).embed.graph == 8 * 4


def test_batch_norms_have_the_samples_that_they_need():
    torch.manual_seed(0)
    network = Chain(nn.Linear(8, 4), [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))], nn.Linear(4, 4))
    assert measured(network, torch.randn(4, 8), torch.randint(4, (4,))).blocks[0].forward.at(4) > 0


def test_frozen_parts_are_not_walked_back():
    network, x, y = residual(4)
    network.embed.requires_grad_(False)
    network.blocks[1].requires_grad_(False)
    costs = measured_costs(
        network, x, y, cross_entropy, lambda: [torch.optim.SGD([p for p in network.parameters() if p.requires_grad])]
    )
    assert costs.embed.parameters == costs.embed.backward.at(BATCH) == 0
    assert costs.front == ()
    assert costs.blocks[1].parameters == 0
    assert costs.blocks[1].inputs.at(BATCH) > 0
    assert costs.kept == 0


def test_one_sample_is_measured_as_it_is():
    network, x, y = residual(4)
    costs = measured(network, x[:1], y[:1])
    assert costs.blocks[0].forward.fixed == 0
    assert costs.labels == y.element_size()
