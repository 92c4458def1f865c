"""JAX twins that several devices share run as they are, or are refused; and twins are spread over devices by rules."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from parity_tests.support.arithmetic import QUICK_FLAGS
from parity_tests.support.subprocesses import run_on_devices

pytestmark = pytest.mark.long(reason="verifies on eight devices, in processes of their own")

SCHEMA = json.loads(files("outlook_parity.report").joinpath("report.schema.json").read_text())
PROGRAM = "from outlook_parity.cli.app import main; main()"
ALL_LEVELS = {"weights", "forward", "layers", "gradients", "training"}


@pytest.fixture(scope="module")
def found() -> Any:
    return run_on_devices("parity_tests.support.sharded_twins", 8)


@pytest.mark.parametrize(
    ("name", "mesh", "split", "spec"),
    [
        ("weights on a mesh", {"data": 4, "model": 2}, 1, "P(None, 'model')"),
        ("weights on an explicit mesh", {"data": 4, "model": 2}, 1, "P(None, 'model')"),
        ("a batch that does not divide", {"data": 4, "model": 2}, 1, "P(None, 'model')"),
        ("inputs on a mesh", {"data": 4, "model": 2}, 0, "P()"),
        ("shard_map inside, weights on its mesh", {"data": 4, "model": 2}, 0, "P()"),
    ],
)
def test_a_sharded_twin_passes_on_its_mesh(found: Any, name: str, mesh: dict[str, int], split: int, spec: str) -> None:
    report = found[name]
    assert report["verdict"] == "pass", report
    assert set(report["levels"]) >= ALL_LEVELS
    assert (report["sharding"]["mesh"], report["sharding"]["rules"]) == (mesh, "as given")
    assert report["sharding"]["split"] == split
    assert report["seen"] == [spec]  # of the kernel, each time the twin ran module by module


def test_inputs_are_split_along_the_batch_if_it_divides_and_keep_their_own_sharding(found: Any) -> None:
    reports = {name: one for name, one in found.items() if name != "loaded" and one.get("sharding")}
    specs = {name: one["sharding"]["inputs"]["input"] for name, one in reports.items()}
    assert specs["weights on a mesh"] == "P('data',)"
    assert specs["a batch that does not divide"] == "P()"
    assert specs["inputs on a mesh"] == "P(('data', 'model'),)"


@pytest.mark.parametrize("name", ["a constraint inside", "shard_map inside"])
def test_a_twin_that_moves_to_several_devices_itself_passes(found: Any, name: str) -> None:
    assert found[name].get("verdict") == "pass", found[name]
    assert set(found[name]["levels"]) >= ALL_LEVELS


def test_what_is_wrong_on_several_devices_alone_is_a_mismatch(found: Any) -> None:
    assert found["each device for itself"]["verdict"] == "mismatch"


@pytest.mark.parametrize(("rules", "split"), [("data", 0), ("fsdp", 4)])
def test_rules_spread_a_twin_and_the_report_says_over_what(found: Any, rules: str, split: int) -> None:
    report = found[rules]
    assert report["verdict"] == "pass", report
    assert set(report["levels"]) >= ALL_LEVELS
    sharding = report["sharding"]
    assert (sharding["mesh"], sharding["rules"], sharding["split"]) == ({"data": 8}, rules, split)
    assert f"8 devices, mesh (data=8), {rules}" in " ".join(report["notes"])


@pytest.mark.parametrize(("name", "kernel"), [("data, watched", "P()"), ("fsdp, watched", "P('data',)")])
def test_a_twin_that_rules_spread_finds_its_weights_and_its_batch_there(found: Any, name: str, kernel: str) -> None:
    assert found[name]["verdict"] == "pass", found[name]
    assert found[name]["seen"] == [kernel]
    assert found[name]["batches"] == ["P('data',)"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two meshes", ("2 meshes", "explicit", "auto", "linear.bias")),
        ("a batch of 3 on 8", ("batch of 3", "a batch of 8 would do")),
        ("sharded, and devices", ("devices=8", "2 arrays sharded", "data=4, model=2")),
    ],
)
def test_what_cannot_run_sharded_is_refused_with_numbers(found: Any, name: str, words: tuple[str, ...]) -> None:
    assert not [word for word in words if word not in found[name]["error"]], found[name]


def test_loading_weights_of_pytorch_keeps_the_shardings(found: Any) -> None:
    assert found["loaded"] == ["P(None, 'model')"] * 2


def test_more_devices_than_there_are_is_not_run(found: Any) -> None:
    report = found["more devices than there are"]
    assert report["verdict"] == "not-run"
    assert "8 of 16 cpu devices" in report["reason"]


def test_the_command_line_makes_the_devices_and_says_the_mesh_in_json() -> None:
    command = [sys.executable, "-c", PROGRAM, "verify", "--model", "layer", "--json", "--quiet"]
    options = ["--devices", "4", "--sharding", "fsdp", "--dtype", "float64", "--level", "forward"]
    flags = {"XLA_FLAGS": QUICK_FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command + options, capture_output=True, text=True, env={**os.environ, **flags}, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, SCHEMA)
    assert report["sharding"]["mesh"] == {"data": 4}
    assert report["sharding"]["split"] == 4
