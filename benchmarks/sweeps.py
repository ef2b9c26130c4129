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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll.data.cifar import cifar10
from hbll.models.convnet import ConvBlock, ConvHead, patch_embed

WIDTH = 32
Matrices = list[Tensor] | None


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


class Chain(nn.Module):
    """The network, its exact states and credit, and sweeps of both."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.head = patch_embed(WIDTH), ConvHead(WIDTH, 10)
        self.blocks = nn.ModuleList(ConvBlock(WIDTH) for _ in range(blocks))

    def states(self, x: Tensor) -> list[Tensor]:
        """z_0 .. z_N."""
        states = [self.embed(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def sweep(self, states: list[Tensor], coarse: Matrices = None) -> list[Tensor]:
        """One sweep: new_n = f_n(old_{n-1}) + (1 + P_n) (new_{n-1} - old_{n-1})."""
        new = states[:1]
        for n, block in enumerate(self.blocks):
            change = new[n] - states[n]
            with torch.no_grad():
                new.append(block(states[n]) + change + (0 if coarse is None else times(change, coarse[n])))
        return new

    def at_head(self, state: Tensor, y: Tensor) -> Tensor:
        state = state.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(self.head(state), y), state)[0]

    def pulled(self, states: list[Tensor], credit: list[Tensor]) -> list[Tensor]:
        """J_n^T b_n for every block."""
        found = []
        for block, state, gradient in zip(self.blocks, states, credit, strict=False):
            state = state.detach().requires_grad_()
            found.append(torch.autograd.grad(block(state), state, gradient)[0])
        return found

    def sweep_credit(self, states: list[Tensor], credit: list[Tensor], coarse: Matrices = None) -> list[Tensor]:
        """The same backwards on b_1 .. b_N, of which the last is exact."""
        pulled, new = self.pulled(states, credit), credit[-1:]
        for n in range(len(credit) - 1, 0, -1):
            change = new[0] - credit[n]
            new.insert(0, pulled[n] + change + (0 if coarse is None else times(change, coarse[n])))
        return new

    def exact_credit(self, states: list[Tensor], y: Tensor) -> list[Tensor]:
        credit = [self.at_head(states[-1], y)] * len(self.blocks)
        for _ in self.blocks:
            credit = self.sweep_credit(states, credit)
        return credit

    def gradients(self, states: list[Tensor], credit: list[Tensor]) -> list[Tensor]:
        """Of every block's parameters, flat."""
        return [
            torch.cat([g.flatten() for g in torch.autograd.grad(block(state), list(block.parameters()), gradient)])
            for block, state, gradient in zip(self.blocks, states, credit, strict=False)
        ]


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


def report(chain: Chain, predictors: nn.ModuleList, fitted: tuple, other: tuple, sweeps: int) -> None:
    """Prints a row for every guess and coarse step."""
    (x_fit, y_fit), (x, y) = fitted, other
    with torch.no_grad():
        known, exact = chain.states(x_fit), chain.states(x)
        start = exact[0]
        added = [(state - known[0]).mean(0) for state in known]
        centred = known[0] - known[0].mean(0)
        guesses = {
            "mean": [start + mean for mean in added],
            "linear": [
                start + mean + times(start - known[0].mean(0), regression(centred, state - known[0] - mean))
                for state, mean in zip(known, added, strict=True)
            ],
            "star": [start, *(predict(start) for predict in predictors)],
        }
        from_mean = [known[0] + mean for mean in added]
        for_states = [
            regression(guess - state, block(guess) - block(state) - (guess - state))
            for block, guess, state in zip(chain.blocks, from_mean, known, strict=False)
        ]
    known_credit, credit = chain.exact_credit(known, y_fit), chain.exact_credit(exact, y)
    for_credit = [
        regression(b, pulled - b) for b, pulled in zip(known_credit, chain.pulled(known, known_credit), strict=True)
    ]
    gradients = chain.gradients(exact, credit)

    def states_judged(found: list[Tensor]) -> str:
        cosine = least_cosine(chain.gradients(found, chain.exact_credit(found, y)), gradients)
        return f"{relative(found[1:], exact[1:]):.3f}, {cosine:.2f}"

    def credit_judged(found: list[Tensor]) -> str:
        return f"{relative(found, credit):.3f}, {least_cosine(chain.gradients(exact, found), gradients):.2f}"

    for guess, found in guesses.items():
        print(f"| states, {guess}, skip | {rounds(sweeps, found, chain.sweep, states_judged)} |")
    found = rounds(sweeps, guesses["mean"], lambda states: chain.sweep(states, for_states), states_judged)
    print(f"| states, mean, channels | {found} |")
    at_head = [credit[-1]] * len(credit)
    for name, coarse in {"skip": None, "channels": for_credit}.items():
        found = rounds(sweeps, at_head, lambda b, c=coarse: chain.sweep_credit(exact, b, c), credit_judged)
        print(f"| credit, head's, {name} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 156, 468, 936], help="of training, to look at")
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = cifar10(options.data_dir).train[:20000]
    samples, fitted, other = samples[768:], samples[:512], samples[512:768]
    chain = Chain(options.blocks)
    predictors = nn.ModuleList(ConvBlock(WIDTH) for _ in range(options.blocks))
    moved, learning = (torch.optim.AdamW(module.parameters(), 1e-3) for module in (chain, predictors))
    for step in range(1, max(options.steps) + 1):
        batch = samples[torch.randint(len(samples), (128,))]
        states = chain.states(batch.inputs)
        moved.zero_grad()
        F.cross_entropy(chain.head(states[-1]), batch.labels).backward()
        nn.utils.clip_grad_norm_(chain.parameters(), 1.0)
        moved.step()
        learning.zero_grad()
        start, wanted = states[0].detach(), [state.detach() for state in states[1:]]
        sum(F.mse_loss(p(start), state) for p, state in zip(predictors, wanted, strict=True)).backward()
        learning.step()
        if step in options.steps:
            print(f"\nStep {step}: relative error, least cosine, after so many sweeps\n")
            print("| |" + "|".join(f" {k} " for k in range(options.sweeps + 1)) + "|")
            print("|---" * (options.sweeps + 2) + "|")
            parts = [(part.inputs, part.labels) for part in (fitted, other)]
            report(chain, predictors, *parts, options.sweeps)


if __name__ == "__main__":
    main()
