"""Load VOLO with weights from the Hugging Face Hub, a folder or a file."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, PrecisionLike

from outlook_common.arrays import to_numpy
from outlook_common.dispatch import ImplementationRequest, check_implementation
from outlook_common.geometry import IntOrPair
from outlook_common.pretrained import Pretrained, prepare
from outlook_common.text import listed
from outlook_common.volo import pretrained_cfg
from outlook_common.weights.formats.registry import PathLike
from outlook_common.weights.tables.volo import volo_table
from outlook_jax.batch_norm import AxisNames
from outlook_jax.model import VOLO
from outlook_jax.ops import IMPLEMENTATIONS
from outlook_jax.weights import WEIGHTS, load_weights, path_name

# Of every variable of a model, or what makes them of the abstract model.
Shardings = nnx.State[Any, Any] | Callable[[nnx.Module], nnx.State[Any, Any]]


def from_pretrained(
    source: PathLike,
    *,
    variant: str | None = None,
    num_classes: int | None = None,
    img_size: IntOrPair | None = None,
    prefix: str = "",
    use_ema: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    implementation: ImplementationRequest = None,
    scan_layers: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    axis_name: AxisNames = None,
    ghost_batches: int = 1,
    rngs: nnx.Rngs | None = None,
    shardings: Shardings | None = None,
    **overrides: Any,
) -> VOLO:
    """Make a VOLO with trained weights, in evaluation mode.

    As the original does it, heads for another number of classes are left out, and `pos_embed` is resized to another
    image size; as timm does it, the first convolution is made one for another number of channels (`in_chans`).
    Everything else must fit.

    Args:
        source: a Hub id ("timm/volo_d1_224.sail_in1k", also with "@revision"), a folder with such files, or a file; or
            the name of a released variant, for its released weights.
        variant: the released variant; None means what the source's config.json or metadata say, of own sizes too, else
            what its tensors show.
        num_classes: None means that of the weights, 0 a model without heads.
        img_size: in pixels; None means the variant's if one is given, else that of the weights.
        prefix: of the model's names in the file.
        use_ema: whether to take the averaged weights of a checkpoint.
        revision: a branch, tag or commit of the Hub.
        token: for private repositories; None means that of the environment or the last login.
        cache_dir: for downloads from the Hub; None means the default of `huggingface_hub`.
        local_files_only: whether to look in the cache alone.
        implementation: that of outlook attention; see `outlook_attention`.
        scan_layers: see `VOLO`.
        dtype: dtype of the computation; None infers it from images and parameters.
        param_dtype: dtype of the parameters.
        precision: precision of every product, as in `jax.lax.dot_general`.
        axis_name: see `VOLO`.
        ghost_batches: likewise.
        rngs: the streams `params`, for new heads, and `dropout`; None means `nnx.Rngs(0)`.
        shardings: of all variables, in the structure of `nnx.state` of the model; or a function that returns them for
            the abstract model, as `lambda model: named_shardings(model, mesh, "fsdp")`. No weight is then ever whole
            on a device that has only part of it. None puts everything on the default device.
        **overrides: change further fields of the `VOLOConfig`. `in_chans`, if it is not among them, is the variant's if
            one is given, else that of the weights.

    Warns:
        UserWarning: heads are left out or start with fresh weights; it names them.

    Raises:
        HubError: the Hub does not give the files; an `OSError`.
        WeightsError: the weights do not fit, with everything that is wrong; where they are another variant's, with its
            name. Or config.json contradicts them.
        TypeError: an override is not a field.
        ValueError: the variant or `implementation` is unknown, or the fields do not fit each other; or `shardings` lack
            variables.
    """
    check_implementation(implementation, IMPLEMENTATIONS)  # before anything is read
    pretrained = prepare(
        source,
        variant=variant,
        num_classes=num_classes,
        img_size=img_size,
        prefix=prefix,
        use_ema=use_ema,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        overrides=overrides,
    )
    return build(
        pretrained,
        implementation=implementation,
        scan_layers=scan_layers,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        axis_name=axis_name,
        ghost_batches=ghost_batches,
        rngs=rngs,
        shardings=shardings,
    )


def build(
    pretrained: Pretrained,
    *,
    implementation: ImplementationRequest = None,
    scan_layers: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    axis_name: AxisNames = None,
    ghost_batches: int = 1,
    rngs: nnx.Rngs | None = None,
    shardings: Shardings | None = None,
) -> VOLO:
    """Make the model of prepared weights, in evaluation mode."""
    make_model = partial(
        VOLO,
        pretrained.config,
        implementation=implementation,
        scan_layers=scan_layers,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        axis_name=axis_name,
        ghost_batches=ghost_batches,
        deterministic=True,
    )
    entries = [entry for entry in volo_table(pretrained.config).entries if entry.torch in pretrained.fresh]
    fresh = {entry.flax: entry for entry in entries}

    # Compiled, so that only what is returned is drawn: drawing all weights takes longer than loading them.
    @nnx.jit
    def draw(rngs: nnx.Rngs) -> nnx.State[Any, Any]:
        variables = nnx.to_flat_state(nnx.state(make_model(rngs=rngs)))
        return nnx.from_flat_state(
            (path, variable)
            for path, variable in variables
            if not isinstance(variable, WEIGHTS) or path_name(path) in fresh
        )

    drawn = draw(nnx.Rngs(0) if rngs is None else rngs)
    model: VOLO = nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0)))
    if shardings is not None:
        drawn = _sharded(model, shardings(model) if callable(shardings) else shardings, drawn)
    nnx.update(model, drawn)
    model.pretrained_cfg = pretrained_cfg(pretrained.variant, pretrained.config, pretrained.described)
    heads = {
        fresh[name].torch: fresh[name].to_torch(to_numpy(variable.get_value()))
        for path, variable in nnx.to_flat_state(drawn)
        if (name := path_name(path)) in fresh
    }
    load_weights(model, pretrained.arrays | heads)
    return model


def _sharded(model: VOLO, shardings: nnx.State[Any, Any], drawn: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """Tell the abstract weights of `model` where they are to lie, and return what is drawn already placed so."""
    by_path = {path: variable.get_value() for path, variable in nnx.to_flat_state(shardings)}
    flat = nnx.to_flat_state(nnx.state(model))
    if missing := [path_name(path) for path, _ in flat if path not in by_path]:
        raise ValueError(f"shardings has none for {len(missing)} of {len(flat)} variables: {listed(missing)}")
    make: Any = jax.ShapeDtypeStruct
    abstract = [
        (path, variable.replace(make(old.shape, old.dtype, sharding=by_path[path])))
        for path, variable in flat
        for old in [variable.get_value()]
    ]
    nnx.update(model, nnx.from_flat_state(abstract))
    placed = [
        (path, variable.replace(jax.device_put(variable.get_value(), by_path[path])))
        for path, variable in nnx.to_flat_state(drawn)
    ]
    return nnx.from_flat_state(placed)
