"""A convolutional network on CIFAR-10 whose blocks keep the shape of the image of features."""

from dataclasses import dataclass
from typing import ClassVar

from hbll.models.convnet import ConvBlock, ConvHead, patch_embed
from hbll.network import Chain
from hbll.recipes.base import ChainRecipe
from hbll.recipes.images import CifarImages


@dataclass(frozen=True, kw_only=True)
class Cifar10Conv(CifarImages, ChainRecipe):
    """ConvNeXt-like blocks on patches of 4 x 4 pixels of CIFAR-10, whose images are shifted and mirrored at random."""

    name: ClassVar[str] = "cifar10-conv"
    methods: ClassVar[tuple[str, ...]] = ("scan", "stream", "paper", "bp")

    width: int = 32
    """Features of every pixel of a state, which has 8 x 8."""

    epochs: int = 20
    """Passes over the training samples."""

    learning_rate: float = 8e-3
    """The optimizer's, at its highest."""

    gradient_clip: float | None = 1.0
    """Norm that the gradients of the network, and those of the rule's own weights, are each cut down to."""

    def network(self) -> Chain:
        return Chain(
            embed=patch_embed(self.width),
            blocks=[ConvBlock(self.width) for _ in range(self.block_count)],
            head=ConvHead(self.width, self.classes),
        )
