"""Backpropagation, the exact gradient of the chain or of any path through it: what the other rules are compared with."""

from collections.abc import Iterator, Sequence
from typing import Any

from hbll.calls import apply
from hbll.losses import Loss, cross_entropy, mean_loss
from hbll.modes import is_trained
from hbll.names import check_number
from hbll.network import Chain
from hbll.rule import Rule, StageLoss, Step
from hbll.rules.rim import rim_loss

__all__ = ["Backpropagation"]


class Backpropagation(Rule):
    """The label's loss, through the whole network, which is one stage.

    Args:
        network: the network to train.
        path: the blocks to go through, as ``Chain.resolve`` takes them; by default all.
        rim: weight of the mean loss of the rim's paths, trained beside it; keeps short paths accurate.
        loss: the label's loss.
    """

    def __init__(
        self,
        network: Chain,
        *,
        path: str | int | Sequence[int] | None = None,
        rim: float = 0.0,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, stage=None, loss=loss)
        check_number("rim", rim, least=0.0)
        self.path = network.resolve(path)
        self.rim = rim

    def losses(self, x: Any, y: Any, step: Step) -> Iterator[StageLoss]:
        network = self.network
        embedded, context = network.embedded(x)
        if self.path == network.tree.chain:
            state = apply(self.stages[0].title, self.stages[0], embedded, context)  # compiled, if it was
        else:
            state = network.along(self.path, embedded, context)
        self._count(embedded.requires_grad, step)
        value = mean_loss(self.loss, network.read(state, context), y)
        step.label_loss = value.detach()
        step.report([1], error=value.unsqueeze(0))
        if self.rim:
            value = value + self.rim * rim_loss(network, embedded, context, y, self.loss, step)
        yield StageLoss(1, value)

    def _count(self, below: bool, step: Step) -> None:
        """Counts the way there and back; ``below`` is whether the embed is trained."""
        length = len(self.path)
        for passed, n in enumerate(self.path, 1):
            trained = is_trained(self.network.blocks[n - 1])
            step.count(1, passed)
            step.count(trained + below, 2 * length + 1 - passed)
            below = below or trained
