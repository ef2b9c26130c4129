"""HBLL-RNN as published: the tree over time, inverted arcs, and consistency sweeps of the deployed cell.

Every node n between its parents i and j takes the state of i over the arc (i, n), and looks at how well the arc (n, j)
then predicts what j holds, or the label if j = N. One gradient step on that error gives the node's target, the posterior,
which its children start from. The deployed cell, which no longer arc trains, is fitted to the tree's states by sweeps of
Jacobi's kind: all of its steps at once, K times, from the states of the sweep before (arXiv 2606.21497, section 4.5).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from hbll.inversion import taylor
from hbll.losses import Loss, cross_entropy, mean_losses
from hbll.recurrent.arcs import Arc
from hbll.recurrent.chunks import unroll
from hbll.recurrent.cost import paper_cost
from hbll.recurrent.network import RecurrentNetwork, padded_start, tree_of
from hbll.recurrent.step import RecurrentRule, RecurrentStep
from hbll.trace import attach_gradients, wide

__all__ = ["PaperRule"]


class PaperRule(RecurrentRule):
    """The paper's tree over time.

    Errors are summed over features and nodes and averaged over the batch.

    Args:
        sweeps: K, consistency sweeps; the paper takes 4 for the GRU and 0 for the Elman cell, which they destabilise.
        variance: sigma^2 of the states.
        label_variance: the label's error is loss / label_variance.
        step: length of the gradient step; 1/2 is exact for orthogonal linear arcs.
        loss: the label's loss.

    Raises:
        ValueError: a number below its least.
    """

    trained: ClassVar[tuple[str, ...]] = ("chain", "tree")

    def __init__(
        self,
        *,
        sweeps: int = 4,
        variance: float = 1.0,
        label_variance: float = 1.0,
        step: float = 0.5,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(loss)
        if sweeps < 0 or not min(variance, label_variance, step) > 0:
            raise ValueError(
                "sweeps is at least 0; variance, label_variance and step are positive; "
                f"got {sweeps}, {variance}, {label_variance}, {step}"
            )
        self.sweeps = sweeps
        self.variance = variance
        self.label_variance = label_variance
        self.step_length = step

    def step(self, network: RecurrentNetwork, x: Tensor, y: Tensor, present: Tensor | None) -> RecurrentStep:
        length, batch, _ = x.shape
        if length < 2:
            raise ValueError("the tree over time needs sequences of at least 2 chunks")
        tree = tree_of(length)
        x, first = padded_start(x, present)
        states = {0: network.cell.initial(batch)}
        losses, errors = [], {}
        for level in tree.levels:
            left = [(tree.left(n), n) for n in level]
            right = [(n, tree.right(n)) for n in level]
            prior = network.cells(x, left, torch.stack([states[a] for a, _ in left]), first)
            with torch.enable_grad():
                at_node = prior.detach().requires_grad_()
                error = self._errors(network, y, at_node, network.cells(x, right, at_node, first), right, states)
            trained = [p for p in self._trained(network, right) if p.requires_grad]
            trained += [x] if x.requires_grad else []
            gradient, *gradients = torch.autograd.grad(error.sum(), [at_node, *trained], materialize_grads=True)
            # Each sample's own gradient: that of the mean times the number of samples.
            target = prior.detach() + self.variance * taylor(batch * gradient, self.step_length)
            losses.append(attach_gradients(error.sum(), trained, gradients))
            losses.append((wide(prior) - wide(target)).square().sum(-1).mean(1).sum() / (2 * self.variance))
            states.update(zip(level, target.unbind(0), strict=True))
            errors.update(zip(level, error.detach().unbind(0), strict=True))
        if self.sweeps:
            losses.append(self._inconsistency(network, x, torch.stack([states[n] for n in range(length)]), present))
        cost = paper_cost(length, self.sweeps)
        return RecurrentStep(torch.stack(losses).sum(), cost.work, cost.span, errors)

    def _trained(self, network: RecurrentNetwork, right: list[Arc]) -> list[nn.Parameter]:
        cells = {network.cells.cell(arc) for arc in right}
        modules = [*(network.cells.cells[kind] for kind in sorted(cells)), network.head]
        return [parameter for module in modules for parameter in module.parameters()]

    def _errors(
        self,
        network: RecurrentNetwork,
        y: Tensor,
        at_node: Tensor,
        ends: Tensor,
        right: list[Arc],
        states: dict[int, Tensor],
    ) -> Tensor:
        """(n,): how far the right arcs end from what their right parents hold, and what the labels say, in nats.

        The last node of every level is the one whose right arc ends at N.
        """
        read, labels = (ends[-1:], y[-1:]) if network.every_step else (ends[-1:], y.unsqueeze(0))
        at_end = mean_losses(self.loss, network.head(network.cell.hidden(read)), labels) / self.label_variance
        held = [states[j] for _, j in right[:-1]]
        inner = (
            [(wide(ends[:-1]) - wide(torch.stack(held))).square().sum(-1).mean(1) / (2 * self.variance)] if held else []
        )
        errors = torch.cat([*inner, at_end])
        if network.every_step:
            labels = torch.stack([y[n - 1] for n, _ in right])
            errors = (
                errors
                + mean_losses(self.loss, network.head(network.cell.hidden(at_node)), labels) / self.label_variance
            )
        return errors

    def _inconsistency(self, network: RecurrentNetwork, x: Tensor, states: Tensor, present: Tensor | None) -> Tensor:
        """||h~^K - h||^2, the distance of the swept states from the tree's, with the gradient of the last sweep alone.

        states: (N, B, S H), the tree's at the times 0..N-1.
        """
        cell = network.cell
        driven, swept = cell.project(x[:-1]), states[:-1]
        held = None if present is None else present.mT[None, :-1]
        with torch.no_grad():
            for _ in range(self.sweeps - 1):
                swept = torch.cat([states[:1], unroll(cell, driven[None], held, swept)[:-1]])
        new = unroll(cell, driven[None], held, swept)
        return (wide(new) - wide(states[1:])).square().sum(-1).mean(1).sum()
