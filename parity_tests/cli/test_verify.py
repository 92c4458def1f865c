"""`outlook verify`: what it prints, writes and returns."""

import json
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

import outlook_torch
from outlook_parity.cli.app import app
from outlook_parity.cli.verify import _twin as twin_of
from outlook_parity.models.photos import PHOTOS, load_photo, load_photos, photo_map


def outlook_verify(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verify", "--model", "layer", *map(str, arguments)], catch_exceptions=True)


def write_layer(path: Path, *, prefix: str = "", bad: float | None = None) -> Path:
    torch.manual_seed(0)
    weights = {f"{prefix}{k}": v.numpy() for k, v in outlook_torch.OutlookAttention(8, 2).state_dict().items()}
    if bad is not None:
        weights[f"{prefix}attn.weight"][5, 3] = bad
    save_file(weights, path)
    return path


def test_the_layer_of_volo_d1_passes_on_the_photo_in_float64_and_float32(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    result = outlook_verify("--json", "--plot", picture)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)  # nothing but JSON
    assert report["verdict"] == "pass"
    assert {row["dtype"] for row in report["checks"]} == {"as given", "float64", "float32"}
    assert {row["verdict"] for row in report["checks"]} == {"pass"}
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] > 1000
    for third in np.array_split(pixels[..., :3], 3, axis=1):
        assert len(np.unique(third.reshape(-1, 3), axis=0)) > 20


def test_a_weight_file_decides_the_sizes_and_the_last_line_is_the_verdict(tmp_path: Path) -> None:
    file = write_layer(tmp_path / "block.safetensors", prefix="network.0.0.attn.")
    result = outlook_verify(
        "--weights",
        file,
        "--prefix",
        "network.0.0.attn",
        "--dtype",
        "float64",
        "--stride",
        1,
        "--level",
        "forward",
        "-v",
    )
    assert result.exit_code == 0, result.output
    assert "8 channels, 2 heads, kernel 3, stride 1" in result.output
    assert "attn.weight" in result.output
    assert result.output.strip().splitlines()[-1].startswith("PASS: the twins are equal to rounding in float64")


def test_a_nan_in_the_weight_file_is_a_mismatch(tmp_path: Path) -> None:
    result = outlook_verify(
        "--weights", write_layer(tmp_path / "w.safetensors", bad=np.nan), "--dtype", "float64", "--level", "forward"
    )
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("MISMATCH")
    assert last.endswith("weight attn.weight: 1 NaN or Inf in torch, 1 NaN or Inf in jax")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_device_is_not_run(tmp_path: Path) -> None:
    file = write_layer(tmp_path / "w.safetensors")
    result = outlook_verify("--weights", file, "--device", "gpu", "--plot", tmp_path / "out.png")
    assert result.exit_code == 3
    assert result.output.strip().splitlines()[-1].startswith("NOT RUN: JAX has no gpu here")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float8"), "unknown dtype 'float8'"),
        (("--kernel-size", 2, "--stride", 1), "the window grid does not fit"),
        (("--num-heads", 7), "192 % 7"),
        (("--weights", "{file}", "--kernel-size", 5), "num_heads=2 with kernel_size=3"),
        (("--weights", "{file}", "--prefix", "network"), "no outlook attention here"),
    ],
)
def test_what_a_user_can_get_wrong_is_an_error_with_the_numbers(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    file = write_layer(tmp_path / "w.safetensors")
    result = outlook_verify(*(str(argument).replace("{file}", str(file)) for argument in arguments))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_the_photos_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_sample_image

    for photo, name in zip(load_photos(), PHOTOS, strict=True):
        assert np.array_equal(np.asarray(photo), load_sample_image(name))


def test_the_photo_becomes_the_map_of_volo_d1() -> None:
    photo = load_photo()
    patches = photo_map(photo, 192, seed=0)
    assert (photo.shape, patches.shape) == ((224, 224, 3), (1, 28, 28, 192))
    assert abs(patches.mean()) < 1e-12
    assert patches.std() == pytest.approx(1.0, abs=1e-12)
    # Row 3, column 5 of the patch whose corner is pixel (16, 200), in green.
    pixels = (photo.astype(np.float64) - photo.mean()) / photo.std()
    assert patches[0, 2, 25, (3 * 8 + 5) * 3 + 1] == pytest.approx(pixels[19, 205, 1], abs=1e-12)


def test_for_other_channels_the_patches_go_through_a_linear_map_of_the_seed() -> None:
    photo = load_photo()
    one, same, other = (photo_map(photo, 256, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (1, 28, 28, 256)
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)


def test_factories_are_called_without_the_optimizations_of_xla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = "jax_disable_most_optimizations"
    (tmp_path / "quick_twins.py").write_text(f"import jax\nmodel = lambda: jax.config.values['{switch}']\n")
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[no-untyped-call]
    assert twin_of("quick_twins:model", "--jax") is True
    assert jax.config.values[switch] is False
