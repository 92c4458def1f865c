"""VOLO thrice from the same weights: both twins and timm's, in float64."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timm.models.volo
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common import VOLOConfig
from outlook_common.weights import table_for
from outlook_jax.blocks import DropRate

Array = np.ndarray

# What timm's VOLO does not know, and what it has fixed instead.
OURS = {"out_kernel": (3, 3), "out_stride": (2, 2), "out_padding": (1, 1), "dynamic_img_size": False}

# Small models run in no time, but take seconds to compile.
QUICKLY = {"xla_backend_optimization_level": 0}


def small_config(**overrides: Any) -> VOLOConfig:
    sizes: dict[str, Any] = {
        "layers": (2, 3),
        "img_size": 32,
        "patch_size": 4,
        "num_classes": 7,
        "stem_hidden_dim": 6,
        "embed_dims": (12, 24),
        "num_heads": (2, 4),
        "downsamples": (True, False),
        "outlook_attention": (True, False),
    }
    return VOLOConfig(**sizes | overrides)


def draw_weights(config: VOLOConfig, seed: int = 0) -> dict[str, Array]:
    """Draw float64 weights under PyTorch's names, with which every part of the model matters."""
    rng = np.random.default_rng(seed)
    return {entry.torch: _draw(rng, entry.torch, entry.shape) for entry in table_for(config).entries}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.array(3, np.int64)
    normal = rng.standard_normal(shape)
    if leaf == "running_var":
        return np.exp(normal / 2)
    if leaf == "weight" and len(shape) == 1:
        return 1 + 0.3 * normal
    if leaf == "weight":
        return 1.5 * normal / np.sqrt(np.prod(shape[1:]))
    return 0.5 * normal


def draw_images(config: VOLOConfig, batch: int = 2, seed: int = 0, size: tuple[int, int] | None = None) -> Array:
    """Draw images (B, C, H, W)."""
    return np.random.default_rng(seed).standard_normal((batch, config.in_chans, *(size or config.img_size)))


def timm_arguments(config: VOLOConfig) -> dict[str, Any]:
    arguments = {field.name: getattr(config, field.name) for field in fields(config)}
    assert {name: arguments.pop(name) for name in OURS} == OURS
    return arguments


def timm_volo(config: VOLOConfig, weights: dict[str, Array]) -> torch.nn.Module:
    model = timm.models.volo.VOLO(**timm_arguments(config)).double()
    model.load_state_dict(to_tensors(weights), strict=True)
    return model


def torch_volo(config: VOLOConfig, weights: dict[str, Array]) -> outlook_torch.VOLO:
    model = outlook_torch.VOLO(config, dtype=torch.float64)
    model.load_state_dict(to_tensors(weights), strict=True)
    return model


def jax_volo(config: VOLOConfig, weights: dict[str, Array], **kwargs: Any) -> outlook_jax.VOLO:
    """Make the JAX twin from abstract shapes: drawing weights to overwrite them would take most of a test."""
    kwargs = {"param_dtype": "float64"} | kwargs
    abstract = nnx.eval_shape(lambda: outlook_jax.VOLO(config, **kwargs, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    entries = {entry.flax: entry for entry in table_for(config).entries}
    leaves = []
    for index, (path, variable) in enumerate(nnx.to_flat_state(state)):
        name = ".".join(map(str, path))
        if name in entries:
            value = np.array(entries[name].to_flax(weights[entries[name].torch]), variable.dtype)
        elif isinstance(variable, nnx.RngKey):
            value = jax.random.key(index)
        elif isinstance(variable, nnx.RngCount):
            value = np.zeros((), variable.dtype)
        else:
            assert isinstance(variable, DropRate)
            value = np.array(config.drop_path_rates(config.network[path[1]].stage)[path[2]], variable.dtype)
        leaves.append((path, variable.replace(jnp.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def last(images: Array) -> Array:
    """Move the channels to the last axis."""
    return images.transpose(0, 2, 3, 1)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `nnx.jit` does for a function of a model and arrays, but compile quickly rather than for speed."""

    @partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
    def pure(graphdef: Any, state: Any, *args: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return function(model, *args), nnx.state(model)

    def call(model: nnx.Module, *args: Any) -> Any:
        out, state = pure(*nnx.split(model), *args)
        nnx.update(model, state)
        return out

    return call


def jax_logits(model: outlook_jax.VOLO, images: Array) -> Array:
    return np.asarray(jit(lambda model, images: model(images))(model, images))


def to_tensors(arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
