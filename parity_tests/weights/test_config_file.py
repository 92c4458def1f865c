"""`convert` of a VOLO of own sizes by a configuration in TOML, JSON or Python."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from examples.imagenet.recipe import Recipe
from outlook_common import VOLOConfig
from outlook_common.weights import WeightsError, convert, inspect, read_arrays, write_arrays
from outlook_common.weights.formats.registry import open_file
from outlook_parity.cli.app import convert as command
from outlook_parity.models.builtin import draw_weights
from parity_tests.support.small_volo import CONFIG

# Neither shows in the shapes: heads of 4 channels, windows two places apart.
OWN = replace(CONFIG, num_heads=(2, 8), drop_path_rate=0.1)
FIELDS = {name: value for name, value in asdict(OWN).items() if name not in ("img_size", "num_classes", "in_chans")}


def toml(fields: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return json.dumps(list(value) if isinstance(value, tuple) else value)

    return "".join(f"{name} = {shown(value)}\n" for name, value in fields.items())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_arrays(tmp_path / "own.npz", draw_weights(OWN))
    return tmp_path / "own.npz"


def written_config(path: Path) -> dict[str, Any]:
    found = json.loads(open_file(path).metadata["outlook.config"])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


GIVEN = {
    "TOML": ("a.toml", toml(FIELDS)),
    "a recipe": ("a.toml", "[model]\n" + toml(FIELDS) + "[training]\nepochs = 3\n"),
    "JSON": ("a.json", json.dumps(FIELDS)),
    "all fields": ("a.json", json.dumps(asdict(OWN))),
    "changes to a released one": (
        "a.json",
        json.dumps({"variant": "volo_d1_224"} | FIELDS),
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_shapes_do_not_show_comes_from_the_file_and_into_the_metadata(
    source: Path, tmp_path: Path, name: str
) -> None:
    file, text = GIVEN[name]
    (tmp_path / file).write_text(text)
    done = convert(source, tmp_path / "out.safetensors", to="torch", config=tmp_path / file)
    assert done.sizes["num_classes"] == OWN.num_classes
    assert written_config(tmp_path / "out.safetensors") == asdict(OWN)
    for key, array in read_arrays(tmp_path / "out.safetensors").items():
        assert np.array_equal(array, draw_weights(OWN)[key])
    without = convert(source, tmp_path / "plain.safetensors", to="torch")
    assert without.model == done.model
    assert "num_heads" in written_config(tmp_path / "out.safetensors")
    assert "num_heads" not in written_config(tmp_path / "plain.safetensors")
    # From the metadata alone it converts the same from now on.
    convert(tmp_path / "out.safetensors", tmp_path / "again.npz")
    assert written_config(tmp_path / "again.npz") == asdict(OWN)


@pytest.mark.parametrize("given", [OWN, FIELDS])
def test_python_takes_a_configuration_or_a_mapping(source: Path, tmp_path: Path, given: Any) -> None:
    convert(source, tmp_path / "out.npz", config=given)
    assert written_config(tmp_path / "out.npz") == asdict(OWN)
    assert inspect(tmp_path / "out.npz").model is not None


def test_weights_of_other_sizes_are_refused_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    for fields in (FIELDS | {"layers": (1, 3)}, FIELDS | {"num_classes": 7}, FIELDS | {"embed_dims": (8, 32)}):
        with pytest.raises(WeightsError, match=r"problems? with its \d+ tensors for VOLO"):
            convert(source, tmp_path / "out.npz", config=fields)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("a.yaml", "", r"a\.yaml: a configuration is a file in \.toml or \.json"),
        ("a.toml", "layers = [", r"a\.toml: not readable as TOML"),
        ("a.json", "[1]", r"a\.json: it holds list, expected fields of VOLOConfig by name"),
        ("a.toml", toml(FIELDS | {"head_count": 3}), "head_count"),
        ("a.toml", toml({"variant": "volo_d1_224", "num_head": (1,)}), "did you mean 'num_heads'"),
        ("a.toml", toml({"layers": (1, 2)}), "missing .* required .*'embed_dims'"),
        ("a.toml", toml(FIELDS | {"num_heads": (3, 8)}), "3"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_its_fault(
    source: Path, tmp_path: Path, file: str, text: str, words: str
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        convert(source, tmp_path / "out.npz", config=tmp_path / file)
    assert file in str(error.value)


def test_model_and_configuration_exclude_each_other(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model='volo_d1_224' and config= both say which model it is"):
        convert(source, tmp_path / "out.npz", model="volo_d1_224", config=OWN)


def test_the_command_takes_the_file_of_a_recipe(tmp_path: Path) -> None:
    recipe = Path("examples/imagenet/digits.toml")
    config: VOLOConfig = Recipe.read(recipe).model
    write_arrays(tmp_path / "a.npz", draw_weights(config))
    app = typer.Typer()
    app.command()(command.convert)
    arguments = [str(tmp_path / "a.npz"), str(tmp_path / "b.safetensors"), "--config", str(recipe)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert written_config(tmp_path / "b.safetensors") == asdict(config)
