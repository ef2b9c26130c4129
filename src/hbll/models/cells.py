"""Recurrent cells whose derivatives are known in closed form: GRU, Elman and LSTM.

Every cell is two linear maps, of the input and of the hidden state, and a function of their sums that acts unit by unit.
Its Jacobian in the state is therefore made of *slopes*, one number per unit and sample, and of the weights:

    J = direct + gated W_hh,

with ``direct`` and ``gated`` diagonal (in blocks, for a cell with more than one state). Slopes are what carries credit
back through a step, and, averaged over a batch, what makes one matrix that serves all of its samples.
Weights have torch's names, shapes and order, so that they are those of nn.GRUCell and nn.LSTMCell as they stand.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CELLS", "GRU", "LSTM", "Cell", "Elman", "OneHot", "Slopes"]


@dataclass(frozen=True)
class Slopes:
    """Partial derivatives of a step's new state, unit by unit; S parts of the state, Γ gates, H units.

    direct: (..., S, S, H), of part s in part r of the old state, the recurrent map held fixed.
    gated: (..., S, Γ, H), of part s in gate γ of the recurrent map's output.
    driven: (..., S, Γ, H), of part s in gate γ of the input map's output.
    """

    direct: Tensor
    gated: Tensor
    driven: Tensor

    def __getitem__(self, index: int) -> "Slopes":
        """Those of one of the steps that the first dimension counts."""
        return Slopes(self.direct[index], self.gated[index], self.driven[index])

    def pull(self, credit: Tensor, weight_hh: Tensor) -> Tensor:
        """J^T credit: the gradient in the old state from that in the new one, both (..., S H)."""
        credit = credit.unflatten(-1, (-1, 1, self.direct.shape[-1]))
        direct = _collect(self.direct * credit).flatten(-2)
        gates = _collect(self.gated * credit).flatten(-2)
        width = weight_hh.shape[1]
        if direct.shape[-1] == width:
            pulled = torch.addmm(direct.flatten(0, -2), gates.flatten(0, -2), weight_hh)
            return pulled.view_as(direct)
        hidden = direct[..., :width] + gates @ weight_hh  # only the first part of the state is read by the linear map
        return torch.cat([hidden, direct[..., width:]], -1)

    def gates(self, credit: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients in the outputs of the recurrent and of the input map, (..., Γ H), from that in the new state."""
        credit = credit.unflatten(-1, (-1, 1, self.direct.shape[-1]))
        recurrent = _collect(self.gated * credit).flatten(-2)
        if self.driven is self.gated:
            return recurrent, recurrent
        return recurrent, _collect(self.driven * credit).flatten(-2)

    def held(self, present: Tensor) -> "Slopes":
        """The slopes where samples without ``present``, (...), keep their old state."""
        moved = present[..., None, None, None]
        same = torch.eye(self.direct.shape[-2], dtype=moved.dtype, device=moved.device)[..., None]
        gated = self.gated * moved
        driven = gated if self.driven is self.gated else self.driven * moved
        return Slopes(self.direct * moved + same * (1 - moved), gated, driven)

    def jacobian(self, weight_hh: Tensor) -> Tensor:
        """J as a matrix, (..., S H, S H)."""
        parts, _, width = self.direct.shape[-3:]
        weights = weight_hh.view(-1, width, width)
        through = self.gated[..., 0, :, None] * weights[0]  # (..., S, H, H), of every part in the hidden state
        for gate in range(1, len(weights)):
            through.addcmul_(self.gated[..., gate, :, None], weights[gate])
        through.diagonal(dim1=-2, dim2=-1).add_(self.direct[..., 0, :])
        if parts == 1:
            return through.squeeze(-3)
        others = torch.diag_embed(self.direct[..., 1:, :]).transpose(-4, -3)  # (..., S-1, S, H, H)
        columns = torch.cat([through.unsqueeze(-4), others], -4)  # by part of the old state, then of the new one
        return columns.movedim(-4, -2).flatten(-4, -3).flatten(-2)


def _collect(values: Tensor) -> Tensor:
    """Sums over the parts of the new state, (..., S, n, H) to (..., n, H)."""
    return values.squeeze(-3) if values.shape[-3] == 1 else values.sum(-3)


class Cell(nn.Module):
    """What every cell offers.

    Args:
        inputs: width of the input.
        width: H, units of the hidden state.
    """

    gates: ClassVar[int]
    """Γ: how many times H both linear maps put out."""
    parts: ClassVar[int] = 1
    """S: the state is (B, S H); its first part is the hidden state, the cell's output."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.width = width
        self.weight_ih = nn.Parameter(torch.empty(self.gates * width, inputs))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * width, width))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * width))
        self.bias_hh = nn.Parameter(torch.empty(self.gates * width))
        for parameter in self.parameters():  # as torch's cells do
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.width}"

    @property
    def state_width(self) -> int:
        return self.parts * self.width

    def initial(self, batch: int) -> Tensor:
        """The state before the first step, zeros (B, S H), of the weights' type and device."""
        return self.weight_hh.new_zeros(batch, self.state_width)

    def hidden(self, state: Tensor) -> Tensor:
        """The part of a state that heads read: (..., S H) to (..., H)."""
        return state[..., : self.width]

    def widen(self, gradient: Tensor) -> Tensor:
        """The gradient in a state from that in its hidden part: (..., H) to (..., S H)."""
        return F.pad(gradient, (0, self.state_width - self.width))

    def project(self, x: Tensor) -> Tensor:
        """The input map, (..., inputs) to (..., Γ H): for all steps at once, since it needs no state."""
        return F.linear(x, self.weight_ih, self.bias_ih).to(self.weight_ih.dtype)  # which autocast may have lowered

    def recur(self, state: Tensor) -> Tensor:
        """The recurrent map, (..., S H) to (..., Γ H)."""
        return F.linear(self.hidden(state), self.weight_hh, self.bias_hh).to(self.weight_hh.dtype)

    def advance(self, driven: Tensor, state: Tensor) -> Tensor:
        """One step from a projected input (..., Γ H) and a state (..., S H)."""
        return self.combine(driven, self.recur(state), state)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """One step: (..., inputs) and (..., S H) to the new state (..., S H)."""
        return self.advance(self.project(x), state)

    def combine(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
        """The new state from both maps' outputs (..., Γ H) and the old state, unit by unit."""
        raise NotImplementedError

    def slopes(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Slopes:
        """The derivatives of ``combine``."""
        raise NotImplementedError

    def bound(self, state: Tensor) -> Tensor:
        """The nearest state that the cell can reach."""
        raise NotImplementedError

    def _gates(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.unflatten(-1, (self.gates, self.width)).unbind(-2)


class GRU(Cell):
    """Gated recurrent unit (Cho et al. 2014) as in nn.GRUCell: h' = (1 - u) n + u h, n = tanh(W_n x + r (V_n h))."""

    gates = 3

    def combine(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
        both = 2 * self.width
        reset, update = torch.sigmoid(driven[..., :both] + recurrent[..., :both]).chunk(2, -1)
        new = torch.tanh(torch.addcmul(driven[..., both:], reset, recurrent[..., both:]))
        return torch.lerp(new, state, update)

    def slopes(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Slopes:
        both = 2 * self.width
        reset, update = torch.sigmoid(driven[..., :both] + recurrent[..., :both]).chunk(2, -1)
        answer = recurrent[..., both:]
        new = torch.tanh(torch.addcmul(driven[..., both:], reset, answer))
        of_new = (1 - update) * (1 - new * new)
        of_reset = of_new * answer * reset * (1 - reset)
        of_update = (state - new) * update * (1 - update)
        return Slopes(
            direct=update[..., None, None, :],
            gated=torch.stack([of_reset, of_update, of_new * reset], -2).unsqueeze(-3),
            driven=torch.stack([of_reset, of_update, of_new], -2).unsqueeze(-3),
        )

    def bound(self, state: Tensor) -> Tensor:
        return state.clamp(-1, 1)


class Elman(Cell):
    """Simple recurrent network (Elman 1990) with a sigmoid, as in the paper: h' = sigmoid(W x + V h)."""

    gates = 1

    def combine(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
        return torch.sigmoid(driven + recurrent)

    def slopes(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Slopes:
        new = torch.sigmoid(driven + recurrent)
        gated = (new * (1 - new))[..., None, None, :]
        return Slopes(torch.zeros_like(gated), gated, gated)

    def bound(self, state: Tensor) -> Tensor:
        return state.clamp(0, 1)


class LSTM(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) as in nn.LSTMCell; the state is (h, c), of width 2 H."""

    gates = 4
    parts = 2

    def combine(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
        entry, forget, candidate, output = self._gates(driven + recurrent)
        memory = forget.sigmoid() * state[..., self.width :] + entry.sigmoid() * candidate.tanh()
        return torch.cat([output.sigmoid() * memory.tanh(), memory], -1)

    def slopes(self, driven: Tensor, recurrent: Tensor, state: Tensor) -> Slopes:
        entry, forget, candidate, output = self._gates(driven + recurrent)
        entry, forget, candidate, output = entry.sigmoid(), forget.sigmoid(), candidate.tanh(), output.sigmoid()
        old = state[..., self.width :]
        squashed = torch.tanh(forget * old + entry * candidate)
        of_memory = output * (1 - squashed * squashed)  # of h' in c'
        zero = torch.zeros_like(output)
        in_memory = torch.stack(
            [
                candidate * entry * (1 - entry),
                old * forget * (1 - forget),
                entry * (1 - candidate * candidate),
                zero,
            ],
            -2,
        )
        in_hidden = of_memory[..., None, :] * in_memory
        in_hidden = torch.cat([in_hidden[..., :3, :], (squashed * output * (1 - output))[..., None, :]], -2)
        direct = torch.stack([torch.stack([zero, of_memory * forget], -2), torch.stack([zero, forget], -2)], -3)
        gated = torch.stack([in_hidden, in_memory], -3)
        return Slopes(direct, gated, gated)

    def bound(self, state: Tensor) -> Tensor:
        # The memory c is not bounded.
        return torch.cat([state[..., : self.width].clamp(-1, 1), state[..., self.width :]], -1)


CELLS: dict[str, type[Cell]] = {"gru": GRU, "elman": Elman, "lstm": LSTM}
"""The cells by the names that recipes use."""


class OneHot(nn.Module):
    """Symbols (...) as unit vectors (..., symbols): what the input map of a cell makes of them is an embedding."""

    like: Tensor

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.symbols = symbols
        self.register_buffer("like", torch.empty(0), persistent=False)  # what the network's numbers are

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError for a symbol that is not within 0 .. symbols - 1."""
        try:
            return F.one_hot(x, self.symbols).to(self.like)
        except RuntimeError as error:
            raise ValueError(f"symbols are numbered 0 to {self.symbols - 1}: {error}") from error
