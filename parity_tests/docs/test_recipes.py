"""The recipes of `examples/imagenet`: both train on the digits, and go on as if they had never been killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import outlook_torch
from examples.imagenet import log
from examples.imagenet.data import OPERATIONS, Source, TrainingData, augment, held_out, mix_box, sources
from examples.imagenet.recipe import Data, Recipe, layer_scales, learning_rates

RECIPE = Path("examples/imagenet/digits.toml")
# In float64, so that losses are those of the uninterrupted training to the last digits; five steps are an epoch.
SMALL = """
[model]
layers = [1, 1]
outlook_attention = [true, false]
downsamples = [true, false]
img_size = 32
num_classes = 10
patch_size = 4
stem_hidden_dim = 8
embed_dims = [8, 8]
num_heads = [2, 2]
mlp_ratio = [2, 2]
use_mix_token = true
[data]
root = "digits"
as_published = false
randaugment = 1
workers = 0
[training]
epochs = 4
batch = 256
warmup_epochs = 1
dtype = "float64"
save_every = 2
"""
FSDP = """
sharding = "fsdp"
layer_decay = 0.8
clip = 1.0
accumulate = 2
"""


def test_a_sample_follows_from_its_position_alone() -> None:
    recipe = Recipe.read(RECIPE)
    source, _ = sources(recipe)
    one, other = TrainingData(source, recipe), TrainingData(source, recipe)
    for position in (0, 1, 1343, 1344, 5000):
        _ = other[position // 2]
        np.testing.assert_array_equal(one[position].image, other[position].image)
    per_epoch = one.steps_per_epoch * recipe.training.batch
    assert per_epoch == 21 * 64
    assert not np.array_equal(one[0].image, one[per_epoch].image)
    assert one[0].target.shape == (10, 2 + 4 * 4)
    np.testing.assert_allclose(one[0].target.sum(axis=0), 1, rtol=1e-5)


class Few:
    """The first samples of a source; says which was read last."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count, self.last = source, count, -1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.last = index
        return self.source[index]


def test_every_epoch_augments_each_image_anew() -> None:
    recipe = Recipe.read(RECIPE)
    few = Few(sources(recipe)[0], recipe.training.batch)
    data, found = TrainingData(few, recipe), dict[int, list[np.ndarray]]()
    for position in range(2 * len(few)):
        image = data[position].image
        found.setdefault(few.last, []).append(image)
    assert found.keys() == set(range(len(few)))
    assert not any(np.array_equal(*both) for both in found.values())


def test_every_operation_of_the_published_augmentation_runs_and_keeps_sizes() -> None:
    recipe, rng = replace(Recipe.read(RECIPE), data=Data()), np.random.default_rng(0)
    image, label, label_map = sources(Recipe.read(RECIPE))[0][0]
    assert label_map is not None
    assert len(OPERATIONS) == 15
    for operation in OPERATIONS.values():
        for level in (0.0, 0.5, 1.0):
            found, found_map = operation(image, label_map, level, -1, rng)
            assert found.size == image.size
            assert found_map.shape == label_map.shape
    for _ in range(20):
        sample = augment(image, label, label_map, recipe, rng)
        assert sample.image.shape == (32, 32, 3)
        assert np.isfinite(sample.image).all()


def test_rates_warm_up_and_fall_as_a_cosine_and_blocks_below_learn_more_slowly() -> None:
    recipe = Recipe.read(RECIPE)
    rates = learning_rates(recipe.training, 10)
    assert rates[0] == 1e-6
    assert rates.argmax() == 20
    assert rates[-1] < 0.02 * rates.max()
    scales = layer_scales(
        ["pos_embed", "network.0.0.norm1.weight", "network.1.proj.weight", "network.2.0.norm1.weight", "head.weight"],
        recipe.model,
        0.5,
    )
    assert list(scales.values()) == [1 / 32, 1 / 16, 1 / 16, 1 / 8, 1]


def test_boxes_of_mixing_lie_in_the_map_and_differ_by_step() -> None:
    recipe = Recipe.read(RECIPE)
    boxes = [mix_box(recipe, step) for step in range(50)]
    assert len(set(boxes)) > 10
    assert all(0 <= y1 <= y2 <= 4 and 0 <= x1 <= x2 <= 4 for y1, x1, y2, x2 in boxes)


def command(framework: str, recipe: Path, folder: Path, processes: int) -> list[str]:
    module = ["-m", f"examples.imagenet.train_{framework}"]
    if framework == "torch" and processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
    return [sys.executable, "-W", "ignore", *module, str(recipe), str(folder)]


def start(framework: str, recipe: Path, folder: Path, processes: int) -> subprocess.Popen[bytes]:
    devices = f"--xla_force_host_platform_device_count={processes}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(framework, recipe, folder, processes),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a training with all its processes; torchrun's ranks are in sessions of their own and would go on."""
    everyone = [process.pid, *_descendants(process.pid)]
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def _descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):
            children += map(int, task.read_text().split())
    return [*children, *(one for child in children for one in _descendants(child))]


def run(framework: str, recipe: Path, folder: Path, processes: int) -> str:
    if framework == "jax":
        pytest.importorskip("grain", reason="not run: Grain is in the extra `examples`")
    process = start(framework, recipe, folder, processes)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output[-3000:]
    return output


def logged(folder: Path) -> int:
    """Return how many steps are logged."""
    return len(log.read(folder)) if (folder / "metrics.jsonl").exists() else 0


def top1_in_torch(checkpoint: Path, **which: Any) -> float:
    """Return the share of held-out digits that PyTorch's twin knows with weights of a checkpoint."""
    recipe = Recipe.read(RECIPE)
    model = outlook_torch.VOLO(recipe.model).eval()
    outlook_torch.load_weights(model, checkpoint, **which)
    _, source = sources(recipe)
    images, labels = zip(*(held_out(source, index, recipe) for index in range(len(source))), strict=True)
    with torch.no_grad():
        best = model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).argmax(1)
    return float((best.numpy() == labels).mean())


@pytest.mark.slow(reason="trains to the end")
@pytest.mark.parametrize(
    ("framework", "processes", "averages"), [("jax", 8, {"prefix": "average"}), ("torch", 2, {"use_ema": True})]
)
def test_the_digits_are_learnt(framework: str, processes: int, averages: dict[str, Any], tmp_path: Path) -> None:
    run(framework, RECIPE, tmp_path, processes)
    top1 = max(values.get("top1", 0) for values in log.read(tmp_path).values())
    assert top1 >= 0.95
    last = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    # An image or two may lie on the border, where rounding decides.
    assert top1_in_torch(last, **averages) == pytest.approx(top1, abs=0.005)


@pytest.mark.slow(reason="trains each recipe several times in processes of its own")
@pytest.mark.parametrize("more", ["", FSDP], ids=["data", "fsdp"])
@pytest.mark.parametrize(
    ("framework", "processes"), [("jax", (8, 8, 4, 1)), ("torch", (1, 1, 1, 1)), ("torch", (2, 2, 2, 2))]
)
def test_a_killed_training_goes_on_with_the_losses_of_one_that_was_not(
    framework: str, processes: tuple[int, ...], more: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL + more)
    run(framework, recipe, tmp_path / "whole", processes[0])
    rng = np.random.default_rng(0)
    for count in processes[:-1]:
        before = logged(tmp_path / "killed")
        process = start(framework, recipe, tmp_path / "killed", count)
        while process.poll() is None and logged(tmp_path / "killed") == before:
            time.sleep(0.05)
        time.sleep(float(rng.uniform(0, 2)))
        if rng.random() < 0.5:
            process.terminate()  # torchrun tells its ranks
            process.communicate()
        else:
            kill(process)
    run(framework, recipe, tmp_path / "killed", processes[-1])
    whole, killed = log.read(tmp_path / "whole"), log.read(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for step, values in whole.items():
        for name, value in values.items():
            assert killed[step][name] == pytest.approx(value, rel=1e-12), (step, name)
