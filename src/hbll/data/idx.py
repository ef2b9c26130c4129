"""The idx format of the MNIST files: a magic number, the sizes, then the elements, all big-endian.

Source: Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits". Only unsigned bytes
(type 8) occur there and are read here.
"""

import struct

import numpy as np

_UNSIGNED_BYTE = 8


def decode(content: bytes) -> np.ndarray:
    """The array of unsigned bytes that an intact idx file holds."""
    dimensions = content[3]
    sizes = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)


def encode(array: np.ndarray) -> bytes:
    """The idx file holding `array` of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, _UNSIGNED_BYTE, array.ndim, *array.shape) + array.tobytes()
