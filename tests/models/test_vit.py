"""Vision transformers. Oracle: the same arithmetic with explicit patches and attention, head by head."""

import pytest
import torch
import torch.nn.functional as F
from tests.networks import assert_equal_gradients, gradients
from tests.oracles.norm import layer_norm, perturbed
from torch import nn

import hbll
from hbll.models.vit import ViTBlock, ViTEmbed, ViTHead, vit


def test_the_embedding_patch_by_patch():
    torch.manual_seed(0)
    embed = perturbed(ViTEmbed(6, 2, 5, channels=3))
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = embed(images)
    assert found.shape == (2, 9, 5)
    matrix = embed.patches.weight.flatten(1)
    for row in range(3):
        for column in range(3):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            expected = patch @ matrix.mT + embed.patches.bias + embed.position[3 * row + column]
            torch.testing.assert_close(found[:, 3 * row + column], expected)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_block_by_hand(heads):
    torch.manual_seed(0)
    block = perturbed(ViTBlock(6, heads))
    state = torch.randn(2, 5, 6, dtype=torch.float64)
    qkv = layer_norm(state, block.attention_norm) @ block.query_key_value.weight.mT + block.query_key_value.bias
    query, key, value = qkv[..., :6], qkv[..., 6:12], qkv[..., 12:]
    size, mixed = 6 // heads, torch.zeros_like(state)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = query[..., part] @ key[..., part].mT / size**0.5
        mixed[..., part] = scores.softmax(-1) @ value[..., part]
    after = state + mixed @ block.attention_out.weight.mT + block.attention_out.bias
    inner = layer_norm(after, block.perceptron_norm) @ block.perceptron_in.weight.mT + block.perceptron_in.bias
    assert inner.shape[-1] == 12
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    torch.testing.assert_close(block(state), after + inner @ block.perceptron_out.weight.mT + block.perceptron_out.bias)


def test_the_head_by_hand():
    torch.manual_seed(0)
    head = perturbed(ViTHead(6, 4))
    state = torch.randn(2, 5, 6, dtype=torch.float64)
    mean = sum(layer_norm(state, head.norm)[:, patch] for patch in range(5)) / 5
    torch.testing.assert_close(head(state), mean @ head.classify.weight.mT + head.classify.bias)


def test_the_parts_are_a_network_on_their_own():
    network = nn.Sequential(*vit())
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    block = 4 * 128 * 128 + 4 * 128 + 2 * (2 * 128 * 128) + 3 * 128 + 4 * 128  # attention, perceptron, two norms
    expected = (48 + 1) * 128 + 64 * 128 + 7 * block + 2 * 128 + 129 * 10
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patch": 5}, "images of 32 pixels a side cannot be cut into patches of 5"),
        ({"heads": 3}, "a width of 128 cannot be divided among 3 attention heads"),
    ],
)
def test_sizes_that_do_not_fit(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        vit(**options)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_scan_trains_it_exactly(engine):
    torch.manual_seed(0)
    embed, *blocks, head = vit(4, 6, 2, 2, 4, classes=3)
    net = hbll.Chain(embed, blocks, head).double()
    x, y = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(3, (2,))
    step = hbll.make_rule("scan", net, guess="mean", stage=2, sweeps=2, credit_sweeps=2, engine=engine)(x, y)
    assert_equal_gradients(gradients(net, step.loss), gradients(net, F.cross_entropy(net(x), y)))
