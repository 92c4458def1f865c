"""VOLO in both twins and timm, in float64 with the same weights."""

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
from outlook_parity.models.builtin import draw_weights as draw_weights
from parity_tests.support.arithmetic import QUICKLY

Array = np.ndarray

# Fields that timm's VOLO lacks, with the values that it has fixed.
NOT_IN_TIMM = {"out_kernel": (3, 3), "out_stride": (2, 2), "out_padding": (1, 1), "dynamic_img_size": False}

FOUR_STAGES: dict[str, Any] = {
    "layers": (1, 2, 1, 1),
    "embed_dims": (12, 24, 24, 24),
    "num_heads": (2, 4, 3, 2),
    "downsamples": (True, False, False, False),
    "outlook_attention": (True, False, False, False),
}


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


def draw_images(config: VOLOConfig, batch: int = 2, seed: int = 0, size: tuple[int, int] | None = None) -> Array:
    """Draw images (B, C, H, W)."""
    return np.random.default_rng(seed).standard_normal((batch, config.in_chans, *(size or config.img_size)))


def timm_arguments(config: VOLOConfig) -> dict[str, Any]:
    arguments = {field.name: getattr(config, field.name) for field in fields(config)}
    assert {name: arguments.pop(name) for name in NOT_IN_TIMM} == NOT_IN_TIMM
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
    """Compile a function of a model and arrays as `nnx.jit` does, but quickly rather than for speed."""

    @partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
    def pure(graphdef: Any, state: Any, *args: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return function(model, *args), nnx.state(model)

    def call(model: nnx.Module, *args: Any) -> Any:
        out, state = pure(*nnx.split(model), *args)
        nnx.update(model, state)
        return out

    return call


# One function for all calls: equal models, as copies and pairs of a test are, share a compilation.
_logits = jit(lambda model, images: model(images))


def jax_logits(model: outlook_jax.VOLO, images: Array) -> Array:
    return np.asarray(_logits(model, images))


def to_tensors(arrays: dict[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
