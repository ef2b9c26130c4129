"""Chunks of time, all at once: their states from guessed starts, their credit from guessed ends, their coarse steps.

A sequence of N steps is M chunks of G; tensors of all steps are laid out (G, M, B, ..), so that one step of every chunk is
one batch. G does not have to divide N: the first chunk then begins with steps that hold the state.
"""

import torch
from torch import Tensor

from hbll import prefix
from hbll.models.cells import Cell, Slopes

__all__ = ["chunked", "coarse_step", "pull", "unchunked", "unroll", "unroll_recorded"]


def chunked(x: Tensor, chunk: int) -> Tensor:
    """(N, ...) as (G, M, ...), with zeros before the start where N is no multiple of G."""
    missing = -len(x) % chunk
    if missing:
        x = torch.cat([x.new_zeros(missing, *x.shape[1:]), x])
    return x.unflatten(0, (-1, chunk)).transpose(0, 1)


def unchunked(x: Tensor, length: int) -> Tensor:
    """(G, M, ...) as (N, ...): undoes ``chunked``."""
    return x.transpose(0, 1).flatten(0, 1)[-length:]


def unroll(cell: Cell, driven: Tensor, present: Tensor | None, starts: Tensor) -> Tensor:
    """The states that all chunks end in, G steps after their starts.

    Args:
        driven: (G, M, B, Γ H), the projected inputs.
        present: (G, M, B), false where a step holds the state; None if none does.
        starts: (M, B, S H).

    Returns:
        (M, B, S H).
    """
    state = starts
    for step, inputs in enumerate(driven):
        state = _hold(present, step, cell.advance(inputs, state), state)
    return state


def unroll_recorded(
    cell: Cell, driven: Tensor, present: Tensor | None, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``unroll`` with what the slopes are made of: also the states before every step (G, M, B, S H), and what the
    recurrent map made of them (G, M, B, Γ H). Returns those two and the ends."""
    state, before, recurrent = starts, [], []
    for step, inputs in enumerate(driven):
        before.append(state)
        recurrent.append(cell.recur(state))
        state = _hold(present, step, cell.combine(inputs, recurrent[-1], state), state)
    return torch.stack(before), torch.stack(recurrent), state


def _hold(present: Tensor | None, step: int, new: Tensor, old: Tensor) -> Tensor:
    return new if present is None else torch.where(present[step, ..., None], new, old)


def pull(slopes: Slopes, weight_hh: Tensor, ends: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Carries credit back through all chunks at once.

    Args:
        slopes: of every step, (G, M, B, ..).
        weight_hh: the recurrent weights.
        ends: (M, B, S H), the gradients at the ends of the chunks from what comes after them.
        own: (G, M, B, S H), the gradient of every step's own loss in its new state; None if there is none.

    Returns:
        The gradients in the new state of every step (G, M, B, S H), and those at the starts (M, B, S H).
    """
    credit, at_step = ends, []
    for step in reversed(range(len(slopes.direct))):
        if own is not None:
            credit = credit + own[step]
        at_step.append(credit)
        credit = slopes[step].pull(credit, weight_hh)
    return torch.stack(at_step[::-1]), credit


def coarse_step(slopes: Slopes, weight_hh: Tensor, chunk: int, chunks: int, radix: int) -> prefix.Matrices:
    """The coarse steps P, the same for all samples, and their products over several chunks, as ``hbll.prefix`` takes them.

    P is the G-th power of a mean Jacobian. The product of the Jacobians of the chunk's steps, each averaged over the batch
    alone, does no better and costs G - 1 matrix products and G Jacobians where this costs log2 G and one.

    Args:
        slopes: averaged over the batch and over the steps of every chunk, (M, ..), or over all steps, (1, ..).
        weight_hh: the recurrent weights.
        chunk: G.
        chunks: M.
        radix: of the scans, as for ``prefix.windows``.
    """
    return prefix.windows(torch.linalg.matrix_power(slopes.jacobian(weight_hh), chunk), chunks, radix)
