"""Operands that are sharded over explicit mesh axes, which JAX's own types carry."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding


def on_automatic_axes(run: Callable[..., Array], like: Array, *operands: Array | None) -> Array:
    """Return run(*operands), whose result is sharded as `like`; explicit axes of the mesh are automatic inside.

    Primitives and sliding windows have no rule for explicit shardings; the compiler needs none.
    """
    shardings = [jax.typeof(x).sharding for x in (like, *operands) if x is not None]
    mesh = next((sharding.mesh for sharding in shardings if sharding.mesh.explicit_axes), None)
    if mesh is None:
        return run(*operands)
    result: Any = NamedSharding(mesh, jax.typeof(like).sharding.spec)
    automatic: Any = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=result)
    out: Array = automatic(*operands)
    return out
