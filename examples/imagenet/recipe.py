"""The recipe: one configuration for both scripts, read from TOML, and what follows from it without a framework."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outlook_common.config import VOLOConfig
from outlook_common.weights.config_file import config_of


@dataclass(frozen=True)
class Data:
    """What is trained on, and how images are augmented; defaults are VOLO's (sail-sg/volo, main.py)."""

    root: str = "imagenet"  # train/<class>/*.JPEG and val/<class>/*.JPEG; "digits": scikit-learn's
    label_maps: str = ""  # folder of <class>/<image>.npy, (2, k, rows, columns); "": no token labels
    as_published: bool = True  # label maps cropped as the published builder does
    scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width to height of the random crop
    hflip: float = 0.5
    randaugment: int = 2  # operations per image
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    erasing: float = 0.25
    smoothing: float = 0.1
    workers: int = 8


@dataclass(frozen=True)
class Training:
    """Steps, rates and averages; defaults are those of VOLO-D1."""

    epochs: int = 300
    batch: int = 1024  # of all devices together, per update
    accumulate: int = 1  # parts of a batch that are computed one after the other
    learning_rate: float = 1.6e-3
    min_learning_rate: float = 1e-5
    warmup_learning_rate: float = 1e-6
    warmup_epochs: int = 20
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # factor per block, from the head down
    clip: float = 0.0  # norm of the gradients; 0: not clipped
    ema: float = 0.99992
    dtype: str = "bfloat16"  # of computing; parameters stay in float32, but with "float64"
    sharding: str = "data"  # of parameters: "data" repeats them on every device, "fsdp" splits them
    seed: int = 42
    save_every: int = 1251  # steps
    keep: int = 3

    @property
    def param_dtype(self) -> str:
        """Of parameters, images and targets, so that losses are exact to it on any number of devices."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True)
class Recipe:
    """A model, its data and its training."""

    model: VOLOConfig
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    @classmethod
    def read(cls, path: str | Path, **training: Any) -> "Recipe":
        """Read a TOML file with the tables [model], [data] and [training]; `training` overrides its values.

        Raises:
            TypeError: a name is unknown.
            ValueError: the model's sizes do not fit each other.
        """
        tables = tomllib.loads(Path(path).read_text())
        data = {name: tuple(v) if isinstance(v, list) else v for name, v in tables.get("data", {}).items()}
        return cls(
            config_of(tables.get("model", {})),
            Data(**data),
            Training(**{**tables.get("training", {}), **training}),
        )


def learning_rates(training: Training, steps_per_epoch: int) -> np.ndarray:
    """Return the rate of each step, (steps,) in float64: linear warm-up, then a cosine, changing once an epoch."""
    epoch = np.arange(training.epochs * steps_per_epoch) // steps_per_epoch
    start, top, end = training.warmup_learning_rate, training.learning_rate, training.min_learning_rate
    warmup = start + (top - start) * epoch / max(training.warmup_epochs, 1)
    cosine = end + (top - end) * (1 + np.cos(np.pi * epoch / training.epochs)) / 2
    return np.where(epoch < training.warmup_epochs, warmup, cosine)


def layer_scales(names: Iterable[str], config: VOLOConfig, decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate: decay**(blocks above it).

    Args:
        names: torch's, or Flax's paths with dots: blocks are named alike.
        config: the model's.
        decay: per block.
    """
    blocks = {}  # "network.<part>." -> blocks below it; a downsampling belongs to the block before
    below = 1
    for index, part in enumerate(config.network):
        blocks[f"network.{index}."] = below
        below += config.layers[part.stage] if part.kind != "downsample" else 0

    def depth(name: str) -> int:
        for prefix, start in blocks.items():
            if name.startswith(prefix):
                block = name[len(prefix) :].split(".")[0]
                return start + int(block) if block.isdigit() else start - 1
        return 0 if name.startswith(("patch_embed", "pos_embed")) else below

    return {name: decay ** (below - depth(name)) for name in names}


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter decays: matrices and kernels do; biases, norms and embeddings do not."""
    return len(shape) > 1 and not name.endswith(("pos_embed", "cls_token"))
