"""The batches of a run: functions of seed, epoch and position, so that nothing of them need be saved."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hbll.data import Samples
from hbll.train.run import Run


@dataclass(frozen=True)
class Feed:
    """What a run learns from, step by step."""

    run: Run
    samples: Samples

    @property
    def steps_per_epoch(self) -> int:
        return len(self.samples) // (self.run.recipe.batch_size * self.run.recipe.accumulate)

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch's samples."""
        order = np.random.default_rng([self.run.seed, epoch]).permutation(len(self.samples))
        return torch.from_numpy(order).to(self.samples.labels.device)

    def batches(self, order: Tensor, epoch: int, position: int) -> list[tuple[Tensor, Tensor]]:
        """The batches of a step, the same whatever the method draws, and after resuming.

        Args:
            order: of the epoch.
            epoch: epochs done before.
            position: steps done in it.
        """
        recipe = self.run.recipe
        # Counted from 1, because a seed padded with zeros is the same seed: step 0 would draw what its order was drawn by.
        draw = np.random.default_rng([self.run.seed, epoch, 1 + position])
        size = recipe.batch_size * recipe.accumulate
        parts = order[position * size : (position + 1) * size].split(recipe.batch_size)
        batches = [self.samples[part] for part in parts]
        return [(recipe.augment(batch.inputs, draw), batch.labels) for batch in batches]
