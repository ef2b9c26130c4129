"""The base of local rules and backpropagation as one. Oracles: autograd through the whole network, counted products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll import Objective, TreeNetwork
from hbll.cuts import SequentialNetwork
from hbll.local.backpropagation import Backpropagation
from hbll.local.rule import LocalRule, LocalStep, detached_pass, local_cost
from hbll.methods import make_rule


def plain():
    torch.manual_seed(0)
    return SequentialNetwork(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def tree(blocks=3):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(blocks)]
    return TreeNetwork(nn.Linear(4, 4), layers, nn.Linear(4, 3)).double()


def batch(size=7):
    torch.manual_seed(1)
    return torch.randn(size, 4, dtype=torch.float64), torch.arange(size) % 3


class Halves(LocalRule):
    """Pulls every block's output to zero: its gradients are known without the rest of the network."""

    def build(self, shapes, classes):
        self.seen = [tuple(shape) for shape in shapes], classes

    def step(self, blocks, x, y):
        losses = [output.square().sum() / 2 for output in detached_pass(blocks.segments, x)]
        return LocalStep(losses, *local_cost(blocks.segments))


@pytest.mark.parametrize("network", [plain(), tree(), nn.Sequential(*plain())])
def test_backpropagation_is_autograd_through_the_whole_network(network):
    x, y = batch()
    step = Backpropagation().prepare(network, x)(network, x, y)
    exact = F.cross_entropy(network(x), y)
    assert step.loss.item() == pytest.approx(exact.item(), rel=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(step.loss, list(network.parameters())),
        torch.autograd.grad(exact, list(network.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_it_costs_what_the_objective_of_that_name_costs():
    network, (x, y) = tree(7), batch()
    local, objective = Backpropagation().prepare(network, x)(network, x, y), Objective("bp")(network, x, y)
    assert (local.work, local.span) == (objective.work, objective.span) == (3 * 7, 2 * 7)


def test_nothing_crosses_from_block_to_block():
    network, (x, y) = plain(), batch()
    step = Halves().prepare(network, x)(network, x, y)
    first = torch.tanh(network[0](x))
    mine = torch.autograd.grad(step.loss, network[0].weight)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(first.square().sum() / 2, network[0].weight)[0])
    assert [node.error for node in step.nodes.values()] == [loss.item() for loss in step.losses]
    assert list(step.nodes) == [1, 2]


def test_rules_see_the_shapes_of_states_that_change_shape():
    network = SequentialNetwork(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5))
    rule = Halves().prepare(network, torch.randn(6, 3, 8, 8))
    assert rule.seen == ([(4, 3, 3), (36,)], 5)
    assert network[1].num_batches_tracked == 0
    assert network.training


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_cost_of_detached_blocks(blocks):
    # Six layers: forward 6 in a row; back, a product for each layer's weights, and one for its input unless it is a block's.
    network = SequentialNetwork(*(nn.Linear(2, 2) for _ in range(7)))
    work, span = local_cost(Halves(blocks).cut(network).segments)
    assert work == 6 + 12 - blocks
    assert span == 6 + 6 // blocks


def test_diagnosis_compares_with_backpropagation_and_leaves_nothing_behind():
    network, (x, y) = plain(), batch()
    reports = Backpropagation().prepare(network, x).diagnose(network, x, y)
    assert reports[1].cosine == pytest.approx(1.0)
    network.insert(1, nn.BatchNorm1d(6).double())
    reports = Halves().prepare(network, x).diagnose(network, x, y)
    assert list(reports) == [1, 2, 3]
    assert all(-1 <= report.cosine < 0.999 for report in reports.values())
    assert all(p.grad is None for p in network.parameters())
    assert network[1].num_batches_tracked == 0


@pytest.mark.parametrize("labels", [torch.zeros(6, dtype=int), torch.zeros(7, 2, dtype=int), torch.zeros(7)])
def test_labels_are_one_class_a_sample(labels):
    with pytest.raises(ValueError, match="one integer class for each of 7 samples"):
        Halves().prepare(plain(), batch()[0])(plain(), batch()[0], labels)


def test_a_rule_is_prepared_before_its_first_step():
    with pytest.raises(ValueError, match=r"call rule.prepare\(network, x\)"):
        Halves()(plain(), *batch())


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'zzz'; there are bp"):
        make_rule("zzz")
