"""Whole VOLO models: compile time of the JAX twin, scanned and unrolled, and forward time against timm."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from benchmarks.timing import Contenders, interleave


def compile_seconds(variant: str, *, scan_layers: bool) -> dict[str, float]:
    """Return the seconds that `jax.jit` takes to trace and to compile the forward pass for one image.

    Parameters are shapes only, so a large variant needs no memory.
    """
    model = nnx.eval_shape(lambda: outlook_jax.volo(variant, scan_layers=scan_layers, rngs=nnx.Rngs(0)))
    model.eval()
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((1, *model.config.img_size, model.config.in_chans), jnp.float32)
    start = time.perf_counter()
    lowered = jax.jit(lambda state, images: nnx.merge(graph, state)(images)).lower(state, images)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace": traced - start, "compile": time.perf_counter() - traced}


def forward_seconds(variant: str, *, batch: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of one forward pass: both twins and timm, eager, interleaved."""
    return interleave(_contenders(variant, batch), rounds=rounds)


def _contenders(variant: str, batch: int) -> Contenders:
    ours = outlook_torch.volo(variant).eval()
    theirs = timm.create_model(variant).eval()
    theirs.load_state_dict(ours.state_dict())
    twin = outlook_jax.volo(variant, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(twin, outlook_torch.export_weights(ours))
    twin.eval()
    graph, state = nnx.split(twin)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))

    shape = (batch, *twin.config.img_size, twin.config.in_chans)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    channels_last, channels_first = jnp.asarray(images), torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return {
        "timm": torch.no_grad()(lambda: theirs(channels_first)),
        "torch": torch.no_grad()(lambda: ours(channels_first)),
        "jax": lambda: jax.block_until_ready(forward(state, channels_last)),
    }
