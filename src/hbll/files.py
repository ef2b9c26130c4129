"""Files that are there whole or not at all, and that tell when they are no longer what was written."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["file_sum", "read_tensors", "sealed", "unsealed", "write_atomically", "write_tensors"]

_SUM = "sha256"


def write_atomically(file: Path, content: bytes | str) -> None:
    """Replaces ``file`` by one holding ``content``: whoever stops in between leaves the old one as it was.

    Raises:
        OSError: the disk is full, for instance; it names the file, and no unfinished one is left.
    """
    content = content.encode() if isinstance(content, str) else content
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def file_sum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold, with a checksum beside it."""
    return {**content, _SUM: _json_sum(content)}


def unsealed(stored: Any, file: Path) -> dict[str, Any]:
    """What was ``sealed``, from the JSON in ``file``.

    Raises:
        ValueError: it was changed since, or never sealed.
    """
    if isinstance(stored, dict):
        content = {key: value for key, value in stored.items() if key != _SUM}
        if stored.get(_SUM) == _json_sum(content):
            return content
    raise ValueError(f"{file} is damaged, or was made by another version: its checksum is not that of its content")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, with a checksum among its metadata."""
    # Clones, because safetensors refuses tensors that share memory, as those of a block used twice do.
    whole = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomically(file, safetensors.torch.save(whole, {**metadata, _SUM: _tensor_sum(whole, metadata)}))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, on the CPU, and the metadata that ``write_tensors`` wrote.

    Raises:
        ValueError: the file is missing, damaged, or was not written so.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if metadata.pop(_SUM, None) != _tensor_sum(tensors, metadata):
        raise ValueError(
            f"{file} cannot be read: it is damaged, or was made by another version: its checksum is not that of its content"
        )
    return tensors, metadata


def _json_sum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tensor_sum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
