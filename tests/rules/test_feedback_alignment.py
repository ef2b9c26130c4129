"""Direct feedback alignment. Oracles: backpropagation, which it is through the true Jacobian, and the formula by hand."""

import pytest
import torch
import torch.nn.functional as F
from tests.networks import CLASSES, TOKENS, WIDTH, convolutional, residual, transformer
from torch import nn

from hbll import Chain, Step
from hbll.rules import make_rule


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True)


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5)], ids=["samples", "tokens"])
def test_feedback_through_the_true_jacobian_is_backpropagation(shape):
    torch.manual_seed(0)
    network = Chain(nn.Identity(), [nn.Linear(5, 5) for _ in range(3)], nn.Linear(5, 4)).double()
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(4, shape[:-1])
    rule = make_rule("dfa", network, example=x)
    after = torch.eye(4, dtype=torch.float64)
    for k, module in ((3, network.head), (2, network.blocks[2]), (1, network.blocks[1])):
        after = after @ module.weight.detach()  # d logits / d output of stage k is the product of the weights after it
        rule.auxiliary(k)[0].matrix.copy_(after)
    exact = F.cross_entropy(network(x).flatten(0, -2), y.flatten())
    step = rule(x, y)
    torch.testing.assert_close(gradients(step.loss, network.parameters()), gradients(exact, network.parameters()))
    assert step.loss.item() == step.label_loss.item() == pytest.approx(exact.item())


@pytest.mark.parametrize("make", [residual, convolutional, transformer])
def test_the_error_reaches_every_output_through_its_matrix(make):
    network, x, y = make(4)
    rule = make_rule("dfa", network, example=x)
    outputs = [network.blocks[0](network.embed(x))]
    for block in network.blocks[1:]:
        outputs.append(block(outputs[-1].detach()))
    logits = network(x)
    error = ((logits.softmax(-1) - F.one_hot(y, CLASSES)) / y.numel()).detach()
    at_head, *losses = list(rule.losses(x, y, Step()))
    assert [loss.stage for loss in losses] == [3, 2, 1]
    for loss in losses:
        assert loss.value == 0
        output, stage = outputs[loss.stage - 1], rule.stages[loss.stage - 1]
        fed_back = (error @ rule.auxiliary(loss.stage)[0].matrix).view_as(output)
        expected = gradients((output * fed_back).sum(), stage.parameters())
        torch.testing.assert_close(gradients(loss.value, stage.parameters()), expected)
    head = list(network.head.parameters())
    exact = F.cross_entropy(logits.flatten(0, -2), y.flatten())
    torch.testing.assert_close(gradients(at_head.value, head), gradients(exact, head))


@pytest.mark.parametrize(("make", "units"), [(residual, WIDTH), (convolutional, 4 * 5 * 4), (transformer, WIDTH)])
def test_the_feedback_is_fixed_random_and_of_the_papers_size(make, units):
    network, x, _ = make(4)
    rule = make_rule("dfa", network, example=x)
    assert len(list(rule.parameters())) == len(list(network.parameters()))
    matrices = [rule.auxiliary(k)[0].matrix for k in (1, 2, 3)]
    for matrix in matrices:
        assert matrix.shape == (CLASSES, units)
        assert matrix.dtype == torch.float64
        assert 0.5 * units**-0.5 < matrix.abs().max() <= units**-0.5
    assert not matrices[0].equal(matrices[1])
    assert {f"beside.{k}.0.matrix" for k in range(3)} < set(rule.state_dict())


def test_one_label_for_all_tokens_reaches_every_entry():
    class Mean(nn.Linear):
        def forward(self, state):
            return super().forward(state.mean(1))

    network, x, y = transformer(3)
    network.head = Mean(WIDTH, CLASSES).double()
    rule = make_rule("dfa", network, example=x)
    assert rule.auxiliary(1)[0].matrix.shape == (CLASSES, TOKENS * WIDTH)
    rule.backward(x, y[:, 0])
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_the_step_reports_the_labels_loss_alone():
    network, x, y = residual(4)
    step = make_rule("dfa", network)(x, y)
    assert {k: report.error for k, report in step.reports.items()} == {3: step.label_loss.item()}
