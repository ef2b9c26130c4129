"""Small recurrent problems in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hbll.recurrent import CELLS, DepthCells, RecurrentNetwork

INPUTS, WIDTH, CLASSES, BATCH = 2, 5, 3, 4


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=list(CELLS))
def cell_name(request) -> str:
    return request.param


@pytest.fixture
def problem(cell_name) -> Callable[..., tuple[RecurrentNetwork, Tensor, Tensor]]:
    """length, every_step -> network, x, y."""

    def make(length: int, every_step: bool = False) -> tuple[RecurrentNetwork, Tensor, Tensor]:
        depths = max(1, (length - 1).bit_length())
        cells = DepthCells(CELLS[cell_name], INPUTS, WIDTH, depths)
        network = RecurrentNetwork(cells, nn.Linear(WIDTH, CLASSES), every_step, length=length)
        y = torch.randint(CLASSES, (BATCH, length) if every_step else (BATCH,))
        return network, torch.randn(BATCH, length, INPUTS), y

    return make
