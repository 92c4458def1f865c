"""What a twin is asked to compute, and how numbers are rounded for it. Imports no framework."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating
from outlook_parity.core.precision import PRECISIONS, STORAGES

# What a model is called with, by name, in the order of its arguments.
Inputs = Mapping[str, np.ndarray]

INPUT = "input"


def inputs_of(given: Any) -> dict[str, np.ndarray]:
    """Return inputs by name: "input" of one array, "input.0"… of a sequence, "input.mask"… of a mapping, in its order.

    Floating-point numbers become float64; whole numbers and booleans stay what they are.

    Raises:
        TypeError: something is no array of numbers.
    """
    if isinstance(given, Mapping):
        named = {f"{INPUT}.{name}": value for name, value in given.items()}
    elif isinstance(given, list | tuple) and any(getattr(value, "ndim", 0) for value in given):
        named = {f"{INPUT}.{index}": value for index, value in enumerate(given)}
    else:
        named = {INPUT: given}
    if not named:
        raise TypeError("inputs must be at least one array, got none")
    if len(named) == 1:
        named = {INPUT: next(iter(named.values()))}
    arrays = {name: np.asarray(value) for name, value in named.items()}
    for name, array in arrays.items():
        if array.dtype not in STORAGES and array.dtype.kind not in "iub":
            floating = ", ".join(dtype.name for dtype in STORAGES)
            raise TypeError(f"{name} must be floating-point numbers ({floating}), integers or bool, got {array.dtype}")
    return {name: array.astype(np.float64) if is_floating(array) else array for name, array in arrays.items()}


def batch_reversed(arrays: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """Return arrays with their first axis reversed, where it is as long as the batch."""
    return {name: array[::-1] if array.ndim and len(array) == batch else array for name, array in arrays.items()}


def batch_of(inputs: Inputs) -> int:
    """Return the size of the batch: of the first axis of the first input, 1 where there is none."""
    first = next(iter(inputs.values()))
    return len(first) if first.ndim else 1


SCATTER = 4.0  # far enough for what differs at the ends of the range alone, as ReLU6 from ReLU


def scattered(inputs: Inputs, seed: int) -> dict[str, np.ndarray]:
    """Return other inputs of the same kind: floating-point numbers shuffled and four times as large."""
    rng = np.random.default_rng(seed)
    return {
        name: SCATTER * rng.permutation(array.ravel()).reshape(array.shape) if is_floating(array) else array
        for name, array in inputs.items()
    }


def places_and_size(inputs: Inputs) -> tuple[int, int]:
    """Return over how many places a weight is applied at most, and how many numbers there are, in the largest input."""
    places = [math.prod(array.shape[:-1] if is_floating(array) else array.shape) for array in inputs.values()]
    return max(places), max(array.size for array in inputs.values())


@dataclass(frozen=True)
class Request:
    """What a twin is asked to compute.

    Weights, inputs, targets and cotangents are first rounded to the dtype that numbers are kept in in `rounded_to`: so
    a run in float64 gives the exact answer to what one in a lower precision was asked.

    Attributes:
        inputs: as the JAX twin takes them.
        dtype: the precision of the computation.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent, of the training's target and of the dropout masks.
        rounded_to: a precision.
        steps: of training, per optimizer.
        moved: by how many units of rounding of `rounded_to` inputs and weights are moved, each up or down at random.
    """

    inputs: Inputs
    dtype: str
    device: str
    seed: int
    rounded_to: str
    steps: int = 0
    moved: float = 0.0

    def rounded(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return weights or inputs as they are to be computed with; what is no floating-point number stays."""
        if not is_floating(values):
            return values
        values = round_to(values, self.rounded_to)
        if self.moved:
            signs = np.random.default_rng([self.seed, *name.encode()]).choice([-1.0, 1.0], values.shape)
            values = values.astype(np.float64) * (1 + self.moved * PRECISIONS[self.rounded_to].epsilon * signs)
        return round_to(values, self.dtype)

    def rounded_inputs(self, inputs: Inputs | None = None) -> dict[str, np.ndarray]:
        """Return the inputs, or others instead, as they are to be computed with."""
        return {name: self.rounded(name, array) for name, array in (inputs or self.inputs).items()}

    def cotangent(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """Return the cotangent of an output of this name and shape, standard normal: the same in both twins."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        return self.fixed(rng.standard_normal(tuple(shape)))

    def fixed(self, values: np.ndarray) -> np.ndarray:
        """Return numbers of the verifier's own, a target or a cotangent, rounded and never moved."""
        return round_to(round_to(values, self.rounded_to), self.dtype)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` as it is kept in a precision; half precisions are rounded by way of float32, alike everywhere."""
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are found where the results are compared
        if dtype != "float64":
            array = array.astype(np.float32)
        return array.astype(PRECISIONS[dtype].storage)
