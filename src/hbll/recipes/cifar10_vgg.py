"""VGG8b on CIFAR-10, the convolutional network of Nøkland & Eidnes (arXiv 1901.06656)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hbll.models.vgg import vgg8b
from hbll.network import Chain
from hbll.recipes.base import LayeredRecipe, PredsimRecipe
from hbll.recipes.images import CifarImages


@dataclass(frozen=True, kw_only=True)
class Cifar10Vgg(PredsimRecipe, CifarImages, LayeredRecipe):
    """VGG8b on CIFAR-10, for bp and the rules of networks cut into blocks (predsim 5.58 % error, bp 5.99)."""

    name: ClassVar[str] = "cifar10-vgg"
    layers: ClassVar[int] = 7

    width: int = 128
    """Feature maps of the first convolution; those of the others are multiples of it."""

    dropout: float = 0.2
    """Share of a layer's inputs that is dropped, except of the first one's."""

    epochs: int = 400
    """Passes over the training samples."""

    def network(self) -> Chain:
        *layers, head = vgg8b(32, width=self.width, dropout=self.dropout)
        return Chain(embed=nn.Identity(), blocks=layers, head=head)
