"""Steps of an asynchronous pipeline whose stages recompute with the weights of the day, written down stage by stage.

It shares no code with hbll. Networks have no context.
"""

import torch
import torch.nn.functional as F
from torch import nn


def stages_of(count, size):
    """The indices of the blocks of every stage."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class PipelineStep:
    """Everything that ever was in flight is kept, by stage and batch; batches are of any size."""

    def __init__(self, net, size):
        self.net, self.last = net, len(stages_of(len(net.blocks), size))
        self.stages = [nn.Sequential(*(net.blocks[b] for b in numbers)) for numbers in stages_of(len(net.blocks), size)]
        self.came_in, self.inputs, self.gradients = [], {}, {}  # by batch; (stage, batch) -> state; (stage, batch) -> g

    def exists(self, batch):
        """Whether a batch came in at that step."""
        return batch >= 0 and self.came_in[batch][0] is not None

    def accumulate(self, x=None, y=None):
        """Adds this step's gradients to the parameters'; without a batch no new one comes in."""
        net, last, t = self.net, self.last, len(self.came_in)
        self.came_in.append((x, y))
        outputs = {}
        with torch.no_grad():
            for n in range(1, last + 1):
                batch = t - (n - 1)
                if self.exists(batch):
                    if n == 1:
                        self.inputs[1, batch] = net.embed(x)
                    outputs[n + 1, batch] = self.stages[n - 1](self.inputs[n, batch])
        pulled = {}
        for n in range(last, -1, -1):
            batch = t - 2 * (last - n) - (n - 1) if n else t - 2 * last + 1
            if not self.exists(batch):
                continue
            if n == 0:
                net.embed(self.came_in[batch][0]).backward(self.gradients[0, batch])
                continue
            if n == last:
                leaf = outputs[last + 1, batch].requires_grad_()
                F.cross_entropy(net.head(leaf).flatten(0, -2), self.came_in[batch][1].flatten()).backward()
                gradient = leaf.grad
            else:
                gradient = self.gradients[n, batch]
            state = self.inputs[n, batch].clone().requires_grad_()
            self.stages[n - 1](state).backward(gradient)
            pulled[n - 1, batch] = state.grad
        self.inputs.update(outputs)
        self.gradients.update(pulled)
