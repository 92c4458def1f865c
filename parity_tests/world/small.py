"""Honest pairs of Equinox, Haiku, Keras and equimo, and PyTorch's twins."""

import os
from typing import Any

import numpy as np
import torch
from torch import nn

from parity_tests.world.pairs import Made, Pair, images

os.environ.setdefault("KERAS_BACKEND", "jax")

FEATURES, HIDDEN, CLASSES = 6, 8, 3


class MLP(nn.Module):
    """The PyTorch twin of all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(FEATURES, HIDDEN), nn.LayerNorm(HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(torch.tanh(self.first(x))))


def _rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, FEATURES))


def _made(ours: Any, inputs: np.ndarray) -> Made:
    from outlook_parity import load_torch_weights

    theirs = MLP()
    return Made(theirs, load_torch_weights(ours, theirs), inputs)


def equinox_mlp(eps: float = 1e-5) -> Made:
    """Equinox, of one sample as its layers take them."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    class Twin(eqx.Module):  # type: ignore[misc]
        first: Any
        norm: Any
        last: Any

        def __call__(self, x: Any) -> Any:
            return self.last(self.norm(jnp.tanh(self.first(x))))

    keys = jax.random.split(jax.random.key(0), 2)
    layers = (eqx.nn.Linear(FEATURES, HIDDEN, key=keys[0]), eqx.nn.LayerNorm(HIDDEN, eps))
    return _made(Twin(*layers, eqx.nn.Linear(HIDDEN, CLASSES, key=keys[1])), _rows()[0])


def haiku_mlp(eps: float = 1e-5) -> Made:
    """Haiku."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    def forward(x: Any) -> Any:
        y = hk.LayerNorm(-1, True, True, eps, name="norm")(jnp.tanh(hk.Linear(HIDDEN, name="first")(x)))
        return hk.Linear(CLASSES, name="last")(y)

    transformed = hk.transform(forward)
    return _made((transformed, transformed.init(jax.random.key(0), _rows().astype(np.float32))), _rows())


def keras_mlp(epsilon: float = 1e-5) -> Made:
    """Keras 3 on JAX."""
    import keras

    layers = [
        keras.layers.Input((FEATURES,)),
        keras.layers.Dense(HIDDEN, activation="tanh", name="first"),
        keras.layers.LayerNormalization(epsilon=epsilon, name="norm"),
        keras.layers.Dense(CLASSES, name="last"),
    ]
    return _made(keras.Sequential(layers), _rows())


def equimo_vit(act_layer: str = "exactgelu", eps: float = 1e-6) -> Made:
    """equimo's ViT, of a batch by `jax.vmap`, and timm's; its default `act_layer` is the tanh GELU."""
    import jax
    import timm
    from equimo.models import VisionTransformer

    from outlook_parity import load_torch_weights

    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 8, "num_heads": 4, "num_classes": CLASSES}
    theirs = timm.models.VisionTransformer(embed_dim=32, depth=2, global_pool="token", **sizes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += (0.1 if parameter.ndim < 2 else 0.2) * torch.randn_like(parameter)
    options = {"act_layer": act_layer, "eps": eps, "reg_tokens": 0, "global_pool": "token"}
    module = VisionTransformer(in_channels=3, dim=32, depths=[2], key=jax.random.key(0), **sizes, **options)

    def batched(model: Any, x: Any) -> Any:
        return jax.vmap(model)(x)

    return Made(theirs, load_torch_weights((batched, module), theirs, inputs=images(24)), images(24))


SMALL_PAIRS = tuple(Pair(make.__name__, make) for make in (equinox_mlp, haiku_mlp, keras_mlp, equimo_vit))
