"""Random numbers that JAX's functions draw, shared with the other twin."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

from outlook_parity.core.dropout import FUNCTIONAL, Draws


@contextmanager
def shared_bernoulli(draws: Draws) -> Iterator[None]:
    """Let `draws` decide what `jax.random.bernoulli` returns: dropout of every library that is no module of Flax."""

    def bernoulli(key: Any, p: Any = 0.5, shape: Sequence[int] | None = None, **options: Any) -> Any:
        sizes = jnp.shape(p) if shape is None else tuple(shape)
        numbers = draws.uniform(tuple(sizes), FUNCTIONAL)
        if isinstance(p, int | float):
            return jnp.asarray(numbers >= 1 - p)  # the same comparison as in PyTorch's `bernoulli_`
        return jnp.asarray(numbers) >= 1 - p

    with patch.object(jax.random, "bernoulli", bernoulli):
        yield
