"""Why sweeps need so many rounds, and what would shorten them: errors of states and credit on a chain as it is trained.

    python benchmarks/sweeps.py --blocks 7 --steps 30 156 468 936 --data-dir DIR

A convolutional chain (width 32) learns CIFAR-10 by backpropagation. At the given steps, on 256 other samples: the relative
error of the states after K sweeps, and the least cosine over blocks between the gradients that follow and the exact ones,

* by first guess (credit exact for those states): the running mean's limit (``mean``, the mean over samples of what the
  blocks add), a ridge regression of every state on the embedded input (``linear``), and a block for each state that learns
  to predict it from the embedded input (``star``);
* by coarse step: the skip path alone (``skip``), or with a matrix over channels for every block, fitted by ridge regression
  to what the block made of the error of the guess (states) or of the exact credit (credit) on 512 samples (``channels``).
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gate import gate
from torch import Tensor, nn

import hbll
from hbll.data.cifar import cifar10
from hbll.losses import mean_loss
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed
from hbll.prefix import Coarse, correct, correct_transposed, windows
from hbll.train import fit

WIDTH = 32


class Watched(hbll.Rule):
    """Backpropagation, and beside it a block for each state that learns to predict it from the embedded input."""

    def __init__(self, network: hbll.Chain) -> None:
        super().__init__(network, stage=None)
        self.predictors = nn.ModuleList(ConvBlock(WIDTH) for _ in network.blocks)

    def losses(self, x: Any, y: Any, step: hbll.Step) -> Iterator[hbll.StageLoss]:
        states = self.states(x)
        yield hbll.StageLoss(1, mean_loss(self.loss, self.network.head(states[-1]), y))
        start, *wanted = (state.detach() for state in states)
        errors = [F.mse_loss(predict(start), state) for predict, state in zip(self.predictors, wanted, strict=True)]
        yield hbll.StageLoss("predictors", torch.stack(errors).sum())

    def auxiliary(self, stage: int) -> list[nn.Module]:
        return [self.predictors]

    def states(self, x: Tensor) -> list[Tensor]:
        """z_0 .. z_S."""
        states = [self.network.embed(x)]
        for block in self.network.blocks:
            states.append(block(states[-1]))
        return states

    def sweep(self, states: list[Tensor], coarse: Coarse = "identity") -> list[Tensor]:
        """One sweep of z_0 .. z_S, of which the first is exact."""
        with torch.no_grad():
            outs = [block(state) for block, state in zip(self.network.blocks, states, strict=False)]
        return [states[0], *_first(correct(_last(states[:-1]), _last(outs), coarse))]

    def pulled(self, states: list[Tensor], credit: list[Tensor]) -> list[Tensor]:
        """J_n^T b_n for every block."""
        found = []
        for block, state, gradient in zip(self.network.blocks, states, credit, strict=False):
            state = state.detach().requires_grad_()
            found.append(torch.autograd.grad(block(state), state, gradient)[0])
        return found

    def sweep_credit(self, states: list[Tensor], credit: list[Tensor], coarse: Coarse = "identity") -> list[Tensor]:
        """The same backwards on b_1 .. b_S, of which the last is exact."""
        pulled = self.pulled(states, credit)
        return [*_first(correct_transposed(_last(credit), _last(pulled), coarse))[1:], credit[-1]]

    def exact_credit(self, states: list[Tensor], y: Tensor) -> list[Tensor]:
        state = states[-1].detach().requires_grad_()
        (at_head,) = torch.autograd.grad(mean_loss(self.loss, self.network.head(state), y), state)
        credit = [at_head] * len(self.predictors)
        for _ in self.predictors:
            credit = self.sweep_credit(states, credit)
        return credit

    def gradients(self, states: list[Tensor], credit: list[Tensor]) -> list[Tensor]:
        """Of every block's parameters, flat."""
        return [
            torch.cat([g.flatten() for g in torch.autograd.grad(block(state), list(block.parameters()), gradient)])
            for block, state, gradient in zip(self.network.blocks, states, credit, strict=False)
        ]


def _last(states: list[Tensor]) -> Tensor:
    """Stacked, with the channels last."""
    return torch.stack(states).movedim(2, -1)


def _first(states: Tensor) -> list[Tensor]:
    return list(states.movedim(-1, 2))


def regression(x: Tensor, y: Tensor, ridge: float = 1e-3) -> Tensor:
    """The matrix over channels, (C, C), that takes x to y, both (B, C, H, W), with the least squared error."""
    rows, wanted = (part.movedim(1, -1).flatten(0, -2) for part in (x, y))
    square = rows.T @ rows
    square += (ridge * square.diagonal().mean() + 1e-12) * torch.eye(
        len(square)
    )  # 0 for the first block, whose input is exact
    return torch.linalg.solve(square, rows.T @ wanted)


def times(state: Tensor, matrix: Tensor) -> Tensor:
    return (state.movedim(1, -1) @ matrix).movedim(-1, 1)


def beside_the_skip(matrices: Tensor) -> Coarse:
    """The coarse step of the skip path and a matrix for every block, (S, C, C)."""
    return windows(torch.eye(WIDTH) + matrices, len(matrices))


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    return sum(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)) / len(exact)


def least_cosine(found: list[Tensor], exact: list[Tensor]) -> float:
    return min(F.cosine_similarity(a, b, dim=0).item() for a, b in zip(found, exact, strict=True))


def rounds(count: int, start: list[Tensor], sweep: Callable, judge: Callable[[list[Tensor]], str]) -> str:
    """The judgement before and after every sweep, as cells of a table."""
    cells, found = [judge(start)], start
    for _ in range(count):
        found = sweep(found)
        cells.append(judge(found))
    return " | ".join(cells)


def report(rule: Watched, fitted: tuple, other: tuple, sweeps: int) -> None:
    """Prints a row for every guess and coarse step."""
    (x_fit, y_fit), (x, y) = fitted, other
    with torch.no_grad():
        known, exact = rule.states(x_fit), rule.states(x)
        start = exact[0]
        added = [(state - known[0]).mean(0) for state in known]
        centred = known[0] - known[0].mean(0)
        guesses = {
            "mean": [start + mean for mean in added],
            "linear": [
                start + mean + times(start - known[0].mean(0), regression(centred, state - known[0] - mean))
                for state, mean in zip(known, added, strict=True)
            ],
            "star": [start, *(predict(start) for predict in rule.predictors)],
        }
        from_mean = [known[0] + mean for mean in added]
        for_states = [
            regression(guess - state, block(guess) - block(state) - (guess - state))
            for block, guess, state in zip(rule.network.blocks, from_mean, known, strict=False)
        ]
    known_credit, credit = rule.exact_credit(known, y_fit), rule.exact_credit(exact, y)
    for_credit = [
        regression(b, pulled - b) for b, pulled in zip(known_credit, rule.pulled(known, known_credit), strict=True)
    ]
    gradients = rule.gradients(exact, credit)

    def states_judged(found: list[Tensor]) -> str:
        cosine = least_cosine(rule.gradients(found, rule.exact_credit(found, y)), gradients)
        return f"{relative(found[1:], exact[1:]):.3f}, {cosine:.2f}"

    def credit_judged(found: list[Tensor]) -> str:
        return f"{relative(found, credit):.3f}, {least_cosine(rule.gradients(exact, found), gradients):.2f}"

    for guess, found in guesses.items():
        print(f"| states, {guess}, skip | {rounds(sweeps, found, rule.sweep, states_judged)} |")
    channels = beside_the_skip(torch.stack(for_states).mT)  # for regression multiplies from the right
    found = rounds(sweeps, guesses["mean"], lambda states: rule.sweep(states, channels), states_judged)
    print(f"| states, mean, channels | {found} |")
    at_head = [credit[-1]] * len(credit)
    coarse: dict[str, Coarse] = {"skip": "identity", "channels": beside_the_skip(torch.stack(for_credit))}
    for name, step in coarse.items():
        found = rounds(sweeps, at_head, lambda b, step=step: rule.sweep_credit(exact, b, step), credit_judged)
        print(f"| credit, head's, {name} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 156, 468, 936], help="of training, to look at")
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    gate(["bp", "scan"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = cifar10(options.data_dir).train[:20000]
    samples, *looked_at = samples[768:], samples[:512], samples[512:768]
    embed, head = patch_embed(WIDTH), ConvHead(WIDTH, 10)
    rule = Watched(hbll.Chain(embed, [ConvBlock(WIDTH) for _ in range(options.blocks)], head))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(max(options.steps)):
            batch = samples[torch.randint(len(samples), (128,))]
            yield batch.inputs, batch.labels

    def on_step(number: int, step: hbll.Step) -> None:
        if number in options.steps:
            print(f"\nStep {number}: relative error, least cosine, after so many sweeps\n")
            print("| |" + "|".join(f" {k} " for k in range(options.sweeps + 1)) + "|")
            print("|---" * (options.sweeps + 2) + "|")
            report(rule, *((part.inputs, part.labels) for part in looked_at), options.sweeps)

    optimizers = [torch.optim.AdamW(module.parameters(), 1e-3) for module in (rule.network, rule.predictors)]
    fit(rule, batches(), optimizers, clip=[1.0, None], on_step=on_step)


if __name__ == "__main__":
    main()
