"""Cells against torch's own, and their slopes against autograd."""

import pytest
import torch
from torch import nn

from hbll.models.cells import CELLS, GRU, LSTM, Slopes


@pytest.fixture
def cell(cell_name):
    return CELLS[cell_name](3, 4)


@pytest.fixture
def situation(cell):
    """A projected input, a state within the cell's reach and what the recurrent map makes of it, for 6 samples."""
    driven, state = torch.randn(6, cell.gates * 4), cell.bound(torch.randn(6, cell.state_width))
    return driven, cell.recur(state), state


def test_gru_and_lstm_are_torchs():
    x, h, c = torch.randn(6, 3), torch.randn(6, 4), torch.randn(6, 4)
    gru, theirs = GRU(3, 4), nn.GRUCell(3, 4)
    gru.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(gru(x, h), theirs(x, h))
    lstm, theirs = LSTM(3, 4), nn.LSTMCell(3, 4)
    lstm.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(lstm(x, torch.cat([h, c], 1)), torch.cat(theirs(x, (h, c)), 1))


def test_the_elman_cell_is_one_linear_layer_and_a_sigmoid():
    cell = CELLS["elman"](3, 4)
    x, h = torch.randn(6, 3), torch.rand(6, 4)
    both = torch.cat([cell.weight_ih, cell.weight_hh], 1)
    expected = torch.sigmoid(torch.cat([x, h], 1) @ both.mT + cell.bias_ih + cell.bias_hh)
    torch.testing.assert_close(cell(x, h), expected)


def exact_jacobians(cell, driven, state):
    function = torch.func.vmap(torch.func.jacrev(cell.advance, argnums=1))
    return function(driven, state)


def test_slopes_make_the_jacobian(cell, situation):
    driven, recurrent, state = situation
    slopes = cell.slopes(driven, recurrent, state)
    torch.testing.assert_close(slopes.jacobian(cell.weight_hh), exact_jacobians(cell, driven, state))


def test_mean_slopes_make_the_mean_jacobian(cell, situation):
    driven, recurrent, state = situation
    slopes = cell.slopes(driven, recurrent, state)
    mean = Slopes(slopes.direct.mean(0), slopes.gated.mean(0), slopes.driven.mean(0))
    torch.testing.assert_close(mean.jacobian(cell.weight_hh), exact_jacobians(cell, driven, state).mean(0))


def test_slopes_carry_credit_to_the_state_and_to_both_maps(cell, situation):
    driven, recurrent, state = (tensor.detach().requires_grad_() for tensor in situation)
    credit = torch.randn(6, cell.state_width)
    new = cell.combine(driven, recurrent, state)
    into_driven, into_recurrent, direct = torch.autograd.grad(
        new, [driven, recurrent, state], credit, materialize_grads=True
    )
    slopes = cell.slopes(driven, recurrent, state)
    for found, expected in zip(slopes.gates(credit), (into_recurrent, into_driven), strict=True):
        torch.testing.assert_close(found, expected)
    through = torch.nn.functional.pad(into_recurrent @ cell.weight_hh, (0, cell.state_width - cell.width))
    torch.testing.assert_close(slopes.pull(credit, cell.weight_hh), direct + through)


def test_held_slopes_are_those_of_a_state_that_stays(cell, situation):
    slopes = cell.slopes(*situation).held(torch.tensor([1.0, 0, 1, 0, 0, 1]))
    exact = cell.slopes(*situation).jacobian(cell.weight_hh)
    held = slopes.jacobian(cell.weight_hh)
    torch.testing.assert_close(held[[0, 2, 5]], exact[[0, 2, 5]])
    torch.testing.assert_close(held[[1, 3, 4]], torch.eye(cell.state_width).expand(3, -1, -1))


def test_states_stay_within_their_bounds(cell):
    state = cell.initial(50)
    for _ in range(20):
        state = cell(10 * torch.randn(50, 3), state)
        torch.testing.assert_close(cell.bound(state), state, rtol=0, atol=0)
