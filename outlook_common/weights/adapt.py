"""Adapt a VOLO's weights to other classes, image sizes and channels, as the original and timm do."""

from dataclasses import dataclass, replace

import numpy as np

from outlook_common.config import FIRST_CONV, VOLOConfig
from outlook_common.interpolation import resize_map
from outlook_common.weights.checkpoint import Checkpoint, Shapes
from outlook_common.weights.identify import as_in_file, classes_in_file
from outlook_common.weights.match import resolve_checkpoint
from outlook_common.weights.tables.volo import volo_table

_HEADS = ("head.", "aux_head.")


@dataclass(frozen=True)
class Adapted:
    """A checkpoint's weights adapted to a model.

    Attributes:
        arrays: under PyTorch's names, in its layout.
        dropped: names of heads in the source that are left out.
        fresh: names of heads in the model that keep their initial values.
    """

    arrays: dict[str, np.ndarray]
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]

    @property
    def change(self) -> str | None:
        """A description of `dropped` and `fresh`; None if both are empty."""
        parts = [f"{', '.join(self.dropped)} left out"] if self.dropped else []
        parts += [f"{', '.join(self.fresh)} start with fresh weights"] if self.fresh else []
        return "; ".join(parts) or None


def adapt(checkpoint: Checkpoint, config: VOLOConfig) -> Adapted:
    """Return a checkpoint's tensors adapted to the model with this configuration.

    The checkpoint must be complete for its own class count, image size and channels. Both heads are left out if the
    class counts differ, as is a head that the model lacks; `pos_embed` is resized to the model's image size, and the
    first convolution changed to its channels.

    Raises:
        WeightsError: the checkpoint is not complete; all problems are reported together.
    """
    own = _config_in_file(config, checkpoint.shapes)
    arrays = resolve_checkpoint(checkpoint, volo_table(own))
    names = [entry.torch for entry in volo_table(config).entries]
    if own.num_classes == config.num_classes:
        taken = {name: arrays[name] for name in names}
    else:
        taken = {name: arrays[name] for name in names if not name.startswith(_HEADS)}
    taken["pos_embed"] = resize_map(taken["pos_embed"], config.token_map)
    first = f"{FIRST_CONV}.weight"
    taken[first] = _for_channels(taken[first], config.in_chans)
    return Adapted(
        taken,
        dropped=tuple(name for name in arrays if name not in taken),
        fresh=tuple(name for name in names if name not in taken),
    )


def _config_in_file(config: VOLOConfig, shapes: Shapes) -> VOLOConfig:
    classes = classes_in_file(shapes)
    # With equal class counts, an auxiliary head that the model has must be in the checkpoint.
    expected = config.use_aux_head and classes == config.num_classes
    has_aux_head = any(name.startswith("aux_head.") for name in shapes) and config.post_layers is not None
    return replace(
        as_in_file(config, shapes),
        use_aux_head=expected or has_aux_head,
        use_mix_token=False,  # has no weights, and would require the auxiliary head
    )


def _for_channels(weight: np.ndarray, channels: int) -> np.ndarray:
    """Return the weight of a convolution, (out, in, rows, columns), for other input channels.

    One channel gets the sum over all channels; more channels repeat the weights cyclically, scaled by old / new. Either
    way an image with equal channels gives the same output, as with timm's `adapt_input_conv`.
    """
    own = weight.shape[1]
    if channels == own:
        return weight
    weight32 = weight.astype(np.promote_types(weight.dtype, np.float32))
    if channels == 1:
        return weight32.sum(axis=1, keepdims=True).astype(weight.dtype)
    repeated = weight32[:, np.arange(channels) % own]
    return (repeated * weight32.dtype.type(own / channels)).astype(weight.dtype)
