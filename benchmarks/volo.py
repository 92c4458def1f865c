"""Contenders for VOLO: both twins and timm; JAX compile time, scanned and unrolled."""

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from benchmarks.floor import jax_floor, products, torch_floor


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


class Pair(NamedTuple):
    """The two timed functions of a contender."""

    forward: Callable[[], object]
    training: Callable[[], object] | None


def contenders(variant: str, batch: int) -> dict[str, Pair]:
    """Return timm's model, plain and accelerated, both twins, and the floors; all with the same weights.

    A training step is `forward_train` with a fixed box, the mean square of both logits, and all gradients. "folded" is
    the twin with BatchNorm folded, which has no training.
    """
    torch_model = outlook_torch.volo(variant)
    timm_model = timm.create_model(variant)
    timm_model.load_state_dict(torch_model.state_dict())
    accelerated = outlook_torch.accelerate(copy.deepcopy(timm_model))
    twin = outlook_jax.volo(variant, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(twin, outlook_torch.export_weights(torch_model))

    shape = (batch, *twin.config.img_size, twin.config.in_chans)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    pairs = {
        name: _torch_pair(model, channels_first)
        for name, model in (("timm", timm_model), ("timm accelerated", accelerated), ("torch", torch_model))
    }
    pairs["jax"] = _jax_pair(twin, jnp.asarray(images))
    folded = {
        "torch folded": _torch_pair(outlook_torch.fold_batch_norm(torch_model.eval()), channels_first),
        "jax folded": _jax_pair(_folded(twin), jnp.asarray(images)),
    }
    pairs |= {name: Pair(pair.forward, None) for name, pair in folded.items()}
    found = products(torch_model, channels_first)
    return pairs | {"torch floor": Pair(*torch_floor(found)), "jax floor": Pair(*jax_floor(found))}


def _folded(model: outlook_jax.VOLO) -> outlook_jax.VOLO:
    model.eval()
    return outlook_jax.fold_batch_norm(model)


def _torch_pair(model: Any, images: torch.Tensor) -> Pair:
    def forward() -> object:
        model.eval()
        with torch.no_grad():
            return model(images)

    def training() -> None:
        model.train()
        cls, aux, _ = model.forward_train(images)
        (cls.square().mean() + aux.square().mean()).backward()
        model.zero_grad()

    return Pair(forward, training)


def _jax_pair(model: outlook_jax.VOLO, images: jax.Array) -> Pair:
    model.eval()
    evaluating, state = nnx.split(model)
    model.train()
    graph, parameters, *rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def forward(state: nnx.State[Any, Any], images: jax.Array) -> object:
        return nnx.merge(evaluating, state)(images)

    @jax.jit
    def training(parameters: nnx.State[Any, Any], rest: Any, images: jax.Array) -> object:
        def loss(parameters: nnx.State[Any, Any]) -> tuple[jax.Array, nnx.State[Any, Any]]:
            model = nnx.merge(graph, parameters, *rest, copy=True)
            cls, aux, _ = model.forward_train(images, mix_box=(2, 2, 8, 8))
            return (cls**2).mean() + (aux**2).mean(), nnx.state(model, nnx.Not(nnx.Param))

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    return Pair(
        lambda: jax.block_until_ready(forward(state, images)),
        lambda: jax.block_until_ready(training(parameters, rest, images)),
    )
