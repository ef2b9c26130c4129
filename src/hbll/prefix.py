"""Corrections of a whole sequence of states at once, by a linear coarse step, and the same transposed for credit.

A sweep evaluates all M segments of a chain at once, each from a guess of its start: ``outs[m]`` from ``starts[m]``.
The end of one segment and the guessed start of the next then disagree. If segment m answered a change of its start
linearly, by P_m, the states without disagreement would be

    new_0 = start_0,   new_{m+1} = out_m + P_m (new_m - start_m),

a linear recurrence, solved in ceil(log_r M) levels, each of which adds up r values. P_m is nothing (Jacobi: the states
are just the outputs), the identity (Picard: the skip path of residual blocks) or a share of it, or a matrix shared by all
samples (recurrent cells). Iterated, this is exact after M sweeps whatever P is; the closer P is to the segments' Jacobians,
the sooner (parareal, Lions et al. 2001; DEER, Lim et al. 2024; the scan itself is Hillis and Steele's, 1986).
"""

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Coarse", "Matrices", "correct", "correct_transposed", "defect", "levels", "widths", "windows"]

Matrices: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""What ``windows`` makes of matrices."""

Coarse: TypeAlias = float | Matrices | None
"""The coarse step P: None for 0, a share of the identity (1.0: the identity), or what ``windows`` makes of matrices."""


def widths(segments: int, radix: int = 2) -> list[range]:
    """For every level l of the recurrence over M segments, the numbers of segments across which it carries values.

    They are i r^l for i = 1 .. r - 1, below M: what a level adds up reaches r^(l + 1) segments far.
    """
    found, stride = [], 1
    while stride < segments:
        found.append(range(stride, min(segments, radix * stride), stride))
        stride *= radix
    return found


def levels(segments: int, radix: int = 2) -> int:
    """The number of sequential levels in which the recurrence over M segments is solved: ceil(log_r M)."""
    return len(widths(segments, radix))


def windows(matrices: Tensor, segments: int, radix: int = 2) -> Matrices:
    """Products of neighbouring matrices, once for all the scans that use them.

    Args:
        matrices: (M, H, H), P_m for every segment; or (1, H, H), the same for all.
        segments: M.
        radix: r, at least 2: how many values a level adds up. With more of them levels are fewer and products more.

    Returns:
        For every level the products of w neighbours for each of its ``widths``, (M - w + 1, H, H): entry m is
        P_{m+w-1} .. P_m. Both directions use them.
    """
    rows, products = widths(segments, radix), {1: matrices}
    shared = len(matrices) < segments
    for level, row in enumerate(rows):
        for width in row[level == 0 :]:
            # From two halves, so that all are there after a logarithm of products.
            unit = radix**level if width > radix**level else radix ** (level - 1)
            half = width // unit // 2 * unit
            first, second = products[half], products[width - half]
            products[width] = second @ first if shared else second[half:] @ first[: len(second) - half]
    return tuple(tuple(products[width].expand(segments - width + 1, -1, -1) for width in row) for row in rows)


def correct(starts: Tensor, outs: Tensor, coarse: Coarse) -> Tensor:
    """The ends of all segments, corrected: new_1 .. new_M with new_0 = start_0.

    Args:
        starts: (M, B, ..., H), the guessed start of every segment; the first is taken for exact.
        outs: (M, B, ..., H), the end that every segment reaches from there.
        coarse: the coarse step; matrices act on the last dimension.
    """
    if coarse is None:
        return outs
    # In terms of new - old the right-hand side is small, which keeps half-precision sums accurate; the last end has no
    # guess, so its own output stands in.
    old = torch.cat([starts[1:], outs[-1:]])
    return old + _prefix(outs - old, coarse)


def correct_transposed(credit: Tensor, pulled: Tensor, coarse: Coarse) -> Tensor:
    """The gradients at the starts of all segments, corrected: nb_0 .. nb_{M-1} with nb_M = b_M, and

        nb_m = v_m + P_m^T (nb_{m+1} - b_{m+1}).

    Args:
        credit: (M, B, ..., H), b_1 .. b_M: the guessed gradients at the segments' ends; the last is taken for exact.
        pulled: (M, B, ..., H), v_0 .. v_{M-1}: each pulled back through its segment.
        coarse: the coarse step, as for ``correct``.
    """
    if coarse is None:
        return pulled
    old = torch.cat([pulled[:1], credit[:-1]])
    return old + _suffix(pulled - old, coarse)


def defect(new: Tensor, old: Tensor) -> Tensor:
    """||new - old|| / ||new||, a scalar: how far the last sweep still moved the states. Without graph."""
    new, old = new.detach().float(), old.detach().float()
    return (new - old).norm() / new.norm().clamp_min(torch.finfo(new.dtype).tiny)


def _prefix(values: Tensor, coarse: float | Matrices) -> Tensor:
    """x_1 .. x_M of x_{m+1} = r_m + P_m x_m, x_0 = 0."""
    if coarse == 1.0:
        return values.cumsum(0)
    if isinstance(coarse, float):
        return _leaky_sums(values, coarse)
    sums = values.flatten(1, -2)
    for level in coarse:
        found = sums.clone()
        for products in level:
            # Entry m sums the last inputs up to m; those w before it are carried across the w segments that follow them.
            width = len(sums) - len(products) + 1
            found[width:] += sums[:-width] @ products[1:].mT  # lower than the sums where autocast says so
        sums = found
    return sums.view_as(values)


def _suffix(values: Tensor, coarse: float | Matrices) -> Tensor:
    """y_0 .. y_{M-1} of y_m = s_m + P_m^T y_{m+1}, y_M = 0."""
    if coarse == 1.0:
        return values.flip(0).cumsum(0).flip(0)
    if isinstance(coarse, float):
        return _leaky_sums(values.flip(0), coarse).flip(0)
    sums = values.flatten(1, -2)
    for level in coarse:
        found = sums.clone()
        for products in level:
            width = len(sums) - len(products) + 1
            found[:-width] += sums[width:] @ products[:-1]
        sums = found
    return sums.view_as(values)


def _leaky_sums(values: Tensor, share: float) -> Tensor:
    """x_1 .. x_M of x_{m+1} = r_m + share x_m, x_0 = 0, in ceil(log_2 M) levels."""
    stride = 1
    while stride < len(values):
        values = torch.cat([values[:stride], values[stride:] + share**stride * values[:-stride]])
        stride *= 2
    return values
