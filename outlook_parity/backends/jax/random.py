"""Random numbers that JAX's functions draw, shared with the other twin."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

from outlook_parity.core.dropout import FUNCTIONAL, Draws, python_random


@contextmanager
def shared_bernoulli(draws: Draws) -> Iterator[None]:
    """Let `draws` decide what `bernoulli` and `uniform` of `jax.random` and Python's `random` return.

    So dropout that is no module of Flax is the other twin's.
    """

    def bernoulli(key: Any, p: Any = 0.5, shape: Sequence[int] | None = None, **options: Any) -> Any:
        sizes = jnp.shape(p) if shape is None else tuple(shape)
        numbers = draws.uniform(tuple(sizes), FUNCTIONAL)
        if isinstance(p, int | float):
            return jnp.asarray(numbers >= 1 - p)  # the same comparison as in PyTorch's `bernoulli_`
        return jnp.asarray(numbers) >= 1 - p

    def uniform(
        key: Any, shape: Any = (), dtype: Any = float, minval: Any = 0.0, maxval: Any = 1.0, **options: Any
    ) -> Any:
        numbers = draws.uniform(tuple(shape) if isinstance(shape, Sequence) else (shape,), "jax.random.uniform")
        return minval + (maxval - minval) * jnp.asarray(numbers, dtype)

    with patch.multiple(jax.random, bernoulli=bernoulli, uniform=uniform), python_random(draws, lambda: "random"):
        yield
