"""The table of released models: what is counted, against the models themselves and what others print."""

import json
from importlib import import_module
from typing import Any

import jax
import pytest
import timm
import torch
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import outlook_jax
import outlook_torch
from outlook_common.config import VOLO_VARIANTS, VOLOConfig, volo_config
from outlook_common.flops import multiply_adds, parameters
from outlook_common.models import list_models, released_models
from outlook_parity.cli.app import app
from parity_tests.support.published import COUNTED_BY_TIMM, FLOPS_OF_PAPER

SMALL: dict[str, Any] = {
    "layers": (1, 2, 1, 1),
    "embed_dims": (12, 24, 24, 24),
    "num_heads": (2, 4, 3, 2),
    "stem_hidden_dim": 6,
    "img_size": (96, 64),
    "num_classes": 7,
}
CHANGES: list[dict[str, Any]] = [
    {},
    {"use_aux_head": False},
    {"num_classes": 0},
    {"post_layers": None, "global_pool": "avg", "use_aux_head": False},
    {"global_pool": ""},
    {"patch_size": 16, "in_chans": 1, "mlp_ratio": (1.0, 2.0, 3.0, 4.0)},
    {"out_kernel": 5, "out_stride": 1, "out_padding": 2, "post_layers": ("ca",)},
    {"outlook_attention": (True, True, False, False)},
]


def counted(model: torch.nn.Module, config: VOLOConfig) -> float:
    """Count the products and convolutions that a model runs, on tensors without numbers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, config.in_chans, *config.img_size, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_multiply_adds_are_those_that_timms_model_runs(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert multiply_adds(VOLO_VARIANTS[name].config) == counted(model, VOLO_VARIANTS[name].config)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_multiply_adds_of_own_sizes_are_those_that_the_model_runs(changes: dict[str, Any]) -> None:
    config = volo_config("volo_d1_224", **SMALL | changes)
    model = outlook_torch.VOLO(config, implementation="reference", device="meta")
    assert multiply_adds(config) == counted(model, config)


@pytest.mark.parametrize(("name", "pixels"), FLOPS_OF_PAPER)
def test_multiply_adds_are_the_papers_within_two_percent(name: str, pixels: int) -> None:
    # D5's are those of a stem of 64 channels; the released D5 has 128.
    changes = {"stem_hidden_dim": 64} if name == "d5" else {}
    config = volo_config(f"volo_{name}_{pixels}", **changes)
    assert multiply_adds(config) / 1e9 == pytest.approx(FLOPS_OF_PAPER[name, pixels], rel=0.02)


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_multiply_adds_are_those_that_timm_prints_which_count_a_little_more(name: str) -> None:
    ratio = COUNTED_BY_TIMM[name].gmacs * 1e9 / multiply_adds(VOLO_VARIANTS[name].config)
    assert 1.001 <= ratio <= 1.0035


@pytest.mark.parametrize("name", VOLO_VARIANTS)
def test_parameters_are_those_of_both_twins_and_of_timm(name: str) -> None:
    config = VOLO_VARIANTS[name].config
    in_torch = outlook_torch.VOLO(config, device="meta").parameters()
    assert parameters(config) == sum(parameter.numel() for parameter in in_torch)
    in_jax = nnx.eval_shape(lambda: outlook_jax.VOLO(config, rngs=nnx.Rngs(0)))
    assert parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(in_jax, nnx.Param)))
    assert parameters(config) / 1e6 == pytest.approx(COUNTED_BY_TIMM[name].params, abs=0.006)


def test_models_are_listed_by_pattern_and_size_alike_in_both_twins() -> None:
    assert outlook_torch.list_models is outlook_jax.list_models is list_models
    assert list_models() == list(VOLO_VARIANTS)
    assert list_models("volo_d1*") == ["volo_d1_224", "volo_d1_384"]
    assert list_models("timm/volo_d?_448.*") == ["volo_d3_448", "volo_d4_448", "volo_d5_448"]
    assert list_models(["*_512", "*d2_2*"]) == ["volo_d2_224", "volo_d5_512"]
    assert list_models(img_size=384, min_top1=86) == ["volo_d2_384"]
    assert list_models(max_parameters=60e6, max_multiply_adds=20e9) == ["volo_d1_224", "volo_d2_224"]
    assert list_models("resnet*") == []


def outlook(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": "80"})


def test_the_command_prints_the_table_within_80_columns() -> None:
    result = outlook("*_224", "--max-params", "60")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "volo_d" in line]
    assert [line.split("│")[1:5] for line in lines] == [
        [" volo_d1_224 ", "  26.6M ", "  6.9G ", " 224 "],
        [" volo_d2_224 ", "  58.7M ", " 14.3G ", " 224 "],
    ]
    assert "│ timm/volo_d1_224.sail_in1k │" in lines[0]
    assert "licence of the weights: apache-2.0" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_command_prints_json_and_says_what_there_is_where_nothing_matches() -> None:
    rows = json.loads(outlook("--min-top1", "87", "--json").stdout)
    assert [row["name"] for row in rows] == ["volo_d5_448", "volo_d5_512"]
    assert rows[1] == json.loads(json.dumps(released_models()[-1].to_dict()))
    result = outlook("resnet*")
    assert isinstance(result.exception, ValueError)
    assert "no released model matches; there are volo_d1_224, " in str(result.exception)


def test_the_page_of_models_has_this_table_and_its_code_says_what_is_returned(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "models.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `volo_")]
    assert rows == [
        f"| `{model.name}` | {model.parameters / 1e6:.1f} | {model.multiply_adds / 1e9:.1f} | {model.img_size[0]} "
        f"| {model.top1} | `{model.hub_id}` |"
        for model in released_models()
    ]
    calls = [line.split("  # ") for line in page.splitlines() if line.startswith("outlook_torch.list_models(")]
    assert len(calls) == 2
    assert [repr(eval(call)) for call, _ in calls] == [returned for _, returned in calls]


def test_every_package_and_the_program_have_one_version() -> None:
    packages = ("outlook_common", "outlook_torch", "outlook_jax", "outlook_parity")
    result = CliRunner().invoke(app, ["--version"])
    assert {import_module(package).__version__ for package in packages} == {result.output.split()[-1]}
    assert result.output == f"outlook {outlook_torch.__version__}\n"
