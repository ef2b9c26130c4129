"""One training step, transcribed node by node from the pseudo-code of the specification (section 3).

The oracle of both engines: Gaussian states, no noise, any boundary and scope, plain torch. It shares no code with hbll and
finds left and right parents by its own recursion.
"""

import torch
import torch.nn.functional as F


def parents(last):
    """Levels of (node, left, right): the interval (i, j) is split at the floor of its middle."""
    levels, intervals = [], [(0, last)]
    while intervals := [(i, j) for i, j in intervals if j - i > 1]:
        levels.append([((i + j) // 2, i, j) for i, j in intervals])
        intervals = [half for n, i, j in levels[-1] for half in ((i, n), (n, j))]
    return levels


def per_sample_cross_entropy(head, state, y):
    """Each sample's own cross-entropy, (B,): averaged over tokens if every token has a label."""
    logits = head(state)
    values = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
    return values if values.ndim == 1 else values.mean(1)


def squared_distance(prediction, target, features):
    """||prediction - target||^2 per sample, (B,): features summed, tokens averaged."""
    squares = (prediction - target).square().sum(features)
    return squares if squares.ndim == 1 else squares.flatten(1).mean(1)


def reference_loss(
    network, x, y, boundary="posterior", scope="block", variance=1.0, label_variance=1.0, step=0.5, features=-1
):
    """The scalar loss of a step and the targets, node by node."""
    last = len(network.blocks) + 1
    states = {0: network.embed(x)}  # what children read
    targets = {}
    tokens = states[0].numel() // (states[0].shape[0] * states[0].shape[features])
    loss = 0.0
    for level in parents(last):
        for n, left, right in level:
            source = states[left] if scope == "tree" or left == 0 else states[left].detach()
            output = network.blocks[n - 1](source)

            def error(state, right=right):
                if right == last:
                    return per_sample_cross_entropy(network.head, state, y) / label_variance
                prediction = network.blocks[right - 1](state)
                return squared_distance(prediction, targets[right], features) / (2 * variance)

            # Each sample's own gradient, times the number of tokens over which its error is averaged.
            leaf = output.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(error(leaf).sum() * tokens, leaf)
            targets[n] = (output - step * variance * gradient).detach()

            if scope == "block":
                loss = loss + error(output.detach()).mean()
                loss = loss + squared_distance(output, targets[n], features).mean() / (2 * variance)
            else:
                loss = loss + error(output).mean()
            if boundary == "prior":
                states[n] = output
            else:
                states[n] = output + (targets[n] - output).detach() if scope == "tree" else targets[n]
    return loss, targets
