"""Load VOLO with weights from the Hugging Face Hub, a folder or a file."""

from typing import Any

from outlook_common.dispatch import ImplementationRequest, check_implementation
from outlook_common.geometry import IntOrPair
from outlook_common.pretrained import Pretrained, prepare
from outlook_common.volo import pretrained_cfg
from outlook_common.weights.formats.registry import PathLike
from outlook_torch.layers import Device, Dtype
from outlook_torch.model import VOLO
from outlook_torch.ops import IMPLEMENTATIONS
from outlook_torch.weights import export_weights, load_weights


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
    device: Device = None,
    dtype: Dtype = None,
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
        device: device of the parameters.
        dtype: dtype of the parameters.
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
    return build(pretrained, implementation=implementation, device=device, dtype=dtype)


def build(
    pretrained: Pretrained,
    *,
    implementation: ImplementationRequest = None,
    device: Device = None,
    dtype: Dtype = None,
) -> VOLO:
    """Make the model of prepared weights, in evaluation mode."""
    model = VOLO(pretrained.config, implementation=implementation, device=device, dtype=dtype)
    model.pretrained_cfg = pretrained_cfg(pretrained.variant, pretrained.config, pretrained.described)
    drawn = export_weights(model) if pretrained.fresh else {}
    load_weights(model, pretrained.arrays | {name: drawn[name] for name in pretrained.fresh})
    return model.eval()
