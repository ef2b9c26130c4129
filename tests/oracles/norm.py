"""A layer norm by its definition, and modules on which its parts show. It shares no code with hbll."""

import torch


def layer_norm(state, norm):
    """Of states (.., F), with the weights of a torch module."""
    mean = state.mean(-1, keepdim=True)
    variance = (state - mean).square().mean(-1, keepdim=True)
    return (state - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def perturbed(module):
    """Norms and biases away from one and zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()
