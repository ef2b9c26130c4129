"""What every recipe whose network is a tree of blocks has besides: its rules' options."""

import math
from dataclasses import dataclass
from typing import Any

from hbll.methods import METHODS
from hbll.names import check_known
from hbll.objective import Objective
from hbll.protocols import TrainingRule
from hbll.recipes.base import flag
from hbll.recipes.cut_recipe import CutRecipe
from hbll.rule import PRESETS, make_rule

OPTIONS = ("stage", "sweeps", "credit_sweeps", "tolerance", "rim")
"""Of the rules in ``PRESETS``."""


@dataclass(frozen=True, kw_only=True)
class TreeRecipe(CutRecipe):
    """Options of the training rule that a user may choose in place of the method's own."""

    stage: int | tuple[int, ...] | None = None
    """Consecutive blocks that form one node, evaluated one after the other, or a number for each: 3 4 (the method's own
    number: 1)."""

    sweeps: int | None = None
    """Of the method scan: evaluations of all stages that correct its guess of the states (its own number: 3)."""

    credit_sweeps: int | None = None
    """Of the method scan: products that carry the head's gradient back, from all stages at once (its own number: 3)."""

    tolerance: float | None = None
    """Of the method scan: end its sweeps as soon as one changes states or credit by less than this share of their norm; the
    numbers of sweeps are then the most (the method's own: none)."""

    rim: float | None = None
    """Weight of the mean loss of the rim's paths, which keeps short paths accurate (the method's own: 0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in self.chosen().items():
            least = 1 if option in ("stage", "sweeps") else 0
            for number in value if isinstance(value, tuple) else [value]:
                if not least <= number < math.inf:
                    finite = " and finite" if option in ("tolerance", "rim") else ""
                    raise ValueError(f"{flag(option)} must be at least {least}{finite}, not {number}")

    def chosen(self) -> dict[str, Any]:
        """The rule's options that were given."""
        given = {option: getattr(self, option) for option in OPTIONS}
        return {option: value for option, value in given.items() if value is not None}

    def reads(self, method: str, option: str) -> bool:
        if method not in PRESETS:
            return option not in OPTIONS and super().reads(method, option)
        return option != "cuts" and make_rule(method, {}).reads(option)

    def objective(self, method: str) -> TrainingRule:
        check_known(method, dict.fromkeys([*PRESETS, *METHODS]), "rule")
        if method not in PRESETS:
            return super().objective(method)
        return Objective(method, **{name: value for name, value in self.chosen().items() if self.reads(method, name)})
