"""`convert` between all formats: bits, counters, metadata, shards, Orbax, options, no framework."""

import contextlib
import hashlib
import itertools
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import timm
import torch
from flax import nnx

import outlook_jax
import outlook_torch
from outlook_common.arrays import DTYPES
from outlook_common.config import VOLO_VARIANTS, VOLOConfig
from outlook_common.weights import WeightsError, convert, inspect, read_arrays, table_for, write_arrays
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.formats.sharded import INDEX
from outlook_common.weights.identify import recognise_as
from outlook_common.weights.infer import SHOWN, infer_volo
from outlook_common.weights.inspection import differences
from outlook_common.weights.io import atomic
from outlook_common.weights.io.lazy import as_lazy
from outlook_common.weights.match import resolve, resolve_checkpoint
from outlook_jax.weights import WEIGHTS as NNX_WEIGHTS
from outlook_jax.weights import path_name
from parity_tests.support.hub_server import Repository, serve, use_hub
from parity_tests.support.volo import FOUR_STAGES, draw_weights, small_config
from parity_tests.weights.layers import (
    CONFIG,
    DIM,
    FLOATS,
    HEADS,
    TABLE,
    TWINS,
    WEIGHTS,
    any_bits,
    assert_same_bits,
    both_twins,
    inside_a_model,
    jax_layer,
    layer_bits,
    layer_weights,
    renamed,
)

FORMATS = (".safetensors", ".npz", ".pth", ".orbax", ".shards")
LAYER_SHARD = 2000  # bytes: several shards


def convert_to(source: Any, path: Path, shard: int = LAYER_SHARD, **options: Any) -> Any:
    return convert(source, path, max_shard_size=shard if path.suffix == ".shards" else None, **options)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: as_lazy(value).read() for name, value in open_checkpoint(path).items}


def circuit(kinds: tuple[str, ...]) -> list[str]:
    """Return a round trip that goes from each kind to each once, itself included."""
    left = {kind: list(kinds) for kind in kinds}
    path, done = [kinds[0]], []
    while path:  # Hierholzer
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            done.append(path.pop())
    return done[::-1]


def test_the_circuit_visits_every_pair_of_formats_once() -> None:
    found = circuit(FORMATS)
    assert sorted(itertools.pairwise(found)) == sorted(itertools.product(FORMATS, FORMATS))


# Round trips


# Slow only in sum: 25 conversions for each of four dtypes.
SOME_SLOW = [
    pytest.param(dtype, marks=[pytest.mark.slow] if dtype in ("float64", "float16") else []) for dtype in FLOATS
]


@pytest.mark.parametrize("dtype", SOME_SLOW)
def test_bits_and_metadata_survive_every_pair_of_formats(tmp_path: Path, dtype: str) -> None:
    bits = layer_bits(dtype)
    here = tmp_path / "0.safetensors"
    write_arrays(here, bits, {"author": "somebody"})
    for step, (kind, following) in enumerate(itertools.pairwise(circuit(FORMATS)), start=1):
        there = tmp_path / f"{step}{following}"
        convert_to(here, there, to="flax" if step % 2 and following != ".pth" else "torch")
        assert_same_bits(resolve(there, TABLE), bits)
        assert open_checkpoint(there).metadata["author"] == "somebody", kind
        here = there


CHANGED = ("patch_embed.conv.1.num_batches_tracked", "patch_embed.conv.4.num_batches_tracked")


def volo_bits(config: VOLOConfig, dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for entry in table_for(config).entries:
        if entry.dtype:
            arrays[entry.torch] = np.array(rng.integers(0, 2**60), entry.dtype)
        else:
            numbers = np.frombuffer(rng.bytes(int(np.prod(entry.shape)) * DTYPES[dtype].itemsize), DTYPES[dtype])
            arrays[entry.torch] = numbers.reshape(entry.shape)
    return arrays


@pytest.mark.slow  # 25 conversions of 54 MB to 2.4 GB for each variant and dtype
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("variant", ["volo_d1_224", "volo_d2_224", "volo_d3_224", "volo_d4_224", "volo_d5_224"])
def test_bits_of_every_variant_survive_every_pair_of_formats(tmp_path: Path, variant: str, dtype: str) -> None:
    config = VOLO_VARIANTS[variant].config
    first = tmp_path / "0.safetensors"
    write_arrays(first, volo_bits(config, dtype), {"author": "somebody"})
    here = first
    for step, kind in enumerate(circuit(FORMATS)[1:], start=1):
        there = tmp_path / f"{step}{kind}"
        done = convert_to(here, there, shard=50_000_000, to="flax" if step % 2 and kind != ".pth" else "torch")
        source, found = open_checkpoint(here), open_checkpoint(there)
        assert done.model == variant
        assert differences(open_checkpoint(first), found) == [], (step, kind)
        if kind != ".pth":  # which has no place for metadata
            assert found.metadata["outlook.model"] == variant
            assert found.metadata.get("author") == source.metadata.get("author")
        if here != first:
            atomic.remove(here)
        here = there
    assert_same_bits(resolve(here, table_for(config)), volo_bits(config, dtype))
    for path in (first, here):
        atomic.remove(path)


def test_a_volo_with_its_counters_survives_torch_to_flax_to_torch(tmp_path: Path) -> None:
    bits = volo_bits(VOLO_VARIANTS["volo_d1_224"].config, "bfloat16")
    write_arrays(tmp_path / "a.safetensors", bits)
    there = convert(tmp_path / "a.safetensors", tmp_path / "b.npz")
    back = convert(tmp_path / "b.npz", tmp_path / "c.safetensors")
    assert (there.written_naming, back.written_naming) == ("flax", "torch")
    found = tensors(tmp_path / "c.safetensors")
    assert_same_bits(found, bits)
    assert all(found[name] > 2**32 for name in CHANGED)


def test_timms_model_to_flax_and_back_loads_into_timm_with_every_bit(tmp_path: Path) -> None:
    model = timm.create_model("volo_d1_224")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "timm.pth")
    convert(tmp_path / "timm.pth", tmp_path / "flax.safetensors")
    convert(tmp_path / "flax.safetensors", tmp_path / "back.pth")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# Orbax and shards


def test_orbax_itself_restores_what_is_written_and_the_twin_takes_it(tmp_path: Path) -> None:
    bits = layer_weights("bfloat16")
    assert convert(bits, tmp_path / "a.orbax").written_naming == "flax"
    restored = ocp.StandardCheckpointer().restore(tmp_path / "a.orbax")
    found = {f"{module}.{leaf}": np.asarray(array) for module, part in restored.items() for leaf, array in part.items()}
    assert_same_bits(found, {name: array.copy() for name, array in renamed(bits, TABLE, "flax").items()})


@pytest.mark.parametrize("save", ["state", "pure dict", "several items", "steps"])
def test_what_orbax_saved_of_the_twin_is_read(tmp_path: Path, save: str) -> None:
    layer = jax_layer()
    outlook_jax.load_weights(layer, WEIGHTS)
    state = nnx.state(layer, nnx.Param)
    if save == "steps":
        with ocp.CheckpointManager(tmp_path / "a") as manager:
            manager.save(7, args=ocp.args.StandardSave(nnx.to_pure_dict(state)))
    elif save == "several items":
        with ocp.CompositeCheckpointHandler() and ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
            saver.save(tmp_path / "a", ocp.args.Composite(state=ocp.args.StandardSave(nnx.to_pure_dict(state))))
    else:
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "a", state if save == "state" else nnx.to_pure_dict(state))
    convert(tmp_path / "a", tmp_path / "b.npz", to="torch")
    assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)


@pytest.mark.parametrize("pure", [False, True])
def test_an_orbax_folder_of_a_complete_nnx_state_lists_what_is_not_weights(tmp_path: Path, pure: bool) -> None:
    config = small_config(layers=(1, 1), drop_path_rate=0.1, attn_drop_rate=0.1)
    drawn = draw_weights(config).items()
    weights = {name: array.astype(np.float32) if array.ndim else array for name, array in drawn}
    model = outlook_jax.VOLO(config, rngs=nnx.Rngs(0))
    outlook_jax.load_weights(model, weights)
    state = nnx.state(model)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "a", nnx.to_pure_dict(state) if pure else state)
    variables = nnx.to_flat_state(state)
    others = {path_name(path) for path, variable in variables if not isinstance(variable, NNX_WEIGHTS)}
    assert {"rngs.key", "network.2.0.drop_path1.rate", "network.0.0.attn.attn_drop.rngs.count"} <= others
    checkpoint = open_checkpoint(tmp_path / "a")
    assert set(checkpoint.not_weights) == others
    assert set(inspect(tmp_path / "a").not_weights) == others
    assert set(checkpoint.below("network.0.0.attn").not_weights) == {
        name.removeprefix("network.0.0.attn.") for name in others if name.startswith("network.0.0.attn.")
    }
    assert_same_bits(resolve_checkpoint(checkpoint, table_for(config)), weights)
    fresh = outlook_jax.VOLO(config, rngs=nnx.Rngs(1))
    outlook_jax.load_weights(fresh, tmp_path / "a")
    assert_same_bits(outlook_jax.export_weights(fresh), weights)


@pytest.mark.parametrize("name", ["a%20b", "a%b", "a#b", "a?b=1"])
def test_an_orbax_folder_may_have_a_name_with_url_escapes(tmp_path: Path, name: str) -> None:
    convert(layer_weights(seed=1), tmp_path / "a b.orbax")  # what "a%20b" would be there
    convert(WEIGHTS, tmp_path / f"{name}.orbax")
    convert(tmp_path / f"{name}.orbax", tmp_path / "b.npz", to="torch")
    assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)


def test_nnx_state_saved_with_other_items_is_found_below_its_name(tmp_path: Path) -> None:
    layer = jax_layer()
    outlook_jax.load_weights(layer, WEIGHTS)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "a", {"model": nnx.state(layer), "step": 3, "scale": {"value": 1.0, "other": 2.0}})
    assert {"model.v.kernel", "step", "scale.value"} <= open_checkpoint(tmp_path / "a").names
    convert(tmp_path / "a", tmp_path / "b.npz", to="torch", prefix="model")
    assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)


def test_orbax_items_and_steps_may_have_any_name(tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt")
    with ocp.CheckpointManager(tmp_path / "a", options=options) as manager:
        tree = nnx.to_pure_dict(nnx.state(jax_layer(), nnx.Param))
        manager.save(3, args=ocp.args.Composite(weights=ocp.args.StandardSave(tree), notes=ocp.args.JsonSave({"a": 1})))
    (tmp_path / "a" / "ckpt_4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "a" / "ckpt_4.orbax-checkpoint-tmp" / "_METADATA").touch()
    assert open_checkpoint(tmp_path / "a").file == tmp_path / "a" / "ckpt_3" / "weights"
    assert open_checkpoint(tmp_path / "a").names == set(renamed(WEIGHTS, TABLE, "flax"))


def test_files_named_as_on_the_hub_take_precedence_over_orbax_folders(tmp_path: Path) -> None:
    write_arrays(tmp_path / "model.safetensors", WEIGHTS)
    convert(WEIGHTS, tmp_path / "other.orbax")
    assert open_checkpoint(tmp_path).file == tmp_path / "model.safetensors"


def test_nothing_is_written_into_the_folder_that_is_read(tmp_path: Path) -> None:
    convert(WEIGHTS, tmp_path / "a.orbax")
    with pytest.raises(WeightsError, match="inside the checkpoint that is read"):
        convert(tmp_path / "a.orbax", tmp_path / "a.orbax" / "b.npz")


def test_folder_with_several_steps_is_an_error_that_lists_them(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "a" / str(step)).mkdir(parents=True)
        convert(WEIGHTS, tmp_path / "a" / str(step) / "default.orbax")
        (tmp_path / "a" / str(step) / "default.orbax").rename(tmp_path / "a" / str(step) / "default")
    with pytest.raises(WeightsError, match="several Orbax checkpoints, pass the path of one: 1/default, 2/default"):
        convert(tmp_path / "a", tmp_path / "b.npz")
    convert(tmp_path / "a" / "2", tmp_path / "b.npz")


def test_damaged_orbax_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    convert(WEIGHTS, tmp_path / "a.orbax")
    files = sorted(path for path in (tmp_path / "a.orbax").rglob("*") if path.is_file() and path.stat().st_size > 50)
    rng = np.random.default_rng(0)
    read = 0
    for path in files:
        whole = path.read_bytes()
        for _ in range(4):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            path.write_bytes(rng.choice([bytes(damaged), whole[: len(whole) // 2], b""]))
            with contextlib.suppress(WeightsError, OSError):
                convert(tmp_path / "a.orbax", tmp_path / "b.npz", to="torch")
                read += 1
        path.write_bytes(whole)
    assert read < 3 * len(files)
    convert(tmp_path / "a.orbax", tmp_path / "b.npz", to="torch")
    assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)


def test_orbax_without_jax_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(WEIGHTS, tmp_path / "a.orbax")
    monkeypatch.setattr("outlook_common.extras.find_spec", lambda module: None)
    for source, destination in ((tmp_path / "a.orbax", "b.npz"), (WEIGHTS, "b.orbax")):
        with pytest.raises(ImportError, match=r"'outlook-attention\[jax\]'"):
            convert(source, tmp_path / destination)
    assert [path.name for path in tmp_path.iterdir()] == ["a.orbax"]


def test_shards_have_the_hubs_layout_and_at_most_the_requested_size(tmp_path: Path) -> None:
    convert(WEIGHTS, tmp_path / "a", to="torch", max_shard_size=200)
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in WEIGHTS.values())}
    assert list(index["weight_map"]) == list(WEIGHTS)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "a" / file, "np") as shard:
            held = [shard.get_tensor(key).nbytes for key in shard.keys()]  # noqa: SIM118
            assert np.array_equal(shard.get_tensor(name), WEIGHTS[name])
        assert len(held) == 1 or sum(held) <= 200
    for source in (tmp_path / "a", tmp_path / "a" / INDEX):
        convert(source, tmp_path / "b.npz", to="torch")
        assert_same_bits(read_arrays(tmp_path / "b.npz"), WEIGHTS)
    convert(layer_weights(seed=1), tmp_path / "a", to="torch", max_shard_size=10**6)  # replaces it whole
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["model.safetensors"]


def test_twins_load_from_shards_and_orbax(tmp_path: Path) -> None:
    convert(WEIGHTS, tmp_path / "a", max_shard_size=2000)
    convert(WEIGHTS, tmp_path / "a.orbax")
    for source in (tmp_path / "a", tmp_path / "a.orbax"):
        layer = outlook_torch.OutlookAttention(DIM, 2, qkv_bias=True)
        outlook_torch.load_weights(layer, source)
        assert_same_bits(outlook_torch.export_weights(layer), WEIGHTS)


def test_hub_ids_are_sources_also_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(WEIGHTS, tmp_path / "shards", to="torch", max_shard_size=2000)
    write_arrays(tmp_path / "one.safetensors", WEIGHTS)
    shards = Repository({path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()})
    one = Repository({"model.safetensors": (tmp_path / "one.safetensors").read_bytes()})
    with serve(shards=shards, one=one) as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        for name in ("shards", "one"):
            done = convert(f"org/{name}", tmp_path / f"{name}.npz", to="torch")
            assert (done.source, done.found_naming) == (f"org/{name}", "torch")
            assert_same_bits(read_arrays(tmp_path / f"{name}.npz"), WEIGHTS)


# Options


def test_missing_and_unexpected_are_allowed_only_on_request_and_listed(tmp_path: Path) -> None:
    source = {name: array for name, array in WEIGHTS.items() if name != "v.bias"} | {"epoch": np.array(3)}
    for options in ({}, {"allow_missing": True}, {"ignore_unexpected": True}):
        with pytest.raises(WeightsError):
            convert(source | {"proj.bias": None}, tmp_path / "a.npz", **options)
    with pytest.raises(WeightsError, match="unexpected"):
        convert(source, tmp_path / "a.npz", allow_missing=True)
    lacking = {name: array for name, array in WEIGHTS.items() if name != "attn.bias"} | {"epoch": np.array(3)}
    with pytest.raises(WeightsError, match="missing"):
        convert(lacking, tmp_path / "a.npz", ignore_unexpected=True)
    assert list(tmp_path.iterdir()) == []
    done = convert(lacking, tmp_path / "a.npz", to="torch", allow_missing=True, ignore_unexpected=True)
    assert (done.missing, done.ignored) == (("attn.bias",), ("epoch",))
    assert_same_bits(
        read_arrays(tmp_path / "a.npz"), {name: array for name, array in WEIGHTS.items() if name != "attn.bias"}
    )


@pytest.mark.parametrize("to", FLOATS)
def test_dtype_casts_as_the_twins_do_and_leaves_counters(tmp_path: Path, to: str) -> None:
    weights = layer_weights("float64")
    done = convert(weights, tmp_path / "a.safetensors", to="torch", dtype=to)
    assert done.dtypes == {to: 6}
    reference = outlook_torch.OutlookAttention(DIM, 2, qkv_bias=True, dtype=getattr(torch, to))
    outlook_torch.load_weights(reference, weights)
    assert_same_bits(read_arrays(tmp_path / "a.safetensors"), outlook_torch.export_weights(reference))


def test_overflow_of_a_cast_is_an_error_and_infinity_is_not(tmp_path: Path) -> None:
    weights = layer_weights() | {"v.bias": np.array([1e6, -7e4, 1, 2, 3, np.inf], np.float32)}
    with pytest.raises(WeightsError, match=r"v\.bias: 2 numbers overflow float16, the largest 1e\+06"):
        convert(weights, tmp_path / "a.npz", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    convert(weights, tmp_path / "a.npz", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got 'int8'"):
        convert(weights, tmp_path / "a.npz", dtype="int8")


def test_a_named_model_reports_its_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown variant 'volo_d6'; did you mean 'volo_d"):
        convert(WEIGHTS, tmp_path / "a.npz", model="volo_d6")
    with pytest.raises(WeightsError, match=r"problems with its 6 tensors for volo_d1_224(?s:.*)missing \("):
        convert(WEIGHTS, tmp_path / "a.npz", model="volo_d1_224")
    assert convert(WEIGHTS, tmp_path / "a.npz", model="layer").model.startswith("OutlookAttention(dim=6")
    with pytest.raises(WeightsError, match="no layer in its 1 tensors"):
        convert({"x": np.ones(2)}, tmp_path / "a.npz", model="layer")
    assert recognise_as("volo_d2_224", {}) is not None


def test_a_layer_with_a_misspelt_value_projection_suggests_the_model_option(tmp_path: Path) -> None:
    misspelt = WEIGHTS | {"v.wieght": WEIGHTS["v.weight"]}
    del misspelt["v.weight"]
    with pytest.raises(WeightsError, match=r"no known model in its 6 tensors .*with model='layer' \(--model layer\)"):
        convert(misspelt, tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=r"v\.weight \(6, 6\); the most similar found is v\.wieght"):
        convert(misspelt, tmp_path / "a.npz", model="layer")
    done = convert(misspelt, tmp_path / "a.npz", model="layer", allow_missing=True, ignore_unexpected=True)
    assert (done.missing, done.ignored) == (("v.weight",), ("v.wieght",))


# A VOLO of sizes that were never released

OWN_SIZES: dict[str, dict[str, Any]] = {
    "two stages": {},
    "four stages": FOUR_STAGES | {"img_size": (32, 48)},
    "biases, no aux head": {"qkv_bias": True, "use_aux_head": False},
    "no class token, no classifier": {
        "post_layers": None, "use_aux_head": False, "global_pool": "avg", "num_classes": 0
    },
    "other windows": {"out_kernel": 5, "out_padding": 2},
    "other ratios and channels": {"mlp_ratio": (35 / 12, 1.3), "in_chans": 4, "patch_size": 8, "img_size": 64},
    "one class attention": {"post_layers": ("ca",)},
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SIZES)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_a_volo_of_own_sizes_that_was_saved_converts_whole(tmp_path: Path, suffix: str, name: str) -> None:
    config = small_config(**OWN_SIZES[name])
    model = outlook_torch.VOLO(config, dtype=torch.float32)
    saved, there, back = tmp_path / f"a{suffix}", tmp_path / "b.npz", tmp_path / f"c{suffix}"
    outlook_torch.save_weights(model, saved)
    done = convert(saved, there, to="flax")
    assert (done.tensors, done.missing, done.ignored) == (len(model.state_dict()), (), ())
    convert(there, back, to="torch")
    assert_same_bits(resolve(back, table_for(config)), outlook_torch.export_weights(model))
    described = json.loads(open_checkpoint(there).metadata["outlook.config"])
    assert described == json.loads(json.dumps(asdict(config)))


@pytest.mark.parametrize("name", OWN_SIZES)
def test_a_file_of_pytorch_that_does_not_say_its_sizes_is_told_by_its_shapes(tmp_path: Path, name: str) -> None:
    config = small_config(**OWN_SIZES[name])
    model = outlook_torch.VOLO(config, dtype=torch.float32)
    torch.save(dict(model.state_dict()), tmp_path / "a.pth")  # a plain dict, without versions of modules
    convert(tmp_path / "a.pth", tmp_path / "b.npz", to="flax")
    described = json.loads(open_checkpoint(tmp_path / "b.npz").metadata["outlook.config"])
    expected = json.loads(json.dumps(asdict(config)))
    assert described.keys() == set(SHOWN)
    expected |= {"mlp_ratio": described["mlp_ratio"]}  # of which there are several for so many channels
    assert all(described[field] == expected[field] for field in SHOWN)
    assert table_for(infer_volo(open_checkpoint(tmp_path / "b.npz").shapes)) == table_for(config)


@both_twins
def test_both_twins_save_the_configuration(tmp_path: Path, twin: str) -> None:
    package, make = TWINS[twin]
    layer = make()
    package.save_weights(layer, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for file in "ab":
        found = json.loads(open_checkpoint(tmp_path / f"{file}.safetensors").metadata["outlook.config"])
        assert found == json.loads(json.dumps(asdict(layer.config)))
        assert found["num_heads"] == HEADS


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "{", '{"layers": 1e400}', '{"layers": [NaN]}', '{"layers": [2, 3]}', "[" * 100_000,
        json.dumps(asdict(small_config()) | {"layers": [10**9, 10**9]}),
        json.dumps(asdict(small_config()) | {"layers": [2] * 10**5}),
        json.dumps(asdict(small_config()) | {"embed_dims": [10**15 + 1, 24]}),
        json.dumps(asdict(small_config()) | {"num_heads": "24"}),
        json.dumps(asdict(small_config()) | {"post_layers": [["ca"]]}),
        json.dumps(asdict(VOLO_VARIANTS["volo_d1_224"].config)),
    ],
)  # fmt: skip
def test_metadata_that_do_not_describe_the_tensors_are_not_believed(tmp_path: Path, text: str) -> None:
    weights = draw_weights(small_config())
    write_arrays(tmp_path / "a.safetensors", weights, {"outlook.config": text})
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.npz").tensors == len(weights)


def test_a_truncated_released_model_is_no_model_of_own_sizes(tmp_path: Path) -> None:
    entries = table_for(VOLO_VARIANTS["volo_d1_224"].config).entries
    cut = {entry.torch: np.zeros(entry.shape, "f2") for entry in entries if not entry.torch.startswith("network.2.3")}
    with pytest.raises(WeightsError, match="missing"):
        convert(cut, tmp_path / "a.npz")


def test_a_prefix_that_would_leave_out_most_of_a_file_says_so(tmp_path: Path) -> None:
    source = {f"backbone.{index}.weight": np.ones(3) for index in range(60)} | inside_a_model("torch")
    words = r"prefix='network\.0\.0\.attn', .* \(a part: 6 of 74 tensors, the other 68 would be left out\)"
    with pytest.raises(WeightsError, match=words):
        convert(source, tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=r"a known one has prefix='net'$"):
        convert({f"net.{name}": array for name, array in WEIGHTS.items()} | {"a": np.ones(3)}, tmp_path / "a.npz")


def test_metadata_record_the_source(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.safetensors", WEIGHTS, {"author": "somebody", "format": "pt", "outlook.version": "0"})
    for suffix in (".safetensors", ".npz", ".orbax"):
        done = convert(tmp_path / "a.safetensors", tmp_path / f"b{suffix}")
        found = open_checkpoint(tmp_path / f"b{suffix}").metadata
        digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
        assert found["outlook.source_sha256"] == done.source_sha256 == digest
        assert json.loads(found["outlook.config"])["dim"] == CONFIG.dim
        assert (found["author"], found["format"]) == ("somebody", "flax")
        assert found["outlook.version"] != "0"


@pytest.mark.parametrize(("suffix", "times"), [(".safetensors", 1), (".npz", 1), (".shards", 1), (".pth", 2)])
def test_progress_counts_bytes_twice_if_they_are_compared_after_writing(
    tmp_path: Path, suffix: str, times: int
) -> None:
    seen: list[tuple[int, int]] = []
    convert_to(WEIGHTS, tmp_path / f"a{suffix}", progress=lambda done, total: seen.append((done, total)))
    size = times * sum(array.nbytes for array in WEIGHTS.values())
    assert seen[-1] == (size, size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == times * len(WEIGHTS)


def test_manifest_is_the_same_in_every_format_and_naming(tmp_path: Path) -> None:
    manifests = [
        convert_to(inside_a_model("flax"), tmp_path / f"a{kind}", prefix="network.0.1.attn", manifest=True).manifest
        for kind in FORMATS
    ]
    assert all(manifest == manifests[0] for manifest in manifests)
    expected = [hashlib.sha256(array.tobytes()).hexdigest() for array in layer_weights(seed=1).values()]
    assert [line.sha256 for line in manifests[0]] == expected
    assert str(manifests[0][0]).endswith("  float32  6x6  v.weight")


# Large tensors and little memory


@pytest.mark.parametrize("suffix", FORMATS)
def test_manifest_is_of_the_source_even_if_it_is_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    expected = convert_to(WEIGHTS, path, manifest=True).manifest
    assert convert_to(path, path, manifest=True).manifest == expected


def test_tensors_of_many_blocks_keep_every_bit_in_any_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "turned": rng.standard_normal((700, 1100)).T,
        "deep": rng.standard_normal((1, 1, 700, 900)).transpose(0, 1, 3, 2),
        "wide": rng.standard_normal((2, 300_000)),
        "strided": rng.standard_normal((900, 900))[::2, ::3],
        "long": any_bits((1_500_001,), "bfloat16", rng),
        "counter": np.array(2**60 + 1),
    }
    for kind in (".safetensors", ".npz", ".orbax"):
        write_arrays(tmp_path / f"a{kind}", arrays)
        assert_same_bits(read_arrays(tmp_path / f"a{kind}"), {name: array.copy() for name, array in arrays.items()})


@pytest.mark.parametrize("kind", [".safetensors", ".npz"])
def test_memory_stays_below_the_largest_tensor_and_200_mb(tmp_path: Path, kind: str) -> None:
    """Three tensors of 150 MB each: all of them together would not fit."""
    code = """if True:
        import sys
        import numpy as np
        from pathlib import Path
        from outlook_common.weights import convert, write_arrays
        from outlook_common.weights.io.lazy import Computed, as_lazy
        def held(what):
            return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what))
        features, source, target = 37_500_000 // 6, Path(sys.argv[1]), Path(sys.argv[2])
        zero = as_lazy(np.zeros(1, "f4"))
        def lazily(*shape):
            return Computed(zero, np.dtype("f4"), shape, lambda z: np.broadcast_to(z, shape))
        write_arrays(source, {
            "v.weight": lazily(6, 6), "attn.weight": lazily(features, 6), "attn.bias": lazily(features),
            "proj.weight": lazily(6, 6), "proj.bias": lazily(6)})
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        convert(source, target)
        print(held("VmHWM") - before)"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / f"a{kind}"), str(tmp_path / f"b{kind}")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150e6 + 200e6


# Without any framework

HIDDEN = ("torch", "jax", "flax", "jaxlib", "orbax", "tensorstore", "optax")


def test_convert_and_inspect_work_where_neither_framework_is_installed(tmp_path: Path) -> None:
    code = f"""if True:
        import importlib.util, sys
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HIDDEN}:
                    raise ModuleNotFoundError(name)
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name in {HIDDEN} else real(name, *rest)
        sys.meta_path.insert(0, Hidden())
        from outlook_parity.cli.app import main
        main()"""

    def outlook(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )

    write_arrays(tmp_path / "a.safetensors", layer_bits("bfloat16"))
    for arguments in (
        ("convert", "a.safetensors", "b.npz"),
        ("convert", "b.npz", "d", "--max-shard-size", "2kB"),
        ("inspect", "a.safetensors", "d"),
    ):
        done = outlook(*arguments)
        assert done.returncode == 0, done.stderr + done.stdout
    assert "OutlookAttention" in outlook("inspect", "b.npz").stdout
    for arguments in (("a.safetensors", "e.pth"), ("a.safetensors", "e.orbax")):
        done = outlook("convert", *arguments)
        assert done.returncode == 2, done.stdout
        assert re.search(r"not installed; install (it|them) with: pip install 'outlook-attention\[", done.stderr)


@pytest.mark.slow  # makes a virtual environment and installs into it, for which it needs a package index
def test_bare_environment_converts_and_inspects(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    bare = ["huggingface_hub", "jaxtyping", "ml_dtypes", "numpy", "rich", "safetensors", "typer"]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(root / "constraints.txt"), *bare]
    subprocess.run(install, check=True)
    subprocess.run([*install[:5], "--no-deps", str(root)], check=True)
    write_arrays(tmp_path / "a.safetensors", layer_bits("float16"))
    outlook = str(tmp_path / "venv" / "bin" / "outlook")
    for arguments in (["convert", "a.safetensors", "b.npz"], ["convert", "b.npz", "c.safetensors"]):
        subprocess.run([outlook, *arguments], check=True, cwd=tmp_path)
    subprocess.run([outlook, "inspect", "a.safetensors", "c.safetensors"], check=True, cwd=tmp_path)
    for framework in ("torch", "jax"):
        assert subprocess.run([str(python), "-c", f"import {framework}"], capture_output=True).returncode == 1
