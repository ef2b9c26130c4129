"""Scan over chunks: the deployed chain's own states and gradients, found in parallel over time.

The sequence is cut into M chunks of G steps. *States*: all chunks run at once from guessed starts, and a linear coarse
step between the chunks corrects the starts; K such sweeps. *Credit*: all chunks are walked back at once from guessed
gradients at their ends, corrected by the transposed coarse step; Kc such sweeps. *Local update*: every step of the cell,
all at once, along its own credit. The coarse step of a chunk is the G-th power of its steps' *mean* Jacobian, one matrix
for all samples, whose slopes are those of the last training step. At K = M and Kc = M - 1 all is exact, whatever the
coarse step (parareal, Lions et al. 2001; DEER, Lim et al. 2024, solves with each sample's own Jacobians).

All is taken on the trajectory of the last sweep: its states, their slopes, and the head's loss on what it ended in.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hbll import prefix
from hbll.losses import Loss, cross_entropy, wide
from hbll.models.cells import Slopes
from hbll.names import check_choice, check_number
from hbll.recurrent.arcs import ArcCells, DepthCells
from hbll.recurrent.chunks import chunked, coarse_step, pull, unchunked, unroll, unroll_recorded
from hbll.recurrent.cost import scan_cost
from hbll.recurrent.network import RecurrentNetwork
from hbll.recurrent.rule import LabelCredit, RecurrentRule, head_credit, local_update, note
from hbll.recurrent.tree_states import tree_states
from hbll.rule import StageLoss, Step

__all__ = ["ScanRule"]


class ScanRule(RecurrentRule):
    """Parallel chunks of time with a batch-mean Jacobian as coarse step.

    Args:
        network: the network to train.
        length: N, chunks of input per sequence; shorter ones are padded at the start.
        chunk: G, time steps that are made one after the other.
        sweeps: K, evaluations of all steps.
        credit_sweeps: Kc, corrections of the credit.
        radix: r; the corrections over M chunks take ceil(log_r M) levels, each of them a product of r matrices with as
            many chunks' states. M is a single level, 2 the fewest operations.
        guess: what the starts are at first: ``zero``, or what a *predictor tree* over the M chunks says, whose cells are
            the rule's own parameters and learn from the corrected starts.
        shared: one coarse step for all chunks, of the mean over all steps, instead of one for each: log2 N products of
            matrices a training step and not M log2 N, which tells where units are many (512 and more).
        adapt: a defect above which the next step makes a sweep more, and below a third of which one less, but never
            fewer than ``sweeps`` or more than M; reading it waits for the device. None keeps K.
        loss: the label's loss.

    Raises:
        ValueError: a number below its least, or an unknown guess.
    """

    trains_loss = False

    direct: Tensor
    gated: Tensor
    current: Tensor

    def __init__(
        self,
        network: RecurrentNetwork,
        length: int,
        *,
        chunk: int = 4,
        sweeps: int = 3,
        credit_sweeps: int = 1,
        radix: int = 2,
        guess: str = "zero",
        shared: bool = False,
        adapt: float | None = None,
        loss: Loss = cross_entropy,
    ) -> None:
        super().__init__(network, loss=loss)
        for name, value in {"length": length, "chunk": chunk, "sweeps": sweeps}.items():
            check_number(name, value, least=1)
        check_number("credit_sweeps", credit_sweeps, least=0)
        check_number("radix", radix, least=2)
        check_choice("guess", guess, ("zero", "tree"))
        if adapt is not None:
            check_number("adapt", adapt, above=0.0)
        cell = network.cell
        self.length = length
        self.chunk = min(chunk, length)
        self.chunks = -(-length // self.chunk)
        self.sweeps = sweeps
        self.credit_sweeps = credit_sweeps
        self.radix = radix
        self.adapt = adapt
        self.predictor: ArcCells | None = None
        if guess == "tree" and self.chunks > 1:
            levels = prefix.levels(self.chunks)
            self.predictor = DepthCells(network.cells.kind, self.chunk * cell.inputs, cell.width, levels).to(
                cell.weight_hh
            )
        # Means of the last training step's slopes; 0 before the first one, so that P = 0.
        self.shared = shared
        shape = (1 if shared else self.chunks, cell.parts)
        self.register_buffer("direct", cell.weight_hh.new_zeros(*shape, cell.parts, cell.width))
        self.register_buffer("gated", cell.weight_hh.new_zeros(*shape, cell.gates, cell.width))
        self.register_buffer("current", torch.tensor(sweeps))

    @staticmethod
    def suggested(length: int, parts: int = 1) -> dict[str, Any]:
        """Options that do well at a length: G grows with its square root, so that chunks and levels balance.

        parts: those of the cell's state; an LSTM's credit, which goes back through two, needs two corrections.
        """
        chunk = 2 ** max(0, (length - 1).bit_length() // 2 - 1)
        chunks = -(-length // chunk)
        radix = max(2, chunks if chunks <= 16 else math.isqrt(chunks - 1) + 1)  # one level, or two
        return {"chunk": chunk, "sweeps": min(5, chunks), "credit_sweeps": parts, "radix": radix, "guess": "tree"}

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return [] if self.predictor is None else [self.predictor]

    def losses_in_time(self, x: Tensor, y: Tensor, present: Tensor | None, step: Step) -> Iterator[StageLoss]:
        if len(x) != self.length:
            raise ValueError(f"this rule was made for sequences of {self.length} chunks; got {len(x)}")
        network, cell = self.network, self.network.cell
        counted, present = self.read(present), self._present(x, present)
        x = chunked(x, self.chunk)
        driven, guess = cell.project(x), self._guess(x.detach())
        coarse, sweeps = self._coarse(), self.sweeps if self.adapt is None else int(self.current)
        before, recurrent, outs, ends = self._sweep(driven, present, guess.detach(), coarse, sweeps)
        step.defect = prefix.defect(ends[:-1], before[0, 1:])
        if self.predictor is not None:
            yield StageLoss("jumps", (wide(guess) - wide(ends[:-1])).square().sum(-1).mean(-1).sum())
        slopes, credit, label = self._credit(driven, present, before, recurrent, outs, y, counted, coarse)
        cost = scan_cost(
            self.length,
            self.chunk,
            sweeps,
            self.credit_sweeps,
            radix=self.radix,
            tree=self.predictor is not None,
            shared=self.shared,
            every_step=network.every_step,
        )
        note(step, label.loss, cost, self.length)
        if self.training and not step.look:
            self._remember(slopes, step.defect)
        yield StageLoss(1, local_update(network, driven, before, slopes, credit, label))

    def _present(self, x: Tensor, present: Tensor | None) -> Tensor | None:
        """(G, M, B), false where a step holds the state; None if none does."""
        if present is None and self.length % self.chunk == 0:
            return None
        return chunked(x.new_ones(x.shape[:2], dtype=torch.bool) if present is None else present.mT, self.chunk)

    def _guess(self, x: Tensor) -> Tensor:
        """The starts of all chunks but the first, (M-1, B, S H), with graph; x is (G, M, B, I)."""
        if self.predictor is None:
            return self.network.cell.initial(x.shape[2]).expand(self.chunks - 1, -1, -1)
        return tree_states(self.predictor, x.permute(1, 2, 0, 3).flatten(2))

    @torch.no_grad()
    def _coarse(self) -> prefix.Matrices:
        """The coarse steps, of the slopes of the last training step."""
        slopes = Slopes(self.direct, self.gated, self.gated)
        return coarse_step(slopes, self.network.cell.weight_hh, self.chunk, self.chunks, self.radix)

    @torch.no_grad()
    def _sweep(
        self, driven: Tensor, present: Tensor | None, guess: Tensor, coarse: prefix.Matrices, sweeps: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The states, after so many sweeps.

        Args:
            driven: (G, M, B, Γ H), the projected inputs.
            guess: (M-1, B, S H), the starts of all chunks but the first.

        Returns:
            Of the last sweep the states before every step (G, M, B, S H), what the recurrent map made of them, and the
            ends of the chunks (M, B, S H); and those ends corrected.
        """
        cell = self.network.cell
        starts = torch.cat([cell.initial(driven.shape[2]).unsqueeze(0), guess])
        for _ in range(sweeps - 1):
            ends = cell.bound(prefix.correct(starts, unroll(cell, driven, present, starts), coarse))
            starts = torch.cat([starts[:1], ends[:-1]])
        before, recurrent, outs = unroll_recorded(cell, driven, present, starts)
        return before, recurrent, outs, cell.bound(prefix.correct(starts, outs, coarse))

    @torch.no_grad()
    def _credit(
        self,
        driven: Tensor,
        present: Tensor | None,
        before: Tensor,
        recurrent: Tensor,
        outs: Tensor,
        y: Tensor,
        counted: Tensor | None,
        coarse: prefix.Matrices,
    ) -> tuple[Slopes, Tensor, LabelCredit]:
        """The slopes of every step, the gradients in their new states (G, M, B, S H), and what the label says."""
        network, cell = self.network, self.network.cell
        slopes = cell.slopes(driven, recurrent, before)
        if present is not None:
            slopes = slopes.held(present.to(before.dtype))
        if network.every_step:
            after = torch.cat([before[1:], outs.unsqueeze(0)])
            label = head_credit(network, self.loss, cell.hidden(unchunked(after, self.length)), y, counted)
            own, last = chunked(cell.widen(label.credit), self.chunk), torch.zeros_like(outs[0])
        else:
            label = head_credit(network, self.loss, cell.hidden(outs[-1]), y, None)
            own, last = None, cell.widen(label.credit)
        return slopes, self._pulled(slopes, coarse, last, own), label

    def _pulled(self, slopes: Slopes, coarse: prefix.Matrices, last: Tensor, own: Tensor | None) -> Tensor:
        """The gradients in the new state of every step (G, M, B, S H).

        Args:
            last: (B, S H), the gradient at the end of the sequence.
            own: (G, M, B, S H), that of every step's own loss.
        """
        weight_hh = self.network.cell.weight_hh
        ends = torch.cat([last.new_zeros(self.chunks - 1, *last.shape), last.unsqueeze(0)])
        if own is None and coarse:  # the coarse step alone takes the last gradient to the first chunk
            pulled = torch.zeros_like(ends)
            pulled[-1] = last @ coarse[0][0][-1]
            ends = torch.cat([prefix.correct_transposed(ends, pulled, coarse)[1:], ends[-1:]])
        for _ in range(self.credit_sweeps):
            _, pulled = pull(slopes, weight_hh, ends, own)
            ends = torch.cat([prefix.correct_transposed(ends, pulled, coarse)[1:], ends[-1:]])
        return pull(slopes, weight_hh, ends, own)[0]

    def _remember(self, slopes: Slopes, defect: Tensor) -> None:
        dimensions = (0, 1, 2) if self.shared else (0, 2)
        self.direct.copy_(slopes.direct.mean(dimensions))
        self.gated.copy_(slopes.gated.mean(dimensions))
        if self.adapt is not None:
            change = int(defect > self.adapt) - int(defect < self.adapt / 3)
            self.current.fill_(min(max(int(self.current) + change, self.sweeps), self.chunks))
