"""Train a small VOLO on handwritten digits in both twins: `python -m examples.digits`.

The 1,797 digits ship inside scikit-learn. Both twins see the same batches, mixed inside the same boxes (token
labelling, as the original trains), and step with AdamW. Results: both loss curves in one plot, both accuracies on
the held-out quarter, and how many held-out digits one twin labels differently with the weights that the other trained.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import typer
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import outlook_jax
import outlook_jax.losses
import outlook_torch
import outlook_torch.losses
from outlook_common import VOLOConfig

CONFIG = VOLOConfig(
    layers=(1, 1, 1, 1),
    img_size=32,
    in_chans=1,
    num_classes=10,
    patch_size=4,
    stem_hidden_dim=16,
    embed_dims=(32, 64, 64, 64),
    num_heads=(2, 4, 4, 4),
)
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 0.05

Box = tuple[int, int, int, int]


class Data(NamedTuple):
    """Images (B, 32, 32, 1) in float32, labels (B,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass
class Result:
    """Result of training; one loss per step."""

    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0


def digits() -> tuple[Data, Data]:
    """Return the training and the held-out digits, upscaled 4x4, scaled to -1…1."""
    images, labels = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8), np.ones((4, 4)))[..., None].astype(np.float32) / 8 - 1
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return Data(train_x, train_y), Data(test_x, test_y)


def batches(data: Data, epochs: int) -> Iterator[tuple[np.ndarray, np.ndarray, Box]]:
    """Yield (images, one-hot targets, mixing box), the same for both twins."""
    rng = np.random.default_rng(0)
    rows, columns = CONFIG.token_map
    for _ in range(epochs):
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            taken = order[start : start + BATCH]
            y, x = rng.integers(0, rows, 2), rng.integers(0, columns, 2)
            box = (int(y.min()), int(x.min()), int(y.max()), int(x.max()))
            yield data.images[taken], np.eye(10, dtype=np.float32)[data.labels[taken]], box


def train_torch(model: outlook_torch.VOLO, data: Data, epochs: int) -> Result:
    """Train in place."""
    result, loss_of = Result(), outlook_torch.losses.TokenLabelCrossEntropy()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    start = time.perf_counter()
    model.train()
    for images, targets, box in batches(data, epochs):
        optimizer.zero_grad()
        loss = loss_of(model.forward_train(to_torch(images), box), torch.from_numpy(targets))
        loss.backward()
        optimizer.step()
        result.losses.append(loss.item())
    result.seconds = time.perf_counter() - start
    return result


def train_jax(model: outlook_jax.VOLO, data: Data, epochs: int) -> Result:
    """Train in place."""
    result, loss_of = Result(), outlook_jax.losses.TokenLabelCrossEntropy()
    optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY), wrt=nnx.Param)

    @nnx.jit
    def step(
        model: outlook_jax.VOLO, optimizer: nnx.Optimizer, images: jax.Array, targets: jax.Array, box: Box
    ) -> jax.Array:
        def objective(model: outlook_jax.VOLO) -> jax.Array:
            return loss_of(model.forward_train(images, box), targets)

        loss, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return loss

    start = time.perf_counter()
    model.train()
    for images, targets, box in batches(data, epochs):
        loss = step(model, optimizer, jnp.asarray(images), jnp.asarray(targets), box)
        result.losses.append(float(loss))
    result.seconds = time.perf_counter() - start
    return result


def predict_torch(model: outlook_torch.VOLO, images: np.ndarray) -> np.ndarray:
    """Return the label of each image."""
    model.eval()
    with torch.no_grad():
        return model(to_torch(images)).argmax(-1).numpy()


def predict_jax(model: outlook_jax.VOLO, images: np.ndarray) -> np.ndarray:
    """Return the label of each image."""
    model.eval()
    return np.asarray(nnx.jit(lambda model, x: model(x).argmax(-1))(model, jnp.asarray(images)))


def to_torch(images: np.ndarray) -> torch.Tensor:
    """Transpose images from NHWC to NCHW."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def run(epochs: int) -> tuple[Result, Result, int]:
    """Train both twins; return their results and the number of labels that differ after exchanging weights."""
    train, test = digits()
    torch.manual_seed(0)
    torch_model, jax_model = outlook_torch.VOLO(CONFIG), outlook_jax.VOLO(CONFIG, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(jax_model, outlook_torch.export_weights(torch_model))

    of_torch, of_jax = train_torch(torch_model, train, epochs), train_jax(jax_model, train, epochs)
    by_torch, by_jax = predict_torch(torch_model, test.images), predict_jax(jax_model, test.images)
    of_torch.accuracy, of_jax.accuracy = (float((by == test.labels).mean()) for by in (by_torch, by_jax))

    jax_in_torch, torch_in_jax = outlook_torch.VOLO(CONFIG), outlook_jax.VOLO(CONFIG, rngs=nnx.Rngs(1))
    outlook_torch.load_weights(jax_in_torch, outlook_jax.export_weights(jax_model))
    outlook_jax.load_weights(torch_in_jax, outlook_torch.export_weights(torch_model))
    crossed = (predict_torch(jax_in_torch, test.images), by_jax), (predict_jax(torch_in_jax, test.images), by_torch)
    return of_torch, of_jax, sum(int((there != here).sum()) for there, here in crossed)


def plot(of_torch: Result, of_jax: Result, path: Path) -> None:
    """Plot both loss curves and their difference."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    curves, apart = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curves.plot(of_torch.losses, label=f"PyTorch, {of_torch.accuracy:.1%} held-out accuracy", linewidth=3, alpha=0.5)
    curves.plot(of_jax.losses, label=f"JAX, {of_jax.accuracy:.1%} held-out accuracy", linewidth=1, color="black")
    curves.set(ylabel="token-labelling loss", title="One small VOLO, one start, two frameworks")
    curves.legend()
    apart.semilogy(np.maximum(np.abs(np.subtract(of_torch.losses, of_jax.losses)), 1e-9), linewidth=0.8)
    apart.set(xlabel="step", ylabel="|difference|")
    figure.savefig(path, dpi=120)


def main(
    epochs: Annotated[int, typer.Option(help="Passes over the training digits.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder of the picture and the numbers.")] = Path("examples/results"),
) -> None:
    """Train both twins and write digits.png and digits.json."""
    of_torch, of_jax, differing = run(epochs)
    out.mkdir(parents=True, exist_ok=True)
    plot(of_torch, of_jax, out / "digits.png")
    numbers = {"torch": asdict(of_torch), "jax": asdict(of_jax), "labels that differ across frameworks": differing}
    (out / "digits.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console = Console()
    for name, result in (("PyTorch", of_torch), ("JAX", of_jax)):
        console.print(f"{name}: held-out accuracy {result.accuracy:.2%}, {result.seconds:.0f} s")
    console.print(f"held-out labels that differ when the weights change frameworks: {differing}")


if __name__ == "__main__":
    typer.run(main)
