"""VGG8b, the convolutional network of Nøkland & Eidnes (arXiv 1901.06656, section 4), as a chain of layers.

Dropout and pooling stand at the start of the layer after the one that they follow in the paper, so that what a layer hands
on is what its local loss is to look at there: the features behind the nonlinearity.
"""

from torch import nn

from hbll.models.mlp import normed_layer

__all__ = ["vgg8b"]

LAYERS = [(1, False), (2, False), (2, True), (4, False), (4, True), (4, True)]
"""Of every convolution: its feature maps, as a multiple of the first one's, and whether pooling stands before it."""


def vgg8b(size: int, width: int = 128, channels: int = 3, classes: int = 10, dropout: float = 0.2) -> list[nn.Module]:
    """Six 3 x 3 convolutions, a hidden layer and the head: images (B, channels, size, size) to logits (B, classes).

    Args:
        size: pixels of a side.
        width: feature maps of the first convolution, 128 in the paper; the other layers' sizes are multiples of it.
    """
    layers, before = [], channels
    for multiple, pooled in LAYERS:
        maps = multiple * width
        start = [nn.Dropout2d(dropout)] if layers else []
        start += [nn.MaxPool2d(2)] if pooled else []
        convolution = nn.Conv2d(before, maps, 3, padding=1)
        layers.append(nn.Sequential(*start, convolution, nn.BatchNorm2d(maps), nn.LeakyReLU()))
        before = maps
    hidden = normed_layer(before * (size // 16) ** 2, 8 * width)
    layers.append(nn.Sequential(nn.Dropout2d(dropout), nn.MaxPool2d(2), nn.Flatten(), *hidden))
    return [*layers, nn.Sequential(nn.Dropout(dropout), nn.Linear(8 * width, classes))]
