"""What a recipe's network costs on this machine, for plans of more devices, and the stages that it is cut into by that."""

from collections.abc import Mapping
from pathlib import Path

import torch

from hbll.distributed.cost import Costs, ReadoutKind, balanced
from hbll.distributed.measure import measured_costs
from hbll.network import Chain
from hbll.recipes import Recipe
from hbll.recipes.base import RULE_OPTIONS, ChainRecipe, flag
from hbll.train.descent import lowered
from hbll.train.device import device
from hbll.train.optimizers import make_optimizers

__all__ = ["balanced_stages", "check_balanced", "check_planned", "recipe_costs"]

READOUTS: Mapping[str, ReadoutKind] = {
    "stream": "spine",
    "greedy": "head",
    "solo": "solo",
    "dgl": "head",
    "predsim": "head",
}
"""What stages read by, unless a recipe says otherwise; a classifier of another kind counts as a head."""


def check_balanced(recipe: Recipe, method: str) -> ChainRecipe:
    """The recipe; ValueError when its stages are given already, or nothing is known of the time that they take."""
    if method not in READOUTS or not isinstance(recipe, ChainRecipe):
        raise ValueError(
            f"--balance time knows what stages take by {', '.join(READOUTS)}, and not by {method}: give --stage"
        )
    for option, value in (("--stage", recipe.stage), ("--cuts", recipe.cuts)):
        if value is not None:
            raise ValueError(f"give {option} or --balance, not both")
    if recipe.readout_depth is not None:
        raise ValueError(
            "--balance time counts readouts of the usual depth: leave out --readout-depth, or give --stage"
        )
    return recipe


def balanced_stages(recipe: ChainRecipe, method: str, data_dir: Path | None, stages: int) -> tuple[int, ...]:
    """The sizes of so many stages of a recipe's network, the slowest of which is as fast here as can be.

    Raises:
        ValueError: the data set is missing.
    """
    return balanced(recipe_costs(recipe, data_dir), stages, recipe.batch_size, recipe.readout or READOUTS[method])


def check_planned(recipe: Recipe) -> None:
    """ValueError when an option of a rule was given that a plan, which has its own cuts and readouts, does not read."""
    usual = recipe.of_preset(getattr(recipe, "preset", "small"))
    for option in RULE_OPTIONS:
        if option != "refresh" and getattr(recipe, option, None) != getattr(usual, option, None):
            raise ValueError(
                f"{flag(option)} does nothing in a plan, which cuts and reads stages by measured time: leave it out"
            )


def recipe_costs(recipe: Recipe, data_dir: Path | None) -> Costs:
    """The measured costs of the parts of a recipe's network, on its first batch.

    Raises:
        ValueError: the data set is missing, or the network is no chain of blocks.
    """
    network = recipe.initial_network(0)
    if not isinstance(network, Chain):
        raise ValueError(f"{recipe.name} has no chain of blocks that could be spread over devices")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    batch = recipe.splits(data_dir).to(device()).train[: recipe.batch_size]
    rule = recipe.rule("bp", network.to(device()), None)
    with lowered(recipe.precision, device()):
        return measured_costs(
            network,
            batch.inputs,
            batch.labels,
            rule.loss,
            lambda: make_optimizers(rule, recipe.optimizer, recipe.learning_rate, recipe.weight_decay),
        )
