"""Faults of a whole VOLO: 31 kinds, each planted in either twin."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import outlook_jax
import outlook_jax.batch_norm
import outlook_jax.blocks
import outlook_torch
import outlook_torch.blocks
from outlook_parity import Report
from outlook_parity.compare.modules import MODEL
from outlook_parity.core.optimizers import BETAS, EPSILON, LEARNING_RATE, OPTIMIZERS, WEIGHT_DECAY
from parity_tests.faults.fault import TWINS, Fault
from parity_tests.support.small_volo import Models, check, small_volo

Plant = Callable[[Models, pytest.MonkeyPatch], None]

TORCH, JAX = outlook_torch.blocks, outlook_jax.blocks


def _in_modules(kind: type, change: Callable[[Any], None], twin: int) -> Plant:
    def plant(models: Models, patch: pytest.MonkeyPatch) -> None:
        modules = models[0].modules() if twin == 0 else [module for _, module in nnx.iter_modules(models[1])]
        found = [module for module in modules if isinstance(module, kind)]
        assert found
        for module in found:
            change(module)

    return plant


def _method(owner: type, name: str, make: Callable[[Any], Any]) -> Plant:
    return lambda models, patch: patch.setattr(owner, name, make(getattr(owner, name)))


def _optimizer(name: str, **twin: Any) -> Plant:
    return lambda models, patch: patch.setitem(OPTIMIZERS, name, replace(OPTIMIZERS[name], **twin))


def _pos_embed_later_torch(honest: Any) -> Any:
    """Add it after the part that it belongs before."""

    def forward(self: Any, index: int, x: Any) -> Any:
        if index != 2:
            return honest(self, index, x)
        return self._run_blocks(self.network[2], x) + self._pos_embed(x.shape[1:3])

    return forward


def _pos_embed_later_jax(honest: Any) -> Any:
    def forward(self: Any, indices: Sequence[int], x: Any) -> Any:
        if indices[0] != 2:
            return honest(self, indices, x)
        x = self._run_blocks(self.network[2], x) + self._pos_embed(x.shape[1:3])
        return honest(self, indices[1:], x) if indices[1:] else x

    return forward


def _queries_for_keys(honest: Any) -> Any:
    # The class token's one query has another shape than its keys, and is left alone.
    return lambda q, k, v, *rest: honest(k, q, v, *rest) if q.shape == k.shape else honest(q, k, v, *rest)


def _no_aux(self: Any, x: Any, pre_logits: bool = False) -> Any:
    return self.head(self._pool(x))


def _mean_of_aux_torch(self: Any, x: Any, pre_logits: bool = False) -> Any:
    return self.head(self._pool(x)) + 0.5 * self.aux_head(x[:, 1:]).mean(dim=1)


def _mean_of_aux_jax(self: Any, x: Any, pre_logits: bool = False) -> Any:
    return self.head(self._pool(x)) + 0.5 * self.aux_head(x[:, 1:]).mean(axis=1)


def _biased_torch(honest: Any) -> Any:
    """The running variance moves towards the batch's biased variance, as Flax's own layer's does."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        before, out = self.running_var.clone(), honest(self, x)
        values = x.numel() // x.shape[1]
        if self.training:
            batch = (self.running_var - (1 - self.momentum) * before) * (values - 1) / values
            self.running_var = (1 - self.momentum) * before + batch  # not in place: the backward pass needs the old one
        return out

    return forward


def _biased_jax(honest: Any) -> Any:
    def statistics(self: Any, x: jax.Array) -> Any:
        before, out = self.var[...], honest(self, x)
        values = x.size // x.shape[-1]
        batch = (self.var[...] - (1 - self.momentum) * before) * (values - 1) / values
        self.var[...] = (1 - self.momentum) * before + batch
        return out

    return statistics


def _stale_torch(honest: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return honest(self, x)
        self.num_batches_tracked += 1
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    return forward


def _stale_jax(honest: Any) -> Any:
    def statistics(self: Any, x: jax.Array) -> Any:
        mean, var = self.mean[...], self.var[...]
        out = honest(self, x)
        self.mean[...], self.var[...] = mean, var
        return out

    return statistics


def _tanh_torch(honest: Any) -> Any:
    return lambda self, x: self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _tanh_jax(honest: Any) -> Any:
    return lambda self, x: self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, value)


def _instead(function: Any) -> Callable[[Any], Any]:
    return lambda honest: function


def _weights(path: str, change: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    """Change the kernel of a module, given and taken in PyTorch's layout."""

    def in_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
        weight = models[0].get_submodule(path).weight
        weight.data.copy_(torch.from_numpy(np.array(change(weight.detach().numpy()))))

    def in_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
        kernel = _module(models[1], path).kernel
        axes = (1, 0) if kernel[...].ndim == 2 else (3, 2, 0, 1)
        back = (1, 0) if kernel[...].ndim == 2 else (2, 3, 1, 0)
        kernel[...] = jnp.asarray(change(np.asarray(kernel[...]).transpose(axes)).transpose(back))

    return in_torch, in_jax


def _module(model: Any, path: str) -> Any:
    for step in path.split("."):
        model = model[int(step)] if step.isdigit() else getattr(model, step)
    return model


def _exchange(weight: np.ndarray) -> np.ndarray:
    q, k, v = np.split(weight, 3)
    return np.concatenate([k, q, v])


def _flip(weight: np.ndarray) -> np.ndarray:
    return weight[:, :, ::-1, ::-1]


def _transpose(weight: np.ndarray) -> np.ndarray:
    return weight.swapaxes(0, 1)


def _other_block_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
    one, other = (models[0].network[2][index].mlp.fc1 for index in (0, 1))
    one.weight.data.copy_(other.weight)


def _other_block_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
    one, other = (models[1].network[2][index].mlp.fc1 for index in (0, 1))
    one.kernel[...] = other.kernel[...]


def _scale_for_bias_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
    norm = models[0].network[2][0].norm1
    norm.weight.data, norm.bias.data = norm.bias.data.clone(), norm.weight.data.clone()


def _scale_for_bias_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
    norm = models[1].network[2][0].norm1
    norm.scale[...], norm.bias[...] = norm.bias[...], norm.scale[...]


def _no_bias_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
    models[0].head.bias.data.zero_()


def _no_bias_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
    models[1].head.bias[...] = jnp.zeros_like(models[1].head.bias[...])


def _one_side_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
    conv = models[0].patch_embed.conv[0]
    conv.padding = (0, 0)
    honest = conv._conv_forward
    conv._conv_forward = lambda x, *rest: honest(F.pad(x, (2, 4, 2, 4)), *rest)


def _one_side_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
    models[1].patch_embed.conv[0].padding = ((2, 4), (2, 4))


def _no_residual(honest: Any) -> Any:
    def forward(self: Any, x: Any) -> Any:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    return forward


def _transposed_map_torch(honest: Any) -> Any:
    return lambda self, size: honest(self, size).transpose(1, 2)


def _transposed_map_jax(honest: Any) -> Any:
    return lambda self, size: honest(self, size).swapaxes(1, 2)


def _bgr_torch(honest: Any) -> Any:
    return lambda self, images: honest(self, images.flip(1))


def _bgr_jax(honest: Any) -> Any:
    return lambda self, images: honest(self, images[..., ::-1])


def _batch_torch(honest: Any) -> Any:
    return lambda self, x: F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def _batch_jax(honest: Any) -> Any:
    def call(self: Any, x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1))
        normal = (x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + self.epsilon)
        return normal * self.scale[...] + self.bias[...]

    return call


def _unscaled(honest: Any) -> Any:
    return lambda q, *rest: honest(q * q.shape[-1] ** 0.5, *rest)


def _rounded_attention_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
    honest = TORCH.attend

    def attend(*args: Any) -> torch.Tensor:
        out = honest(*args)
        return out if out.dtype == torch.float64 else out.bfloat16().to(out.dtype)

    patch.setattr(TORCH, "attend", attend)


def _rounded_attention_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
    honest = JAX.attend

    def attend(*args: Any) -> jax.Array:
        out = honest(*args)
        return out if out.dtype == jnp.float64 else jax.lax.reduce_precision(out, 8, 7)

    patch.setattr(JAX, "attend", attend)


def _mean_torch(self: Any, x: Any) -> Any:
    return x.mean(dim=1)


def _mean_jax(self: Any, x: Any) -> Any:
    return x.mean(axis=1)


def _leaky_torch(models: Models, patch: pytest.MonkeyPatch) -> None:
    models[0].patch_embed.conv[2] = torch.nn.LeakyReLU()


def _leaky_jax(models: Models, patch: pytest.MonkeyPatch) -> None:
    models[1].patch_embed.conv[2] = jax.nn.leaky_relu


def _rolled_torch(honest: Any) -> Any:
    return lambda self, x: honest(self, x).roll(1, dims=0)


def _rolled_jax(honest: Any) -> Any:
    return lambda self, x: jnp.roll(honest(self, x), 1, axis=0)


def _stopped_torch(honest: Any) -> Any:
    return lambda self, x: self.fc2(F.gelu(self.fc1(x).detach()))


def _stopped_jax(honest: Any) -> Any:
    return lambda self, x: self.fc2(jax.nn.gelu(jax.lax.stop_gradient(self.fc1(x)), approximate=False))


@dataclass(frozen=True)
class VOLOFault(Fault):
    """A bug in one twin of a small VOLO."""

    plant: Plant
    level: str
    dtype: str = "float64"  # the one that must show it
    rates: Mapping[str, float] = field(default_factory=dict)
    fast: bool = False

    def run(self, patch: pytest.MonkeyPatch) -> Report:
        models = small_volo(**self.rates)
        self.plant(models, patch)
        return check(models, self.level, dtypes=(self.dtype,))


def _either(
    name: str, level: str, plants: tuple[Plant, Plant], path: str | None, cause: str, **options: Any
) -> list[VOLOFault]:
    """Return the fault in the PyTorch twin, and in the JAX twin."""
    return [
        VOLOFault(name, twin, path, cause, plant, level, **options) for twin, plant in zip(TWINS, plants, strict=True)
    ]


BATCH_NORM = (torch.nn.BatchNorm2d, outlook_jax.batch_norm.BatchNorm)


def _of_functions(name: str, make: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    return tuple(
        lambda models, patch, owner=owner: patch.setattr(owner, name, make(getattr(owner, name)))
        for owner in (TORCH, JAX)
    )


def _of_volo(name: str, torch_make: Callable[[Any], Any], jax_make: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    return _method(outlook_torch.VOLO, name, torch_make), _method(outlook_jax.VOLO, name, jax_make)


FAULTS = [
    *_either(
        "epsilon of LayerNorm 1e-6",
        "layers",
        (_in_modules(torch.nn.LayerNorm, _set("eps", 1e-06), 0), _in_modules(nnx.LayerNorm, _set("epsilon", 1e-06), 1)),
        "network.0.0.norm1",
        "LayerNorm eps",
    ),
    *_either(
        "tanh GELU",
        "layers",
        (_method(TORCH.Mlp, "forward", _tanh_torch), _method(JAX.Mlp, "__call__", _tanh_jax)),
        "network.0.0.mlp",
        "GELU",
        fast=True,
    ),
    *_either(
        "auxiliary head dropped", "layers", _of_volo("forward_head", _instead(_no_aux), _instead(_no_aux)), MODEL, ""
    ),
    *_either(
        "mean of the auxiliary head",
        "layers",
        _of_volo("forward_head", _instead(_mean_of_aux_torch), _instead(_mean_of_aux_jax)),
        MODEL,
        "",
    ),
    *_either(
        "pos_embed behind the part",
        "layers",
        (
            _method(outlook_torch.VOLO, "_forward_part", _pos_embed_later_torch),
            _method(outlook_jax.VOLO, "_forward_parts", _pos_embed_later_jax),
        ),
        MODEL,
        "network.2.0",
    ),
    *_either(
        "queries and keys exchanged",
        "layers",
        _of_functions("attend", _queries_for_keys),
        "network.2.0.attn",
        "network.2.0.attn.proj",
    ),
    *_either(
        "biased running variance",
        "training",
        (_method(BATCH_NORM[0], "forward", _biased_torch), _method(BATCH_NORM[1], "_batch_statistics", _biased_jax)),
        "patch_embed.conv.1",
        "biased",
    ),
    *_either(
        "momentum of BatchNorm 0.9",
        "training",
        (_in_modules(BATCH_NORM[0], _set("momentum", 0.9), 0), _in_modules(BATCH_NORM[1], _set("momentum", 0.9), 1)),
        "patch_embed.conv.1",
        "momentum",
    ),
    *_either(
        "stale statistics",
        "training",
        (_method(BATCH_NORM[0], "forward", _stale_torch), _method(BATCH_NORM[1], "_batch_statistics", _stale_jax)),
        "patch_embed.conv.1",
        "stale",
    ),
    *_either(
        "weight decay as L2",
        "training",
        (
            _optimizer("AdamW", torch=lambda p: torch.optim.Adam(p, LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY)),
            _optimizer(
                "AdamW",
                jax=lambda: optax.chain(
                    optax.add_decayed_weights(WEIGHT_DECAY), optax.adam(LEARNING_RATE, *BETAS, eps=EPSILON)
                ),
            ),
        ),
        None,
        "only AdamW",
    ),
    *_either(
        "no momentum",
        "training",
        (
            _optimizer("SGD", torch=lambda p: torch.optim.SGD(p, LEARNING_RATE)),
            _optimizer("SGD", jax=lambda: optax.sgd(LEARNING_RATE)),
        ),
        None,
        "only SGD",
    ),
    *_either(
        "queries and keys exchanged in the weights",
        "layers",
        _weights("network.2.0.attn.qkv", _exchange),
        "network.2.0.attn.qkv",
        "parts along axis 0",
    ),
    *_either(
        "another block's weights",
        "layers",
        (_other_block_torch, _other_block_jax),
        "network.2.0.mlp.fc1",
        "values of network.2.1.mlp.fc1",
    ),
    *_either(
        "scale and bias of LayerNorm exchanged",
        "layers",
        (_scale_for_bias_torch, _scale_for_bias_jax),
        "network.2.0.norm1",
        "values of network.2.0.norm1",
    ),
    *_either("kernel flipped", "layers", _weights("patch_embed.conv.3", _flip), "patch_embed.conv.3", "another order"),
    *_either(
        "channels in and out exchanged",
        "layers",
        _weights("patch_embed.conv.3", _transpose),
        "patch_embed.conv.3",
        "another order",
    ),
    *_either("bias forgotten", "layers", (_no_bias_torch, _no_bias_jax), "head", "zero in"),
    *_either(
        "padding on one side more",
        "layers",
        (_one_side_torch, _one_side_jax),
        "patch_embed.conv.0",
        "padding",
        fast=True,
    ),
    *_either(
        "residual dropped",
        "layers",
        (_method(TORCH.Transformer, "forward", _no_residual), _method(JAX.Transformer, "__call__", _no_residual)),
        "network.2.0",
        "network.2.0",
    ),
    *_either(
        "pos_embed transposed",
        "layers",
        _of_volo("_pos_embed", _transposed_map_torch, _transposed_map_jax),
        MODEL,
        "pos_drop",
    ),
    *_either("colours in the order BGR", "layers", _of_volo("_embed", _bgr_torch, _bgr_jax), MODEL, "patch_embed"),
    *_either(
        "statistics of the batch in eval",
        "layers",
        (_method(BATCH_NORM[0], "forward", _batch_torch), _method(BATCH_NORM[1], "__call__", _batch_jax)),
        "patch_embed.conv.1",
        "",
    ),
    *_either(
        "epsilon of BatchNorm 1e-3",
        "layers",
        (_in_modules(BATCH_NORM[0], _set("eps", 1e-3), 0), _in_modules(BATCH_NORM[1], _set("epsilon", 1e-3), 1)),
        "patch_embed.conv.1",
        "BatchNorm2d eps",
    ),
    *_either(
        "scale of attention dropped",
        "layers",
        _of_functions("attend", _unscaled),
        "network.2.0.attn",
        "attention scale",
    ),
    *_either(
        "bfloat16 in attention",
        "layers",
        (_rounded_attention_torch, _rounded_attention_jax),
        "network.2.0.attn",
        "in float32 alone",
        dtype="float32",
    ),
    *_either(
        "mean of the tokens pooled",
        "layers",
        _of_volo("_pool", _instead(_mean_torch), _instead(_mean_jax)),
        MODEL,
        "head_drop",
    ),
    *_either(
        "another number of heads",
        "layers",
        (_in_modules(TORCH.Attention, _set("num_heads", 2), 0), _in_modules(JAX.Attention, _set("num_heads", 2), 1)),
        "network.2.0.attn",
        "attention scale",
    ),
    *_either("another activation", "layers", (_leaky_torch, _leaky_jax), "patch_embed", "patch_embed.conv.3"),
    *_either(
        "samples of the batch shifted",
        "layers",
        (_method(TORCH.Downsample, "forward", _rolled_torch), _method(JAX.Downsample, "__call__", _rolled_jax)),
        "network.1",
        "",
    ),
    *_either(
        "no gradient through a layer",
        "gradients",
        (_method(TORCH.Mlp, "forward", _stopped_torch), _method(JAX.Mlp, "__call__", _stopped_jax)),
        "post_network.0.mlp.fc1",
        "gradients do not",
    ),
    *_either(
        "a dropout mask missing",
        "training",
        (
            lambda models, patch: _set("p", 0.0)(models[0].head_drop),
            lambda models, patch: _set("rate", 0.0)(models[1].head_drop),
        ),
        "head_drop",
        "dropout mask",
        rates={"drop_rate": 0.5},
    ),
]
