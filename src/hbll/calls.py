"""How blocks and heads are called, and the ways through a network."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hbll.adapt import Part
from hbll.tree import Path

__all__ = [
    "Context",
    "PathLike",
    "Readout",
    "apply",
    "call",
    "check_shape",
    "check_tensor",
    "chosen",
    "evaluate",
    "first_of",
    "names",
    "out_of_order",
    "picked",
    "refuse_in_place",
    "takes",
]

Context: TypeAlias = Mapping[str, Any]
"""What blocks and head take as keywords beside the state: masks, rotary tables, position ids; tensors, or nests of them."""


@dataclass(frozen=True)
class Readout:
    """A path through a network, or another way of reading it."""

    name: str
    """The network's name for it, or that of ``format_path``."""

    path: Path

    blocks: int
    """Blocks that are evaluated along it; of a recurrent network, cells."""

    scores: Callable[[Tensor], Tensor] | None = None
    """x -> what the measures take for logits, where a rule has a way of its own to get them."""

    head: nn.Module | None = None
    """What reads the state that the path comes to, where it is a stage's readout and no path of the tree; it is handed what
    it takes of the context, and of ``cache`` where tokens are generated."""


PathLike: TypeAlias = str | int | Sequence[int] | Readout | None
"""A path as ``Chain.resolve`` takes it, or a readout."""


def apply(name: str, block: nn.Module, state: Tensor, context: Context) -> Tensor:
    """The state that a block makes of a state (B, ...).

    Raises:
        ValueError: it returns no tensor, nor a tuple that starts with one, or it changes in place what others need; the
            message has the name.
    """
    try:
        output = call(block, state, context)
    except RuntimeError as error:
        refuse_in_place(name, error)
        raise
    check_tensor(name, output)
    return output


def call(block: nn.Module, state: Tensor, context: Context) -> Any:
    """What a block returns for a state (B, ...); of a tuple the first item."""
    return first_of(evaluate(block, state, context))


def first_of(output: Any) -> Any:
    """What a block returned for a state; of a tuple the first item."""
    return output[0] if isinstance(output, tuple) and output else output


def evaluate(module: nn.Module, state: Tensor, context: Context) -> Any:
    """What a block or a head returns for a state (B, ...), given what it takes of the context."""
    return module(state, **chosen(module, context)) if context else module(state)


def chosen(module: nn.Module, context: Context) -> dict[str, Any]:
    """What of a context a module takes."""
    return picked(context, takes(module))


def picked(context: Context, taken: frozenset[str] | None) -> dict[str, Any]:
    """What of a context has one of these keys; all of it for None."""
    return dict(context) if taken is None else {key: value for key, value in context.items() if key in taken}


def takes(module: nn.Module) -> frozenset[str] | None:
    """The keywords that a module's forward names; None if it takes any."""
    forward = _forward(module)
    method = getattr(forward, "__func__", None)
    return _keywords(forward, 1) if method is None else _keywords_of_method(method)


def names(module: nn.Module, keyword: str) -> bool:
    """Whether a module's forward names a keyword, whatever else it takes."""
    return any(parameter.name == keyword for parameter in _parameters(_forward(module)))


def _forward(module: nn.Module) -> Callable[..., Any]:
    return module.function if isinstance(module, Part) else module.forward


@lru_cache(maxsize=1024)  # asked for with every token that is generated; of classes there are few
def _keywords_of_method(method: Callable[..., Any]) -> frozenset[str] | None:
    return _keywords(method, 2)


def _keywords(function: Callable[..., Any], first: int) -> frozenset[str] | None:
    """The keywords that a function names after so many arguments; None if it takes any."""
    parameters = _parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return frozenset(p.name for p in (*by_place[first:], *(p for p in parameters if p.kind is p.KEYWORD_ONLY)))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # a built-in function, such as torch.tanh
        return []


def check_tensor(name: str, output: object) -> None:
    """Raises ValueError unless embed or a block returned a state."""
    if not isinstance(output, Tensor):
        raise ValueError(f"{name} returns a {type(output).__name__}; it must return a state, which is one tensor")


def refuse_in_place(name: str, error: RuntimeError) -> None:
    """Raises ValueError if torch's error is that something was changed in place."""
    reason = str(error).split(". ")[0]
    if "inplace" in reason.replace("-", ""):
        raise ValueError(
            f"{name} changes its input in place, which is a state that others read: give its first layer inplace=False, and "
            f"for state += .. write state = state + .. ({reason})"
        ) from error


@contextmanager
def out_of_order(name: str, state: Tensor) -> Iterator[None]:
    """Inside, a block is called on a state of another block than the one before it.

    Raises:
        ValueError: the block cannot take it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        refuse_in_place(name, error)
        raise ValueError(
            f"{name} cannot take a state of shape {tuple(state.shape)}; here it is called out of order, on the state of "
            "another block than the one before it, and states must be of one shape: take dgl where they are not "
            f"({str(error).splitlines()[0]})"
        ) from error


def check_shape(name: str, output: Tensor, state: Tensor) -> None:
    """Raises ValueError unless a block that is called out of order kept the shape of the state."""
    if output.shape != state.shape:
        raise ValueError(
            f"{name} changes the state's shape from {tuple(state.shape)} to {tuple(output.shape)}; here blocks are called "
            "out of order, on the states of other blocks, and must keep it"
        )
