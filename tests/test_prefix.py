"""The corrections against the plain loop of their recurrence, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hbll import prefix

SHAPES = [(3,), (2, 3), (2, 2, 3)]


def loop(starts: Tensor, outs: Tensor, matrices: Tensor) -> Tensor:
    new = [starts[0]]
    for start, out, matrix in zip(starts, outs, matrices, strict=True):
        new.append(out + (new[-1] - start) @ matrix.mT)
    return torch.stack(new[1:])


def loop_transposed(credit: Tensor, pulled: Tensor, matrices: Tensor) -> Tensor:
    new = [credit[-1]]
    for guess, value, matrix in reversed(list(zip(credit, pulled, matrices, strict=True))):
        new.append(value + (new[-1] - guess) @ matrix)
    return torch.stack(new[:0:-1])


def draw(segments: int, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, segments, *shape, dtype=torch.float64, generator=generator)
    matrices = torch.randn(segments, shape[-1], shape[-1], dtype=torch.float64, generator=generator) / 2
    return first, second, matrices


@settings(deadline=None)
@given(segments=st.integers(1, 19), radix=st.integers(2, 20), shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_matrices_solve_the_recurrence_in_either_direction(segments, radix, shape, seed):
    first, second, matrices = draw(segments, (4, *shape), seed)
    coarse = prefix.windows(matrices, segments, radix)
    assert len(coarse) == prefix.levels(segments, radix)
    torch.testing.assert_close(prefix.correct(first, second, coarse), loop(first, second, matrices))
    torch.testing.assert_close(
        prefix.correct_transposed(first, second, coarse), loop_transposed(first, second, matrices)
    )


@pytest.mark.parametrize("segments", [1, 2, 7])
@pytest.mark.parametrize(("coarse", "scale"), [(None, 0.0), (1.0, 1.0), (0.8, 0.8), (0.0, 0.0)])
def test_shares_of_the_identity_are_its_multiples(segments, coarse, scale):
    first, second, _ = draw(segments, (2, 3), seed=0)
    matrices = scale * torch.eye(3, dtype=torch.float64).expand(segments, 3, 3)
    torch.testing.assert_close(prefix.correct(first, second, coarse), loop(first, second, matrices))
    torch.testing.assert_close(
        prefix.correct_transposed(first, second, coarse), loop_transposed(first, second, matrices)
    )


def test_the_number_of_levels_and_of_products_is_logarithmic():
    assert [prefix.levels(m) for m in (1, 2, 3, 4, 5, 64, 65)] == [0, 1, 2, 2, 3, 6, 7]
    assert [prefix.levels(m, 4) for m in (1, 2, 4, 5, 16, 17)] == [0, 1, 1, 2, 2, 3]
    sizes = [[len(products) for products in level] for level in prefix.windows(torch.zeros(64, 2, 2), 64)]
    assert sizes == [[64], [63], [61], [57], [49], [33]]
    sizes = [[len(products) for products in level] for level in prefix.windows(torch.zeros(10, 2, 2), 10, 4)]
    assert sizes == [[10, 9, 8], [7, 3]]  # of 1, 2, 3 and of 4, 8 neighbours


@settings(deadline=None)
@given(segments=st.integers(1, 12), radix=st.integers(2, 12), seed=st.integers(0, 999))
def test_windows_are_products_of_neighbours(segments, radix, seed):
    _, _, matrices = draw(segments, (1, 2), seed)
    for depth, level in enumerate(prefix.windows(matrices, segments, radix)):
        for count, products in enumerate(level, 1):
            width = count * radix**depth
            for m in range(segments - width + 1):
                expected = torch.eye(2, dtype=torch.float64)
                for matrix in matrices[m : m + width]:
                    expected = matrix @ expected
                torch.testing.assert_close(products[m], expected)


@pytest.mark.parametrize(("segments", "radix"), [(1, 2), (7, 2), (16, 16), (12, 4)])
def test_one_matrix_for_all_segments_is_so_many_of_it(segments, radix):
    _, _, matrices = draw(1, (1, 2), seed=3)
    shared = prefix.windows(matrices, segments, radix)
    each = prefix.windows(matrices.expand(segments, -1, -1), segments, radix)
    torch.testing.assert_close(shared, each)


def test_exact_steps_solve_a_linear_chain_in_one_sweep():
    _, inputs, matrices = draw(9, (2, 3), seed=5)

    def segments(starts):
        return inputs + starts @ matrices.mT

    chain = [torch.zeros(2, 3, dtype=torch.float64)]
    for m in range(9):
        chain.append(inputs[m] + chain[-1] @ matrices[m].mT)
    guess = torch.randn(9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    guess[0] = 0
    torch.testing.assert_close(
        prefix.correct(guess, segments(guess), prefix.windows(matrices, 9)), torch.stack(chain[1:])
    )


def test_the_defect_is_the_relative_change():
    new, old = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert prefix.defect(new, old).item() == pytest.approx(4 / 5)
    assert prefix.defect(new, new).item() == 0
    assert prefix.defect(torch.zeros(2), torch.zeros(2)).item() == 0
