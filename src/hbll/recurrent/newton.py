"""Parallel Newton over time, the strongest rival: every sample's own Jacobians, exact states and exact gradients.

All steps of the chain are one system of equations. A Newton iteration linearises every step for every sample and solves
the linear recurrence by an associative scan over H x H matrices of every sample (DEER: Lim et al. 2024). Iterations go on
until the states no longer move; one transposed scan with the same Jacobians then gives the exact gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hbll import prefix
from hbll.losses import Loss, cross_entropy
from hbll.names import check_number
from hbll.recurrent.cost import newton_cost
from hbll.recurrent.network import RecurrentNetwork
from hbll.recurrent.rule import RecurrentRule, head_credit, local_update, note
from hbll.rule import StageLoss, Step

__all__ = ["Newton", "solve"]


class Newton(RecurrentRule):
    """DEER. Memory and time grow with N B H^2 and N B H^3.

    Args:
        network: the network to train.
        tolerance: the largest change of a state in an iteration, after which there is no other. Looking at it waits for
            the device.
        iterations: how many at most; N are always enough in exact arithmetic. By default N.
        loss: the label's loss.

    Raises:
        ValueError: a number below its least.
    """

    trains_loss = False

    def __init__(
        self,
        network: RecurrentNetwork,
        *,
        tolerance: float = 1e-4,
        iterations: int | None = None,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, loss=loss)
        check_number("tolerance", tolerance, least=0.0)
        if iterations is not None:
            check_number("iterations", iterations, least=1)
        self.tolerance = tolerance
        self.iterations = iterations

    def losses_in_time(self, x: Tensor, y: Tensor, present: Tensor | None, step: Step) -> Iterator[StageLoss]:
        network, cell, length = self.network, self.network.cell, len(x)
        driven = cell.project(x)
        with torch.no_grad():
            states = cell.initial(x.shape[1]).repeat(length + 1, 1, 1)  # at the times 0..N
            limit = length if self.iterations is None else self.iterations
            for iteration in range(1, limit + 1):  # noqa: B007
                before = states[:-1]
                recurrent = cell.recur(before)
                new = cell.combine(driven, recurrent, before)
                slopes = cell.slopes(driven, recurrent, before)
                if present is not None:
                    new = torch.where(present.mT.unsqueeze(-1), new, before)
                    slopes = slopes.held(present.mT.to(new.dtype))
                jacobians = slopes.jacobian(cell.weight_hh)
                rest = new - states[1:]
                states = torch.cat([states[:1], cell.bound(states[1:] + solve(jacobians, rest))])
                if self.iterations is None and (states[:-1] - before).abs().max() <= self.tolerance:
                    break
            hidden = cell.hidden(states[1:])
            label = head_credit(network, self.loss, hidden if network.every_step else hidden[-1], y, self.read(present))
            own = cell.widen(label.credit)
            if not network.every_step:
                own = torch.cat([own.new_zeros(length - 1, *own.shape), own.unsqueeze(0)])
            # b_t = own_t + J_{t+1}^T b_{t+1}: the same recurrence from the other end.
            reverse = torch.cat([jacobians[:1], jacobians[1:].flip(0)]).mT
            credit = solve(reverse, own.flip(0)).flip(0)
        note(step, label.loss, newton_cost(length, iteration), length)
        step.defect = prefix.defect(states[:-1], before)
        yield StageLoss(1, local_update(network, driven, before, slopes, credit, label))


def solve(matrices: Tensor, values: Tensor) -> Tensor:
    """x_1 .. x_N of x_{m+1} = r_m + A_m x_m with x_0 = 0, by cyclic reduction: 2 log2 N levels, N matrix products.

    Args:
        matrices: (N, ..., H, H), one for each step and sample.
        values: r, (N, ..., H).
    """
    if len(values) == 1:
        return values
    pairs = len(values) // 2
    first, second = matrices[0 : 2 * pairs : 2], matrices[1::2]
    joined = values[1::2] + _times(second, values[0 : 2 * pairs : 2])
    even = solve(second @ first, joined)  # x_2, x_4, ..
    odd = torch.cat([values[:1], values[2::2] + _times(matrices[2::2], even[: len(values[2::2])])])  # x_1, x_3, ..
    both = values.new_empty(values.shape)
    both[0::2], both[1::2] = odd, even
    return both


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
