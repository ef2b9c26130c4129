"""The initial weights of every neuron as a function of (seed, neuron): no matrix has to be kept to have them again.

Each neuron owns a SplitMix64 stream (Steele, Lea & Flood 2014) that starts at a hash of seed and neuron; its first
number is the neuron's sign in the second layer, the rest become normals by the ziggurat (Marsaglia & Tsang 2000).
NumPy's generators are not used because they cannot jump to one neuron: its ziggurat draws a variable count of
numbers, and a search that has to look at a thousand of a million neurons again would have to draw them all.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["fill_rows", "fill_signs", "initial_rows", "initial_signs"]

LAYERS = 256
TAIL_START = 3.6541528853610088  # where the ziggurat's lowest layer of 256 passes into the tail
LAYER_AREA = 0.00492867323399


def _ziggurat() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Right edges of the layers (the lowest first, then shrinking to 0) and the density exp(-x^2 / 2) there."""
    edges = np.zeros(LAYERS + 1)
    edges[0] = LAYER_AREA / math.exp(-0.5 * TAIL_START**2)
    edges[1] = TAIL_START
    for layer in range(2, LAYERS):
        edges[layer] = math.sqrt(-2 * math.log(LAYER_AREA / edges[layer - 1] + math.exp(-0.5 * edges[layer - 1] ** 2)))
    return edges, np.exp(-0.5 * edges**2)


EDGES, DENSITY = _ziggurat()
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
LAYER_BITS, SIGN_BIT, ONE = np.uint64(LAYERS - 1), np.uint64(LAYERS), np.uint64(1)
ULP = 2.0**-53


@njit(inline="always")
def _mix(state):
    state = (state ^ (state >> S30)) * MIX_1
    state = (state ^ (state >> S27)) * MIX_2
    return state ^ (state >> S31)


@njit(inline="always")
def _start(seed, neuron):
    return _mix(_mix(np.uint64(seed)) + np.uint64(neuron))


@njit(inline="always")
def _uniform(bits):
    """In (0, 1): never 0, whose logarithm the tail would need."""
    return (np.float64(np.int64(bits >> S11)) + 0.5) * ULP


@njit(inline="always")
def sign_of(seed, neuron):
    return 1 - 2 * np.int8(_mix(_start(seed, neuron) + GOLDEN) & ONE)


@njit(nogil=True)
def fill_row(seed, neuron, row):
    """Write the neuron's initial weights, d numbers of N(0, 1) rounded to float32, into `row`."""
    state = _start(seed, neuron) + GOLDEN
    for k in range(row.shape[0]):
        while True:
            state += GOLDEN
            bits = _mix(state)
            layer = np.int64(bits & LAYER_BITS)
            x = _uniform(bits) * EDGES[layer]
            inside = x < EDGES[layer + 1]
            if not inside and layer > 0:
                state += GOLDEN
                height = DENSITY[layer] + _uniform(_mix(state)) * (DENSITY[layer + 1] - DENSITY[layer])
                inside = height < math.exp(-0.5 * x * x)
            elif not inside:  # the tail beyond TAIL_START (Marsaglia 1964)
                while not inside:
                    state += GOLDEN
                    beyond = -math.log(_uniform(_mix(state))) / TAIL_START
                    state += GOLDEN
                    inside = -2 * math.log(_uniform(_mix(state))) > beyond * beyond
                    x = TAIL_START + beyond
            if inside:
                row[k] = np.float32(-x if bits & SIGN_BIT else x)
                break


@njit(nogil=True, cache=True)
def fill_rows(seed, neurons, rows):
    """Write the initial weights of `neurons` (r,) into `rows` (r, d)."""
    for q in range(neurons.shape[0]):
        fill_row(seed, neurons[q], rows[q])


@njit(nogil=True, cache=True)
def fill_signs(seed, neurons, signs):
    """Write the second layer's -1 or +1 of `neurons` (r,) into `signs` (r,) of int8."""
    for q in range(neurons.shape[0]):
        signs[q] = sign_of(seed, neurons[q])


def initial_rows(seed: int, neurons: NDArray[np.int64], features: int, dtype: np.dtype) -> NDArray:
    """Initial first-layer weights w_r ~ N(0, I) of `neurons` (r,), shape (r, features). The same numbers in every
    data type.
    """
    rows = np.empty((len(neurons), features), dtype)
    fill_rows(np.uint64(seed), neurons, rows)
    return rows


def initial_signs(seed: int, neurons: NDArray[np.int64]) -> NDArray[np.int8]:
    """Second-layer weights a_r in {-1, +1} of `neurons` (r,)."""
    signs = np.empty(len(neurons), np.int8)
    fill_signs(np.uint64(seed), neurons, signs)
    return signs
