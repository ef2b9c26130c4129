"""What every recipe whose network is a tree of blocks has besides: its rules' options."""

from dataclasses import dataclass

from hbll.methods import METHODS
from hbll.names import check_known
from hbll.objective import Objective
from hbll.protocols import TrainingRule
from hbll.recipes.cut_recipe import CutRecipe
from hbll.rule import PRESETS


@dataclass(frozen=True, kw_only=True)
class TreeRecipe(CutRecipe):
    """Options of the training rule that a user may choose in place of the method's own."""

    stage: int | None = None
    """Consecutive blocks that form one node, evaluated one after the other (the method's own number: 1)."""

    rim: float | None = None
    """Weight of the mean loss of the rim's paths, which keeps short paths accurate (the method's own: 0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage is not None and self.stage < 1:
            raise ValueError(f"--stage must be at least 1, not {self.stage}")
        if self.rim is not None and not 0 <= self.rim < float("inf"):
            raise ValueError(f"--rim must be at least 0 and finite, not {self.rim}")

    def objective(self, method: str) -> TrainingRule:
        check_known(method, dict.fromkeys([*PRESETS, *METHODS]), "rule")
        if method not in PRESETS:
            return super().objective(method)
        chosen = {"stage": self.stage, "rim": self.rim}
        return Objective(method, **{option: value for option, value in chosen.items() if value is not None})
