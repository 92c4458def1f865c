"""`outlook convert` and `outlook inspect`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from outlook_common.arrays import to_tensor
from outlook_common.weights import WeightsError, read_arrays, write_arrays
from outlook_parity.cli.app import convert, inspect
from parity_tests.weights.layers import (
    TABLE,
    WEIGHTS,
    assert_same_bits,
    inside_a_model,
    layer_bits,
    layer_weights,
    renamed,
)

app = typer.Typer()
app.command()(convert.convert)
app.command()(inspect.inspect)


def outlook(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def outlook_json(*arguments: Any) -> dict[str, Any]:
    result = outlook(*arguments, "--json", "--quiet")  # its runner mixed stderr with stdout before Click 8.2
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    write_arrays(path, layer_bits("bfloat16"))
    return path


def test_convert_writes_the_file_and_reports_what_it_found_and_wrote(file: Path, tmp_path: Path) -> None:
    result = outlook("convert", file, tmp_path / "out.npz")
    assert result.exit_code == 0, result.output
    for words in ("OutlookAttention(dim=6", str(file), "out.npz", "torch", "flax", "6 bfloat16"):
        assert words in result.stdout
    assert_same_bits(read_arrays(tmp_path / "out.npz"), renamed(layer_bits("bfloat16"), TABLE, "flax"))


def test_convert_takes_prefix_naming_and_averaged_weights(tmp_path: Path) -> None:
    averaged = {f"body.{name}": to_tensor(array) for name, array in layer_weights(seed=5).items()}
    plain = {f"body.{name}": to_tensor(array) for name, array in WEIGHTS.items()}
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "a.pth.tar")
    out = tmp_path / "out.safetensors"
    done = outlook_json(
        "convert", tmp_path / "a.pth.tar", out, "--to", "external-attention", "--prefix", "body", "--use-ema"
    )
    assert_same_bits(read_arrays(out), renamed(layer_weights(seed=5), TABLE, "external-attention"))
    assert (done["found_naming"], done["written_naming"], done["prefix"]) == ("torch", "external-attention", "body")
    assert done["sizes"]["num_heads"] == 2


def test_convert_of_broken_weights_reports_all_problems_and_writes_nothing(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {name: array for name, array in WEIGHTS.items() if "bias" not in name})
    result = outlook("convert", tmp_path / "a.npz", tmp_path / "b.npz")
    assert isinstance(result.exception, WeightsError)
    assert result.exception.names("missing") == ["attn.bias", "proj.bias"]
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("name", ["absent[torch].npz", "absent.h5"])
def test_usage_errors_end_in_one_line_and_exit_code_2(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from outlook_parity.cli.app import main

    monkeypatch.setattr(sys, "argv", ["outlook", "convert", "--quiet", str(tmp_path / name), str(tmp_path / "b.npz")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / name) in error  # square brackets included
    assert error.count("\n") == 1


def test_inspect_shows_model_naming_and_each_tensor(file: Path) -> None:
    found = outlook_json("inspect", file)
    assert found["model"] == "OutlookAttention(dim=6, attn_features=162, qkv_bias=True)"
    assert found["naming"] == "torch"
    assert {row["name"]: tuple(row["shape"]) for row in found["tensors"]} == {e.torch: e.shape for e in TABLE.entries}
    assert {row["dtype"] for row in found["tensors"]} == {"bfloat16"}
    text = outlook("inspect", file).stdout
    for words in ("naming: torch", "dim=6", "attn.weight", "162×6", "bfloat16"):
        assert words in text


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_inspect_counts_nan_and_inf(tmp_path: Path, dtype: str) -> None:
    weights = layer_weights(dtype)
    weights["proj.weight"][0, :2] = np.nan
    weights["proj.weight"][1, :3] = [np.inf, -np.inf, np.inf]
    write_arrays(tmp_path / "a.npz", weights)
    counts = {row["name"]: (row["nan"], row["inf"]) for row in outlook_json("inspect", tmp_path / "a.npz")["tensors"]}
    assert counts.pop("proj.weight") == (2, 3)
    assert set(counts.values()) == {(0, 0)}


def test_inspect_of_an_unknown_model_lists_prefixes_with_layers(tmp_path: Path) -> None:
    torch.save({name: to_tensor(array) for name, array in inside_a_model("torch").items()}, tmp_path / "a.pth")
    found = outlook_json("inspect", tmp_path / "a.pth")
    assert (found["model"], found["naming"]) == (None, None)
    assert found["prefixes"] == ["network.0.0.attn", "network.0.1.attn"]
    assert len(found["tensors"]) == 14
    assert "not known" in outlook("inspect", tmp_path / "a.pth").stdout
    part = outlook_json("inspect", tmp_path / "a.pth", "--prefix", "network.0.1.attn")
    assert part["naming"] == "torch"
    assert len(part["tensors"]) == 6


def test_inspect_shows_the_type_of_values_that_are_no_tensors(tmp_path: Path) -> None:
    torch.save({"v.weight": torch.ones(2, 2), "note": "by hand"}, tmp_path / "a.pth")
    rows = {row["name"]: row["dtype"] for row in outlook_json("inspect", tmp_path / "a.pth")["tensors"]}
    assert rows == {"v.weight": "float32", "note": "not numbers: str"}


def test_inspect_never_cuts_a_name_short_on_a_narrow_terminal(tmp_path: Path) -> None:
    name = "a_rather_long_module." * 6 + "weight"
    write_arrays(tmp_path / "a.npz", {name: np.ones(2)})
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.npz")], env={"COLUMNS": "60"})
    first_column = "".join(line.split("│")[1].strip() for line in result.stdout.splitlines() if line.count("│") > 2)
    assert first_column == name


def test_inspect_cuts_no_number_short_on_a_usual_terminal(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"a_module.with.a.name": np.array([-1.2345e-12, -6.789e11])})
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.npz")], env={"COLUMNS": "80"})
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.count("│") > 2]
    cells = ["".join(part.strip() for part in column) for column in zip(*rows, strict=True)]
    sha256 = outlook_json("inspect", tmp_path / "a.npz")["tensors"][0]["sha256"][:12]
    numbers = ["-6.79e+11", "-1.23e-12", "-3.39e+11", "3.39e+11"]
    assert cells == ["a_module.with.a.name", "float64", "2", "0", "0", "0", *numbers, sha256]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_a_terminal_cannot_show_are_no_error(file: Path, tmp_path: Path, encoding: str) -> None:
    source = os.fsencode(tmp_path) + b"/caf\xe9.safetensors"
    Path(os.fsdecode(source)).write_bytes(file.read_bytes())
    code = "from outlook_parity.cli.app import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    for arguments in (["inspect", source], ["convert", source, tmp_path / "b.npz"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert "\\udce9.safetensors" in done.stdout.replace("\n", "")


@pytest.mark.parametrize(("suffix", "imported"), [(".npz", []), (".safetensors", []), (".pth", ["torch"])])
def test_commands_import_a_framework_only_for_pytorchs_files(tmp_path: Path, suffix: str, imported: list[str]) -> None:
    write_arrays(tmp_path / f"a{suffix}", layer_bits("bfloat16"))
    code = f"""if True:
        import sys
        from pathlib import Path
        from outlook_parity.cli.app import convert
        from outlook_parity.cli.app import inspect
        source = Path(sys.argv[1])
        convert.convert(source, source.with_name("b{suffix}"))
        inspect.inspect(source)
        print(sorted({{"torch", "jax", "flax"}} & sys.modules.keys()))"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / f"a{suffix}")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(imported)
