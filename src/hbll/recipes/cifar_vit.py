"""Vision transformers on CIFAR-10 and CIFAR-100 (the paper's section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hbll.models.vit import vit
from hbll.network import Chain
from hbll.recipes.base import ChainRecipe, OptimizerName, flag
from hbll.recipes.images import CifarImages
from hbll.recipes.measures import ACCURACY, TOP_5_ACCURACY, Measure

PAPER = {
    "width": 128,
    "batch_size": 256,
    "optimizer": "adamw",
    "learning_rate": 5e-4,
    "epochs": 500,
    "gradient_clip": None,
    "rand_augment": 2,
}
"""What the paper says of both data sets. The size of its network it does not say, nor a schedule."""


@dataclass(frozen=True, kw_only=True)
class Cifar10Vit(CifarImages, ChainRecipe):
    """Transformer blocks on patches of CIFAR-10, whose images are shifted and mirrored at random."""

    name: ClassVar[str] = "cifar10-vit"
    methods: ClassVar[tuple[str, ...]] = ("stream", "scan", "paper", "bp")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {**PAPER, "noise": 0.005}}

    preset: Literal["small", "paper"] = "small"
    """What options that are not given are: for minutes on two cores, or the paper's."""

    width: int = 64
    """Features of every patch of a state."""

    heads: int = 4
    """Attention heads; they divide the width."""

    patch: int = 4
    """Pixels of a patch's side."""

    epochs: int = 3
    """Passes over the training samples."""

    optimizer: OptimizerName = "muon"
    """What moves the weights: adamw; muon the matrices inside blocks, and adamw the rest at the same rate and decay; or
    nadam with a beta1 of .99, for gradients that come late."""

    learning_rate: float = 8e-3
    """The optimizer's, at its highest."""

    gradient_clip: float | None = 1.0
    """Norm that the gradients of the network, and those of the rule's own weights, are each cut down to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, whole in (("heads", self.width), ("patch", self.image[1])):
            part = getattr(self, option)
            if part < 1 or whole % part:
                raise ValueError(f"{flag(option)} must divide {whole}, not be {part}")

    def network(self) -> Chain:
        size = self.image[1]
        embed, *blocks, head = vit(self.block_count, self.width, self.heads, self.patch, size, classes=self.classes)
        return Chain(embed, blocks, head)


@dataclass(frozen=True, kw_only=True)
class Cifar100Vit(Cifar10Vit):
    """The same on CIFAR-100, with its 100 fine classes."""

    name: ClassVar[str] = "cifar100-vit"
    classes: ClassVar[int] = 100
    measures: ClassVar[tuple[Measure, ...]] = (ACCURACY, TOP_5_ACCURACY)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {**PAPER, "noise": 0.002}}
