"""The plan of training on many devices: its arithmetic against counted parameters, shards and compiled programs."""

import json
from math import prod
from typing import Any

import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

import outlook_jax
from benchmarks import plan, report
from outlook_common.config import volo_config
from parity_tests.support.exchanged_bytes import BATCH, CONFIG, MESHES
from parity_tests.support.markdown import ROOT
from parity_tests.support.published import COUNTED_BY_TIMM
from parity_tests.support.subprocesses import run_on_devices

NAMES = ("d1", "d2", "d3", "d4", "d5")
MACHINES = {"v5e": plan.V5E_256, "H100": plan.H100_64}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_products_are_those_that_timm_prints(name: str) -> None:
    config, printed = volo_config(f"volo_{name}_224"), COUNTED_BY_TIMM[f"volo_{name}_224"]
    assert plan.work(config).multiplications / 1e9 == pytest.approx(printed.gmacs, rel=0.02)
    assert plan.parameters(config, {"data": 1}, "data").total / 1e6 == pytest.approx(printed.params, abs=0.006)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rules", ["data", "fsdp"])
def test_what_a_device_holds_is_what_the_shardings_of_the_model_give_it(machine: str, rules: str) -> None:
    config, mesh = volo_config("volo_d1_224"), MACHINES[machine].mesh
    model = nnx.eval_shape(lambda: outlook_jax.VOLO(config, rngs=nnx.Rngs(0)))
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    specs = nnx.to_flat_state(outlook_jax.partition_specs(model, abstract, rules))
    spec_of = {path: variable.get_value() for path, variable in specs}
    shapes = nnx.to_flat_state(nnx.state(model, nnx.Param))
    numbers = sum(
        prod(NamedSharding(abstract, spec_of[path]).shard_shape(variable.get_value().shape))
        for path, variable in shapes
    )
    counted = plan.parameters(config, mesh, rules)
    assert counted.total == sum(prod(variable.get_value().shape) for _, variable in shapes)
    assert plan.held(counted, mesh["data"]) == 4 * 4 * numbers  # parameters, gradients, two moments; float32


def test_a_batch_that_does_not_divide_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match="v5e-256: 256 devices do not divide a batch of 1000"):
        plan.plan(volo_config("volo_d1_224"), plan.V5E_256, rules="data", batch=1000)


def test_the_page_has_the_numbers_of_the_plan() -> None:
    assert report.plan(plan.plans()) in (ROOT / "docs" / "scaling.md").read_text()


def test_the_page_has_the_compilers_figures_beside_those_of_the_plan() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "sharded_step_v5e.json").read_text())
    planned = plan.plans()["v5e-256"]
    assert report.sharded_steps_table(found, planned) in (ROOT / "docs" / "scaling.md").read_text()
    for name, of in found.items():
        whole, split = planned[name.split("_")[1]]
        by_plan = split if name.endswith("fsdp") else whole
        # Four images and their targets are 6 MB more; and a TPU pads: 12 rows of a weight that is split become 16.
        operands = by_plan.held * 3 / 4 / 1e6
        assert operands < of["operands MB"] < (4 / 3 if by_plan is split else 1) * operands + 12
        assert of["exchanged MB"].get("all-gather", 0) == pytest.approx(by_plan.gathered / 1e6, rel=0.01)


def test_both_rules_send_alike_for_a_sum_is_a_reduce_scatter_and_a_gather() -> None:
    for of in plan.plans().values():
        for whole, split in of.values():
            assert whole.sent.total == pytest.approx(split.sent.total)
            assert whole.communication == pytest.approx(split.communication)


@pytest.fixture(scope="module")
def compiled() -> Any:
    return run_on_devices("parity_tests.support.exchanged_bytes", 8)


# What the plan leaves out: vectors of three BatchNorms, forward and backward, and losses.
SMALL = 4 * (3 * 5 * CONFIG.stem_hidden_dim + 16)


@pytest.mark.slow(reason="compiles three training steps for eight devices")
@pytest.mark.parametrize("name", MESHES)
def test_compiled_programs_exchange_the_bytes_of_the_plan(compiled: Any, name: str) -> None:
    rules, mesh = MESHES[name]
    counted = plan.parameters(CONFIG, mesh, rules)
    exchanged = compiled[name]["exchanged"]
    # XLA:CPU has no reduce-scatter: it sums whole gradients, and each device takes its part.
    reduced = 4 * counted.total
    between = 4 * counted.total / mesh["data"] if "replica" in mesh else 0
    assert reduced <= exchanged["all-reduce"] <= reduced + between + SMALL
    gathered = 4 * counted.split
    assert gathered <= exchanged.get("all-gather", 0) <= gathered + SMALL
    # Token mixing flips the batch: twice the map after the stem's stages, and the values of the class token.
    assert exchanged.keys() - {"all-reduce", "all-gather"} == {"collective-permute"}


@pytest.mark.slow(reason="compiles three training steps for eight devices")
@pytest.mark.parametrize("name", MESHES)
def test_compiled_programs_hold_the_bytes_of_the_plan(compiled: Any, name: str) -> None:
    rules, mesh = MESHES[name]
    counted = plan.parameters(CONFIG, mesh, rules)
    gradients = 4 * (counted.split / mesh["data"] + counted.whole)
    rows, columns = CONFIG.token_map
    per_image = 4 * (3 * prod(CONFIG.img_size) + CONFIG.num_classes * (2 + rows * columns))
    batch = BATCH // prod(mesh.values()) * per_image
    expected = plan.held(counted, mesh["data"]) - gradients + batch
    assert compiled[name]["arguments"] == pytest.approx(expected, rel=0.02)
