"""Train a small VOLO for segmentation in both twins from one start: `python -m examples.segmentation`.

`forward_intermediates` feeds a head as UPerNet's (Xiao et al., 2018): the last map pooled over grids of several sizes,
then a pyramid from the coarsest map to the finest. Images show discs, squares and crosses on noise, at 100x76 pixels,
which the model's stride of 8 does not divide: they are padded, and the scores of the padding are cut off. Results: how
far apart the losses of both twins are, and the mean intersection over union (mIoU) of each on held-out images.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import typer
from flax import nnx
from rich.console import Console
from torch.nn import functional as F

import outlook_jax
import outlook_torch
from outlook_common import VOLOConfig
from outlook_parity import load_torch_weights

CLASSES = ("background", "disc", "square", "cross")
SIZE = (100, 76)
CONFIG = VOLOConfig(
    layers=(1, 1, 1, 1),
    img_size=(104, 80),  # the next multiples of the stride
    num_classes=0,
    patch_size=4,
    stem_hidden_dim=16,
    embed_dims=(32, 64, 64, 64),
    num_heads=(2, 4, 4, 4),
)
HEAD_DIM, GRIDS = 32, (1, 2, 3)
BATCH, LEARNING_RATE, WEIGHT_DECAY = 8, 2e-3, 0.05


class Data(NamedTuple):
    """Images (B, H, W, 3) in float64, the class of each pixel (B, H, W)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass
class Result:
    """Result of training; one loss per step."""

    losses: list[float] = field(default_factory=list)
    miou: float = 0.0


def shapes(count: int, seed: int, size: tuple[int, int] = SIZE) -> Data:
    """Draw images with three shapes on noise; only the form tells the class, and later ones cover earlier ones."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    images = rng.normal(0.0, 0.5, (count, *size, 3))
    labels = np.zeros((count, *size), np.int64)
    for image, label in zip(images, labels, strict=True):
        for kind in rng.permutation(len(CLASSES) - 1) + 1:
            radius = rng.integers(min(size) // 8, min(size) // 4)
            y, x = np.abs(rows - rng.integers(size[0])), np.abs(columns - rng.integers(size[1]))
            inside = {
                "disc": y**2 + x**2 <= radius**2,
                "square": np.maximum(y, x) <= radius * 0.9,
                "cross": (np.minimum(y, x) <= radius / 3) & (np.maximum(y, x) <= radius),
            }[CLASSES[kind]]
            image[inside] += rng.uniform(0.5, 1.5, 3)
            label[inside] = kind
    return Data(images, labels)


def batches(data: Data, steps: int) -> Iterator[Data]:
    """Yield batches, the same for both twins."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        taken = rng.choice(len(data.labels), BATCH, replace=False)
        yield Data(data.images[taken], data.labels[taken])


# Resampling along one axis, as matrices that both frameworks multiply by.


def pooling(size: int, cells: int) -> np.ndarray:
    """Return (cells, size): means over cells of nearly equal size, as `F.adaptive_avg_pool2d` takes them."""
    matrix = np.zeros((cells, size))
    for cell in range(cells):
        start, end = cell * size // cells, -(-(cell + 1) * size // cells)
        matrix[cell, start:end] = 1 / (end - start)
    return matrix


def bilinear(size: int, new_size: int) -> np.ndarray:
    """Return (new_size, size): what `F.interpolate(mode="bilinear", align_corners=False)` computes."""
    centre = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(size)))


class TorchSegmenter(torch.nn.Module):
    """VOLO with a pyramid head: images (B, 3, H, W) to scores (B, classes, H, W)."""

    def __init__(self, backbone: outlook_torch.VOLO) -> None:
        super().__init__()
        channels = [info["num_chs"] for info in backbone.feature_info]
        backbone.prune_intermediate_layers(None, prune_norm=True)
        options = {"dtype": backbone.patch_embed.proj.weight.dtype}
        self.backbone = backbone
        self.pooled = torch.nn.ModuleList(torch.nn.Conv2d(channels[-1], HEAD_DIM, 1, **options) for _ in GRIDS)
        self.lateral = torch.nn.ModuleList(torch.nn.Conv2d(count, HEAD_DIM, 1, **options) for count in channels)
        self.bottleneck = torch.nn.Conv2d(HEAD_DIM * (1 + len(GRIDS)), HEAD_DIM, 3, padding=1, **options)
        self.fuse = torch.nn.Conv2d(HEAD_DIM * len(channels), HEAD_DIM, 3, padding=1, **options)
        self.classify = torch.nn.Conv2d(HEAD_DIM, len(CLASSES), 1, **options)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pad the images, and cut the padding off the scores."""
        (H, W), (rows, columns) = images.shape[2:], self.backbone.config.img_size
        padded = F.pad(images, (0, columns - W, 0, rows - H))
        maps = self.backbone.forward_intermediates(padded, intermediates_only=True)
        last, *finer = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)][::-1]
        levels = [self._pool(maps[-1], last)]
        for x in finer:  # the pyramid: each level adds the coarser one
            levels.append(x + self._resize(levels[-1], x.shape[2:]))
        finest = levels[-1].shape[2:]
        fused = F.relu(self.fuse(torch.cat([self._resize(x, finest) for x in levels], dim=1)))
        return self._resize(self.classify(fused), (rows, columns))[:, :, :H, :W]

    def _pool(self, x: torch.Tensor, lateral: torch.Tensor) -> torch.Tensor:
        H, W = x.shape[2:]
        grids = [_resampled_torch(x, pooling(H, cells), pooling(W, cells)) for cells in GRIDS]
        grids = [F.relu(conv(grid)) for conv, grid in zip(self.pooled, grids, strict=True)]
        return F.relu(self.bottleneck(torch.cat([lateral, *(self._resize(grid, (H, W)) for grid in grids)], dim=1)))

    def _resize(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return _resampled_torch(x, *(bilinear(old, new) for old, new in zip(x.shape[2:], size, strict=True)))


def _resampled_torch(x: torch.Tensor, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    return torch.einsum("hH,wW,bcHW->bchw", *(torch.from_numpy(matrix).to(x.dtype) for matrix in (rows, columns)), x)


class JaxSegmenter(nnx.Module):
    """VOLO with a pyramid head: images (B, H, W, 3) to scores (B, H, W, classes)."""

    def __init__(self, backbone: outlook_jax.VOLO, *, rngs: nnx.Rngs) -> None:
        channels = [info["num_chs"] for info in backbone.feature_info]
        backbone.prune_intermediate_layers(None, prune_norm=True)
        options = {"param_dtype": backbone.param_dtype, "rngs": rngs}
        self.backbone = backbone
        self.pooled = nnx.List(nnx.Conv(channels[-1], HEAD_DIM, (1, 1), **options) for _ in GRIDS)
        self.lateral = nnx.List(nnx.Conv(count, HEAD_DIM, (1, 1), **options) for count in channels)
        self.bottleneck = nnx.Conv(HEAD_DIM * (1 + len(GRIDS)), HEAD_DIM, (3, 3), **options)
        self.fuse = nnx.Conv(HEAD_DIM * len(channels), HEAD_DIM, (3, 3), **options)
        self.classify = nnx.Conv(HEAD_DIM, len(CLASSES), (1, 1), **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Pad the images, and cut the padding off the scores."""
        (H, W), (rows, columns) = images.shape[1:3], self.backbone.config.img_size
        padded = jnp.pad(images, ((0, 0), (0, rows - H), (0, columns - W), (0, 0)))
        maps = self.backbone.forward_intermediates(padded, intermediates_only=True)
        last, *finer = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)][::-1]
        levels = [self._pool(maps[-1], last)]
        for x in finer:  # the pyramid: each level adds the coarser one
            levels.append(x + self._resize(levels[-1], x.shape[1:3]))
        finest = levels[-1].shape[1:3]
        fused = jax.nn.relu(self.fuse(jnp.concatenate([self._resize(x, finest) for x in levels], axis=-1)))
        return self._resize(self.classify(fused), (rows, columns))[:, :H, :W]

    def _pool(self, x: jax.Array, lateral: jax.Array) -> jax.Array:
        H, W = x.shape[1:3]
        grids = [_resampled_jax(x, pooling(H, cells), pooling(W, cells)) for cells in GRIDS]
        grids = [jax.nn.relu(conv(grid)) for conv, grid in zip(self.pooled, grids, strict=True)]
        grids = [self._resize(grid, (H, W)) for grid in grids]
        return jax.nn.relu(self.bottleneck(jnp.concatenate([lateral, *grids], axis=-1)))

    def _resize(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
        return _resampled_jax(x, *(bilinear(old, new) for old, new in zip(x.shape[1:3], size, strict=True)))


def _resampled_jax(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    return jnp.einsum("hH,wW,bHWc->bhwc", *(jnp.asarray(matrix, x.dtype) for matrix in (rows, columns)), x)


def segmenters(config: VOLOConfig = CONFIG, seed: int = 0) -> tuple[TorchSegmenter, JaxSegmenter]:
    """Make both twins with the same weights, in float64."""
    torch.manual_seed(seed)
    torch_model = TorchSegmenter(outlook_torch.VOLO(config, dtype=torch.float64))
    rngs = nnx.Rngs(seed)
    jax_model = JaxSegmenter(outlook_jax.VOLO(config, param_dtype=jnp.float64, rngs=rngs), rngs=rngs)
    load_torch_weights(jax_model, torch_model)
    return torch_model, jax_model


def train_torch(model: TorchSegmenter, data: Data, steps: int) -> Result:
    """Train in place."""
    result = Result()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.train()
    for images, labels in batches(data, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.from_numpy(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        result.losses.append(loss.item())
    return result


def train_jax(model: JaxSegmenter, data: Data, steps: int) -> Result:
    """Train in place."""
    result = Result()
    optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)

    @nnx.jit
    def step(model: JaxSegmenter, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
        def objective(model: JaxSegmenter) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        loss, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return loss

    model.train()
    for images, labels in batches(data, steps):
        result.losses.append(float(step(model, optimizer, jnp.asarray(images), jnp.asarray(labels))))
    return result


def predict_torch(model: TorchSegmenter, images: np.ndarray) -> np.ndarray:
    """Return the class of each pixel."""
    model.eval()
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2))).argmax(1).numpy()


def predict_jax(model: JaxSegmenter, images: np.ndarray) -> np.ndarray:
    """Return the class of each pixel."""
    model.eval()
    return np.asarray(nnx.jit(lambda model, x: model(x).argmax(-1))(model, jnp.asarray(images)))


def mean_iou(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean over the classes of intersection / union of their pixels; of classes that are in either."""
    pairs = np.bincount(len(CLASSES) * labels.ravel() + predicted.ravel(), minlength=len(CLASSES) ** 2)
    confusion = pairs.reshape(len(CLASSES), len(CLASSES))
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float((confusion.diagonal()[union > 0] / union[union > 0]).mean())


def run(steps: int, images: int, config: VOLOConfig = CONFIG, size: tuple[int, int] = SIZE) -> tuple[Result, Result]:
    """Train both twins on `images` images, and test them on a quarter as many others."""
    train, test = shapes(images, 1, size), shapes(max(images // 4, 1), 2, size)
    torch_model, jax_model = segmenters(config)
    of_torch, of_jax = train_torch(torch_model, train, steps), train_jax(jax_model, train, steps)
    of_torch.miou = mean_iou(predict_torch(torch_model, test.images), test.labels)
    of_jax.miou = mean_iou(predict_jax(jax_model, test.images), test.labels)
    return of_torch, of_jax


def main(
    steps: Annotated[int, typer.Option(help="Training steps of 8 images.", min=2)] = 300,
    images: Annotated[int, typer.Option(help="Training images.", min=BATCH)] = 256,
) -> None:
    """Train both twins and print how far apart they are."""
    jax.config.update("jax_enable_x64", True)
    of_torch, of_jax = run(steps, images)
    console = Console()
    for name, result in (("PyTorch", of_torch), ("JAX", of_jax)):
        console.print(
            f"{name}: loss {result.losses[0]:.3f} to {result.losses[-1]:.3f}, held-out mIoU {result.miou:.1%}"
        )
    apart = np.abs(np.subtract(of_torch.losses, of_jax.losses))
    console.print(f"largest difference of the losses: {apart[:10].max():.1e} in 10 steps, {apart.max():.1e} in {steps}")


if __name__ == "__main__":
    typer.run(main)
