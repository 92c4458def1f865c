"""What a twin is asked to compute, and how numbers are rounded for it. Imports no framework."""

from dataclasses import dataclass

import numpy as np

from outlook_common.weights.arrays import is_floating
from outlook_parity.compare import DTYPES, epsilon


@dataclass(frozen=True)
class Request:
    """What a twin is asked to compute.

    Weights, inputs, targets and cotangents are first rounded to `rounded_to`: so a run in float64 gives the exact
    answer to what one in a lower precision was asked.

    Attributes:
        inputs: as the JAX twin takes them.
        dtype: of the computation.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent, of the training's target and of the dropout masks.
        rounded_to: a dtype.
        steps: of training, per optimizer.
        moved: by how many units of rounding of `rounded_to` inputs and weights are moved, each up or down at random.
    """

    inputs: np.ndarray
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
            values = values.astype(np.float64) * (1 + self.moved * epsilon(self.rounded_to) * signs)
        return round_to(values, self.dtype)

    def cotangent(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the cotangent of an output of this shape, standard normal: the same in both twins."""
        return self.fixed(np.random.default_rng(self.seed).standard_normal(shape))

    def fixed(self, values: np.ndarray) -> np.ndarray:
        """Return numbers of the verifier's own, a target or a cotangent, rounded and never moved."""
        return round_to(round_to(values, self.rounded_to), self.dtype)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` in `dtype`; half precisions are rounded by way of float32, alike everywhere."""
    with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN are found where the results are compared
        if dtype != "float64":
            array = array.astype(np.float32)
        return array.astype(DTYPES[dtype])
