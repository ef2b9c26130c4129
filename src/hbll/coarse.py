"""The linear coarse step of sweeps in depth: how a correction of a stage's input changes its output."""

import torch
from torch import Tensor, nn

from hbll.late_buffers import register_late_buffers
from hbll.scan import Coarse, windows

__all__ = ["COARSE", "ChannelStep", "CoarseStep", "NoStep", "SkipStep"]


class CoarseStep(nn.Module):
    """What every coarse step offers."""

    def forward(self, stages: int) -> Coarse:
        """The step of all stages, for ``hbll.scan``."""
        raise NotImplementedError

    def learn(self, changes: Tensor, responses: Tensor) -> None:
        """Learns from what stages made of changes: rows (S, n, C) before and after."""


class NoStep(CoarseStep):
    """Corrections end where they are made: Jacobi's sweeps."""

    def forward(self, stages: int) -> Coarse:
        return None


class SkipStep(CoarseStep):
    """Corrections pass unchanged, as along skip connections: Picard's sweeps."""

    def forward(self, stages: int) -> Coarse:
        return "identity"


class ChannelStep(CoarseStep):
    """A matrix over features for every stage, the same for all samples and tokens: a running ridge regression of what the
    stage made of the changes from one sweep to the next.
    """

    momentum = 0.1
    """The weight of the newest batch, as in batch normalisation."""
    ridge = 1e-2
    """Added to the mean square of a change, relative to it."""

    squares: Tensor | None
    products: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        register_late_buffers(self, "squares", "products")

    transposed = False

    def forward(self, stages: int) -> Coarse:
        if self.squares is None or self.products is None:
            return "identity"
        eye = torch.eye(self.squares.shape[-1], dtype=self.squares.dtype, device=self.squares.device)
        level = self.squares.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        rest = torch.linalg.solve(self.squares + (self.ridge * level + 1e-20) * eye, self.products)
        return windows(eye + (rest if self.transposed else rest.mT), stages, max(2, stages))

    def learn(self, changes: Tensor, responses: Tensor) -> None:
        if not self.training:
            return
        size = changes.square().mean((1, 2)).clamp_min(1e-20)[:, None, None] * changes.shape[1]
        squares = changes.mT @ changes / size
        products = changes.mT @ (responses - changes) / size
        first = self.squares is None
        self.squares = squares if first else torch.lerp(self.squares, squares, self.momentum)
        self.products = products if first else torch.lerp(self.products, products, self.momentum)


COARSE: dict[str, type[CoarseStep]] = {"skip": SkipStep, "channels": ChannelStep, "none": NoStep}
