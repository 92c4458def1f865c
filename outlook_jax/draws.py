"""Random streams of a model that is being made, and draws that compile for many shapes at once."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

# Draws of at most so many numbers are cut from one of so many.
LENGTHS = (2**12, 2**16)


class CountedRngs(nnx.Rngs):
    """The streams of `rngs`, with the same keys; what was drawn is added to their counts by `finish`, once.

    Flax sets a count at each draw. Where that is traced, as in `nnx.eval_shape`, JAX looks through all that was traced
    before to say where the count comes from: seven eighths of the time of an abstract VOLO-D5.
    """

    def __init__(self, rngs: nnx.Rngs) -> None:
        for name, stream in rngs.items():  # type: ignore[no-untyped-call]
            setattr(self, name, _Stream(stream))

    def finish(self) -> None:
        """Add the number of draws to the count of each stream."""
        for stream in vars(self).values():
            if isinstance(stream, _Stream) and stream.draws:
                stream.stream.count[...] += stream.draws


class _Stream:
    def __init__(self, stream: nnx.RngStream) -> None:
        self.stream, self.draws = stream, 0
        self.key, self.first = stream.key[...], stream.count[...]

    def __call__(self) -> Array:
        key: Array = jax.random.fold_in(self.key, self.first + np.uint32(self.draws))
        self.draws += 1
        return key

    def fork(self) -> nnx.RngStream:
        return nnx.RngStream(self(), tag=self.stream.tag)


def draw(one: Callable[[Array, tuple[int, ...], Any], Array], key: Array, shape: Sequence[int], dtype: Any) -> Array:
    """Return `one(key, shape, dtype)`, bit for bit, for random numbers that are drawn independently of each other.

    XLA takes a quarter of a second to compile a draw of each new shape, and a VOLO has dozens. The numbers are drawn on
    one axis, as in `Dropout`, and few of them cut from more, where a draw begins with the same numbers however long it
    is.
    """
    size = prod(shape)
    length = next((length for length in LENGTHS if size <= length and _begins_alike(key)), size)
    return _cut(one(key, (length,), dtype), tuple(shape))


def _begins_alike(key: Array) -> bool:
    """Return whether each number depends on the key and its own place alone, as in JAX's default generator."""
    partitionable: bool = getattr(jax.config, "jax_threefry_partitionable", True)
    return partitionable and str(jax.random.key_impl(key)) == "threefry2x32"


@partial(jax.jit, static_argnums=1)
def _cut(numbers: Array, shape: tuple[int, ...]) -> Array:
    return numbers[: prod(shape)].reshape(shape)
