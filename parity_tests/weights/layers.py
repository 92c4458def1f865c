"""A layer in both twins, its weights in every naming, and helpers that compare bits."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import OutlookAttentionConfig
from outlook_common.arrays import DTYPES
from outlook_common.weights import (
    WeightTable,
    table_for,
)
from outlook_common.weights.io.lazy import as_lazy
from outlook_common.weights.rename import rename

FLOATS = ("float64", "float32", "float16", "bfloat16")
DIM, HEADS = 6, 2
CONFIG = OutlookAttentionConfig(DIM, HEADS, qkv_bias=True)
TABLE = table_for(CONFIG)
NAMINGS = ("torch", "flax", "external-attention")


def any_bits(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Random bits: NaN payloads, infinities, -0.0 and denormals, which the first six numbers always include."""
    numbers = DTYPES[dtype]
    array = np.frombuffer(rng.bytes(int(np.prod(shape)) * numbers.itemsize), numbers).copy()
    special = np.array([-0.0, np.inf, -np.inf, np.nan], numbers)
    array[:4] = special
    word = np.dtype(f"u{numbers.itemsize}")
    array.view(word)[4:6] = [3, special.view(word)[3] ^ 5]  # a denormal, a NaN with a payload
    return array.reshape(shape)


def layer_weights(dtype: str = "float32", seed: int = 0, table: WeightTable = TABLE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {entry.torch: rng.standard_normal(entry.shape).astype(DTYPES[dtype]) for entry in table.entries}


def layer_bits(dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {entry.torch: any_bits(entry.shape, dtype, rng) for entry in TABLE.entries}


def torch_layer(dtype: str = "float32", **kwargs: Any) -> outlook_torch.OutlookAttention:
    return outlook_torch.OutlookAttention(DIM, HEADS, qkv_bias=True, dtype=getattr(torch, dtype), **kwargs).eval()


def jax_layer(dtype: str = "float32") -> outlook_jax.OutlookAttention:
    return outlook_jax.OutlookAttention(
        DIM, HEADS, qkv_bias=True, param_dtype=jnp.dtype(dtype), deterministic=True, rngs=nnx.Rngs(0)
    )


TWINS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "torch": (outlook_torch, torch_layer),
    "jax": (outlook_jax, jax_layer),
}
both_twins = pytest.mark.parametrize("twin", TWINS)


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def renamed(arrays: dict[str, np.ndarray], table: WeightTable, naming: str) -> dict[str, np.ndarray]:
    """A model's arrays under the names and in the layout of another naming."""
    lazy = {name: as_lazy(array) for name, array in arrays.items()}
    return {name: tensor.read() for name, tensor in rename(lazy, table, naming).items()}


def inside_a_model(naming: str) -> dict[str, Any]:
    """Two layers, with different weights, and other tensors that no table knows."""
    source: dict[str, Any] = {"patch_embed.proj.weight": np.ones((2, 3, 4, 4)), "network.0.0.norm1.weight": np.ones(6)}
    for place in (0, 1):
        weights = renamed(layer_weights(seed=place), TABLE, naming)
        source |= {f"network.0.{place}.attn.{name}": array for name, array in weights.items()}
    return source


WEIGHTS = layer_weights()
IN_FLAX = renamed(WEIGHTS, TABLE, "flax")
