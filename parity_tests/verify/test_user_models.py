"""Twins that are not of this package: NNX, Linen and plain functions, in Python and through the command line."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from typer.testing import CliRunner

import outlook_jax.linen
import outlook_torch
from outlook_parity import NameMap, Report, load_torch_weights, verify
from outlook_parity.cli.app import app
from outlook_parity.cli.options import name_map_from_options
from outlook_parity.mapping.infer import TorchLeaf, derive_names
from outlook_parity.mapping.user import read_name_map
from parity_tests.support.vit import NAMES, linen_vit, nnx_vit, torch_vit, vit_images

pytestmark = pytest.mark.usefixtures("quick_compilation")

THEIRS = "parity_tests.support.vit"


def wrong(report: Report) -> list[Any]:
    return [row for row in report.checks if row.verdict not in ("pass", "zero", "skipped")]


@pytest.mark.parametrize(
    "make",
    [nnx_vit, pytest.param(linen_vit, marks=pytest.mark.slow(reason="compiles all again"))],
    ids=["NNX", "Linen"],
)
def test_a_vit_that_is_not_ours_agrees_on_every_level_but_for_the_biased_variance_of_flax(make: Any) -> None:
    report = verify(torch_vit(), make(), vit_images(), dtypes=("float64",), steps=2, names=NAMES)
    assert [row.name for row in wrong(report)] == ["SGD: bn.running_var", "AdamW: bn.running_var"]
    assert report.first_divergence == "bn"
    assert "biased variance" in str(report.cause)
    rows = {(row.level, row.name) for row in report.checks if row.verdict == "pass"}
    assert {
        ("weights", "bn.running_var"),
        ("forward", "output"),
        ("layers", "blocks.1.fc2"),
        ("layers", "embed"),
        ("layers", "bn"),
        ("gradients", "blocks.0.q.weight"),
        ("gradients", "pos"),
        ("training", "SGD: bn.running_mean"),
        ("training", "AdamW: first moment of blocks.1.v.bias"),
    } <= rows


@pytest.mark.slow(reason="float32 compiles all again")
@pytest.mark.parametrize("make", [nnx_vit, linen_vit], ids=["NNX", "Linen"])
def test_a_vit_that_is_not_ours_passes_in_lower_precisions(make: Any) -> None:
    levels = ("forward", "layers", "gradients")
    report = verify(torch_vit(), make(), vit_images(), dtypes=("float32", "bfloat16"), levels=levels, names=NAMES)
    assert report.verdict == "pass", wrong(report)[:5]


def test_a_gradient_that_is_zero_but_for_rounding_is_no_mismatch() -> None:
    """Softmax is blind to the bias of the keys: what both twins compute for it is rounding alone."""
    report = verify(torch_vit(), nnx_vit(), vit_images(), levels=("gradients",), dtypes=("float64",), names=NAMES)
    assert report.verdict == "pass", wrong(report)
    (row,) = [row for row in report.checks if (row.level, row.name) == ("gradients", "blocks.0.k.bias")]
    assert row.measured is not None
    assert row.measured > 1e-3
    assert "rounding" in row.note
    largest = re.search(r"largest relative error ([\d.e+-]+)", str(report))
    assert largest is not None, str(report)
    assert float(largest[1]) < 1e-12


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], catch_exceptions=True)


@pytest.mark.parametrize(
    ("factory", "code", "words"),
    [
        ("nnx_vit", 0, "PASS"),
        ("nnx_vit_with_a_bug", 1, "LayerNorm eps 1e-06 in jax, 1e-05 in torch, at blocks.1.norm2"),
    ],
)
def test_twins_of_the_users_own_go_through_the_command_line(
    factory: str, code: int, words: str, tmp_path: Path
) -> None:
    save_file({"images": vit_images()}, tmp_path / "images.safetensors")
    (tmp_path / "map.toml").write_text("torch_axes = [0, 3, 1, 2]\n")
    pages = ("--html", tmp_path / "r.html", "--junit", tmp_path / "r.xml")
    twins = ("--torch", f"{THEIRS}:torch_vit", "--jax", f"{THEIRS}:{factory}")
    inputs = ("--inputs", tmp_path / "images.safetensors", "--map", tmp_path / "map.toml")
    result = run(*twins, *inputs, *pages, "--level", "layers", "--dtype", "float64")
    assert result.exit_code == code, result.output
    assert words in result.output
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "r.xml").exists()


@pytest.mark.parametrize("in_the_map", [None, [0, 1, 2, 3]], ids=["no map", "other axes in the map"])
def test_the_order_of_axes_needs_no_map_and_the_option_holds_where_both_say_it(
    in_the_map: list[int] | None, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", vit_images())
    (tmp_path / "map.toml").write_text(f"torch_axes = {in_the_map}\n")
    twins = ("--torch", f"{THEIRS}:torch_vit", "--jax", f"{THEIRS}:nnx_vit", "--inputs", tmp_path / "images.npy")
    names = ("--map", tmp_path / "map.toml") if in_the_map else ()
    result = run(*twins, *names, "--torch-axes", "0, 3, 1, 2", "--level", "forward", "--dtype", "float64")
    assert result.exit_code == 0, result.output


def test_what_the_options_say_together(tmp_path: Path) -> None:
    file = tmp_path / "map.toml"
    file.write_text('torch_axes = [0, 1]\n[modules]\ndense_0 = "0"\n')
    assert name_map_from_options(None, None) == NameMap()
    assert name_map_from_options(None, "1,0") == NameMap(torch_axes=(1, 0))
    assert name_map_from_options(file, None) == NameMap(modules={"dense_0": "0"}, torch_axes=(0, 1))
    assert name_map_from_options(file, "1,0") == NameMap(modules={"dense_0": "0"}, torch_axes=(1, 0))
    for wrong in ("0,2", "0;1", "", "[1, 0]", "0,-1"):
        with pytest.raises(ValueError, match="--torch-axes must be a permutation"):
            name_map_from_options(file, wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--torch-axes", "0,3,1,2"),
            "--torch-axes is for your own models only: it needs --torch, --jax and --inputs too",
        ),
        (("--map", "map.toml"), "--map is for your own models only: it needs --torch, --jax and --inputs too"),
        (("--torch", "m:f", "--torch-axes", "0,3,1"), "--torch-axes must be a permutation"),
        (("--torch", "m:f"), "--jax and --inputs not given"),
        (("--torch", "m", "--jax", "m:f", "--inputs", "{images}"), "package.module:factory, got 'm'"),
        (("--torch", "nowhere:f", "--jax", "m:f", "--inputs", "{images}"), "no module 'nowhere'"),
        (("--torch", f"{THEIRS}:nothing", "--jax", "m:f", "--inputs", "{images}"), "no factory 'nothing'"),
        (("--torch", f"{THEIRS}:torch_vit", "--jax", "m:f", "--inputs", "x.png"), "got .png"),
    ],
)
def test_what_a_user_can_get_wrong_is_an_error(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", vit_images())
    result = run(*(argument.replace("{images}", str(tmp_path / "images.npy")) for argument in arguments))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_plain_functions_are_compared_in_output_and_gradient() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5))
    report = verify(lambda x: torch.tanh(x) * x.exp(), lambda x: jnp.tanh(x) * jnp.exp(x), x)
    assert report.verdict == "pass"
    assert {row.level for row in report.checks} == {"forward", "gradients", "again"}
    assert verify(torch.nn.functional.gelu, jax.nn.gelu, x).verdict == "mismatch"
    with pytest.raises(ValueError, match="no modules"):
        verify(torch.tanh, jnp.tanh, x, levels=("layers",))


def test_something_else_than_a_model_is_an_error() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5))
    with pytest.raises(TypeError, match="torch model must be"):
        verify(3, jnp.tanh, x)
    with pytest.raises(ValueError, match=r"model: an exported program must be one of \.onnx"):
        verify("model", jnp.tanh, x)
    with pytest.raises(TypeError, match="JAX model must be"):
        verify(torch.tanh, linen.Dense(3), x)


def test_exchanged_models_are_an_error_that_says_so() -> None:
    x, torch_model, jax_model = np.arange(3.0)[None], torch.nn.Linear(3, 3), nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    for call in (partial(verify, jax_model, torch_model, x), partial(load_torch_weights, torch_model, jax_model)):
        with pytest.raises(TypeError, match="of Flax: are the two exchanged"):
            call()


def test_our_layer_for_linen_is_verified_too() -> None:
    torch.manual_seed(0)
    theirs = outlook_torch.OutlookAttention(6, num_heads=2, stride=2)
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 6))
    module = outlook_jax.linen.OutlookAttention(6, num_heads=2, stride=2)
    variables = module.init(jax.random.key(0), jnp.asarray(x))
    report = verify(theirs, (module, variables), x, levels=("layers",), dtypes=("float64",))
    assert report.verdict == "mismatch"
    assert report.first_divergence == "v"
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = {
        part: {"kernel": state[f"{part}.weight"].T} | ({"bias": state[f"{part}.bias"]} if part != "v" else {})
        for part in ("v", "attn", "proj")
    }
    report = verify(theirs, (module, {"params": params}), x, levels=("layers",), dtypes=("float64",))
    assert report.verdict == "pass", wrong(report)


class Repeated(linen.Module):
    """Modules inside a transformation cannot be watched: there the arrays have no values yet."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.remat(linen.Dense)(3, name="1")(jnp.tanh(linen.Dense(4, name="0")(x)))


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", torch.nn.Linear(5, 4))
        self.add_module("1", torch.nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("1")(torch.tanh(self.get_submodule("0")(x)))


def test_what_a_transformation_hides_is_left_out_and_the_rest_compared() -> None:
    torch.manual_seed(0)
    theirs, module = Stack(), Repeated()
    x = np.random.default_rng(0).standard_normal((3, 5))
    ours = load_torch_weights((module, module.init(jax.random.key(0), jnp.asarray(x))), theirs)
    report = verify(theirs, ours, x, levels=("layers",), dtypes=("float64",))
    assert report.verdict == "pass", wrong(report)
    verdicts = {(row.name, row.verdict) for row in report.checks if row.level == "layers"}
    assert {("0", "pass"), ("1", "skipped"), ("(model)", "pass")} <= verdicts


class Renamed(nnx.Module):
    def __init__(self) -> None:
        self.dense_0 = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, x: Any) -> Any:
        return self.out(jnp.tanh(self.dense_0(x)))


def test_a_map_says_what_corresponds_where_the_names_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    file = tmp_path / "map.toml"
    file.write_text('[modules]\ndense_0 = "0"\n[weights]\n"out.bias" = "2.bias"\n"out.kernel" = "2.weight"\n')
    names = read_name_map(file)
    ours = load_torch_weights(Renamed(), theirs, names)
    x = np.random.default_rng(0).standard_normal((3, 5))
    report = verify(theirs, ours, x, levels=("forward", "gradients"), dtypes=("float64",), names=names)
    assert report.verdict == "pass", wrong(report)
    exchanged = NameMap(weights={"dense_0.bias": "0.bias", "dense_0.kernel": "2.weight"})
    with pytest.raises(ValueError, match=r"dense_0.kernel has shape \(5, 4\), 2.weight in its layout \(4, 3\)"):
        load_torch_weights(Renamed(), theirs, exchanged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modules = 3", "'modules' must be a table, got 3"),
        ("[blocks]\na = 'b'", "'blocks' is none of modules, weights, axes, out_axes, torch_axes$"),
        ("[module]\na = 'b'", "'module' is none of .*; did you mean 'modules'[?]"),
        ("[Weights]\na = 'b'", "did you mean 'weights'[?]"),
        ("torch-axis = [0, 3, 1, 2]", "did you mean 'torch_axes'[?]"),
        ("[modules]\na = 3", "must be a str"),
        ("torch_axes = [0, 0, 1]", "permutation"),
        ("[axes]\nkernel = [1, 2]", "permutation"),
        ('torch_axes = ["0", 1]', "permutation"),
        ("torch_axes = [false, true]", "permutation"),
        ("modules", "map.toml"),
    ],
)
def test_a_map_that_is_wrong_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_name_map(tmp_path / "map.toml")


def test_names_are_derived_from_modules_and_leaves() -> None:
    names = derive_names(
        {
            "blocks.0.fc.weight": TorchLeaf("Linear", (3, 2)),
            "bn.running_var": TorchLeaf("BatchNorm2d", (3,)),
            "conv.weight": TorchLeaf("Conv2d", (4, 3, 2, 2)),
            "extra": TorchLeaf("M", (1,)),
        },
        {"", "blocks", "blocks.0", "blocks.0.fc", "bn", "conv"},
        {"blocks_0.fc.kernel": (2, 3), "bn.var": (3,), "conv.kernel": (2, 2, 3, 4)},
        {"", "blocks_0", "blocks_0.fc", "bn", "conv"},
        NameMap(),
    )
    found = {flax: (weight.torch, weight.axes) for flax, weight in names.by_flax.items()}
    assert found["blocks_0.fc.kernel"] == ("blocks.0.fc.weight", (1, 0))
    assert found["bn.var"] == ("bn.running_var", None)
    assert found["conv.kernel"] == ("conv.weight", (2, 3, 1, 0))
    assert names.module("blocks_0.fc") == "blocks.0.fc"
    assert "extra" in names.expected
