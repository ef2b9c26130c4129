"""Any nest of dicts, lists, tuples, numbers, strings and tensors as one safetensors file, without pickle.

The tensors are the file's tensors, named by their place (`network.blocks.0.linear.weight`); the rest is JSON in the
file's metadata, with a checksum of both. One file, because a pair could be torn apart by an interruption.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbll.files import read_tensors, write_tensors

Nest = Any
"""Tensors, None, bool, int, float and str, in dicts (with int or str as keys), lists and tuples."""


def save(file: Path, state: Nest) -> None:
    """Writes `state` so that `load` returns an equal one, to the last bit and of the same types."""
    tensors: dict[str, Tensor] = {}
    outline = _take_apart(state, "", tensors)
    write_tensors(file, tensors, {"outline": json.dumps(outline)})


def load(file: Path, device: torch.device | str = "cpu") -> Nest:
    """What was saved, its tensors on `device`; ValueError naming the file when it is missing or damaged."""
    tensors, metadata = read_tensors(file)
    with understood(file):
        outline = json.loads(metadata["outline"])
    return _put_together(outline, {name: tensor.to(device) for name, tensor in tensors.items()})


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Inside, what does not find its part in a checkpoint, or finds another form of it, is a ValueError naming the file."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{file} is of another network or was made by another version, neither of which this run can go on with: "
            "begin a new run"
        ) from error


def _take_apart(part: Nest, place: str, tensors: dict[str, Tensor]) -> Nest:
    match part:
        case Tensor():
            while place in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
                place += "'"
            tensors[place] = part
            return {"tensor": place}
        case dict():
            items = [(key, _take_apart(value, _join(place, key), tensors)) for key, value in part.items()]
            return {"dict": items}
        case list() | tuple():
            values = [_take_apart(value, _join(place, index), tensors) for index, value in enumerate(part)]
            return {type(part).__name__: values}
        case None | bool() | int() | float() | str():
            return part
    raise TypeError(f"a checkpoint cannot hold the {type(part).__name__} at {place}")


def _put_together(part: Nest, stored: Mapping[str, Tensor]) -> Nest:
    match part:
        case {"tensor": place}:
            return stored[place]
        case {"dict": items}:
            return {key: _put_together(value, stored) for key, value in items}
        case {"list": values}:
            return [_put_together(value, stored) for value in values]
        case {"tuple": values}:
            return tuple(_put_together(value, stored) for value in values)
    return part


def _join(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)
