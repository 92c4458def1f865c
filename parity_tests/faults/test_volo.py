"""Planted bugs in a whole model, each in either twin: called a mismatch, where they are, and for what they are."""

from collections.abc import Callable, Mapping
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
from outlook_parity.compare.modules import MODEL
from outlook_parity.core.optimizers import BETAS, EPSILON, LEARNING_RATE, OPTIMIZERS, WEIGHT_DECAY
from parity_tests.faults import test_attention as test_faults
from parity_tests.support.small_volo import Models, check, quick_compilation, small_volo, wrong

__all__ = ["quick_compilation"]  # a fixture

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


def _pos_embed_later(honest: Any) -> Any:
    """Added behind the part that it belongs before."""

    def forward(self: Any, index: int, x: Any) -> Any:
        if index != 2:
            return honest(self, index, x)
        return self._run_blocks(self.network[2], x) + self._pos_embed(x.shape[1:3])

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
class Fault:
    """A bug to plant; where the report must say that it is, and words of the cause, "" if it cannot tell the kind."""

    name: str
    level: str
    plant: tuple[Plant, Plant]  # in the torch twin, in the JAX twin
    path: str | None
    cause: str
    dtype: str = "float64"  # the one that must show it
    rates: Mapping[str, float] = field(default_factory=dict)
    fast: bool = False


BATCH_NORM = (torch.nn.BatchNorm2d, outlook_jax.batch_norm.BatchNorm)


def _of_functions(name: str, make: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    return tuple(
        lambda models, patch, owner=owner: patch.setattr(owner, name, make(getattr(owner, name)))
        for owner in (TORCH, JAX)
    )


def _of_volo(name: str, torch_make: Callable[[Any], Any], jax_make: Callable[[Any], Any]) -> tuple[Plant, Plant]:
    return _method(outlook_torch.VOLO, name, torch_make), _method(outlook_jax.VOLO, name, jax_make)


FAULTS = [
    Fault(
        "epsilon of LayerNorm 1e-6",
        "layers",
        (_in_modules(torch.nn.LayerNorm, _set("eps", 1e-06), 0), _in_modules(nnx.LayerNorm, _set("epsilon", 1e-06), 1)),
        "network.0.0.norm1",
        "LayerNorm eps",
    ),
    Fault(
        "tanh GELU",
        "layers",
        (_method(TORCH.Mlp, "forward", _tanh_torch), _method(JAX.Mlp, "__call__", _tanh_jax)),
        "network.0.0.mlp",
        "GELU",
        fast=True,
    ),
    Fault(
        "auxiliary head dropped", "layers", _of_volo("forward_head", _instead(_no_aux), _instead(_no_aux)), MODEL, ""
    ),
    Fault(
        "mean of the auxiliary head",
        "layers",
        _of_volo("forward_head", _instead(_mean_of_aux_torch), _instead(_mean_of_aux_jax)),
        MODEL,
        "",
    ),
    Fault(
        "pos_embed behind the part",
        "layers",
        _of_volo("_forward_part", _pos_embed_later, _pos_embed_later),
        MODEL,
        "network.2.0",
    ),
    Fault(
        "queries and keys exchanged",
        "layers",
        _of_functions("attend", _queries_for_keys),
        "network.2.0.attn",
        "network.2.0.attn.proj",
    ),
    Fault(
        "biased running variance",
        "training",
        (_method(BATCH_NORM[0], "forward", _biased_torch), _method(BATCH_NORM[1], "_batch_statistics", _biased_jax)),
        "patch_embed.conv.1",
        "biased",
    ),
    Fault(
        "momentum of BatchNorm 0.9",
        "training",
        (_in_modules(BATCH_NORM[0], _set("momentum", 0.9), 0), _in_modules(BATCH_NORM[1], _set("momentum", 0.9), 1)),
        "patch_embed.conv.1",
        "momentum",
    ),
    Fault(
        "stale statistics",
        "training",
        (_method(BATCH_NORM[0], "forward", _stale_torch), _method(BATCH_NORM[1], "_batch_statistics", _stale_jax)),
        "patch_embed.conv.1",
        "stale",
    ),
    Fault(
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
    Fault(
        "no momentum",
        "training",
        (
            _optimizer("SGD", torch=lambda p: torch.optim.SGD(p, LEARNING_RATE)),
            _optimizer("SGD", jax=lambda: optax.sgd(LEARNING_RATE)),
        ),
        None,
        "only SGD",
    ),
    Fault(
        "queries and keys exchanged in the weights",
        "layers",
        _weights("network.2.0.attn.qkv", _exchange),
        "network.2.0.attn.qkv",
        "parts along axis 0",
    ),
    Fault(
        "another block's weights",
        "layers",
        (_other_block_torch, _other_block_jax),
        "network.2.0.mlp.fc1",
        "values of network.2.1.mlp.fc1",
    ),
    Fault(
        "scale and bias of LayerNorm exchanged",
        "layers",
        (_scale_for_bias_torch, _scale_for_bias_jax),
        "network.2.0.norm1",
        "values of network.2.0.norm1",
    ),
    Fault("kernel flipped", "layers", _weights("patch_embed.conv.3", _flip), "patch_embed.conv.3", "another order"),
    Fault(
        "channels in and out exchanged",
        "layers",
        _weights("patch_embed.conv.3", _transpose),
        "patch_embed.conv.3",
        "another order",
    ),
    Fault("bias forgotten", "layers", (_no_bias_torch, _no_bias_jax), "head", "zero in"),
    Fault(
        "padding on one side more",
        "layers",
        (_one_side_torch, _one_side_jax),
        "patch_embed.conv.0",
        "padding",
        fast=True,
    ),
    Fault(
        "residual dropped",
        "layers",
        (_method(TORCH.Transformer, "forward", _no_residual), _method(JAX.Transformer, "__call__", _no_residual)),
        "network.2.0",
        "network.2.0",
    ),
    Fault(
        "pos_embed transposed",
        "layers",
        _of_volo("_pos_embed", _transposed_map_torch, _transposed_map_jax),
        MODEL,
        "pos_drop",
    ),
    Fault("colours in the order BGR", "layers", _of_volo("_embed", _bgr_torch, _bgr_jax), MODEL, "patch_embed"),
    Fault(
        "statistics of the batch in eval",
        "layers",
        (_method(BATCH_NORM[0], "forward", _batch_torch), _method(BATCH_NORM[1], "__call__", _batch_jax)),
        "patch_embed.conv.1",
        "",
    ),
    Fault(
        "epsilon of BatchNorm 1e-3",
        "layers",
        (_in_modules(BATCH_NORM[0], _set("eps", 1e-3), 0), _in_modules(BATCH_NORM[1], _set("epsilon", 1e-3), 1)),
        "patch_embed.conv.1",
        "BatchNorm2d eps",
    ),
    Fault(
        "scale of attention dropped",
        "layers",
        _of_functions("attend", _unscaled),
        "network.2.0.attn",
        "network.2.0.attn.proj",
    ),
    Fault(
        "bfloat16 in attention",
        "layers",
        (_rounded_attention_torch, _rounded_attention_jax),
        "network.2.0.attn",
        "in float32 alone",
        dtype="float32",
    ),
    Fault(
        "mean of the tokens pooled",
        "layers",
        _of_volo("_pool", _instead(_mean_torch), _instead(_mean_jax)),
        MODEL,
        "head_drop",
    ),
    Fault(
        "another number of heads",
        "layers",
        (_in_modules(TORCH.Attention, _set("num_heads", 2), 0), _in_modules(JAX.Attention, _set("num_heads", 2), 1)),
        "network.2.0.attn",
        "network.2.0.attn.proj",
    ),
    Fault("another activation", "layers", (_leaky_torch, _leaky_jax), "patch_embed", "patch_embed.conv.3"),
    Fault(
        "samples of the batch shifted",
        "layers",
        (_method(TORCH.Downsample, "forward", _rolled_torch), _method(JAX.Downsample, "__call__", _rolled_jax)),
        "network.1",
        "",
    ),
    Fault(
        "no gradient through a layer",
        "gradients",
        (_method(TORCH.Mlp, "forward", _stopped_torch), _method(JAX.Mlp, "__call__", _stopped_jax)),
        "post_network.0.mlp.fc1",
        "gradients do not",
    ),
    Fault(
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

BUFFERS_ONLY = ("biased running variance", "momentum of BatchNorm 0.9", "stale statistics")
CASES = [
    pytest.param(
        fault,
        twin,
        id=f"{('torch', 'jax')[twin]}: {fault.name}",
        marks=[] if fault.fast else pytest.mark.slow(reason="62 planted faults in a whole model take minutes"),
    )
    for fault in FAULTS
    for twin in (0, 1)
]


@pytest.mark.parametrize(("fault", "twin"), CASES)
def test_a_planted_fault_is_called_a_mismatch_where_it_is_and_for_what_it_is(
    fault: Fault, twin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = small_volo(**fault.rates)
    fault.plant[twin](models, monkeypatch)
    report = check(models, fault.level, dtypes=(fault.dtype,))
    assert report.verdict == "mismatch"
    assert (report.first_divergence, report.cause) == (fault.path, test_faults.AnythingWith(fault.cause))
    if fault.name in BUFFERS_ONLY:
        assert all(name.endswith(("running_mean", "running_var")) for name in wrong(report))
    if fault.name in ("weight decay as L2", "no momentum"):
        assert {name.partition(":")[0] for name in wrong(report)} == {report.cause.split()[1]}


def test_of_forty_kinds_and_more_nine_tenths_are_told_where_and_three_quarters_for_what_they_are() -> None:
    """What the tables of both files promise, kind by kind, is what their tests hold the reports to."""
    of_layer = {fault.name.partition(": ")[2]: fault for fault in test_faults.FAULTS}
    kinds = [*of_layer.values(), *FAULTS]
    assert len(test_faults.FAULTS) == 2 * len(of_layer)
    assert len({fault.name for fault in kinds}) == len(kinds) >= 40
    assert sum(fault.path is not None for fault in kinds) >= 0.9 * len(kinds)
    assert sum(fault.cause not in ("", fault.path) for fault in kinds) >= 0.75 * len(kinds)
