"""`outlook inspect` of one checkpoint and of two, and the options of `outlook convert`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outlook_common.arrays import to_tensor
from outlook_common.weights import WeightsError, convert, read_arrays, write_arrays
from outlook_common.weights.conversion import renamed
from outlook_common.weights.statistics import Statistics
from parity_tests.cli.test_convert import outlook, outlook_json
from parity_tests.weights.test_load import FLOATS, TABLE, WEIGHTS, any_bits, assert_same_bits


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in outlook_json("inspect", path)["tensors"]}


@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_are_those_of_the_finite_numbers(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    numbers = (3 + rng.standard_normal((700, 600))).astype(dtype)
    numbers[0, :7] = [np.nan, np.inf, -np.inf, np.nan, 0, -0.0, 0]
    write_arrays(tmp_path / "a.npz", {"x": numbers, "none": np.full(3, np.nan), "empty": np.zeros((0, 2))})
    found = rows(tmp_path / "a.npz")
    finite = numbers.astype(np.float64)[np.isfinite(numbers.astype(np.float64))]
    row = found["x"]
    assert (row["size"], row["nan"], row["inf"]) == (420_000, 2, 2)
    assert row["zeros"] == np.count_nonzero(numbers.astype(np.float64) == 0)
    assert (row["smallest"], row["largest"]) == (finite.min(), finite.max())
    assert abs(row["mean"] - finite.mean()) < 1e-12
    assert abs(row["deviation"] - finite.std()) < 1e-12
    for name in ("none", "empty"):
        assert [found[name][key] for key in ("smallest", "largest", "mean", "deviation")] == [None] * 4


def test_statistics_do_not_lose_small_deviations_beside_a_large_mean() -> None:
    numbers = 1e8 + np.random.default_rng(0).standard_normal(100_000)
    seen = Statistics(numbers.dtype)
    for block in np.array_split(numbers, 7):
        list(seen.watch([block.view(np.uint8)]))
    assert seen.deviation == pytest.approx(numbers.std(), rel=1e-9)


def test_signalling_nans_are_counted_without_a_warning(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", {"x": np.full(4, 0x7F81, np.uint16).view("bfloat16")})
    assert rows(tmp_path / "a.npz")["x"]["nan"] == 4


def test_hashes_are_of_the_file_and_of_the_weights_in_pytorchs_layout(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.safetensors", WEIGHTS)
    convert(tmp_path / "a.safetensors", tmp_path / "b.npz", to="flax")
    a, b = (outlook_json("inspect", tmp_path / name) for name in ("a.safetensors", "b.npz"))
    assert a["sha256"] == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert a["sha256"] != b["sha256"]
    assert a["weights_sha256"] == b["weights_sha256"]
    sums = {row["torch_name"]: row["sha256"] for row in b["tensors"]}
    assert sums == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in WEIGHTS.items()}
    assert {row["name"] for row in b["tensors"]} == set(TABLE.names("flax"))
    lines = outlook("inspect", tmp_path / "b.npz", "--manifest").stdout.splitlines()
    assert sorted(lines) == sorted(outlook("inspect", tmp_path / "a.safetensors", "--manifest").stdout.splitlines())
    assert f"{sums['v.weight']}  float32  6x6  v.weight" in lines
    assert outlook_json("inspect", tmp_path / "b.npz")["metadata"]["outlook.source_sha256"] == a["sha256"]


def test_manifest_of_other_weights_differs(tmp_path: Path) -> None:
    changed = {name: array.copy() for name, array in WEIGHTS.items()}
    changed["v.bias"].view("u4")[0] ^= 1
    for name, arrays in (("a", WEIGHTS), ("b", changed)):
        write_arrays(tmp_path / f"{name}.npz", arrays)
    found = [outlook_json("inspect", tmp_path / f"{name}.npz") for name in "ab"]
    assert found[0]["weights_sha256"] != found[1]["weights_sha256"]


# Two checkpoints


def test_two_checkpoints_in_other_formats_and_namings_are_the_same(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.pth", WEIGHTS)
    convert(tmp_path / "a.pth", tmp_path / "b.npz", to="flax")
    convert(tmp_path / "a.pth", tmp_path / "c.safetensors", to="external-attention")
    for other in ("b.npz", "c.safetensors"):
        result = outlook("inspect", tmp_path / "a.pth", tmp_path / other)
        assert result.exit_code == 0, result.output
        assert "every bit of 6 tensors is the same" in result.stdout


def test_every_difference_of_two_checkpoints_is_named_and_counted(tmp_path: Path) -> None:
    other = {name: array.copy() for name, array in WEIGHTS.items()}
    other["v.weight"][0, :2] += [1.0, -3.0]
    other["proj.weight"].view("u4")[5, 5] ^= 1
    other["attn.bias"] = other["attn.bias"].astype(np.float64)
    other["v.bias"] = other["v.bias"].astype(np.float16)
    other["proj.bias"] = other["proj.bias"][:5]
    other["epoch"] = np.array(3)
    del other["attn.weight"]
    write_arrays(tmp_path / "a.npz", WEIGHTS)
    write_arrays(tmp_path / "b.safetensors", other)
    result = outlook("inspect", tmp_path / "a.npz", tmp_path / "b.safetensors", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    found = {item["name"]: item for item in told["differences"]}
    assert not told["same"]
    assert {name: item["kind"] for name, item in found.items()} == {
        "attn.weight": "only in A",
        "epoch": "only in B",
        "v.weight": "numbers",
        "v.bias": "dtype",
        "attn.bias": "dtype",
        "proj.weight": "numbers",
        "proj.bias": "shape",
    }
    assert found["v.weight"]["differing"] == 2
    assert found["v.weight"]["largest"] == pytest.approx(3, rel=1e-6)
    assert found["proj.weight"]["detail"].startswith("1 of 36 numbers differ, by ")
    assert found["attn.bias"]["detail"] == "float32 in A, float64 in B; every number is the same"
    assert found["v.bias"]["differing"] == 6
    assert found["proj.bias"]["detail"] == "(6,) in A, (5,) in B"
    text = outlook("inspect", tmp_path / "a.npz", tmp_path / "b.safetensors")
    assert text.exit_code == 1
    for words in ("v.weight", "2 of 36 numbers differ, by 3 at most", "only in B"):
        assert words in text.stdout


@pytest.mark.parametrize("differ", [False, True], ids=["the same", "different"])
def test_what_is_no_weight_is_not_compared_and_said_so(tmp_path: Path, differ: bool) -> None:
    none = {"dropout.rngs.count": np.array(7, np.uint32), "drop_path1.rate": np.array(0.1, np.float32)}
    other = {name: array + 1 if differ and name == "v.bias" else array for name, array in WEIGHTS.items()}
    write_arrays(tmp_path / "a.npz", {f"net.{name}": array for name, array in (WEIGHTS | none).items()})
    write_arrays(tmp_path / "b.npz", {f"net.{name}": array for name, array in other.items()})
    for first, second, where in (("a.npz", "b.npz", "A"), ("b.npz", "a.npz", "B")):
        pair = ("inspect", tmp_path / first, tmp_path / second, "--prefix", "net")
        text, told = outlook(*pair), outlook(*pair, "--json")
        assert (text.exit_code, told.exit_code) == (differ, differ)
        left_out = f"not weights in {where} (2), not compared: dropout.rngs.count, drop_path1.rate\n"
        assert text.stdout.endswith(left_out)
        assert text.stdout.count("not weights in ") == 1
        named = {"a": [], "b": []} | {where.lower(): sorted(none, reverse=True)}
        assert json.loads(told.stdout)["not_weights"] == named


def test_nan_payloads_and_signs_of_zero_are_differences(tmp_path: Path) -> None:
    bits = any_bits((3, 4), "float32", np.random.default_rng(0))
    for place, name in ((0, "zero"), (3, "nan")):
        other = bits.copy()
        other.view("u4").reshape(-1)[place] ^= 1 << 31 if name == "zero" else 1
        write_arrays(tmp_path / "a.npz", {"x": bits})
        write_arrays(tmp_path / "b.npz", {"x": other})
        assert outlook("inspect", tmp_path / "a.npz", tmp_path / "b.npz").exit_code == 1, name


def test_nothing_compared_is_no_pass(tmp_path: Path) -> None:
    torch.save({"note": "no tensors"}, tmp_path / "a.pth")
    result = outlook("inspect", tmp_path / "a.pth", tmp_path / "a.pth")
    assert isinstance(result.exception, WeightsError)
    assert "there are no tensors to compare" in str(result.exception)


@pytest.mark.parametrize("how", ["nested and flat", "in two namings"])
def test_names_that_come_twice_are_not_compared_as_if_one_were_not_there(tmp_path: Path, how: str) -> None:
    if how == "nested and flat":
        given = {name: to_tensor(array) for name, array in WEIGHTS.items()}
        twice = {"v": {"weight": given["v.weight"] + 1}, **given}
    else:
        given = {name: to_tensor(array) for name, array in renamed(WEIGHTS, TABLE, "flax").items()}
        twice = {**given, "v.weight": given["v.kernel"].T}
    torch.save(given, tmp_path / "a.pth")
    torch.save(twice, tmp_path / "b.pth")
    for pair in (("a.pth", "b.pth"), ("b.pth", "a.pth"), ("b.pth", "b.pth")):
        error = outlook("inspect", *(tmp_path / name for name in pair)).exception
        assert isinstance(error, WeightsError)
        assert error.names("duplicate") == ["v.weight"]
        assert "b.pth" in str(error)


@pytest.mark.parametrize("command", [["inspect"], ["convert", "b.npz"]], ids=["inspect", "convert"])
def test_a_prefix_with_nothing_below_is_an_error_that_says_what_there_is(tmp_path: Path, command: list[str]) -> None:
    where = [tmp_path / name for name in ("a.npz", *command[1:])]
    for names, words in (
        (WEIGHTS, "without a prefix there is OutlookAttention(dim=6"),
        ({f"net.{name}": array for name, array in WEIGHTS.items()}, "there is a known model with prefix='net'"),
        ({"other.weight": np.ones(3)}, "its names are other.weight"),
    ):
        write_arrays(where[0], names)
        error = outlook(command[0], *where, "--prefix", "state_dict").exception
        assert isinstance(error, WeightsError)
        assert f"nothing below the prefix 'state_dict'; {words}" in str(error)


# The options of `outlook convert`


def test_convert_lists_what_it_left_out(tmp_path: Path) -> None:
    lacking = {name: to_tensor(array) for name, array in WEIGHTS.items() if name != "attn.bias"}
    torch.save(lacking | {"epoch": 3}, tmp_path / "a.pth")
    out = tmp_path / "b.npz"
    assert outlook("convert", tmp_path / "a.pth", out).exit_code == 1
    options = ("--allow-missing", "--ignore-unexpected", "--to", "torch", "--manifest")
    result = outlook("convert", tmp_path / "a.pth", out, *options)
    assert result.exit_code == 0, result.output
    assert "missing (1): attn.bias" in result.stdout
    assert "ignored (1): epoch" in result.stdout
    assert hashlib.sha256(WEIGHTS["v.weight"].tobytes()).hexdigest() in result.stdout
    done = outlook_json("convert", tmp_path / "a.pth", out, *options)
    assert (done["missing"], done["ignored"], done["tensors"]) == (["attn.bias"], ["epoch"], 5)


def test_convert_takes_dtype_model_and_shard_size(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.safetensors", WEIGHTS)
    done = outlook_json(
        "convert", tmp_path / "a.safetensors", tmp_path / "b", "--model", "layer", "--dtype", "float64",
        "--to", "torch", "--max-shard-size", "4 kB",
    )  # fmt: skip
    assert done["dtypes"] == {"float64": 6}
    files = {path.name for path in (tmp_path / "b").iterdir()}
    assert "model.safetensors.index.json" in files
    assert len(files) > 2
    convert(tmp_path / "b", tmp_path / "c.npz", to="torch", dtype="float32")
    assert_same_bits(read_arrays(tmp_path / "c.npz"), WEIGHTS)
    wrong = outlook("convert", tmp_path / "a.safetensors", tmp_path / "d", "--max-shard-size", "much")
    assert "--max-shard-size must be a number of bytes, kB, MB or GB, as 2GB; got 'much'" in str(wrong.exception)


def test_inspect_of_a_hub_id_or_folder_takes_what_convert_takes(tmp_path: Path) -> None:
    convert(WEIGHTS, tmp_path / "a", max_shard_size=2000)
    assert outlook_json("inspect", tmp_path / "a")["naming"] == "flax"
    assert isinstance(outlook("inspect", tmp_path / "absent.npz").exception, FileNotFoundError)
