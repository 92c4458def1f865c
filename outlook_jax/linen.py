"""Flax Linen modules of the layer and the model: `init` with one key, `apply` with `train=`.

The NNX modules compute. Their variables lie in Linen's collections `params` and `batch_stats` under the same names, all
strings: "network" / "0" / "0" / "attn" / "v" / "kernel".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.core import meta
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float

from outlook_common.config import VOLOConfig
from outlook_common.dispatch import ImplementationRequest
from outlook_common.geometry import IntOrPair
from outlook_common.text import listed
from outlook_common.volo import Layout, MixBox
from outlook_common.weights.checkpoint import Source
from outlook_jax import attention, model
from outlook_jax.attention import KERNEL_INIT
from outlook_jax.batch_norm import AxisNames
from outlook_jax.blocks import DropPath
from outlook_jax.weights import concrete_value, load_weights, path_name

__all__ = ["VOLO", "OutlookAttention", "load_variables", "variables_of"]

Variables = dict[str, dict[str, Any]]
# Paths and abstract variables, as `nnx.to_flat_state` gives them.
Flat = Sequence[tuple[Any, nnx.Variable[Any]]]

COLLECTIONS: dict[str, type[nnx.Variable[Any]]] = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class _Abstract(NamedTuple):
    """An NNX module without values, and whether it drops anything in training."""

    graphdef: nnx.GraphDef[Any]
    flat: Flat
    drops: bool


class _OfNNX(linen.Module):
    """A Linen module whose variables are those of an NNX module, which is put together anew at each call."""

    nnx_class: ClassVar[Callable[..., nnx.Module]]

    def to_nnx(self, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None) -> nnx.Module:
        """Return the NNX module with these variables, in training mode unless this one is deterministic.

        Args:
            variables: of this module.
            rngs: the stream `dropout`; None means `nnx.Rngs(0)`.

        Raises:
            ValueError: variables are missing or have other shapes; it names them.
        """
        abstract = _abstract(self.nnx_class, _options(self), bool(self._mode))
        return self._merged(abstract, variables, nnx.Rngs(0) if rngs is None else rngs)

    def _merged(self, abstract: _Abstract, variables: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
        state = _filled(abstract.flat, variables, getattr(self, "config", None), rngs)
        module: nnx.Module = nnx.merge(abstract.graphdef, state)
        return module

    def _run(
        self, call: Callable[[Any], Any], train: bool | None, deterministic: bool | None, mixes: bool = False
    ) -> Any:
        """Return `call` of the NNX module with this module's variables; initialization runs as evaluation does.

        Args:
            call: takes the NNX module.
            train: see `VOLO`.
            deterministic: likewise.
            mixes: whether the call draws a random number in training even where nothing is dropped.
        """
        evaluates = self.is_initializing() or self._evaluates(train, deterministic)
        if self.is_initializing() and "params" not in self.variables:
            rngs = nnx.Rngs(params=self.make_rng("params"), dropout=0)
            made = self.nnx_class(**dict(_options(self)), deterministic=True, rngs=rngs)
            self._put(made, *COLLECTIONS)
            return call(made)
        abstract = _abstract(self.nnx_class, _options(self), evaluates)
        key = self.make_rng("dropout") if not evaluates and (mixes or abstract.drops) else jax.random.key(0)
        module = self._merged(abstract, self.variables, nnx.Rngs(dropout=key))
        out = call(module)
        if not evaluates:
            self._put(module, "batch_stats")
        return out

    @property
    def _mode(self) -> bool | None:
        mode: bool | None = vars(self)["deterministic"]  # a field of each subclass, the last one
        return mode

    def _evaluates(self, train: bool | None, deterministic: bool | None) -> bool:
        if train is not None and train == deterministic:
            raise ValueError(f"train={train} contradicts deterministic={deterministic}: give one of the two")
        if train is not None:
            return not train
        return next(mode for mode in (deterministic, self._mode, True) if mode is not None)

    def _put(self, module: nnx.Module, *collections: str) -> None:
        for collection, variables in variables_of(module).items():
            for name, value in variables.items() if collection in collections else ():
                self.put_variable(collection, name, value)


class OutlookAttention(_OfNNX):
    """`outlook_jax.OutlookAttention` as a Linen module; arguments as there, `name` as Linen's.

    `deterministic` is the mode of calls that say neither `train` nor `deterministic`; None means evaluation. Training
    needs the random stream `dropout` unless the rates are zero.
    """

    nnx_class = attention.OutlookAttention

    dim: int
    num_heads: int = 1
    kernel_size: IntOrPair = 3
    padding: IntOrPair = 1
    stride: IntOrPair = 1
    qkv_bias: bool = False
    attn_drop: float = 0.1
    proj_drop: float | None = None
    qk_scale: float | None = None
    implementation: ImplementationRequest = None
    kernel_init: Initializer = KERNEL_INIT
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    rows_axis: str | None = None
    deterministic: bool | None = None

    def __call__(
        self,
        x: Float[Array, "*B H W C"],
        *,
        dropout_mask: Float[Array, "*B h w N KK KK"] | None = None,
        proj_dropout_mask: Float[Array, "*B H W C"] | None = None,
        train: bool | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "*B H W C"]:
        """Mix each pixel with its neighbourhood; arguments and errors as in NNX.

        Args:
            x: (*B, H, W, C).
            dropout_mask: see `outlook_jax.OutlookAttention`.
            proj_dropout_mask: likewise.
            train: whether to drop out; the opposite of `deterministic`, of which one suffices.
            deterministic: overrides the module's setting for this call.
        """
        masks = {"dropout_mask": dropout_mask, "proj_dropout_mask": proj_dropout_mask}
        return self._run(lambda layer: layer(x, **masks), train, deterministic)


class VOLO(_OfNNX):
    """`outlook_jax.VOLO` as a Linen module; arguments as there, `name` as Linen's.

    `deterministic` is the mode of calls that say neither `train` nor `deterministic`; None means evaluation. Training
    needs `mutable=["batch_stats"]`, and the random stream `dropout` where rates are not zero or a mixing box is drawn.
    """

    nnx_class = model.VOLO

    config: VOLOConfig
    implementation: ImplementationRequest = None
    scan_layers: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    axis_name: AxisNames = None
    ghost_batches: int = 1
    deterministic: bool | None = None

    def __call__(
        self,
        images: Float[Array, "B rows columns in_chans"],
        *,
        token_labels: bool = False,
        mix_box: MixBox | None = None,
        train: bool | None = None,
        deterministic: bool | None = None,
    ) -> Float[Array, "B *tokens classes"] | tuple[Array, Array, MixBox]:
        """Return the logits, or what token labelling needs; see `outlook_jax.VOLO`.

        Args:
            images: (B, H, W, C).
            token_labels: return what `forward_train` of the NNX module does.
            mix_box: likewise, with `token_labels`.
            train: whether to drop out and to normalise by the batch; the opposite of `deterministic`, of which one
                suffices.
            deterministic: overrides the module's setting for this call.
        """
        arguments = {"token_labels": token_labels, "mix_box": mix_box}
        mixes = token_labels and mix_box is None and self.config.use_mix_token
        return self._run(lambda volo: volo(images, **arguments), train, deterministic, mixes)

    def forward_features(
        self, images: Float[Array, "B rows columns in_chans"], *, train: bool | None = None
    ) -> Float[Array, "B T C"]:
        """Return the normalised tokens: `apply(variables, images, method="forward_features")`."""
        return self._run(lambda volo: volo.forward_features(images), train, None)

    def forward_intermediates(
        self,
        images: Float[Array, "B rows columns in_chans"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Layout = "NHWC",
        intermediates_only: bool = False,
        *,
        train: bool | None = None,
    ) -> list[Float[Array, "B _ _ _"]] | tuple[Array, list[Float[Array, "B _ _ _"]]]:
        """Return the feature maps after the stages; arguments as in NNX."""
        arguments = (indices, norm, stop_early, output_fmt, intermediates_only)
        return self._run(lambda volo: volo.forward_intermediates(images, *arguments), train, None)


def load_variables(
    module: OutlookAttention | VOLO, source: Source, *, prefix: str = "", use_ema: bool = False
) -> Variables:
    """Return the variables of a Linen module with the weights of a checkpoint.

    Args:
        module: whose `apply` takes the variables.
        source: see `outlook_jax.load_weights`, likewise what follows.
        prefix: of the module's names in the source.
        use_ema: whether to take the averaged weights.

    Raises:
        WeightsError: the source cannot be read or does not fit; all faults are reported together.
        OSError: the file cannot be opened.
    """
    graphdef, flat, _ = _abstract(module.nnx_class, _options(module), True)
    made = nnx.merge(graphdef, nnx.from_flat_state([(path, leaf.replace(leaf.get_value())) for path, leaf in flat]))
    load_weights(made, source, prefix=prefix, use_ema=use_ema, rngs=nnx.Rngs(0))
    return variables_of(made)


def variables_of(module: nnx.Module) -> Variables:
    """Return the weights of an NNX module of this package as the variables of its Linen twin."""
    variables: Variables = {}
    for collection, kind in COLLECTIONS.items():
        for path, variable in nnx.to_flat_state(nnx.state(module, kind)):
            branch = variables.setdefault(collection, {})
            for step in path[:-1]:
                branch = branch.setdefault(str(step), {})
            branch[str(path[-1])] = variable.get_value()
    return variables


def _options(module: linen.Module) -> tuple[tuple[str, Any], ...]:
    """Return what the NNX module is made with."""
    left_out = {"parent", "name", "deterministic"}
    return tuple((field.name, getattr(module, field.name)) for field in fields(module) if field.name not in left_out)


@lru_cache(maxsize=64)
def _abstract(
    nnx_class: Callable[..., nnx.Module], options: tuple[tuple[str, Any], ...], deterministic: bool
) -> _Abstract:
    made = nnx.eval_shape(lambda: nnx_class(**dict(options), deterministic=deterministic, rngs=nnx.Rngs(0)))
    parts = [part for _, part in nnx.iter_modules(made)]
    drops = any(isinstance(part, DropPath) or (isinstance(part, nnx.Dropout) and part.rate > 0) for part in parts)
    graphdef, state = nnx.split(made)
    return _Abstract(graphdef, tuple(nnx.to_flat_state(state)), drops)


def _filled(flat: Flat, variables: Mapping[str, Any], config: VOLOConfig | None, rngs: nnx.Rngs) -> nnx.State[Any, Any]:
    """Return a state with Linen's variables, and with new random streams.

    Raises:
        ValueError: variables are missing or have other shapes; it names all.
    """
    given: dict[str, dict[str, Any]] = {
        collection: {path_name(path): value for path, value in nnx.traversals.flatten_mapping(tree).items()}
        for collection, tree in meta.unbox(variables).items()
        if collection in COLLECTIONS
    }
    filled, faults = [], []
    for path, variable in flat:
        collection = next((name for name, kind in COLLECTIONS.items() if isinstance(variable, kind)), None)
        if collection is None:
            filled.append((path, variable.replace(concrete_value(config, path, variable, rngs))))
            continue
        name, shape = path_name(path), variable.get_value().shape
        found = given.get(collection, {}).get(name)
        if found is None:
            faults.append(f"{collection}: {name} is missing")
        elif jnp.shape(found) != shape:
            faults.append(f"{collection}: {name} has shape {jnp.shape(found)}, expected {shape}")
        else:
            filled.append((path, variable.replace(found)))
    if faults:
        raise ValueError(f"{len(faults)} of {len(flat)} variables do not fit the module: {listed(faults)}")
    return nnx.from_flat_state(filled)
