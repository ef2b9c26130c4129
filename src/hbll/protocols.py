"""What the trainer needs of a network and of a training rule, whatever their kind."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from hbll.layout import Layout, Readout
from hbll.objective import NodeReport

__all__ = ["Network", "TrainingRule", "TrainingStep"]


class Module(Protocol):
    """What is used of every ``nn.Module``."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def to(self, device: torch.device) -> Self: ...
    def zero_grad(self) -> None: ...
    def train(self) -> Self: ...
    def eval(self) -> Self: ...


class Network(Module, Protocol):
    """A network that can be read along named paths."""

    def __call__(self, x: Tensor, *, path: Any) -> Tensor: ...

    def readout(self, name: str) -> Readout:
        """The path that a user names; ValueError when there is none like it."""
        ...


class TrainingStep(Protocol):
    """What a call of a rule returns."""

    @property
    def loss(self) -> Tensor:
        """A scalar with graph, whose gradients are the rule's updates."""
        ...

    @property
    def work(self) -> int:
        """All block evaluations of the step."""
        ...

    @property
    def span(self) -> int:
        """The longest chain of them in which each needs the one before."""
        ...

    @property
    def defect(self) -> Tensor | None:
        """How far the last sweep still moved the states, relative to their norm; None of rules without sweeps."""
        ...

    @property
    def nodes(self) -> dict[int, NodeReport]:
        """A report for every node of the rule's layout that learns."""
        ...


class TrainingRule(Module, Protocol):
    """What turns a network and a batch into gradients."""

    def prepare(self, network: Any, x: Tensor) -> Self:
        """Makes the parameters that the rule has beside the network's, for states as an input batch gives them."""
        ...

    def __call__(self, network: Any, x: Tensor, y: Tensor) -> TrainingStep: ...

    def diagnose(self, network: Any, x: Tensor, y: Tensor) -> dict[int, NodeReport]:
        """The reports of a batch from which nothing is learnt; empty for a rule that cannot be diagnosed."""
        ...

    def readouts(self, network: Any) -> list[Readout]:
        """The paths to measure, the whole network's first."""
        ...

    def layout(self, network: Any) -> Layout:
        """How the rule sees the network."""
        ...
