"""`from_pretrained` in both twins: sources, other heads and sizes, errors."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from timm.models._manipulate import adapt_input_conv
from torch.nn import functional

import outlook_jax
import outlook_torch
from outlook_common import VOLO_VARIANTS, VOLOConfig
from outlook_common.arrays import BFLOAT16, to_tensor
from outlook_common.config import volo_config
from outlook_common.pretrained import Pretrained, prepare
from outlook_common.weights import WeightsError, convert, table_for, write_arrays
from parity_tests.support.hub_server import Repository, Server, one_line, serve, use_hub
from parity_tests.support.runners import bits, relative_error
from parity_tests.weights.layers import renamed

pytestmark = pytest.mark.usefixtures("quick_compilation")

Array = np.ndarray

TWINS: dict[str, Any] = {"torch": outlook_torch, "jax": outlook_jax}
both_twins = pytest.mark.parametrize("twin", TWINS)

# A VOLO of a few thousand parameters, as timm would describe it in config.json.
SMALL: dict[str, Any] = {
    "layers": [1, 2, 1, 1],
    "embed_dims": [12, 24, 24, 24],
    "num_heads": [2, 4, 3, 2],
    "stem_hidden_dim": 6,
}
CLASSES, SIDE = 7, 64
HEADS = ["aux_head.weight", "aux_head.bias", "head.weight", "head.bias"]


def config(**changes: Any) -> VOLOConfig:
    return volo_config("volo_d1_224", **SMALL | {"num_classes": CLASSES, "img_size": SIDE} | changes)


def weights(of: VOLOConfig, seed: int = 0, dtype: str = "float64") -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for entry in table_for(of).entries:
        if entry.dtype is not None:
            arrays[entry.torch] = np.array(3, entry.dtype)
            continue
        drawn = rng.standard_normal(entry.shape).astype(dtype)
        arrays[entry.torch] = np.exp(drawn) if entry.torch.endswith("running_var") else drawn / 2
    return arrays


WEIGHTS = weights(config())


def folder(path: Path, arrays: dict[str, Any], file: str = "model.safetensors", **described: Any) -> Path:
    """Write what a repository holds; `described` changes its config.json, all None leaves it out."""
    path.mkdir(exist_ok=True)
    write_arrays(path / file, arrays)
    contents = {"architecture": "volo_d1_224", "num_classes": CLASSES, "model_args": SMALL} | described
    if any(value is not None for value in contents.values()):
        (path / "config.json").write_text(json.dumps(contents))
    return path


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly() -> Iterator[None]:
    """Weights are what is looked at here; XLA would spend most of the time on making code fast that runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return folder(tmp_path / "model", WEIGHTS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Iterator[Server]:
    with serve(model=Repository({path.name: path.read_bytes() for path in model.iterdir()})) as server:
        use_hub(monkeypatch, server.url, tmp_path / "cache")
        yield server


def prepared(source: Path | str, **changes: Any) -> Pretrained:
    names = list(inspect.signature(prepare).parameters)[1:]
    defaults = dict.fromkeys(names) | {"prefix": "", "use_ema": False, "local_files_only": False, "overrides": {}}
    return prepare(source, **defaults | changes)


def exact(twin: str) -> dict[str, Any]:
    """The arguments that keep float64."""
    return {"torch": {"dtype": torch.float64}, "jax": {"param_dtype": "float64"}}[twin]


run_jax = nnx.jit(lambda model, images: model(images))
train_jax = nnx.jit(lambda model, images: model.forward_train(images))


def logits(twin: str, model: Any, images: Array) -> Array:
    if twin == "torch":
        with torch.no_grad():
            return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    return np.asarray(run_jax(model, jnp.asarray(images)))


def draw_images(side: int) -> Array:
    return np.random.default_rng(5).standard_normal((2, side, side, 3))


def assert_loaded(twin: str, model: Any, expected: dict[str, Array]) -> None:
    found = TWINS[twin].export_weights(model)
    assert found.keys() >= expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


# Where they come from


@both_twins
def test_a_model_from_the_hub_has_its_weights_bit_for_bit_and_evaluates(hub: Server, twin: str) -> None:
    made = TWINS[twin].from_pretrained("org/model", **exact(twin))
    assert made.config == config()
    assert_loaded(twin, made, WEIGHTS)
    images = draw_images(SIDE)
    first = logits(twin, made, images)
    assert np.array_equal(first, logits(twin, made, images))
    assert_loaded(twin, made, {name: array for name, array in WEIGHTS.items() if "running" in name})
    again = TWINS[twin].from_pretrained("org/model", local_files_only=True)
    assert str(np.asarray(TWINS[twin].export_weights(again)["pos_embed"]).dtype) == "float32"
    assert hub.count("GET", "model.safetensors") == 1


def test_twins_from_the_same_place_agree(hub: Server) -> None:
    images = draw_images(SIDE)
    found = [logits(twin, TWINS[twin].from_pretrained("org/model", **exact(twin)), images) for twin in TWINS]
    assert found[0].shape == (2, CLASSES)
    assert relative_error(*found) <= 1e-12


@both_twins
def test_errors_of_the_hub_are_the_same_line_in_both_twins(hub: Server, twin: str) -> None:
    with one_line("org/model: it has no revision 'v9'"):
        TWINS[twin].from_pretrained("org/model", revision="v9")
    with one_line("org/absent@main: no such repository"):
        TWINS[twin].from_pretrained("org/absent@main", token="hf_wrong")


@both_twins
def test_a_variants_name_means_its_released_weights_unless_a_path_has_that_name(
    hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twin: str
) -> None:
    with one_line("timm/volo_d1_224.sail_in1k: no such repository"):
        TWINS[twin].from_pretrained("volo_d1_224")
    folder(tmp_path / "volo_d1_224", WEIGHTS)
    monkeypatch.chdir(tmp_path)
    assert_loaded(twin, TWINS[twin].from_pretrained("volo_d1_224", **exact(twin)), WEIGHTS)


@both_twins
def test_load_weights_takes_a_hub_id(hub: Server, tmp_path: Path, twin: str) -> None:
    made = TWINS[twin].from_pretrained(folder(tmp_path / "other", weights(config(), 9)), **exact(twin))
    TWINS[twin].load_weights(made, "org/model@main")
    assert_loaded(twin, made, WEIGHTS)


@both_twins
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_folder_or_a_single_file_is_a_source(tmp_path: Path, twin: str, file: str) -> None:
    path = folder(tmp_path / "folder", WEIGHTS, file)
    assert_loaded(twin, TWINS[twin].from_pretrained(path, **exact(twin)), WEIGHTS)
    alone = TWINS[twin].from_pretrained(path / file, variant="volo_d1_224", img_size=SIDE, **SMALL, **exact(twin))
    assert_loaded(twin, alone, WEIGHTS)


@both_twins
def test_averaged_weights_prefixes_and_flax_names_are_supported(tmp_path: Path, twin: str) -> None:
    averaged = {f"body.{name}": to_tensor(array) for name, array in weights(config(), 9).items()}
    torch.save({"state_dict": {}, "state_dict_ema": averaged}, tmp_path / "a.pth.tar")
    settings: dict[str, Any] = {"variant": "volo_d1_224", "img_size": SIDE, **SMALL, **exact(twin)}
    made = TWINS[twin].from_pretrained(tmp_path / "a.pth.tar", prefix="body", use_ema=True, **settings)
    assert_loaded(twin, made, weights(config(), 9))
    write_arrays(tmp_path / "flax.npz", renamed(WEIGHTS, table_for(config()), "flax"))
    assert_loaded(twin, TWINS[twin].from_pretrained(tmp_path / "flax.npz", **settings), WEIGHTS)


def test_the_jax_twin_needs_no_torch(model: Path) -> None:
    script = """if True:
        import sys
        sys.modules["torch"] = None  # importing it fails
        import outlook_jax
        print(outlook_jax.from_pretrained(sys.argv[1]).config.num_classes)"""
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(CLASSES)]


def test_both_twins_take_the_same_arguments_except_their_frameworks() -> None:
    own = {"device", "dtype", "param_dtype", "precision", "rngs", "scan_layers"}
    own |= {"axis_name", "ghost_batches", "shardings"}  # PyTorch's engines decide them
    names = [
        [name for name in inspect.signature(package.from_pretrained).parameters if name not in own]
        for package in TWINS.values()
    ]
    assert names[0] == names[1]


# Other heads and sizes


@both_twins
def test_heads_for_other_classes_are_left_out_with_a_warning_that_names_them(model: Path, twin: str) -> None:
    with pytest.warns(
        UserWarning, match=f"its weights are for 7 classes, the model for 3: {', '.join(HEADS)}"
    ) as caught:
        made = TWINS[twin].from_pretrained(model, num_classes=3, **exact(twin))
    assert len(caught) == 1
    assert made.config == config(num_classes=3)
    assert_loaded(twin, made, {name: array for name, array in WEIGHTS.items() if name not in HEADS})
    heads = {name: TWINS[twin].export_weights(made)[name] for name in HEADS}
    assert heads["head.weight"].shape == heads["aux_head.weight"].shape == (3, 24)
    assert 0.01 < heads["head.weight"].std() < 0.04  # as drawn, not as in the file
    assert not heads["head.bias"].any()


@both_twins
@pytest.mark.parametrize("side", [(96, 96), (48, 80)], ids=str)
def test_pos_embed_is_resized_as_pytorch_resizes_it(model: Path, twin: str, side: tuple[int, int]) -> None:
    made = TWINS[twin].from_pretrained(model, img_size=side, **exact(twin))
    assert made.config == config(img_size=side)
    tokens = side[0] // 16, side[1] // 16
    grid = torch.from_numpy(WEIGHTS["pos_embed"]).permute(0, 3, 1, 2)
    expected = functional.interpolate(grid, tokens, mode="bicubic").permute(0, 2, 3, 1).numpy()
    assert relative_error(TWINS[twin].export_weights(made)["pos_embed"], expected) <= 1e-12
    assert_loaded(twin, made, {name: array for name, array in WEIGHTS.items() if name != "pos_embed"})


@both_twins
@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_the_first_convolution_is_adapted_to_other_channels_as_in_timm(
    tmp_path: Path, twin: str, channels: int
) -> None:
    given = {name: array if array.dtype == np.int64 else array.astype(np.float32) for name, array in WEIGHTS.items()}
    made = TWINS[twin].from_pretrained(folder(tmp_path / "model", given), in_chans=channels)
    assert made.config == config(in_chans=channels)
    weight = "patch_embed.conv.0.weight"
    expected = adapt_input_conv(channels, torch.from_numpy(given[weight])).numpy()
    assert_loaded(twin, made, given | {weight: expected})


def test_weights_for_grey_images_are_adapted_to_colours_only_on_request(tmp_path: Path) -> None:
    grey = weights(config(in_chans=1))
    path = folder(tmp_path / "model", grey)
    assert prepared(path).config == config(in_chans=1)
    asked = prepared(path, overrides={"in_chans": 3})
    weight = "patch_embed.conv.0.weight"
    assert relative_error(asked.arrays[weight].sum(1, keepdims=True), grey[weight]) <= 1e-15
    half = {name: array if array.dtype == np.int64 else array.astype(BFLOAT16) for name, array in grey.items()}
    found = prepared(folder(tmp_path / "half", half), overrides={"in_chans": 2}).arrays[weight]
    assert found.dtype == BFLOAT16
    assert np.array_equal(found, np.repeat(half[weight] / 2, 2, axis=1))  # halving is exact


@both_twins
def test_a_model_may_have_fewer_heads_than_its_weights_and_more(tmp_path: Path, twin: str, model: Path) -> None:
    with pytest.warns(UserWarning, match="the model for 0: .*head.bias left out$"):
        bare = TWINS[twin].from_pretrained(model, num_classes=0, **exact(twin))
    assert_loaded(twin, bare, {name: array for name, array in WEIGHTS.items() if name not in HEADS})
    with pytest.warns(UserWarning, match=r": aux_head\.weight, aux_head\.bias left out$"):
        plain = TWINS[twin].from_pretrained(model, use_aux_head=False, **exact(twin))
    assert_loaded(twin, plain, {name: array for name, array in WEIGHTS.items() if not name.startswith("aux")})

    headless = folder(tmp_path / "headless", TWINS[twin].export_weights(bare), num_classes=0)
    assert TWINS[twin].from_pretrained(headless).num_classes == 0
    with pytest.warns(UserWarning, match=f"are for 0 classes, the model for 5: {', '.join(HEADS)} start with fresh"):
        assert TWINS[twin].from_pretrained(headless, num_classes=5).num_classes == 5


@both_twins
def test_other_overrides_reach_the_configuration(model: Path, twin: str) -> None:
    made = TWINS[twin].from_pretrained(model, drop_path_rate=0.25, dynamic_img_size=True)
    assert made.config == config(drop_path_rate=0.25, dynamic_img_size=True)
    with pytest.raises(TypeError, match="'drop_pathrate' is not a field of VOLOConfig; did you mean 'drop_path_rate'"):
        TWINS[twin].from_pretrained(model, drop_pathrate=0.25)


def test_new_heads_and_random_streams_in_jax_are_those_of_a_fresh_model_from_the_same_rngs(model: Path) -> None:
    with pytest.warns(UserWarning, match="fresh"):
        made = outlook_jax.from_pretrained(model, num_classes=3, rngs=nnx.Rngs(11))
    expected = nnx.jit(lambda rngs: outlook_jax.VOLO(config(num_classes=3), rngs=rngs))(nnx.Rngs(11))
    for name in HEADS:
        heads = [outlook_jax.export_weights(volo)[name] for volo in (made, expected)]
        assert np.allclose(*heads, rtol=1e-6, atol=0), name  # compiled otherwise, they may round otherwise
    streams = [nnx.to_flat_state(nnx.state(volo, nnx.RngState)) for volo in (made, expected)]
    assert len(streams[0]) == len(streams[1]) > 20
    for (path, found), (_, wanted) in zip(*streams, strict=True):
        assert np.array_equal(bits(found.get_value()), bits(wanted.get_value())), path


def test_a_model_that_was_loaded_in_jax_trains(model: Path) -> None:
    made = outlook_jax.from_pretrained(model, drop_path_rate=0.5, drop_rate=0.5, **exact("jax"))
    images = jnp.asarray(draw_images(SIDE))
    still = run_jax(made, images)
    made.train()
    cls, aux, _ = train_jax(made, images)
    assert aux.shape == (2, 16, CLASSES)
    assert not np.allclose(cls, train_jax(made, images)[0])  # dropout
    made.eval()
    assert not np.allclose(still, run_jax(made, images))  # running statistics have moved


# What does not fit


@both_twins
def test_all_problems_are_reported_at_once(tmp_path: Path, twin: str) -> None:
    broken = {name: array for name, array in WEIGHTS.items() if name not in ("norm.bias", "aux_head.weight")}
    path = folder(tmp_path / "broken", broken | {"norm.weight": np.ones(5), "stranger": np.ones(2)})
    with pytest.raises(WeightsError, match="4 problems") as caught:
        TWINS[twin].from_pretrained(path)
    assert str(path) in str(caught.value)
    assert caught.value.names("missing") == ["aux_head.weight", "norm.bias"]
    assert caught.value.names("misshapen") == ["norm.weight"]
    assert caught.value.names("unexpected") == ["stranger"]


def test_an_auxiliary_head_that_is_missing_is_an_error_where_the_classes_are_the_same(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {name: array for name, array in WEIGHTS.items() if not name.startswith("aux")})
    with pytest.raises(WeightsError) as caught:
        prepared(path)
    assert caught.value.names("missing") == ["aux_head.weight", "aux_head.bias"]
    assert prepared(path, overrides={"use_aux_head": False}).fresh == ()


@both_twins
@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"num_classes": 1000}, "config.json says num_classes=1000, but the weights are for 7 classes"),
        ({"architecture": "resnet50"}, "config.json says architecture='resnet50'; known: volo_d1_224, "),
        (
            {"architecture": None, "num_classes": None, "model_args": None},
            r"fit no released VOLO, .*They show layers=\(1, 2, 1, 1\), .*; or pass variant=",
        ),
    ],
    ids=["classes", "architecture", "unknown sizes"],
)
def test_a_config_json_that_contradicts_the_weights_is_an_error(
    tmp_path: Path, twin: str, described: dict[str, Any], words: str
) -> None:
    with pytest.raises(WeightsError, match=words):
        TWINS[twin].from_pretrained(folder(tmp_path / "m", WEIGHTS, **described))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "its config.json is not JSON"), ("[1]", "holds list, expected an obj")]
)
def test_a_broken_config_json_is_an_error(model: Path, text: str, words: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=words):
        prepared(model)


def zeros(of: VOLOConfig) -> dict[str, Array]:
    """Weights of a large model that take no memory."""
    return {
        entry.torch: np.broadcast_to(np.zeros((), entry.dtype or "float16"), entry.shape)
        for entry in table_for(of).entries
    }


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_weights_of_another_variant_are_recognised_by_name(name: str) -> None:
    made = outlook_torch.VOLO(config())
    with pytest.raises(WeightsError, match=f"; they are those of {name}\n"):
        outlook_torch.load_weights(made, zeros(volo_config(name)))
    changed = zeros(volo_config(name, num_classes=10, img_size=320, in_chans=1))
    released = f"volo_{name.split('_')[1]}_224"
    with pytest.raises(WeightsError, match=f"those of {released} with img_size=320x320, num_classes=10, in_chans=1\n"):
        outlook_torch.load_weights(made, changed)


@both_twins
def test_a_file_of_another_variant_than_requested_is_an_error_with_its_name(tmp_path: Path, twin: str) -> None:
    write_arrays(tmp_path / "a.safetensors", zeros(volo_config("volo_d1_224", num_classes=10)))
    with pytest.raises(WeightsError, match="they are those of volo_d1_224 with num_classes=10\n"):
        TWINS[twin].from_pretrained(tmp_path / "a.safetensors", variant="volo_d2_224")
    with pytest.raises(ValueError, match="unknown variant 'volo_d1_225'; did you mean 'volo_d1_224'"):
        TWINS[twin].from_pretrained(tmp_path / "a.safetensors", variant="volo_d1_225")


def test_a_bare_file_is_recognised_with_its_own_classes_size_and_channels(tmp_path: Path) -> None:
    sizes: Any = {"num_classes": 10, "img_size": 320, "in_chans": 4}
    write_arrays(tmp_path / "a.safetensors", zeros(volo_config("volo_d1_384", **sizes)))
    found = prepared(tmp_path / "a.safetensors")
    assert (found.variant, found.config) == ("volo_d1_224", volo_config("volo_d1_224", **sizes))
    asked = prepared(tmp_path / "a.safetensors", variant="volo_d1_384")
    assert asked.config == volo_config("volo_d1_384", num_classes=10)
    assert asked.arrays["pos_embed"].shape == (1, 24, 24, 384)


@pytest.mark.parametrize("naming", ["torch", "flax"])
def test_a_file_without_the_heads_bias_reports_the_bias_as_missing(naming: str) -> None:
    config = volo_config("volo_d1_224", num_classes=10)
    arrays = renamed(zeros(config), table_for(config), naming)
    del arrays["head.bias"]
    with pytest.raises(WeightsError) as caught:
        convert(arrays, "never.npz")
    assert [(problem.kind, problem.name) for problem in caught.value.problems] == [("missing", "head.bias")]


# How its images are prepared


def test_images_are_prepared_as_config_json_says_and_else_as_the_variants_are(tmp_path: Path, model: Path) -> None:
    variant = VOLO_VARIANTS["volo_d1_224"]
    plain = prepared(model).preprocessing
    assert (plain.size, plain.crop_pct, plain.mean) == ((SIDE, SIDE), variant.crop_pct, variant.mean)
    described = {"crop_pct": 0.5, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    described_so = folder(tmp_path / "own", WEIGHTS, pretrained_cfg=described)
    own = prepared(described_so).preprocessing
    timms = outlook_torch.from_pretrained(described_so, dtype=torch.float64).pretrained_cfg
    assert {name: timms[name] for name in ("input_size", *described)} == {
        "input_size": (3, *own.size),
        **{name: getattr(own, name) for name in described},
    }
    assert (own.crop_pct, own.mean, own.std) == (0.5, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert own.interpolation == "bilinear"
    squash = folder(tmp_path / "squash", WEIGHTS, pretrained_cfg={"crop_mode": "squash"})
    with pytest.raises(ValueError, match=r"config\.json says crop_mode='squash', only 'center' is supported"):
        _ = prepared(squash).preprocessing


@pytest.mark.slow  # VOLO-D1 is built and compiled in full
def test_a_released_variant_gives_the_same_logits_in_both_twins(tmp_path: Path) -> None:
    drawn = outlook_torch.volo("volo_d1_224", dtype=torch.float64)
    outlook_torch.save_weights(drawn, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "volo_d1_224", "num_classes": 1000}))
    images = draw_images(224)[:1]
    found = [logits(twin, TWINS[twin].from_pretrained(tmp_path, **exact(twin)), images) for twin in TWINS]
    assert found[0].shape == (1, 1000)
    assert relative_error(*found) <= 1e-12
