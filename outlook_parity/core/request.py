"""A request: inputs, precision, device, seed; and how numbers are rounded for it. Imports no framework."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outlook_common.arrays import is_floating
from outlook_parity.core.precision import PRECISIONS, STORAGES

# Inputs by name, in the order of the arguments.
Inputs = Mapping[str, np.ndarray]

INPUT = "input"

DEVICES = ("cpu", "gpu", "tpu")


def inputs_of(inputs: Any) -> dict[str, np.ndarray]:
    """Return inputs by name: "input" of one array, "input.0"… of a sequence, "input.mask"… of a mapping, in its order.

    Floating-point numbers become float64; integers and booleans stay what they are.

    Raises:
        TypeError: something is no array of numbers.
    """
    arrays = {name: np.asarray(value) for name, value in named_inputs(inputs).items()}
    for name, array in arrays.items():
        if array.dtype not in STORAGES and array.dtype.kind not in "iub":
            floating = ", ".join(dtype.name for dtype in STORAGES)
            raise TypeError(f"{name} must be floating-point numbers ({floating}), integers or bool, got {array.dtype}")
    return {name: array.astype(np.float64) if is_floating(array) else array for name, array in arrays.items()}


def named_inputs(inputs: Any) -> dict[str, Any]:
    """Return inputs by name as they are given.

    Raises:
        TypeError: there are none.
    """
    if isinstance(inputs, Mapping):
        named = {f"{INPUT}.{name}": value for name, value in inputs.items()}
    elif isinstance(inputs, list | tuple) and any(getattr(value, "ndim", 0) for value in inputs):
        named = {f"{INPUT}.{index}": value for index, value in enumerate(inputs)}
    else:
        named = {INPUT: inputs}
    if not named:
        raise TypeError("inputs must be at least one array, got none")
    return {INPUT: next(iter(named.values()))} if len(named) == 1 else named


def keywords_of(inputs: Any) -> tuple[str, ...]:
    """Return the keys of a mapping of inputs in its order, which may be names of arguments; of anything else none."""
    return tuple(map(str, inputs)) if isinstance(inputs, Mapping) else ()


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


def positions_and_size(inputs: Inputs) -> tuple[int, int]:
    """Return of the largest input how many positions a weight is applied at, and how many numbers it has."""
    positions = [math.prod(array.shape[:-1] if is_floating(array) else array.shape) for array in inputs.values()]
    return max(positions), max(array.size for array in inputs.values())


@dataclass(frozen=True)
class Request:
    """What a twin is to compute.

    Weights, inputs, targets and cotangents are first rounded to the storage dtype of `rounded_to`: so a run in float64
    gives the exact results for the numbers that a run in a lower precision computes with.

    Attributes:
        inputs: as the JAX twin takes them.
        dtype: the precision of the computation.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent, of the training's target and of the dropout masks.
        rounded_to: a precision.
        steps: of training, per optimizer.
        perturbed: units of rounding of `rounded_to` by which inputs and weights are changed, each up or down at random.
        keywords: of the inputs, in their order, where models are called by keyword; none where by position.
        keep_all: whether dropout of training keeps all, times 1/(1-rate): where the twins' masks cannot be the same.
        single: what single random numbers of training are, see `Draws`; None where they are drawn.
        frozen: parameters that training leaves without gradients.
        masks: output -> True where it counts, of its shape in JAX; elsewhere it reads as zero.
        positions: the same for the leading axes of arrays inside the models.
    """

    inputs: Inputs
    dtype: str
    device: str
    seed: int
    rounded_to: str
    steps: int = 0
    perturbed: float = 0.0
    keywords: tuple[str, ...] = ()
    keep_all: bool = False
    single: float | None = None
    frozen: frozenset[str] = frozenset()
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray | None = None

    @property
    def by_keyword(self) -> bool:
        """Whether models are called by keyword."""
        return bool(self.keywords)

    def arguments(self, values: Mapping[str, Any]) -> Sequence[Any] | Mapping[str, Any]:
        """Return what a model is called with: values of the inputs in their order, by keyword where it is so called."""
        in_order = tuple(values[name] for name in self.inputs)
        return dict(zip(self.keywords, in_order, strict=True)) if self.by_keyword else in_order

    def rounded(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return weights or inputs as they are to be computed with; integers and booleans unchanged."""
        if not is_floating(values):
            return values
        values = round_to(values, self.rounded_to)
        if self.perturbed:
            # In place: the weight may be as large as memory allows.
            factors = np.asarray(np.random.default_rng([self.seed, *name.encode()]).choice([-1.0, 1.0], values.shape))
            factors *= self.perturbed * PRECISIONS[self.rounded_to].epsilon
            factors += 1
            factors *= values.astype(np.float64, copy=False)
            values = factors
        return round_to(values, self.dtype)

    def rounded_inputs(self, inputs: Inputs | None = None) -> dict[str, np.ndarray]:
        """Return the inputs, or others instead, as they are to be computed with."""
        return {name: self.rounded(name, array) for name, array in (inputs or self.inputs).items()}

    def cotangent(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """Return the cotangent of an output of this name and shape, standard normal: the same in both twins."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        return self.fixed(self.masked({name: rng.standard_normal(tuple(shape))})[name])

    def masked(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return outputs with zeros where they do not count."""
        return {
            name: np.where(self.masks[name], array, np.zeros_like(array))
            if name in self.masks and np.shape(array) == self.masks[name].shape
            else array
            for name, array in outputs.items()
        }

    def fixed(self, values: np.ndarray) -> np.ndarray:
        """Return numbers of the verifier's own, a target or a cotangent, rounded and never perturbed."""
        return round_to(round_to(values, self.rounded_to), self.dtype)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` as it is kept in a precision; half precisions are rounded by way of float32, alike everywhere."""
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are found where the results are compared
        if dtype != "float64":
            array = array.astype(np.float32)
        return array.astype(PRECISIONS[dtype].storage)
