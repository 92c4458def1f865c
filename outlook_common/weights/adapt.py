"""A VOLO's weights for other classes, another image size or other channels, as the original and timm make them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from outlook_common.config import FIRST_CONV, VOLOConfig
from outlook_common.interpolation import resize_map
from outlook_common.weights.checkpoint import Checkpoint
from outlook_common.weights.match import resolve_checkpoint
from outlook_common.weights.tables.volo import as_in_file, classes_in_file, volo_table

_HEADS = ("head.", "aux_head.")


@dataclass(frozen=True)
class Adapted:
    """Weights that fit a model.

    Attributes:
        arrays: under PyTorch's names, in its layout.
        dropped: the names in the source that are left out, of heads alone.
        fresh: the names in the model that `arrays` has not, of heads alone: they keep what they were drawn as.
    """

    arrays: dict[str, np.ndarray]
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]

    @property
    def change(self) -> str | None:
        """What differs, in words; None if every tensor was taken."""
        parts = [f"{', '.join(self.dropped)} left out"] if self.dropped else []
        parts += [f"{', '.join(self.fresh)} start with fresh weights"] if self.fresh else []
        return "; ".join(parts) or None


def adapt(checkpoint: Checkpoint, config: VOLOConfig) -> Adapted:
    """Return a checkpoint's tensors for the model with this configuration.

    Everything must fit a model of the checkpoint's own class count, image size and channels. Then, if the class counts
    differ, both heads are left out, and so is a head that the model does not have; `pos_embed` is resized, and the
    first convolution made one for the model's channels.

    Raises:
        WeightsError: anything does not fit; all of it is reported together.
    """
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in checkpoint.items}
    own = _config_in_file(config, shapes)
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


def _config_in_file(config: VOLOConfig, shapes: Mapping[str, tuple[int, ...]]) -> VOLOConfig:
    classes = classes_in_file(shapes)
    # Where both have classes, and as many, an auxiliary head that the model has must be there.
    expected = config.use_aux_head and classes == config.num_classes
    has_aux_head = any(name.startswith("aux_head.") for name in shapes) and config.post_layers is not None
    return replace(
        as_in_file(config, shapes),
        use_aux_head=expected or has_aux_head,
        use_mix_token=False,  # has no weights, and would demand the auxiliary head
    )


def _for_channels(weight: np.ndarray, channels: int) -> np.ndarray:
    """Return the weight of a convolution, (out, in, rows, columns), for images of as many channels.

    One channel gets the sum of what all had: a grey image gives what it gave as an image of equal channels. More get
    the same weights in turn, scaled so that an image whose channels are equal gives what it gave. Both as timm's
    `adapt_input_conv` does.
    """
    own = weight.shape[1]
    if channels == own:
        return weight
    wide = weight.astype(np.promote_types(weight.dtype, np.float32))
    if channels == 1:
        return wide.sum(axis=1, keepdims=True).astype(weight.dtype)
    in_turn = wide[:, np.arange(channels) % own]
    return (in_turn * wide.dtype.type(own / channels)).astype(weight.dtype)
