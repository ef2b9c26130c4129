"""Toy networks of every kind that the tests train, in float64, each with a batch: (network, x, y)."""

import torch
import torch.nn.functional as F
from torch import nn

from hbll import Chain

BATCH, CLASSES, INPUTS, WIDTH, TOKENS = 4, 3, 5, 6, 7


class Layer(nn.Module):
    """A plain layer of the paper's MLP, without skip or norm."""

    def __init__(self, width=WIDTH, activation=torch.tanh):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = activation

    def forward(self, state):
        return self.activation(self.linear(state))


class Residual(Layer):
    """A tanh layer with a skip around it."""

    def forward(self, state):
        return state + super().forward(state)


class Convolution(nn.Module):
    """A residual convolutional block with a norm over channels, states (B, C, H, W)."""

    def __init__(self, width=4):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, state):
        return state + self.second(F.gelu(self.first(self.norm(state))))


class Transformer(nn.Module):
    """A pre-norm transformer block with causal attention, states (B, T, F)."""

    def __init__(self, width=WIDTH, heads=2, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, state):
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(state)).chunk(3, -1)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        state = state + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return state + self.dropout(self.mlp(state))


class Pooled(nn.Module):
    """A head that averages over pixels."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, state):
        return self.linear(state.mean((2, 3)))


def mlp(nodes=8, width=WIDTH, block=Layer, seed=0):
    torch.manual_seed(seed)
    blocks = [block() for _ in range(nodes - 1)]
    net = Chain(embed=nn.Linear(INPUTS, width), blocks=blocks, head=nn.Linear(width, CLASSES)).double()
    return net, torch.randn(BATCH, INPUTS, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def residual(nodes=8, seed=0):
    return mlp(nodes, block=Residual, seed=seed)


def convolutional(nodes=8, seed=0):
    torch.manual_seed(seed)
    blocks = [Convolution() for _ in range(nodes - 1)]
    net = Chain(embed=nn.Conv2d(2, 4, 3, padding=1), blocks=blocks, head=Pooled()).double()
    return net, torch.randn(BATCH, 2, 5, 4, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def transformer(nodes=8, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    blocks = [Transformer(dropout=dropout) for _ in range(nodes - 1)]
    net = Chain(embed=nn.Embedding(11, WIDTH), blocks=blocks, head=nn.Linear(WIDTH, CLASSES)).double()
    return net, torch.randint(11, (BATCH, TOKENS)), torch.randint(CLASSES, (BATCH, TOKENS))


class Noise(nn.Module):
    """Multiplies by noise that is drawn by number and use in training, as a dropout that is seeded by stage."""

    def __init__(self, number):
        super().__init__()
        self.number, self.uses = number, 0
        self.register_buffer("share", torch.tensor(0.1 + 0.01 * number), persistent=False)

    def forward(self, state):
        self.uses += torch.is_grad_enabled()
        draw = torch.Generator().manual_seed(1000 * self.number + self.uses)
        return state * (1 + self.share * torch.randn(state.shape, generator=draw, dtype=state.dtype))


class Bounded(nn.Module):
    """z + g(z) with ||g|| <= M and Lipschitz constant L: g = M / sqrt(d) sin(a U z + c), U orthogonal, a = L sqrt(d) / M."""

    def __init__(self, bound=1.0, lipschitz=0.3, width=WIDTH):
        super().__init__()
        self.amplitude = bound / width**0.5
        self.rate = lipschitz / self.amplitude
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(width, width))[0])
        self.phase = nn.Parameter(torch.randn(width))

    def forward(self, state):
        return state + self.amplitude * torch.sin(self.rate * (state @ self.turn.mT) + self.phase)


class Masking(nn.Module):
    """An embed with a context: a mask of each sample's own, a table that all samples share, a plain number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(INPUTS, WIDTH)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH))
        self.factor = 0.7

    def forward(self, x):
        mask = torch.cos(x.sum(1, keepdim=True) * torch.arange(1, WIDTH + 1))
        return self.linear(x), {"mask": mask, "tables": {"one": (self.table,)}, "factor": self.factor}


class Masked(nn.Module):
    """A residual layer that a context scales."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state, mask, tables, factor=1.0):
        return state + factor * mask * tables["one"][0] * torch.tanh(self.linear(state))


class MaskedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, state, mask):
        return self.linear(state * mask)


class Beside(nn.Module):
    """An embed, block or head with a context as one without: the mask is a part of the state, which no gradient moves."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def split(self, state):
        state, mask = state.chunk(2, -1)
        return state, mask.detach()


class BesideEmbed(Beside):
    def forward(self, x):
        return torch.cat([self.linear(x), torch.cos(x.sum(1, keepdim=True) * torch.arange(1, WIDTH + 1))], -1)


class BesideBlock(Beside):
    def forward(self, state):
        state, mask = self.split(state)
        table = torch.linspace(0.5, 1.5, WIDTH).to(state)
        return torch.cat([state + 0.7 * mask * table * torch.tanh(self.linear(state)), mask], -1)


class BesideHead(Beside):
    def forward(self, state):
        state, mask = self.split(state)
        return self.linear(state * mask)


def masked(nodes=8, seed=0):
    """A network with a context."""
    torch.manual_seed(seed)
    net = Chain(embed=Masking(), blocks=[Masked() for _ in range(nodes - 1)], head=MaskedHead()).double()
    return net, torch.randn(BATCH, INPUTS, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def unmasked(net):
    """The same function of the same parameters, by a network without a context."""
    parts = net.embed.linear, [block.linear for block in net.blocks], net.head.linear
    return Chain(embed=BesideEmbed(parts[0]), blocks=map(BesideBlock, parts[1]), head=BesideHead(parts[2]))


KINDS = {"mlp": (mlp, -1), "convolutional": (convolutional, -3), "transformer": (transformer, -1)}
"""Each with the dimension of its features."""


def batches(count, kind="mlp", seed=1, sizes=(BATCH,)):
    """Mini-batches for the networks of a kind, of these sizes in turn."""
    torch.manual_seed(seed)
    found = []
    for i in range(count):
        size = sizes[i % len(sizes)]
        if kind == "transformer":
            found.append((torch.randint(11, (size, TOKENS)), torch.randint(CLASSES, (size, TOKENS))))
        else:
            shape = (2, 5, 4) if kind == "convolutional" else (INPUTS,)
            found.append((torch.randn(size, *shape, dtype=torch.float64), torch.randint(CLASSES, (size,))))
    return found


def chain_states(net, x):
    """The states z_0, z_1, .. of the deployed chain, with their graph."""
    states = [net.embed(x)]
    for block in net.blocks:
        states.append(block(states[-1]))
    return states


def label_loss(logits, y):
    """The mean cross-entropy of all samples, or of all their tokens."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def gradients(module, loss):
    """The gradient of a loss in every parameter by name, zero where there is none; with a rule's prefix left out."""
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return {name.removeprefix("network."): g for name, g in zip(names, found, strict=True)}


def assert_equal_gradients(actual, expected):
    """Equal to float64 rounding, and not all of them zero."""
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-9, atol=1e-12 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
