"""Layers of multilayer perceptrons: sigmoid layers, normed ReLU layers, and ReLU blocks with a skip."""

from torch import Tensor, nn


def sigmoid_layer(inputs: int, outputs: int) -> nn.Sequential:
    """Linear map and sigmoid, (..., inputs) -> (..., outputs): the layer of the paper's MNIST networks."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Sigmoid())


def normed_layer(inputs: int, outputs: int) -> nn.Sequential:
    """Linear map, batch norm and leaky ReLU, (B, inputs) -> (B, outputs): the layer of Nøkland & Eidnes' networks."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU())


class SkipBlock(nn.Module):
    """ReLU block with a skip, z + linear(relu(z)), (..., width) -> (..., width).

    The ReLU stands before the linear map, so that the block can move its state in both directions.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        return state + self.linear(state.relu())
