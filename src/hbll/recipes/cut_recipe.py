"""What every recipe has whose network is a sequence of parts: local rules, on as many blocks as it is cut into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hbll.methods import make_rule
from hbll.protocols import TrainingRule
from hbll.recipes.base import Recipe


@dataclass(frozen=True, kw_only=True)
class CutRecipe(Recipe):
    """Options of local rules."""

    suited: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options of rules, by method, that suit the states of the recipe's network better than the rules' own."""

    cuts: int | None = None
    """Blocks that the network is cut into for local rules such as bll, of about as many layers each (one a layer)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuts is not None and self.cuts < 1:
            raise ValueError(f"--cuts must be at least 1, not {self.cuts}")

    def reads(self, method: str, option: str) -> bool:
        return option != "cuts" or method != "bp"  # which has nothing to cut

    def objective(self, method: str) -> TrainingRule:
        cuts = {"blocks": self.cuts} if self.cuts is not None and self.reads(method, "cuts") else {}
        return make_rule(method, **cuts, **self.suited.get(method, {}))


@dataclass(frozen=True, kw_only=True)
class PlainRecipe(CutRecipe):
    """A recipe whose network is a `SequentialNetwork` of its own number of layers."""

    methods: ClassVar[tuple[str, ...]] = ("bll", "bp")

    layers: ClassVar[int]
    """Layers before the head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None or self.blocks is not None:
            raise ValueError(f"{self.name} has its own number of layers: leave out --depth and --blocks")

    @property
    def block_count(self) -> int:
        return self.layers
