"""ResNet-18 on CIFAR-10: states change shape from stage to stage."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hbll.models.resnet import resnet18
from hbll.network import Chain
from hbll.recipes.base import LayeredRecipe
from hbll.recipes.images import CifarImages


@dataclass(frozen=True, kw_only=True)
class Cifar10Resnet(CifarImages, LayeredRecipe):
    """ResNet-18 with a 3 x 3 stem on CIFAR-10, whose states change shape, for bp and local rules."""

    name: ClassVar[str] = "cifar10-resnet"
    layers: ClassVar[int] = 9

    width: int = 64
    """Channels of the first stage; the last has eight times as many."""

    epochs: int = 200
    """Passes over the training samples."""

    def network(self) -> Chain:
        *layers, head = resnet18(self.width)
        return Chain(embed=nn.Identity(), blocks=layers, head=head)
