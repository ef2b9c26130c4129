"""Optimizers by name: who moves what."""

import pytest
import torch
from tests.networks import convolutional, residual, transformer
from torch import nn
from torch.optim import AdamW, Muon, NAdam

import hbll
from hbll.recipes import RECIPES
from hbll.train import ErrorFeedback, fit, make_optimizers


def names_of(rule, optimizer):
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in rule.named_parameters() if p in held}


def test_adamw_moves_everything():
    rule = hbll.make_rule("scan", residual()[0], guess="tree")
    (optimizer,) = make_optimizers(rule, "adamw", 1e-2, 0.1)
    assert isinstance(optimizer, AdamW)
    assert names_of(rule, optimizer) == dict(rule.named_parameters()).keys()
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-2, 0.1)


@pytest.mark.parametrize(
    ("rule", "beside"),
    [
        (hbll.make_rule("paper", residual()[0]), []),
        (hbll.make_rule("greedy", residual()[0]), []),  # whose heads are no blocks
        (hbll.make_rule("predsim", residual()[0], torch.zeros(1, 5).double()), []),  # nor are its maps
        (hbll.make_rule("scan", residual()[0], guess="tree"), ["jumps"]),  # but jumps are copies of blocks
        (hbll.make_rule("stream", transformer()[0]), []),
    ],
)
def test_muon_moves_the_matrices_inside_blocks_and_adamw_the_rest(rule, beside):
    muon, adamw = make_optimizers(rule, "muon", 1e-2, 0.1)
    assert (isinstance(muon, Muon), type(adamw)) == (True, AdamW)
    inside = {
        name
        for name, p in rule.named_parameters()
        if p.ndim == 2 and (name.startswith("network.blocks.") or any(word in name for word in beside))
    }
    assert names_of(rule, muon) == inside
    assert inside
    assert names_of(rule, adamw) == dict(rule.named_parameters()).keys() - inside
    for optimizer in (muon, adamw):
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-2, 0.1)


def test_a_pointwise_convolution_of_the_conv_net_is_a_matrix():
    recipe = RECIPES["cifar10-conv"](width=4, blocks=2)
    rule = recipe.rule("paper", recipe.network(), None)
    muon, _ = make_optimizers(rule, "muon", 1e-2, 0.1)
    expected = {f"network.blocks.{n}.{part}.weight" for n in range(2) for part in ("expand", "project")}
    assert names_of(rule, muon) == expected


@pytest.mark.parametrize("feedback", [False, True])
def test_a_1_x_1_convolution_learns_as_the_linear_layer_that_it_is(feedback):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    convolution = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Tanh())
    with torch.no_grad():
        convolution[0].weight.copy_(linear[0].weight.view(6, 6, 1, 1))
        convolution[0].bias.copy_(linear[0].bias)
    x, y = torch.randn(2, 6, 6, 6), torch.arange(2)
    found = []
    for block, inputs, channels in ((linear, x, -1), (convolution, x.permute(0, 3, 1, 2), 1)):
        net = hbll.Chain(nn.Identity(), [block], Mean(channels))
        rule = hbll.make_rule("bp", net)
        optimizers = make_optimizers(rule, "muon", 1e-2, 0.1, error_feedback=feedback)
        for state in (None, [optimizer.state_dict() for optimizer in optimizers]):
            if state:
                for optimizer, moments in zip(optimizers, state, strict=True):
                    optimizer.load_state_dict(moments)
            fit(rule, [(inputs, y)] * 3, optimizers)
        found.append(block[0].weight)
    assert found[1].shape == found[1].grad.shape == (6, 6, 1, 1)
    torch.testing.assert_close(found[1].flatten(1), found[0])


class Mean(nn.Module):
    """A head: channels, averaged over the places of an image."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, state):
        return state.movedim(self.channels, -1).flatten(1, 2).mean(1)


def test_kernels_that_reach_further_are_no_matrices():
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1))
    rule = hbll.make_rule("bp", hbll.Chain(nn.Identity(), [block], nn.Flatten()))
    muon, _ = make_optimizers(rule, "muon", 1e-2, 0.1)
    assert names_of(rule, muon) == {"network.blocks.0.2.weight"}


def test_updates_of_muon_are_as_large_as_those_of_adamw():
    # An orthogonal matrix of width w has elements of 1 / sqrt(w): times 0.2 sqrt(w) they are AdamW's usual 0.2.
    network, _, _ = residual(3)
    x, y = torch.randn(64, 5).double(), torch.arange(64) % 3
    rule = hbll.make_rule("bp", network)
    before = [block.linear.weight.detach().clone() for block in network.blocks]
    fit(rule, [(x, y)], make_optimizers(rule, "muon", 1e-2, 0.0))
    for block, old in zip(network.blocks, before, strict=True):
        update = (block.linear.weight - old) / 1e-2
        values = torch.linalg.svdvals(update / (0.2 * 6**0.5))
        assert ((values > 0.5) & (values < 1.3)).all()  # about 1, as five Newton-Schulz iterations leave them


def test_nadam_has_the_momentum_for_late_gradients():
    rule = hbll.make_rule("2bw", residual()[0])
    (optimizer,) = make_optimizers(rule, "nadam", 1e-2, 0.1)
    assert isinstance(optimizer, NAdam)
    assert names_of(rule, optimizer) == dict(rule.named_parameters()).keys()
    assert optimizer.defaults["betas"][0] == 0.99
    # Decay is of the weights alone: without gradients they shrink by rate times decay.
    before = rule.network.head.weight.detach().clone()
    for p in rule.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(rule.network.head.weight.detach(), before * (1 - 1e-2 * 0.1))


@pytest.mark.parametrize("name", ["adamw", "muon", "nadam"])
def test_error_feedback_is_around_each(name):
    rule = hbll.make_rule("2bw", residual()[0])
    plain, found = (make_optimizers(rule, name, 1e-2, 0.1, error_feedback=corrected) for corrected in (False, True))
    assert [type(optimizer.optimizer) for optimizer in found] == [type(optimizer) for optimizer in plain]
    assert all(type(optimizer) is ErrorFeedback and optimizer.strength == 1.0 for optimizer in found)


def test_blocks_without_matrices_are_for_adamw():
    rule = hbll.make_rule("bp", convolutional(3)[0])
    with pytest.raises(ValueError, match="muon moves the matrices inside blocks, and these have none: take adamw"):
        make_optimizers(rule, "muon", 1e-2, 0.1)


def test_an_unknown_optimizer_is_one_sentence():
    with pytest.raises(ValueError, match="unknown optimizer 'moun'; did you mean muon"):
        make_optimizers(hbll.make_rule("bp", residual(3)[0]), "moun", 1e-2, 0.1)
