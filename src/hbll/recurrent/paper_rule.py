"""HBLL-RNN as published: the tree over time, inverted arcs, and consistency sweeps of the deployed cell.

Every node n between its parents i and j takes the state of i over the arc (i, n), and looks at how well the arc (n, j)
then predicts what j holds, or the label if j = N. One gradient step on that error gives the node's target, the posterior,
which its children start from. The deployed cell, which no longer arc trains, is fitted to the tree's states by sweeps of
Jacobi's kind: all of its steps at once, K times, from the states of the sweep before (arXiv 2606.21497, section 4.5).
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from hbll.inversion import taylor
from hbll.losses import Loss, cross_entropy, mean_losses, wide
from hbll.names import check_number
from hbll.recurrent.arcs import Arc
from hbll.recurrent.chunks import unroll
from hbll.recurrent.cost import paper_cost
from hbll.recurrent.network import RecurrentNetwork, beginnings, tree_of
from hbll.recurrent.rule import RecurrentRule
from hbll.rule import StageLoss, Step, attach_gradients

__all__ = ["PaperRule"]


class PaperRule(RecurrentRule):
    """The paper's tree over time.

    Errors are summed over features and nodes and averaged over the batch. A level of the tree is walked back before the
    next one is computed.

    Args:
        network: the network to train.
        sweeps: K, consistency sweeps; by default the paper's 4, or 0 for a cell without gates (Elman's), which they
            destabilise.
        variance: sigma^2 of the states.
        label_variance: the label's error is loss / label_variance.
        step: length of the gradient step; 1/2 is exact for orthogonal linear arcs.
        loss: the label's loss.

    Raises:
        ValueError: a number below its least.
    """

    trains_loss = False
    trained: ClassVar[tuple[str, ...]] = ("chain", "tree")

    def __init__(
        self,
        network: RecurrentNetwork,
        *,
        sweeps: int | None = None,
        variance: float = 1.0,
        label_variance: float = 1.0,
        step: float = 0.5,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, loss=loss)
        if sweeps is None:
            sweeps = 4 if network.cell.gates > 1 else 0
        check_number("sweeps", sweeps, least=0)
        check_number("variance", variance, above=0.0)
        check_number("label_variance", label_variance, above=0.0)
        check_number("step", step, above=0.0)
        self.sweeps = sweeps
        self.variance = variance
        self.label_variance = label_variance
        self.step_length = step

    def losses_in_time(self, x: Tensor, y: Tensor, present: Tensor | None, step: Step) -> Iterator[StageLoss]:
        length, batch, _ = x.shape
        if length < 2:
            raise ValueError("the tree over time needs sequences of at least 2 chunks")
        # Every level reads the chunks, whose graph can be walked back once: a leaf gathers their gradients.
        gathers = x.requires_grad and not step.look
        chunks = x.detach().requires_grad_() if gathers else x
        leaves = (chunks,) if gathers else ()
        states = {0: self.network.cell.initial(batch)}
        for level in tree_of(length).levels:
            value, targets, errors, label = self._level(level, chunks, y, present, states)
            states.update(zip(level, targets.unbind(0), strict=True))
            step.report(level, error=errors)
            step.label_loss = label  # of the last level at last, whose end is the longest way from the input
            yield StageLoss(1, value, leaves)
        if self.sweeps:
            held = torch.stack([states.pop(n) for n in range(length)])
            yield StageLoss(1, self._inconsistency(chunks, held, present), leaves)
        if gathers and chunks.grad is not None:
            value = attach_gradients(chunks.new_zeros(()), [x], [chunks.grad])
            yield StageLoss("embed", value, gathered=True)
        cost = paper_cost(length, self.sweeps)
        step.count(cost.work, cost.span)

    def _level(
        self, level: tuple[int, ...], x: Tensor, y: Tensor, present: Tensor | None, states: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A level of the tree, n nodes, all at once.

        Args:
            x: (N, B, I), the chunks, a leaf if they are to get gradients.
            present: (B, N), false for the padding; None if there is none.
            states: those of the levels before.

        Returns:
            The loss of the level; the targets (n, B, S H), the errors (n,) and the label's mean loss, without graph.
        """
        network, tree, first = self.network, tree_of(len(x)), beginnings(present)
        left = [(tree.left(n), n) for n in level]
        right = [(n, tree.right(n)) for n in level]
        prior = network.cells(x, left, torch.stack([states[a] for a, _ in left]), first)
        # Two leaves, for the means that they come into are over different numbers of samples.
        at_node, at_head = (prior.detach().requires_grad_() for _ in range(2))
        ends = network.cells(x, right, at_node, first)
        errors, label, samples = self._errors(y, at_head, ends, right, states, present)
        trained: list[Tensor] = [p for p in self._trained(right) if p.requires_grad]
        trained += [x] if x.requires_grad else []
        found = torch.autograd.grad(errors.sum(), [at_node, at_head, *trained], materialize_grads=True)
        # Each sample's own gradient: that of a mean times the number of samples in it.
        across, here = (g * of.to(g.dtype)[:, None, None] for g, of in zip(found[:2], samples, strict=True))
        target = prior.detach() + self.variance * taylor(across + here, self.step_length)
        moved = (wide(prior) - wide(target)).square().sum(-1).mean(1).sum() / (2 * self.variance)
        return attach_gradients(errors.sum(), trained, found[2:]) + moved, target, errors.detach(), label.detach()

    def _trained(self, right: list[Arc]) -> list[nn.Parameter]:
        """The parameters of the cells of right arcs, and the head's."""
        cells = self.network.cells
        modules = [*(cells.cells[kind] for kind in sorted({cells.cell(arc) for arc in right})), self.network.head]
        return [parameter for module in modules for parameter in module.parameters()]

    def _errors(
        self,
        y: Tensor,
        at_head: Tensor,
        ends: Tensor,
        right: list[Arc],
        states: Mapping[int, Tensor],
        present: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(n,): how far the right arcs end from what their right parents hold, and what the labels say, in nats; the label's
        mean loss at the end; and of how many samples the errors are means, (n,), those of right arcs and those of labels at
        the nodes themselves.

        The last node of every level is the one whose right arc ends at N.

        Args:
            at_head: (n, B, S H), the states at the nodes, whose labels are read off them.
        """
        network = self.network
        last = y[None, :, -1] if network.every_step else y.unsqueeze(0)
        label, labelled = mean_losses(self.loss, network.head(network.cell.hidden(ends[-1:])), last)
        held = [states[j] for _, j in right[:-1]]
        inner = (
            [(wide(ends[:-1]) - wide(torch.stack(held))).square().sum(-1).mean(1) / (2 * self.variance)] if held else []
        )
        errors = torch.cat([*inner, label / self.label_variance])
        samples = torch.cat([labelled.new_full((len(held),), y.shape[0]), labelled])
        own_samples = torch.zeros_like(samples)
        if network.every_step:
            labels = torch.stack([y[:, n - 1] for n, _ in right])
            counted = None if present is None else torch.stack([present[:, n - 1] for n, _ in right])
            own, own_samples = mean_losses(self.loss, network.head(network.cell.hidden(at_head)), labels, counted)
            errors = errors + own / self.label_variance
        return errors, label.squeeze(0), (samples, own_samples)

    def _inconsistency(self, x: Tensor, states: Tensor, present: Tensor | None) -> Tensor:
        """||h~^K - h||^2, the distance of the swept states from the tree's, with the gradient of the last sweep alone.

        states: (N, B, S H), the tree's at the times 0..N-1.
        """
        cell = self.network.cell
        driven, swept = cell.project(x[:-1]), states[:-1]
        held = None if present is None else present.mT[None, :-1]
        with torch.no_grad():
            for _ in range(self.sweeps - 1):
                swept = torch.cat([states[:1], unroll(cell, driven[None], held, swept)[:-1]])
        new = unroll(cell, driven[None], held, swept)
        return (wide(new) - wide(states[1:])).square().sum(-1).mean(1).sum()
