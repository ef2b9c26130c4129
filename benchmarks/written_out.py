"""`paper` and `tree` over sigmoid layers with the gradients written out: what table1.py trains, several times as fast.

The states of a level are one stack, and no graph is recorded. ``deviation`` compares the gradients with the rule's own.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll.rules.composed import Composed
from hbll.rules.tree import ArcCredit, TreeStates


class WrittenOut:
    """The gradients of `paper`, or of `tree`, without a graph.

    Args:
        rule: of a network of 2^D - 1 blocks, each a linear map and a sigmoid as the embed is, and a linear head. The weights
            of its blocks are moved into stacks, of which they are views from then on.
    """

    def __init__(self, rule: Composed) -> None:
        states, credit, network = rule.states, rule.credit, rule.network
        assert isinstance(states, TreeStates)
        assert isinstance(credit, ArcCredit)
        self.posterior, self.variance, self.step = states.posterior, credit.variance, credit.length
        # In block scope a block moves to its target, ``step`` of the way along the gradient.
        self.share = credit.length if credit.scope == "block" else 1.0
        tree = network.tree
        blocks = [block[0] for block in network.blocks]
        self.weight = torch.stack([block.weight.detach().T for block in blocks])
        self.bias = torch.stack([block.bias.detach() for block in blocks]).unsqueeze(1)
        for n, block in enumerate(blocks):
            block.weight.data, block.bias.data = self.weight[n].T, self.bias[n, 0]
        self.embed, self.head = network.embed[0], network.head
        self.parameters = [self.weight, self.bias, *self.embed.parameters(), *self.head.parameters()]
        self.levels = []
        for level in tree.levels:  # of which the last node is the rim's: its right parent is the label
            left = torch.tensor([tree.left(n) for n in level])
            right = torch.tensor([tree.right(n) for n in level[:-1]], dtype=torch.long)
            self.levels.append((torch.tensor(level), left, right))
        for p in self.parameters:
            p.grad = torch.zeros_like(p)

    @torch.no_grad()
    def backward(self, x: Tensor, y: Tensor) -> None:
        """Puts the gradients of a batch into ``.grad``."""
        weight_grad, bias_grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        state = torch.sigmoid(F.linear(x, self.embed.weight, self.embed.bias))
        count, width = state.shape
        bound = state.new_empty(len(self.weight) + 1, count, width)
        target = state.new_empty(len(self.weight) + 1, count, width)
        bound[0] = state
        state_grad = torch.zeros_like(state)
        head_grad, head_bias_grad = torch.zeros_like(self.head.weight), torch.zeros_like(self.head.bias)
        hot = F.one_hot(y, self.head.out_features).to(state.dtype)
        for nodes, left, right in self.levels:
            given, own = bound[left], self.weight[nodes - 1]
            prior = torch.baddbmm(self.bias[nodes - 1], given, own).sigmoid_()
            gradient = torch.empty_like(prior)  # of each sample's own error
            missed = F.linear(prior[-1], self.head.weight, self.head.bias).softmax(1) - hot
            gradient[-1] = missed @ self.head.weight
            head_grad += missed.T @ prior[-1]
            head_bias_grad += missed.sum(0)
            if len(right):
                theirs = self.weight[right - 1]
                guess = torch.baddbmm(self.bias[right - 1], prior[:-1], theirs).sigmoid_()
                wrong = (guess - target[right]) * guess * (1 - guess) / self.variance
                torch.bmm(wrong, theirs.mT, out=gradient[:-1])
                weight_grad.index_add_(0, right - 1, prior[:-1].mT @ wrong)
                bias_grad.index_add_(0, right - 1, wrong.sum(1, keepdim=True))
            target[nodes] = prior - self.step * self.variance * gradient
            bound[nodes] = target[nodes] if self.posterior else prior
            move = self.share * gradient * prior * (1 - prior)
            weight_grad.index_add_(0, nodes - 1, given.mT @ move)
            bias_grad.index_add_(0, nodes - 1, move.sum(1, keepdim=True))
            state_grad += move[0] @ own[0].T  # the first node of a level reads the embed
        state_grad *= state * (1 - state)
        summed = [weight_grad, bias_grad, state_grad.T @ x, state_grad.sum(0), head_grad, head_bias_grad]
        for p, gradient in zip(self.parameters, summed, strict=True):
            p.grad = gradient / count

    @classmethod
    def deviation(cls, rule: Composed, x: Tensor, y: Tensor) -> float:
        """The largest difference from the rule's own gradients of a batch, in float64, of every tensor as a share of its
        largest element."""
        rule, x = copy.deepcopy(rule).double(), x.double()
        rule.backward(x, y)
        network = rule.network
        exact = [
            torch.stack([block[0].weight.grad.T for block in network.blocks]),
            torch.stack([block[0].bias.grad for block in network.blocks]).unsqueeze(1),
            *(p.grad for part in (network.embed, network.head) for p in part.parameters()),
        ]
        written_out = cls(rule)
        written_out.backward(x, y)
        found = [p.grad for p in written_out.parameters]
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))
