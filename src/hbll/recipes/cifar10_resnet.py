"""ResNet-18 on CIFAR-10: states change shape from stage to stage."""

from dataclasses import dataclass
from typing import ClassVar

from hbll.cuts import SequentialNetwork
from hbll.models.resnet import resnet18
from hbll.recipes.cifar10_images import Cifar10Images
from hbll.recipes.cut_recipe import PlainRecipe


@dataclass(frozen=True, kw_only=True)
class Cifar10Resnet(Cifar10Images, PlainRecipe):
    """ResNet-18 with a 3 x 3 stem on CIFAR-10, whose states change shape, for bp and local rules."""

    name: ClassVar[str] = "cifar10-resnet"
    layers: ClassVar[int] = 9

    width: int = 64
    """Channels of the first stage; the last has eight times as many."""

    epochs: int = 200
    """Passes over the training samples."""

    def network(self) -> SequentialNetwork:
        return SequentialNetwork(*resnet18(self.width))
