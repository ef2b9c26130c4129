"""Decoupled greedy learning. Oracles: a stage and its auxiliary network trained alone, and the paper's network by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.networks import CLASSES, residual, transformer
from torch import nn

from hbll import Chain, Step
from hbll.models.vgg import vgg8b
from hbll.rules import make_rule
from hbll.rules.decoupled import auxiliary_network


def convolutional():
    """States change their shape on the way, from maps to vectors."""
    torch.manual_seed(0)
    *layers, head = vgg8b(16, width=2, channels=2, classes=CLASSES, dropout=0.0)
    x, y = torch.randn(6, 2, 16, 16, dtype=torch.float64), torch.randint(CLASSES, (6,))
    return Chain(nn.Identity(), layers, head).double(), x, y


def test_a_stage_learns_as_a_network_of_itself_and_its_auxiliary_network():
    network, x, y = convolutional()
    rule = make_rule("dgl", network, example=x)
    state = network.blocks[0](x).detach()
    alone = nn.Sequential(copy.deepcopy(network.blocks[1]), copy.deepcopy(*rule.auxiliary(2)))
    F.cross_entropy(alone(state), y).backward()
    rule.backward(x, y)
    together = [*network.blocks[1].parameters(), *rule.auxiliary(2)[0].parameters()]
    torch.testing.assert_close([p.grad for p in together], [p.grad for p in alone.parameters()])


def test_losses_are_those_of_the_predictions():
    network, x, y = residual(4)
    rule = make_rule("dgl", network, example=x, stage=(1, 2))
    (predict,) = rule.auxiliary(1)
    assert rule.auxiliary(2) == []
    step, state = rule(x, y), network.blocks[0](network.embed(x))
    errors = [F.cross_entropy(predict(state), y), F.cross_entropy(network(x), y)]
    assert [report.error for report in step.reports.values()] == pytest.approx([error.item() for error in errors])
    torch.testing.assert_close(step.loss, sum(errors))
    torch.testing.assert_close(step.label_loss, errors[1])


def test_tokens_are_each_predicted():
    network, x, y = transformer(3)
    y[0, 2:] = -100
    rule = make_rule("dgl", network, example=x, hidden=0)
    ((linear,),) = rule.auxiliary(1)
    scores = network.blocks[0](network.embed(x)) @ linear.weight.mT + linear.bias
    loss = next(rule.losses(x, y, Step())).value
    torch.testing.assert_close(loss, F.cross_entropy(scores.flatten(0, 1), y.flatten(), ignore_index=-100))


def norm(values):
    """Batch norm of rows (n, F) at its start."""
    return (values - values.mean(0)) / (values.var(0, unbiased=False) + 1e-5).sqrt()


def test_the_auxiliary_network_of_images_by_hand():
    torch.manual_seed(0)
    network, state = auxiliary_network((3, 8, 6), 5, hidden=1).double(), torch.randn(4, 3, 8, 6, dtype=torch.float64)
    weights = [p for p in network.parameters() if p.ndim == 4]
    assert [tuple(p.shape) for p in weights] == [(3, 3, 1, 1)] * 3
    # To a quarter of each side: rows two by two from four, columns 0-2 and 3-5.
    small = torch.stack(
        [state[..., 4 * i : 4 * i + 4, 3 * j : 3 * j + 3].mean((2, 3)) for i in (0, 1) for j in (0, 1)], 2
    )
    for weight in weights:
        mixed = torch.einsum("oi,bip->bpo", weight[:, :, 0, 0], small)
        small = norm(mixed.flatten(0, 1)).view_as(mixed).mT.relu()
    hidden, last = [layer for layer in network if isinstance(layer, nn.Linear)]
    deep = norm(small.flatten(1) @ hidden.weight.mT + hidden.bias).relu()
    torch.testing.assert_close(network(state), deep @ last.weight.mT + last.bias)


def test_tokens_with_one_label_are_averaged():
    torch.manual_seed(0)
    network, state = auxiliary_network((7, 4), 5, hidden=0), torch.randn(2, 7, 4)
    torch.testing.assert_close(network(state), F.linear(state.mean(1), network[-1].weight, network[-1].bias))


@pytest.mark.parametrize("hidden", [0, 1, 3])
@pytest.mark.parametrize("shape", [(6,), (7, 6), (4, 5, 3)])
def test_there_are_no_more_parameters_than_announced(shape, hidden):
    announced = len(list(make_rule("dgl", residual(3)[0], hidden=hidden).beside.parameters()))
    parameters = len(list(auxiliary_network(shape, 3, hidden).parameters()))
    assert parameters <= announced
    assert (parameters == announced) == (len(shape) == 3)


@pytest.mark.parametrize(
    ("hidden", "sentence"), [(-1, "hidden must not be negative; got -1"), (1.5, "hidden is a whole number; got 1.5")]
)
def test_what_cannot_be_is_refused(hidden, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule("dgl", residual(3)[0], hidden=hidden)
