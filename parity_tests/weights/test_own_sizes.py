"""A VOLO of own sizes: what is saved says what it is, and every reader of either twin takes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict
from typer.testing import CliRunner

import outlook_jax
import outlook_torch
from outlook_common.arrays import to_tensor
from outlook_common.config import OutlookAttentionConfig, VOLOConfig, volo_config
from outlook_common.weights import WeightsError, convert, inspect, table_for, write_arrays
from outlook_common.weights.checkpoint import open_checkpoint
from outlook_common.weights.described import config_in_metadata, model_config
from outlook_common.weights.identify import described_config
from outlook_parity.cli.app import app
from outlook_parity.models.builtin import draw_weights
from parity_tests.weights.layers import renamed

pytestmark = pytest.mark.usefixtures("quick_compilation")

TWINS: dict[str, Any] = {"torch": outlook_torch, "jax": outlook_jax}
OTHER = {"torch": "jax", "jax": "torch"}
both_twins = pytest.mark.parametrize("twin", TWINS)

# Its shapes show neither the heads of its transformers nor the stride of its outlookers.
CONFIG = volo_config(
    "volo_d1_224",
    layers=(1, 1, 1, 1),
    embed_dims=(12, 24, 24, 24),
    num_heads=(2, 6, 3, 2),
    stem_hidden_dim=6,
    img_size=(64, 32),
    num_classes=5,
    out_stride=1,
    mlp_ratio=(2.0, 1.5, 2.0, 2.0),
)
WEIGHTS = {name: array.astype("float32") if array.ndim else array for name, array in draw_weights(CONFIG).items()}
PREPARED = {"architecture": "volo_d5_448", "crop_pct": 0.5, "mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
SUFFIXES = (".safetensors", ".npz", ".pth", ".orbax", ".dcp", ".msgpack")


def make(twin: str) -> Any:
    model = outlook_torch.VOLO(CONFIG) if twin == "torch" else outlook_jax.VOLO(CONFIG, rngs=nnx.Rngs(0))
    TWINS[twin].load_weights(model, WEIGHTS)
    model.pretrained_cfg = PREPARED
    return model


def assert_whole(twin: str, source: Path) -> None:
    """The model of a source is what `make` made: configuration, preparation of images, every bit."""
    model = TWINS[twin].from_pretrained(source)
    assert model.config == CONFIG
    assert {name: model.pretrained_cfg[name] for name in PREPARED} == PREPARED
    found = TWINS[twin].export_weights(model)
    assert found.keys() == WEIGHTS.keys()
    assert all(np.array_equal(found[name], array) for name, array in WEIGHTS.items())


@both_twins
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_one_twin_saves_the_other_loads_with_its_configuration(tmp_path: Path, twin: str, suffix: str) -> None:
    TWINS[twin].save_weights(make(twin), tmp_path / f"a{suffix}")
    assert_whole(OTHER[twin], tmp_path / f"a{suffix}")


def test_the_configuration_survives_conversions_through_every_format(tmp_path: Path) -> None:
    outlook_torch.save_weights(make("torch"), tmp_path / "0.safetensors")
    source = tmp_path / "0.safetensors"
    for number, suffix in enumerate((*SUFFIXES, ".npz"), start=1):
        convert(source, tmp_path / f"{number}{suffix}")
        source = tmp_path / f"{number}{suffix}"
        assert described_config(open_checkpoint(source)) == CONFIG
    convert(source, tmp_path / "shards", max_shard_size=5000)
    assert len(list((tmp_path / "shards").iterdir())) > 5
    assert_whole("jax", tmp_path / "shards")


@both_twins
def test_config_json_says_it_of_formats_without_metadata(tmp_path: Path, twin: str) -> None:
    write_arrays(tmp_path / "flax_model.msgpack", WEIGHTS)
    for source in (tmp_path, tmp_path / "flax_model.msgpack"):
        with pytest.raises(WeightsError, match=r"no config\.json or metadata say its configuration"):
            TWINS[twin].from_pretrained(source)
    (tmp_path / "config.json").write_text(json.dumps(model_config(CONFIG, PREPARED)))
    assert_whole(twin, tmp_path)
    assert_whole(twin, tmp_path / "flax_model.msgpack")
    convert(tmp_path, tmp_path / "named.npz")
    assert_whole(twin, tmp_path / "named.npz")


def test_metadata_beside_a_msgpack_are_of_that_file_alone(tmp_path: Path) -> None:
    file, own = tmp_path / "a.msgpack", tmp_path / "a.msgpack.outlook.json"
    outlook_torch.save_weights(make("torch"), file)
    whole = file.read_bytes()
    assert json.loads(open_checkpoint(file).metadata["outlook.config"])["num_heads"] == [2, 6, 3, 2]
    assert flatten_dict(msgpack_restore(whole), sep=".").keys() == WEIGHTS.keys()  # nothing that Flax would stumble on
    for other in (whole[:-1] + bytes([whole[-1] ^ 1]), msgpack_serialize({"cls_token": np.ones(3)})):
        file.write_bytes(other)
        assert open_checkpoint(file).metadata == {}
    write_arrays(file, WEIGHTS)
    assert not own.exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, '{"metadata": {"outlook.config": 3}}', " " * (1 << 24) + "{}"]
)
def test_damaged_metadata_beside_a_msgpack_are_one_clear_error(tmp_path: Path, text: str) -> None:
    write_arrays(tmp_path / "a.msgpack", WEIGHTS, {"made": "here"})
    (tmp_path / "a.msgpack.outlook.json").write_text(text)
    with pytest.raises(WeightsError, match=r"a\.msgpack\.outlook\.json: not a readable \.outlook\.json file: "):
        open_checkpoint(tmp_path / "a.msgpack")


def test_config_json_holds_what_differs_from_the_released_variant() -> None:
    described = json.loads(json.dumps(model_config(CONFIG)))
    assert (described["architecture"], described["num_classes"]) == ("volo_d1_224", 5)
    assert described["model_args"] == {
        "layers": [1, 1, 1, 1],
        "img_size": [64, 32],
        "stem_hidden_dim": 6,
        "embed_dims": [12, 24, 24, 24],
        "num_heads": [2, 6, 3, 2],
        "mlp_ratio": [2.0, 1.5, 2.0, 2.0],
        "out_stride": [1, 1],
    }


@both_twins
def test_without_a_description_the_shapes_and_the_heads_are_enough(tmp_path: Path, twin: str) -> None:
    write_arrays(tmp_path / "a.npz", WEIGHTS)
    with pytest.raises(WeightsError) as caught:
        TWINS[twin].from_pretrained(tmp_path / "a.npz")
    assert "They show layers=(1, 1, 1, 1), img_size=(64, 32), num_classes=5, stem_hidden_dim=6, " in str(caught.value)
    assert "num_heads=(…) gives, one number for each of 4 stages" in str(caught.value)
    model = TWINS[twin].from_pretrained(tmp_path / "a.npz", num_heads=CONFIG.num_heads, out_stride=1)
    assert model.config == CONFIG


@both_twins
def test_other_classes_and_sizes_of_a_model_of_own_sizes(tmp_path: Path, twin: str) -> None:
    outlook_torch.save_weights(make("torch"), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="its weights are for 5 classes, the model for 3"):
        model = TWINS[twin].from_pretrained(tmp_path / "a.safetensors", num_classes=3, img_size=96)
    assert model.config == VOLOConfig(**{**vars(CONFIG), "num_classes": 3, "img_size": 96})


def test_metadata_of_another_model_than_the_weights_are_passed_over(tmp_path: Path) -> None:
    """A released model's weights under own sizes' metadata, as scripts write that copy the metadata of another file."""
    outlook_torch.save_weights(make("torch"), tmp_path / "a.safetensors")
    metadata = open_checkpoint(tmp_path / "a.safetensors").metadata
    small = volo_config("volo_d1_224", num_classes=2)
    arrays = {
        entry.torch: np.broadcast_to(np.zeros((), entry.dtype or "float16"), entry.shape)
        for entry in table_for(small).entries
    }
    write_arrays(tmp_path / "b.safetensors", arrays, metadata)
    found = inspect(tmp_path / "b.safetensors").model
    assert found is not None
    assert found.table.model == "volo_d1_224 with num_classes=2"


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", "1" * 200_000, '{"layers": [1]}', '{"layers": 1e999}', "[" * 50_000,
        json.dumps({"layers": [1 << 20] * 4, "embed_dims": [12] * 4, "num_heads": [2] * 4}),
    ],
)  # fmt: skip
def test_hostile_descriptions_are_passed_over_or_refused(tmp_path: Path, text: str) -> None:
    assert config_in_metadata(VOLOConfig, {"outlook.config": text}) is None
    write_arrays(tmp_path / "model.safetensors", WEIGHTS, {"outlook.config": text, "outlook.pretrained_cfg": text})
    with pytest.raises(WeightsError, match=r"no config\.json or metadata"):
        outlook_torch.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(f'{{"architecture": "volo_d1_224", "model_args": {text}}}')
    with pytest.raises(WeightsError, match=r"config\.json (describes no VOLO|is not JSON)"):
        outlook_torch.from_pretrained(tmp_path)


def test_what_a_pickle_puts_beside_its_tensors_is_taken_only_if_it_is_text(tmp_path: Path) -> None:
    outlook_torch.save_weights(make("torch"), tmp_path / "a.pth")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)
    assert not outlook_torch.VOLO(CONFIG).load_state_dict(saved).missing_keys
    for versions, kept in (
        ({"": {"outlook.config": 3, 4: "x", "version": 2, "other": "y"}}, {"other": "y"}),
        ({"": [1]}, {}),
        ([2], {}),
        ({}, {}),
    ):
        saved._metadata = versions
        torch.save(saved, tmp_path / "b.pth")
        assert open_checkpoint(tmp_path / "b.pth").metadata == kept


def outlook(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".msgpack"])
def test_every_command_takes_own_sizes(tmp_path: Path, suffix: str) -> None:
    PIL = pytest.importorskip("PIL.Image")
    PIL.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    file = tmp_path / f"a{suffix}"
    outlook_torch.save_weights(make("torch"), file)
    found = json.loads(outlook("inspect", file, "--json").stdout)
    assert json.loads(found["metadata"]["outlook.config"])["num_heads"] == [2, 6, 3, 2]
    found = json.loads(outlook("convert", file, tmp_path / "b.npz", "--json").stdout)
    assert (found["tensors"], found["found_naming"]) == (len(WEIGHTS), "torch")
    found = json.loads(outlook("predict", tmp_path / "a.png", "--weights", tmp_path / "b.npz", "--json").stdout)
    assert found["images"][0]["agree"] is True
    assert len(found["images"][0]["guesses"]["jax"]) == 5
    done = outlook("verify", "--weights", tmp_path / "b.npz", "--level", "forward", "--dtype", "float64", "--json")
    assert json.loads(done.stdout)["verdict"] == "pass", done.output


def test_verify_takes_a_layer_with_window_and_scale_of_its_own(tmp_path: Path) -> None:
    config = OutlookAttentionConfig(24, 3, 5, 2, 4, True, qk_scale=0.7)
    layer = outlook_torch.OutlookAttention(24, 3, 5, 2, 4, True, qk_scale=0.7)
    outlook_torch.load_weights(layer, {name: to_tensor(array) for name, array in draw_weights(config).items()})
    outlook_torch.save_weights(layer, tmp_path / "a.npz")
    done = outlook("verify", "--weights", tmp_path / "a.npz", "--level", "forward", "--dtype", "float64")
    assert "24 channels, 3 heads, kernel 5, stride 4" in done.output
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("volo_d1", "volo_d1_224"),
        ("volo_d5_521", "volo_d5_512"),
        ("volo-d1-384", "volo_d1_384"),
        ("volo_d1_224.sail_in1k", "timm/volo_d1_224.sail_in1k"),
    ],
)
def test_a_mistyped_variant_is_told_the_nearest_name(source: str, near: str) -> None:
    for read in (outlook_torch.from_pretrained, outlook_jax.from_pretrained, open_checkpoint):
        with pytest.raises(FileNotFoundError, match=f"did you mean the released '{near}'") as caught:
            read(source)
        assert caught.value.filename == source


def test_flax_names_in_a_file_are_described_too(tmp_path: Path) -> None:
    outlook_torch.save_weights(make("torch"), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "flax.npz", to="flax")
    assert open_checkpoint(tmp_path / "flax.npz").names == renamed(WEIGHTS, table_for(CONFIG), "flax").keys()
    assert_whole("torch", tmp_path / "flax.npz")
