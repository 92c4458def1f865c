"""VOLO with weights from the Hugging Face Hub, a folder or a file."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, PrecisionLike

from outlook_common.arrays import to_numpy
from outlook_common.dispatch import ImplementationRequest, check_implementation
from outlook_common.geometry import IntOrPair
from outlook_common.pretrained import Pretrained, prepare
from outlook_common.weights.formats.registry import PathLike
from outlook_common.weights.tables.volo import volo_table
from outlook_jax.ops import IMPLEMENTATIONS
from outlook_jax.volo import VOLO
from outlook_jax.weights import WEIGHTS, load_weights, path_name


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
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> VOLO:
    """Make a VOLO with trained weights, in evaluation mode.

    As the original does it, heads for another number of classes are left out, and `pos_embed` is resized to another
    image size; as timm does it, the first convolution is made one for another number of channels (`in_chans`).
    Everything else must fit.

    Args:
        source: a Hub id ("timm/volo_d1_224.sail_in1k", also with "@revision"), a folder with such files, or a file; or
            the name of a released variant, for its released weights.
        variant: the released variant; None means what the source's config.json says, else what its tensors show.
        num_classes: None means that of the weights, 0 a model without heads.
        img_size: in pixels; None means the variant's if one is given, else that of the weights.
        prefix: where in the file the model lies.
        use_ema: take the averaged weights of a checkpoint.
        revision: a branch, tag or commit of the Hub.
        token: for private repositories; None means that of the environment or the last login.
        cache_dir: where what comes from the Hub is kept; None means where all programs keep it.
        local_files_only: whether to look in the cache alone.
        implementation: of outlook attention; see `outlook_attention`.
        scan_layers: see `VOLO`.
        dtype: of the computation; None infers it from images and parameters.
        param_dtype: of the parameters.
        precision: of every product, as in `jax.lax.dot_general`.
        rngs: the streams `params`, for new heads, and `dropout`; None means `nnx.Rngs(0)`.
        **overrides: change further fields of the `VOLOConfig`. `in_chans`, if it is not among them, is the variant's if
            one is given, else that of the weights.

    Warns:
        UserWarning: heads are left out or start with fresh weights; it names them.

    Raises:
        HubError: the Hub does not give the files; an `OSError`.
        WeightsError: the weights do not fit, with everything that is wrong; where they are another variant's, with its
            name. Or config.json contradicts them.
        TypeError: an override is not a field.
        ValueError: the variant or `implementation` is unknown, or the fields do not fit each other.
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
        rngs=rngs,
    )


def build(
    pretrained: Pretrained,
    *,
    implementation: ImplementationRequest = None,
    scan_layers: bool = True,
    dtype: Dtype | None = None,
    param_dtype: Dtype = jnp.float32,
    precision: PrecisionLike = None,
    rngs: nnx.Rngs | None = None,
) -> VOLO:
    """Make the model that was prepared, in evaluation mode."""
    make = partial(
        VOLO,
        pretrained.config,
        implementation=implementation,
        scan_layers=scan_layers,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        deterministic=True,
    )
    entries = [entry for entry in volo_table(pretrained.config).entries if entry.torch in pretrained.fresh]
    fresh = {entry.flax: entry for entry in entries}

    # Compiled, what is not returned is not drawn either: that of the weights would take longer than loading them.
    @nnx.jit
    def draw(rngs: nnx.Rngs) -> nnx.State[Any, Any]:
        variables = nnx.to_flat_state(nnx.state(make(rngs=rngs)))
        return nnx.from_flat_state(
            (path, variable)
            for path, variable in variables
            if not isinstance(variable, WEIGHTS) or path_name(path) in fresh
        )

    drawn = draw(nnx.Rngs(0) if rngs is None else rngs)
    model: VOLO = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    nnx.update(model, drawn)
    heads = {
        fresh[name].torch: fresh[name].to_torch(to_numpy(variable.get_value()))
        for path, variable in nnx.to_flat_state(drawn)
        if (name := path_name(path)) in fresh
    }
    load_weights(model, pretrained.arrays | heads)
    return model
