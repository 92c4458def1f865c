"""Exported programs in place of either twin: torch.export, AOTInductor, jax.export and ONNX files."""

import json
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import outlook_torch
from outlook_parity import Report, verify
from outlook_parity.backends.exported.registry import as_exported
from outlook_parity.cli.app import app
from outlook_parity.mapping.user import NameMap
from outlook_parity.models.builtin import Options, make

ONNX = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="not run: onnx, onnxscript and onnxruntime are not installed",
)
FLATBUFFERS = pytest.mark.skipif(not find_spec("flatbuffers"), reason="not run: flatbuffers is not installed")

NCHW = (0, 3, 1, 2)
NAMES = NameMap(torch_axes=NCHW)


class Small(nn.Module):
    """A convolution, an activation and a mean; takes (B, 3, H, W)."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(approximate), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def jax_twin() -> tuple[Callable[..., Any], dict[str, np.ndarray]]:
    weights = {name: tensor.detach().numpy() for name, tensor in Small().named_parameters()}

    def forward(w: dict[str, Any], x: jax.Array) -> jax.Array:
        kernel = w["conv.weight"].transpose(2, 3, 1, 0)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.nn.gelu(y + w["conv.bias"], approximate=False).mean((1, 2))
        return y @ w["head.weight"].T + w["head.bias"]

    return forward, weights


def inputs(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 6, 7, 3))


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor]:
    return (torch.zeros(2, 3, 6, 7, dtype=dtype),)


def write_pt2(path: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    torch.export.save(torch.export.export(model.to(dtype).eval(), example(dtype)), path)
    return path


def write_jax(path: Path, model: tuple[Callable[..., Any], Any], dtype: str = "float32") -> Path:
    function, weights = model
    with jax.enable_x64(dtype == "float64"):
        cast = {name: np.asarray(array, dtype) for name, array in weights.items()}
        program = jax.export.export(jax.jit(lambda x: function(cast, x)))(jax.ShapeDtypeStruct((2, 6, 7, 3), dtype))
        path.write_bytes(program.serialize())
    return path


def write_onnx(path: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model.to(dtype).eval(), example(dtype), dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    assert program is not None
    program.save(str(path))
    return path


WRITERS = [
    pytest.param(write_pt2, "program.pt2", id="torch.export"),
    pytest.param(
        write_onnx,
        "program.onnx",
        id="ONNX",
        marks=[
            ONNX,
            pytest.mark.filterwarnings("ignore::DeprecationWarning"),
            pytest.mark.filterwarnings("ignore::FutureWarning"),
        ],
    ),
]
of_torch = pytest.mark.parametrize(("write", "name"), WRITERS)


def rows(report: Report) -> list[tuple[str, str, str]]:
    return [(row.level, row.dtype, row.verdict) for row in report.checks if row.level != "weights"]


def assert_passes(report: Report, twin: str) -> None:
    assert report.verdict == "pass", (report.reason, report.checks)
    assert rows(report) == [("forward", "float32", "pass")]
    (check,) = report.checks
    noises = {"torch": check.torch_noise, "jax": check.jax_noise}
    assert all(noise is not None and 0 < noise.rms < 8 for noise in noises.values())
    assert any("computes in float32 alone: its error was judged by that of" in note for note in report.notes)
    assert any(f"both against {twin} in float64" in note for note in report.notes)
    assert any("left out, for the exported program computes in float32 alone: float64" in one for one in report.notes)


@of_torch
def test_a_program_of_the_torch_model_passes_in_place_of_either_twin(write: Any, name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, Small())
    assert_passes(verify(file, jax_twin(), inputs(), names=NAMES), "JAX")
    report = verify(Small(), str(file), inputs(), names=NAMES)
    assert_passes(report, "torch")
    assert any(
        "takes the axes as torch does, by its shapes: input in the order [0, 3, 1, 2]" in n for n in report.notes
    )


@FLATBUFFERS
def test_a_program_of_the_jax_model_passes_in_place_of_either_twin(tmp_path: Path) -> None:
    file = write_jax(tmp_path / "program.jax_export", jax_twin())
    assert_passes(verify(Small(), file, inputs(), names=NAMES), "torch")
    report = verify(file, jax_twin(), inputs(), names=NAMES)
    assert_passes(report, "JAX")
    assert any("takes the axes as JAX does, by its shapes" in note for note in report.notes)


class Maps(Small):
    """The same with the map before the mean, (B, 8, H, W), as its first output; of 8 rows and columns it is a cube."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.act(self.conv(x))
        return maps, self.head(maps.mean((2, 3)))


def jax_maps(weights: dict[str, np.ndarray], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = weights["conv.weight"].transpose(2, 3, 1, 0)
    maps = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    maps = jax.nn.gelu(maps + weights["conv.bias"], approximate=False)
    return maps, maps.mean((1, 2)) @ weights["head.weight"].T + weights["head.bias"]


@pytest.mark.parametrize("size", [(6, 7), (8, 8)])
def test_maps_are_compared_in_the_order_that_each_twin_has(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, *size, 3))
    torch_program = torch.export.export(Maps().eval(), (torch.zeros(2, 3, *size),))
    weights = jax_twin()[1]
    jax_program = jax.export.export(jax.jit(lambda x: jax_maps(weights, x)))(jax.ShapeDtypeStruct(x.shape, jnp.float32))
    pairs = ((torch_program, (jax_maps, weights)), (Maps(), torch_program), (Maps(), jax_program))
    for torch_model, jax_model in (*pairs, (jax_program, (jax_maps, weights))):
        report = verify(torch_model, jax_model, x, names=NAMES)
        assert report.verdict == "pass", (report.checks, report.notes)
        assert [row.name for row in report.checks] == ["output.0", "output.1"]


def test_programs_in_memory_pass() -> None:
    program = torch.export.export(Small().eval(), example())
    assert_passes(verify(program, jax_twin(), inputs(), names=NAMES), "JAX")
    function, weights = jax_twin()
    exported = jax.export.export(jax.jit(lambda x: function(weights, x)))(
        jax.ShapeDtypeStruct((2, 6, 7, 3), jnp.float32)
    )
    assert_passes(verify(Small(), exported, inputs(), names=NAMES), "torch")


@of_torch
def test_a_program_of_another_model_is_a_mismatch(write: Any, name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, Small("tanh"))
    for report in (verify(file, jax_twin(), inputs(), names=NAMES), verify(Small(), file, inputs(), names=NAMES)):
        assert report.verdict == "mismatch"
        assert rows(report) == [("forward", "float32", "mismatch")]


@FLATBUFFERS
def test_a_jax_program_of_another_model_is_a_mismatch(tmp_path: Path) -> None:
    function, weights = jax_twin()
    weights = {**weights, "head.bias": weights["head.bias"] + np.float32(1e-4)}
    file = write_jax(tmp_path / "program.jax_export", (function, weights))
    assert verify(Small(), file, inputs(), names=NAMES).verdict == "mismatch"


def test_a_program_in_float64_is_compared_in_float64(tmp_path: Path) -> None:
    report = verify(write_pt2(tmp_path / "program.pt2", Small(), torch.float64), jax_twin(), inputs(), names=NAMES)
    assert report.verdict == "pass"
    assert ("forward", "float64", "pass") in rows(report)
    assert {dtype for _, dtype, _ in rows(report)} == {"float64"}
    assert all(row.measured is not None and row.measured <= 1e-12 for row in report.checks if row.level == "forward")


@FLATBUFFERS
def test_a_jax_program_in_float64_is_compared_in_float64(tmp_path: Path) -> None:
    file = write_jax(tmp_path / "program.jax_export", jax_twin(), "float64")
    report = verify(Small(), file, inputs(), names=NAMES)
    assert report.verdict == "pass"
    assert {dtype for _, dtype, _ in rows(report)} == {"float64"}


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Small().eval(), example())


@pytest.mark.parametrize("level", ["layers", "gradients", "training"])
def test_other_levels_are_refused_with_the_one_that_works(level: str, program: Any) -> None:
    with pytest.raises(ValueError, match=rf"'{level}' \(the torch.export program has outputs alone, for 'forward'\)"):
        verify(program, jax_twin(), inputs(), levels=["forward", level], names=NAMES)


def test_left_out_levels_are_among_the_notes(program: Any) -> None:
    notes = verify(program, jax_twin(), inputs(), names=NAMES).notes
    for level in ("layers", "gradients", "training"):
        assert any(f"the level '{level}' was left out" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ["float64"]}, "computes in float32 alone, and dtypes are float64"),
        ({"device": "gpu"}, "device='gpu' is for two models"),
        ({"memory": "2GiB"}, "memory='2GiB' is for two models"),
        ({"devices": 2}, "devices=2 is for two models"),
    ],
)
def test_options_that_programs_do_not_have_are_refused(options: Any, message: str, program: Any) -> None:
    with pytest.raises(ValueError, match=message):
        verify(program, jax_twin(), inputs(), names=NAMES, **options)


class Dense(nn.Module):
    """One product and one activation: C++ compilers take longer for anything more. Takes (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(x.mean((2, 3))))


def dense_twin() -> tuple[Callable[..., Any], dict[str, np.ndarray]]:
    weights = {name: tensor.detach().numpy() for name, tensor in Dense().named_parameters()}
    return lambda w, x: jnp.tanh(x.mean((1, 2)) @ w["head.weight"].T + w["head.bias"]), weights


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of AOTInductor, compiled in some ten seconds."""
    if shutil.which("g++") is None:
        pytest.skip("not run: AOTInductor compiles with g++")
    path = tmp_path_factory.mktemp("compiled") / "dense.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about itself
        torch._inductor.aoti_compile_and_package(torch.export.export(Dense().eval(), example()), package_path=str(path))
    return path


@pytest.mark.long(reason="compiles a package of C++")
def test_a_package_of_aotinductor_passes_in_place_of_either_twin(package: Path) -> None:
    assert_passes(verify(package, dense_twin(), inputs(), names=NAMES), "JAX")
    report = verify(Dense(), str(package), inputs(), names=NAMES)
    assert_passes(report, "torch")
    assert any("dense.pt2 (AOTInductor) takes the axes as torch does, by its shapes" in note for note in report.notes)


@pytest.mark.long(reason="compiles a package of C++")
def test_a_package_of_another_model_is_a_mismatch(package: Path) -> None:
    function, weights = dense_twin()
    weights["head.bias"] = weights["head.bias"] + np.float32(1e-4)
    assert verify(package, (function, weights), inputs(), names=NAMES).verdict == "mismatch"


@pytest.mark.long(reason="compiles a package of C++")
def test_a_package_reads_nothing_beyond_the_ends_of_other_shapes(package: Path) -> None:
    with pytest.raises(ValueError, match=r"takes argument 0 float32 \(2, 3, 6, 7\); got input \(3, 3, 6, 7\)"):
        verify(package, dense_twin(), inputs(3), names=NAMES)
    program = as_exported(package)
    assert program is not None
    with pytest.raises(RuntimeError, match="unmatched dim value at 0, expected: 2, but got: 1"):
        program.call([np.zeros((1, 3, 6, 7), np.float32)])


CHECK = """
AOTI_NOINLINE static void check_input_0(AtenTensorHandle* input_handles) {
    int32_t x_expected_dtype = aoti_torch_dtype_float32();
"""


@pytest.mark.parametrize(
    ("model", "source", "device", "message"),
    [
        ("model", CHECK, "cuda", "compiled for cuda; exported programs run on the CPU"),
        ("model", "int main() {}", "cpu", "does not say what its inputs are"),
        ("other", CHECK, "cpu", "it has the compiled models other; one, called 'model', can be run"),
        ("model", CHECK, "cpu", "AOTInductor cannot load it"),
    ],
)
def test_packages_that_cannot_be_run_are_refused(
    model: str, source: str, device: str, message: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr(f"a/data/aotinductor/{model}/x.wrapper.cpp", source)
        archive.writestr(f"a/data/aotinductor/{model}/x.wrapper_metadata.json", json.dumps({"AOTI_DEVICE_KEY": device}))
    with pytest.raises(ValueError, match=message):
        verify(Dense(), tmp_path / "a.pt2", inputs(), names=NAMES)


def test_two_programs_are_refused(program: Any) -> None:
    with pytest.raises(ValueError, match="are both exported programs: one twin must be a model"):
        verify(program, program, inputs())


def test_inputs_that_do_not_fit_are_named_with_what_the_program_takes(program: Any) -> None:
    with pytest.raises(ValueError, match=r"takes x float32 \(2, 3, 6, 7\); got input \(3, 3, 6, 7\)"):
        verify(program, jax_twin(), inputs(3), names=NAMES)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("model.pt", b"", ValueError, r"must be one of \.onnx, \.pt2, \.jax_export"),
        ("model.pt2", None, FileNotFoundError, "there is no such file"),
        ("model.pt2", b"no archive", ValueError, "no program of torch.export.save"),
        pytest.param("model.onnx", b"no graph", ValueError, "ONNX Runtime cannot read it", marks=ONNX),
        pytest.param("model.jax_export", b"no program", ValueError, "jax.export cannot read it", marks=FLATBUFFERS),
    ],
)
def test_files_that_are_no_programs_are_refused(
    name: str, content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        verify(Small(), tmp_path / name, inputs(), names=NAMES)


def test_without_onnx_runtime_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ImportError, match=r"to run model\.onnx, needs onnxruntime.*pip install onnxruntime"):
        verify(Small(), tmp_path / "model.onnx", inputs(), names=NAMES)


# Without the shape checks of the tests, which torch.export cannot trace.
WRITE_LAYER = """
import sys, torch, outlook_torch
layer = outlook_torch.OutlookAttention(192, 6, stride=2)
outlook_torch.load_weights(layer, sys.argv[1])
torch.export.save(torch.export.export(layer.eval(), (torch.randn(1, 28, 28, 192),)), sys.argv[2])
"""


@pytest.mark.long(reason="exports and verifies VOLO")
def test_the_command_takes_a_program_in_place_of_either_twin_of_a_built_in_model(tmp_path: Path) -> None:
    options = Options("layer", None, "", 3, None, 3, 2, None)
    weights, program = tmp_path / "layer.safetensors", tmp_path / "layer.pt2"
    outlook_torch.save_weights(make(options, ["torch"]).torch_model, weights)
    subprocess.run([sys.executable, "-c", WRITE_LAYER, weights, program], check=True, timeout=300)
    for twin in ("--torch", "--jax"):
        arguments = ["verify", "--model", "layer", "--weights", str(weights), twin, str(program)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "layer.pt2 in place of" in result.output
    result = CliRunner().invoke(app, [*arguments, "--level", "layers"])
    assert "has outputs alone, for 'forward'" in str(result.exception)
    result = CliRunner().invoke(app, ["verify", "--model", "layer", "--jax", str(program)])  # of other weights
    assert result.exit_code == 1, result.output
