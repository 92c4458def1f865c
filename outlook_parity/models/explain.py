"""Attention maps of a pretrained model by either framework, as NumPy arrays."""

from collections.abc import Callable

import numpy as np

from outlook_common.pretrained import Pretrained

Maps = dict[str, np.ndarray]


def _torch_maps(pretrained: Pretrained, image: np.ndarray) -> Maps:
    import torch

    from outlook_torch import attention_maps
    from outlook_torch.pretrained import build

    with torch.no_grad():
        maps = attention_maps(build(pretrained), torch.from_numpy(image.transpose(2, 0, 1).copy())[None])
    return {path: weights[0].numpy() for path, weights in maps.items()}


def _jax_maps(pretrained: Pretrained, image: np.ndarray) -> Maps:
    import jax

    from outlook_jax import attention_maps
    from outlook_jax.pretrained import build

    maps = jax.jit(attention_maps)(build(pretrained, precision="highest"), image[None])
    return {path: np.asarray(weights[0]) for path, weights in maps.items()}


# By framework: from a pretrained model and its input (H, W, C) to the weights of each layer, without the batch axis.
ATTENTION_MAPS: dict[str, Callable[[Pretrained, np.ndarray], Maps]] = {"torch": _torch_maps, "jax": _jax_maps}
