"""Partition specs from the table of logical axes: every variable has one, Flax's metadata says the same."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import outlook_jax
from outlook_common.axes import LOGICAL_AXES, logical_axes, mesh_axes
from outlook_common.config import VOLO_VARIANTS, OutlookAttentionConfig, volo_config
from outlook_common.weights import write_arrays
from outlook_common.weights.identify import table_for
from outlook_common.weights.tables.volo import volo_table
from outlook_parity.models.builtin import draw_weights
from parity_tests.support.divisible_sizes import SIZES

MESH = AbstractMesh((4, 2), ("data", "model"))
# What is left of weights that lie along both axes, without the one of the batch.
MODEL_ALONE = {"P('model',)", "P('model', None)", "P(None, 'model')"}
RULES: dict[str, Any] = {
    "data": "data",
    "fsdp": "fsdp",
    "tensor": "tensor",
    "own": {"embed": "data", "mlp": ("model",), "classes": "model", "stem": None},
    "both axes": {"mlp": ("data", "model")},
}


def abstract(**overrides: Any) -> outlook_jax.VOLO:
    model: outlook_jax.VOLO = nnx.eval_shape(
        lambda: outlook_jax.volo("volo_d1_224", rngs=nnx.Rngs(0), **SIZES | overrides)
    )
    return model


def flat(state: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def model() -> outlook_jax.VOLO:
    return abstract()


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_every_parameter_of_every_variant_has_logical_axes_and_no_matrix_has_none(name: str) -> None:
    for entry in volo_table(volo_config(name)).entries:
        axes = logical_axes(entry)
        assert len(axes) == len(entry.shape)
        assert set(axes) <= {None, *LOGICAL_AXES}
        assert any(axes) == (len(entry.shape) > 0)


def test_a_layer_alone_has_the_axes_that_it_has_inside_a_model() -> None:
    whole = {entry.torch: entry for entry in volo_table(volo_config("volo_d1_224")).entries}
    layer = table_for(OutlookAttentionConfig(192, 6)).entries
    for entry in layer:
        assert logical_axes(entry) == logical_axes(whole[f"network.0.0.attn.{entry.torch}"])
    assert {entry.torch: logical_axes(entry) for entry in layer} == {
        "v.weight": ("heads", "embed"),
        "attn.weight": ("heads", "embed"),
        "attn.bias": ("heads",),
        "proj.weight": ("embed", "heads"),
        "proj.bias": ("embed",),
    }


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_specs_have_the_structure_of_the_state_and_divide_every_shape(model: outlook_jax.VOLO, rules: Any) -> None:
    specs = outlook_jax.partition_specs(model, MESH, rules)
    state = nnx.state(model)
    assert jax.tree.structure(jax.tree.map(lambda _: 0, specs)) == jax.tree.structure(jax.tree.map(lambda _: 0, state))
    shapes = {path: value.shape for path, value in flat(state).items()}
    for path, spec in flat(specs).items():
        NamedSharding(MESH, spec).shard_shape(shapes[path])  # raises where it does not


def test_rules_split_what_they_say(model: outlook_jax.VOLO) -> None:
    specs = {rules: flat(outlook_jax.partition_specs(model, MESH, rules)) for rules in ("data", "fsdp", "tensor")}
    assert not any(map(any, specs["data"].values()))
    fc1, qkv, conv = "network.2.0.mlp.fc1.kernel", "network.2.0.attn.qkv.kernel", "patch_embed.conv.3.kernel"
    assert specs["fsdp"][fc1] == PartitionSpec("data", None)  # Flax has inputs first
    assert specs["tensor"][fc1] == PartitionSpec(None, "model")
    assert specs["tensor"]["network.2.0.mlp.fc2.kernel"] == PartitionSpec("model", None)
    assert specs["tensor"][qkv] == PartitionSpec(None, "model")
    assert specs["fsdp"][conv] == PartitionSpec(None, None, None, "data")
    assert specs["fsdp"]["patch_embed.conv.1.num_batches_tracked"] == PartitionSpec()
    assert specs["fsdp"]["pos_embed"] == PartitionSpec(None, None, None, "data")
    whole = [path for path, spec in specs["fsdp"].items() if not any(spec) and path.endswith("kernel")]
    assert not whole


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_flax_metadata_gives_the_same_specs(rules: Any) -> None:
    model = abstract()
    outlook_jax.set_partitioning(model, MESH, rules)
    of_flax = flat(nnx.get_partition_spec(nnx.state(model)))
    assert of_flax == flat(outlook_jax.partition_specs(model, MESH, rules))
    assert model.head.kernel.get_metadata("out_sharding") == ("embed", "classes")


def test_what_does_not_divide_is_refused_with_numbers(model: outlook_jax.VOLO) -> None:
    with pytest.raises(ValueError, match=r"\(data=3\) does not divide \d+ axes") as error:
        outlook_jax.partition_specs(model, AbstractMesh((3,), ("data",)), "fsdp")
    assert "pos_embed: embed of 32 on data of 3" in str(error.value)
    assert re.search(r"and \d+ more", str(error.value))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("fdsp", "unknown rules 'fdsp'; known: data, fsdp, tensor"),
        ({"embbed": "data"}, "did you mean 'embed'"),
        ({"embed": "rows"}, "axes rows of the mesh; it has (data=4, model=2)"),
        ({"embed": "data", "heads": "data"}, "two of its axes on data"),
    ],
)
def test_unknown_rules_and_axes_are_refused(model: outlook_jax.VOLO, rules: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        outlook_jax.partition_specs(model, MESH, rules)


def test_tensor_rules_need_an_axis_for_them(model: outlook_jax.VOLO) -> None:
    with pytest.raises(ValueError, match="axis model or tensor; it has "):
        outlook_jax.partition_specs(model, AbstractMesh((4,), ("data",)), "tensor")


def test_the_axis_fsdp_is_taken_before_data(model: outlook_jax.VOLO) -> None:
    entries = volo_table(model.config).entries
    found = mesh_axes(entries, {"data": 2, "fsdp": 4}, "fsdp")
    assert {axis for axes in found.values() for axis in axes} == {None, "fsdp"}


@pytest.mark.parametrize(
    ("rules", "split"),
    [("fsdp", set()), ("tensor", MODEL_ALONE), ("both axes", MODEL_ALONE)],
)
def test_weights_are_gathered_along_the_batch_alone(model: outlook_jax.VOLO, rules: str, split: set[str]) -> None:
    graph, state = nnx.split(model)

    def gathered(state: Any) -> Any:
        return nnx.state(outlook_jax.gather_weights(nnx.merge(graph, state), MESH, RULES[rules]), nnx.Param)

    specs = re.findall(r"sharding=NamedSharding\(.*?spec=(P\(.*?\))", str(jax.make_jaxpr(gathered)(state)))
    assert len(specs) == len(flat(nnx.state(model, nnx.Param)))
    assert {spec for spec in specs if "'" in spec} == split


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "volo.safetensors"
    write_arrays(path, draw_weights(volo_config("volo_d1_224", **SIZES)))
    return path


def test_pretrained_weights_go_where_the_shardings_say(model: outlook_jax.VOLO, weights: Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    loaded = outlook_jax.from_pretrained(
        weights,
        variant="volo_d1_224",
        shardings=lambda model: outlook_jax.named_shardings(model, mesh, "fsdp"),
        **SIZES,
    )
    specs = flat(outlook_jax.partition_specs(model, mesh, "fsdp"))
    for path, value in flat(nnx.state(loaded)).items():
        assert value.sharding == NamedSharding(mesh, specs[path]), path
    with pytest.raises(ValueError, match="shardings has none for"):
        outlook_jax.from_pretrained(weights, variant="volo_d1_224", shardings=nnx.State({}), **SIZES)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_pretrained_weights_load_under_a_mesh(weights: Path, kind: AxisType) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        loaded = outlook_jax.from_pretrained(weights, variant="volo_d1_224", **SIZES)
    assert loaded.head.kernel.get_value().sharding.mesh == mesh
