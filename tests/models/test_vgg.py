"""VGG8b. Oracle: the paper's count of its parameters, and the same network in the paper's order of layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hbll.models.vgg import vgg8b


@pytest.mark.parametrize(("size", "channels", "millions"), [(32, 3, 8.9), (28, 1, 7.3)])
def test_it_has_the_papers_parameters(size, channels, millions):
    count = sum(p.numel() for layer in vgg8b(size, channels=channels) for p in layer.parameters())
    assert round(count / 1e6, 1) == millions  # the table of the authors' repository, CIFAR-10 and MNIST


@pytest.mark.parametrize("size", [16, 28, 32])
def test_layers_in_the_papers_order(size):
    torch.manual_seed(0)
    layers = [layer.eval() for layer in vgg8b(size, width=2, channels=3, classes=5)]
    x = torch.randn(3, 3, size, size)
    state = x
    for layer, pooled_after in zip(layers[:6], [False, True, False, True, True, True], strict=True):
        convolution = next(m for m in layer if isinstance(m, nn.Conv2d))
        norm = next(m for m in layer if isinstance(m, nn.BatchNorm2d))
        state = F.leaky_relu(norm(convolution(state)), 0.01)
        state = F.max_pool2d(state, 2) if pooled_after else state
    linear, norm = (next(m for m in layers[6] if isinstance(m, kind)) for kind in (nn.Linear, nn.BatchNorm1d))
    state = F.leaky_relu(norm(linear(state.flatten(1))), 0.01)
    torch.testing.assert_close(nn.Sequential(*layers)(x), layers[7][-1](state))


def test_what_a_layer_hands_on_is_not_dropped_out():
    torch.manual_seed(0)
    layers = vgg8b(32, width=4, dropout=0.9)
    state = torch.randn(4, 3, 32, 32)
    for layer in layers[:-1]:
        state = layer(state)
        assert not (state.detach() == 0).any()
