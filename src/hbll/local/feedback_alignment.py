"""Direct feedback alignment (DFA): Nøkland, arXiv 1609.01596."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hbll.local.rule import Blocks, LocalRule, LocalStep, detached_pass, local_cost
from hbll.losses import mean_loss
from hbll.trace import attach_gradients

__all__ = ["DirectFeedbackAlignment"]


class DirectFeedbackAlignment(LocalRule):
    """The output's error reaches every block's output through a fixed random matrix; inside a block gradients are exact.

    Published: MNIST, fully connected layers with dropout 1.45 % error. No block waits for another one's backward pass, but
    all of them wait for the output.
    """

    def build(self, shapes: Sequence[torch.Size], classes: int) -> None:
        self.feedback = nn.Module()
        for k, shape in enumerate(shapes, 1):
            units = math.prod(shape)
            matrix = torch.empty(classes, units).uniform_(-1, 1) / math.sqrt(units)
            self.feedback.register_buffer(str(k), matrix)

    def step(self, blocks: Blocks, x: Tensor, y: Tensor) -> LocalStep:
        outputs = detached_pass(blocks.segments, x)
        logits = blocks.head.module(outputs[-1].detach())
        head_loss = mean_loss(self.loss, logits, y)
        (error,) = torch.autograd.grad(head_loss, logits, retain_graph=True)
        losses = [
            attach_gradients(head_loss.new_zeros(()), [output], [(error @ feedback).view_as(output)])
            for output, feedback in zip(outputs, self.feedback.buffers(), strict=True)
        ]
        losses[-1] = losses[-1] + head_loss
        work, _ = local_cost(blocks.segments)
        forward = sum(segment.cost for segment in blocks.segments)
        return LocalStep(losses, work, forward + max(segment.backward_span for segment in blocks.segments))
