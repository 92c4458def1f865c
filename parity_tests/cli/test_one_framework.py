"""`outlook predict` and `outlook trace` where only one framework is installed, or none; what errors say to install."""

import json
from pathlib import Path

import numpy as np
import pytest

import outlook_torch
from outlook_common.extras import EXTRAS, require
from parity_tests.cli.test_trace import outlook_without
from parity_tests.weights.test_own_sizes import make

# Framework -> the top-level modules of all others, and of every extra but its own and "images".
NOT_IN = {
    "torch": ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "sklearn", "matplotlib"),
    "jax": ("torch", "sklearn", "matplotlib"),
}
NO_FRAMEWORK = (*NOT_IN["torch"], "torch")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a small model and an image."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("files")
    outlook_torch.save_weights(make("torch"), folder / "a.safetensors")
    image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "a.png")
    return folder


@pytest.mark.long(reason="VOLO-D1 in processes of their own")
@pytest.mark.parametrize("framework", NOT_IN)
def test_predict_runs_with_the_framework_that_is_there(files: Path, framework: str) -> None:
    arguments = ("predict", files / "a.png", "--weights", files / "a.safetensors", "--json")
    done = outlook_without(NOT_IN[framework], *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["frameworks"] == [framework]
    assert len(found["images"][0]["guesses"][framework]) == 5
    other = next(name for name in NOT_IN if name != framework)
    done = outlook_without(NOT_IN[framework], *arguments, "--framework", other)
    assert done.returncode == 2
    assert f"pip install 'outlook-attention[{other}]'" in done.stderr


def test_predict_names_what_is_missing_and_no_more(files: Path) -> None:
    arguments = ("predict", files / "a.png", "--weights", files / "a.safetensors")
    done = outlook_without(NO_FRAMEWORK, *arguments)
    assert done.returncode == 2
    expected = (
        "needs torch or jax, install one with: pip install 'outlook-attention[torch]' or 'outlook-attention[jax]'"
    )
    assert expected in done.stderr
    done = outlook_without((*NOT_IN["torch"], "PIL"), *arguments)
    assert done.returncode == 2
    assert "needs PIL, which is not installed; install it with: pip install 'outlook-attention[images]'" in done.stderr


MODELS = """
import {imported}

def torch_model():
    return torch.nn.Tanh()

def jax_model():
    return jnp.tanh
"""


@pytest.mark.parametrize(("framework", "imported"), [("torch", "torch"), ("jax", "jax.numpy as jnp")])
def test_trace_of_an_own_model_needs_its_framework_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framework: str, imported: str
) -> None:
    (tmp_path / "mine.py").write_text(MODELS.format(imported=imported))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2, 3)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    arguments = (f"--{framework}", f"mine:{framework}_model", "--inputs", "x.npy", "--out", "a.trace")
    done = outlook_without((*NOT_IN[framework], "PIL"), "trace", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.trace").exists()


@pytest.mark.parametrize("framework", NOT_IN)
def test_trace_of_a_built_in_model_says_all_that_is_missing_at_once(tmp_path: Path, framework: str) -> None:
    arguments = ("trace", "--framework", framework, "--model", "layer", "--out", tmp_path / "a.trace")
    done = outlook_without(NOT_IN[framework], *arguments)
    assert done.returncode == 2
    assert "outlook trace needs sklearn, which is not installed; install it with" in done.stderr
    assert "'outlook-attention[photos]'" in done.stderr
    done = outlook_without((*NO_FRAMEWORK, "PIL"), *arguments)
    assert f"pip install 'outlook-attention[{framework}]'" in done.stderr


def test_verify_says_all_that_is_missing_at_once(tmp_path: Path) -> None:
    done = outlook_without(("torch", "sklearn"), "verify", "--model", "layer")
    assert done.returncode == 2
    assert "outlook verify needs torch and sklearn, which are not installed; install them with" in done.stderr
    assert "'outlook-attention[photos,torch]'" in done.stderr


def test_no_extra_brings_more_than_its_own(request: pytest.FixtureRequest) -> None:
    """Every extra that an error can name is one of the package's, and only `parity` brings both frameworks."""
    import tomllib

    extras = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= extras.keys()
    assert not any("torch" in name for extra in ("jax", "images", "photos", "plots") for name in extras[extra])
    assert not any("jax" in name for extra in ("torch", "images", "photos", "plots") for name in extras[extra])
    require(*EXTRAS, needed_by="this test")
