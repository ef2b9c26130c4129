"""What a recipe's network costs on this machine, for plans of more devices."""

from pathlib import Path

import torch

from hbll.distributed.cost import Costs
from hbll.distributed.measure import measured_costs
from hbll.network import Chain
from hbll.recipes import Recipe
from hbll.train.device import device
from hbll.train.optimizers import make_optimizers

__all__ = ["recipe_costs"]


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
    return measured_costs(
        network,
        batch.inputs,
        batch.labels,
        rule.loss,
        lambda: make_optimizers(rule, recipe.optimizer, recipe.learning_rate, recipe.weight_decay),
    )
