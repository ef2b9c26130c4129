"""Convolutional blocks. Oracle: the same arithmetic by einsum and unfold."""

import pytest
import torch
import torch.nn.functional as F
from tests.networks import assert_equal_gradients, gradients
from torch import nn

import hbll
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed


def group_norm(state, norm):
    mean = state.mean((1, 2, 3), keepdim=True)
    variance = (state - mean).square().mean((1, 2, 3), keepdim=True)
    scaled = (state - mean) / (variance + norm.eps).sqrt()
    return scaled * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def test_patches_by_hand():
    torch.manual_seed(0)
    embed = patch_embed(5, patch=4, channels=3).double()
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    found = embed(x)
    assert found.shape == (2, 5, 3, 2)
    for i in range(3):
        for j in range(2):
            patch = x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            expected = torch.einsum("bchw,fchw->bf", patch, embed.weight) + embed.bias
            torch.testing.assert_close(found[:, :, i, j], expected)


@pytest.mark.parametrize(("kernel", "expansion"), [(3, 4), (7, 2), (1, 1)])
def test_a_block_by_hand(kernel, expansion):
    torch.manual_seed(0)
    block = ConvBlock(6, kernel, expansion).double()
    with torch.no_grad():
        for p in block.norm.parameters():
            p.copy_(torch.randn_like(p))
    state = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    padded = F.pad(state, [kernel // 2] * 4)
    windows = padded.unfold(2, kernel, 1).unfold(3, kernel, 1)  # (B, C, H, W, kernel, kernel)
    mixed = torch.einsum("bchwij,cij->bchw", windows, block.mix_pixels.weight[:, 0])
    mixed = mixed + block.mix_pixels.bias.view(-1, 1, 1)
    inner = torch.einsum("bchw,fc->bfhw", group_norm(mixed, block.norm), block.expand.weight)
    inner = inner + block.expand.bias.view(-1, 1, 1)
    assert inner.shape[1] == expansion * 6
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    out = torch.einsum("bfhw,cf->bchw", inner, block.project.weight) + block.project.bias.view(-1, 1, 1)
    torch.testing.assert_close(block(state), state + out)


def test_the_head_by_hand():
    torch.manual_seed(0)
    head = ConvHead(6, 3).double()
    with torch.no_grad():
        for p in head.norm.parameters():
            p.copy_(torch.randn_like(p))
    state = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    pooled = group_norm(state, head.norm).flatten(2).mean(2)
    torch.testing.assert_close(head(state), pooled @ head.classify.weight.mT + head.classify.bias)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_scan_trains_it_exactly(engine):
    torch.manual_seed(0)
    net = hbll.Chain(patch_embed(4, 4), [ConvBlock(4) for _ in range(4)], ConvHead(4, 3)).double()
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    rule = hbll.make_rule("scan", net, guess="mean", stage=2, sweeps=2, credit_sweeps=2, engine=engine)
    assert_equal_gradients(gradients(net, rule(x, y).loss), gradients(net, F.cross_entropy(net(x), y)))


def test_a_depthwise_network_is_evaluated_block_by_block():
    net = hbll.Chain(patch_embed(4, 4), [ConvBlock(4) for _ in range(3)], ConvHead(4, 3))
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    assert hbll.make_rule("stream", net)(x, y).engine == "loop"


def test_its_weights_are_drawn_as_those_of_convolutions():
    torch.manual_seed(0)
    block = ConvBlock(6, 3, 2)
    torch.manual_seed(0)
    nn.Conv2d(6, 6, 3, groups=6)
    for own, convolution in ((block.expand, nn.Conv2d(6, 12, 1)), (block.project, nn.Conv2d(12, 6, 1))):
        assert own.weight.equal(convolution.weight.flatten(1))
        assert own.bias.equal(convolution.bias)
        state = torch.randn(2, own.in_features, 5, 4)
        assert own(state).equal(convolution(state))
