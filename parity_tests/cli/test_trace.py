"""`outlook trace` and `outlook compare`: twins on two machines, compared on a third that has neither framework."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner, Result

from outlook_parity import NameMap, load_torch_weights
from outlook_parity.cli.app import app
from outlook_parity.core.recorder import Key
from outlook_parity.trace.compare import compare_traces
from outlook_parity.trace.file import TraceFile, digest, read, write
from parity_tests.support.vit import vit_images
from parity_tests.verify.test_truth import LENGTH, WIDTH, jax_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

HIDING = """
import sys
hidden = set({hidden!r})
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else real(name, *rest)
sys.meta_path.insert(0, Hidden())
from outlook_parity.cli.app import main
sys.argv = ["outlook", *{arguments!r}]
main()
"""


def outlook(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=True)


def outlook_without(hidden: tuple[str, ...], *arguments: object) -> subprocess.CompletedProcess[str]:
    script = HIDING.format(hidden=hidden, arguments=[*map(str, arguments)])
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The layer's traces in float64, each written where the other framework is not installed."""
    folder = tmp_path_factory.mktemp("traces")
    others = {"torch": ("jax", "jaxlib", "flax", "optax"), "jax": ("torch",)}
    paths = {}
    for framework, hidden in others.items():
        paths[framework] = folder / f"{framework}.trace"
        done = outlook_without(hidden, "trace", "--framework", framework, "--model", "layer", "--out", paths[framework])
        assert done.returncode == 0, done.stderr
    return paths


def test_traces_are_compared_where_neither_framework_is(traces: dict[str, Path]) -> None:
    hidden = ("torch", "jax", "jaxlib", "flax", "optax", "sklearn", "matplotlib")
    done = outlook_without(hidden, "compare", traces["torch"], traces["jax"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("PASS: the twins are equal to rounding in float64")


def test_output_gradients_and_modules_are_compared(traces: dict[str, Path]) -> None:
    report = compare_traces(read(traces["jax"]), read(traces["torch"]))
    assert report.verdict == "pass"
    names = {(row.level, row.name) for row in report.checks if row.verdict == "pass"}
    assert {("forward", "output"), ("gradients", "input"), ("gradients", "proj.bias"), ("layers", "attn")} <= names
    assert report.environment["torch: device"] == "cpu"
    assert report.environment["jax: device"] == "cpu"
    assert report.environment["torch: products"] == "cuda.matmul ieee, cudnn.conv ieee, cudnn.rnn ieee"
    assert report.environment["jax: products"] == "jax_default_matmul_precision highest"


def changed(trace: TraceFile, what: str) -> TraceFile:
    header, weights = trace.header, dict(trace.header.weights)
    weights["proj.bias"] = digest(np.ones(3))
    other = {
        "inputs": replace(header, inputs={"input": digest(np.ones(3))}),
        "weights": replace(header, weights=weights),
        "dtype": replace(header, dtype="float32", rounded_to="float32"),
        "seed": replace(header, seed=7),
        "framework": replace(header, framework="torch"),
    }
    return replace(trace, header=other[what])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("inputs", "different inputs in the traces of torch and jax: input"),
        ("weights", "different weights in the traces of torch and jax: proj.bias"),
        ("dtype", "dtype float64 in torch, float32 in jax"),
        ("seed", "seed 0 in torch, 7 in jax"),
        ("framework", "of torch and torch"),
    ],
)
def test_traces_of_something_else_are_refused(traces: dict[str, Path], what: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "other.trace"
    write(file, changed(read(traces["jax"]), what))
    result = outlook("compare", traces["torch"], file)
    assert isinstance(result.exception, ValueError)
    assert words in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--torch-axes", "0,3,1,2"), "--torch-axes is for your own models only: it needs --torch or --jax too"),
        (("--map", "map.toml"), "--map is for your own models only: it needs --torch or --jax too"),
        (("--names", "a.trace"), "--names is for your own models only: it needs --torch or --jax too"),
        (("--inputs", "x.npy"), "--inputs is for your own models only: it needs --torch or --jax too"),
        (("--jax", "m:f"), "--torch and --jax need --inputs too"),
        (("--jax", "m:f", "--inputs", "x.npy", "--torch-axes", "1,2"), "--torch-axes must be a permutation"),
        (("--torch", "m:f", "--inputs", "x.npy"), "a trace is of one twin"),
        (("--level", "training"), "unknown level 'training'; known: forward, layers, gradients"),
    ],
)
def test_options_that_do_not_fit_each_other_are_an_error(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = outlook("trace", "--framework", "jax", "--model", "layer", "--out", tmp_path / "a.trace", *arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_trace_of_no_twin_says_how_to_name_one(tmp_path: Path) -> None:
    result = outlook("trace", "--model", "layer", "--out", tmp_path / "a.trace")
    assert "which twin? --torch or --jax names your own model" in str(result.exception)


def test_steps_are_told_on_stderr_and_a_level_alone_takes_fewer(tmp_path: Path) -> None:
    given = ("trace", "--framework", "torch", "--model", "layer", "--out", tmp_path / "a.trace")
    every, one, quiet = (outlook(*given, *more) for more in ((), ("--level", "forward"), ("--quiet",)))
    assert [line.split("s  ")[1] for line in every.stderr.splitlines()[1:]] == [
        *("torch in float64", "how far rounding changes gradients", "module by module", "writing a.trace", "done")
    ]
    assert [line.split("s  ")[1] for line in one.stderr.splitlines()[1:]] == [
        *("torch in float64", "writing a.trace", "done")
    ]
    assert quiet.stderr == ""
    assert every.stdout == one.stdout == quiet.stdout == f"trace: {tmp_path / 'a.trace'}\n"


def test_the_first_module_that_differs_is_named(traces: dict[str, Path]) -> None:
    torch, jax = read(traces["torch"]), read(traces["jax"])
    key = Key("attn", 0, "out")
    events = {**jax.events, key: [2 * array for array in jax.events[key]]}
    report = compare_traces(torch, replace(jax, events=events))
    assert (report.verdict, report.first_divergence) == ("mismatch", "attn")
    assert report.cause == "attn is the first module whose results differ; jax has 2 times what torch has"


def test_what_is_missing_or_nan_in_a_trace_is_a_mismatch(traces: dict[str, Path]) -> None:
    torch, jax = read(traces["torch"]), read(traces["jax"])
    fewer = {name: array for name, array in jax.gradients.items() if name != "v.weight"}
    assert compare_traces(torch, replace(jax, gradients=fewer)).verdict == "mismatch"
    assert compare_traces(torch, replace(jax, outputs={"output": jax.outputs["output"] * np.nan})).verdict == "mismatch"


def test_a_lower_precision_needs_a_truth(traces: dict[str, Path], tmp_path: Path) -> None:
    lower = [replace(trace, header=changed(trace, "dtype").header) for trace in map(read, traces.values())]
    with pytest.raises(ValueError, match="--dtype float64 --rounded-to float32"):
        compare_traces(*lower)


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_trace_is_an_error(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.trace"
    file.write_bytes(content)
    result = outlook("compare", file, file)
    assert isinstance(result.exception, ValueError)
    assert "bad.trace" in str(result.exception)


def test_a_trace_survives_the_file(traces: dict[str, Path], tmp_path: Path) -> None:
    trace = read(traces["torch"])
    write(tmp_path / "again.trace", trace)
    again = read(tmp_path / "again.trace")
    assert again.header == trace.header
    assert list(again.events) == list(trace.events)
    for key, arrays in trace.events.items():
        assert all(np.array_equal(one, other) for one, other in zip(arrays, again.events[key], strict=True))


THIS = "parity_tests.cli.test_trace"


def torch_stack() -> torch.nn.Module:
    torch.manual_seed(0)
    first, second, third = (torch.nn.Linear(5, 5) for _ in range(3))
    return torch.nn.Sequential(first, torch.nn.Tanh(), second, torch.nn.Tanh(), third)


class Stack(nnx.Module):
    def __init__(self, *names: str) -> None:
        self.names = names
        for name in names:
            setattr(self, name, nnx.Linear(5, 5, rngs=nnx.Rngs(0)))

    def __call__(self, x: Any) -> Any:
        first, *rest = (getattr(self, name) for name in self.names)
        x = first(x)
        for layer in rest:
            x = layer(jnp.tanh(x))
        return x


def stack_of_its_names() -> Any:
    return load_torch_weights(Stack("0", "2", "4"), torch_stack())


def stack_with_another_end() -> Any:
    return load_torch_weights(Stack("0", "neck", "head"), torch_stack(), NameMap(modules={"neck": "2", "head": "4"}))


def stack_of_other_names() -> Any:
    names = NameMap(modules={"stem": "0", "neck": "2", "head": "4"})
    return load_torch_weights(Stack("stem", "neck", "head"), torch_stack(), names)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and the trace of the torch model."""
    folder = tmp_path_factory.mktemp("stack")
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((2, 5)))
    where = ("--inputs", folder / "x.npy", "--out", folder / "a.trace")
    assert outlook("trace", "--torch", f"{THIS}:torch_stack", *where).exit_code == 0
    return folder


def traced(
    stack: Path, factory: str, out: Path, *options: object, names: str = "a.trace", inputs: str = "x.npy"
) -> Result:
    given = ("--inputs", stack / inputs, "--names", stack / names, "--out", out, *options)
    return outlook("trace", "--jax", f"{THIS}:{factory}", "--quiet", *given)


def test_weights_that_all_have_names_are_traced_without_a_word(stack: Path, tmp_path: Path) -> None:
    result = traced(stack, "stack_of_its_names", tmp_path / "b.trace")
    assert (result.exit_code, result.stderr) == (0, "")
    assert outlook("compare", stack / "a.trace", tmp_path / "b.trace").exit_code == 0


def test_weights_without_a_name_in_the_torch_trace_are_told_at_once(stack: Path, tmp_path: Path) -> None:
    result = traced(stack, "stack_with_another_end", tmp_path / "b.trace")
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        f"note: 4 of 6 weights have no counterpart in {stack / 'a.trace'}: head.bias (nearest there: 2.bias), "
        "head.kernel (nearest there: 2.weight), neck.bias (nearest there: 2.bias), … and 1 more; "
        f"4 of 6 weights of {stack / 'a.trace'} have no counterpart here: 2.weight, 2.bias, 4.weight, 4.bias; "
        "--map says what corresponds to what, and `outlook compare` refuses traces of other weights\n"
    )
    assert result.stdout == f"trace: {tmp_path / 'b.trace'}\n"
    assert "different weights" in str(outlook("compare", stack / "a.trace", tmp_path / "b.trace").exception)
    (tmp_path / "map.toml").write_text('[modules]\nhead = "4"\nneck = "2"\n')
    result = traced(stack, "stack_with_another_end", tmp_path / "b.trace", "--map", tmp_path / "map.toml")
    assert (result.exit_code, result.stderr) == (0, "")
    assert outlook("compare", stack / "a.trace", tmp_path / "b.trace").exit_code == 0


def test_a_model_none_of_whose_weights_has_a_name_in_the_torch_trace_is_an_error(stack: Path, tmp_path: Path) -> None:
    result = traced(stack, "stack_of_other_names", tmp_path / "b.trace")
    assert isinstance(result.exception, ValueError)
    told = str(result.exception)
    assert f"none of 6 weights has a counterpart in {stack / 'a.trace'}: head.bias (nearest there: 0.bias), " in told
    assert "head.kernel (nearest there: 0.weight), neck.bias (nearest there: 0.bias), … and 3 more; 6 of 6" in told
    assert "have no counterpart here: 0.weight, 0.bias, 2.weight, 2.bias, 4.weight, 4.bias; --map says" in told
    assert not (tmp_path / "b.trace").exists()


def test_names_are_told_of_before_the_model_runs(stack: Path, tmp_path: Path) -> None:
    np.save(stack / "wide.npy", np.random.default_rng(0).standard_normal((2, 7)))
    result = traced(stack, "stack_with_another_end", tmp_path / "b.trace", inputs="wide.npy")
    assert "the JAX model fails in 0 on input of shape (2, 7)" in str(result.exception)
    assert result.stderr.startswith("note: 4 of 6 weights have no counterpart")


def test_names_are_those_of_a_torch_trace(stack: Path, tmp_path: Path) -> None:
    assert traced(stack, "stack_of_its_names", stack / "b.trace").exit_code == 0
    result = traced(stack, "stack_of_its_names", tmp_path / "c.trace", names="b.trace")
    assert isinstance(result.exception, ValueError)
    assert "--names must be the trace of the torch twin" in str(result.exception)
    assert "b.trace is jax's" in str(result.exception)


TRUTH = "parity_tests.verify.test_truth"


def wrong_base() -> Any:
    return jax_model(base=5000.0)


def test_float32_tables_are_named_where_traces_in_float64_differ_by_as_little(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)))
    modules = {"torch": f"{TRUTH}:torch_model", "jax": f"{TRUTH}:jax_model", "faulty": f"{THIS}:wrong_base"}

    def trace(twin: str, name: str, *options: object) -> TraceFile:
        names = () if twin == "torch" else ("--names", tmp_path / "torch64.trace")
        given = (modules[twin], "--inputs", tmp_path / "x.npy", "--out", tmp_path / f"{name}.trace")
        result = outlook("trace", "--torch" if twin == "torch" else "--jax", *given, *names, *options)
        assert result.exit_code == 0, result.exception
        return read(tmp_path / f"{name}.trace")

    torch64, jax64 = (trace(twin, f"{twin}64", "--dtype", "float64") for twin in ("torch", "jax"))
    report = compare_traces(torch64, jax64)
    (note,) = report.notes
    assert report.verdict == "mismatch"  # nothing in float64 shows that it is rounding
    assert "as small as float32 constants make them: frequencies of shape (4,) in attention (torch); " in note
    assert "a constant of shape (5, 4) in attention (jax); traces in float32 tell" in note
    truth = trace("torch", "truth", "--dtype", "float64", "--rounded-to", "float32")
    torch32, jax32 = (trace(twin, f"{twin}32", "--dtype", "float32") for twin in ("torch", "jax"))
    assert compare_traces(torch32, jax32, truth).verdict == "pass"
    faulty = compare_traces(torch64, trace("faulty", "faulty64", "--dtype", "float64"))
    assert (faulty.verdict, faulty.notes) == ("mismatch", ())


VIT = "parity_tests.support.vit"


def test_what_rounding_can_do_to_gradients_is_in_the_traces_too(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", vit_images())
    given = ("--inputs", tmp_path / "x.npy", "--torch-axes", "0,3,1,2")
    torch_trace, jax_trace = tmp_path / "a.trace", tmp_path / "b.trace"
    for framework, factory, out, options in (
        ("torch", "torch_vit", torch_trace, ()),
        ("jax", "nnx_vit", jax_trace, ("--names", torch_trace)),
    ):
        result = outlook("trace", f"--{framework}", f"{VIT}:{factory}", *given, "--out", out, *options)
        assert result.exit_code == 0, result.exception
    torch, jax = read(torch_trace), read(jax_trace)
    report = compare_traces(torch, jax)
    assert report.verdict == "pass"
    excused = {row.name for row in report.checks if row.excused}
    assert excused
    assert excused <= {f"blocks.{block}.k.bias" for block in range(2)}  # their true value is zero
    assert compare_traces(replace(torch, jumps={}), jax).verdict == "mismatch"
    wrong = {**jax.gradients, "blocks.0.k.bias": jax.gradients["blocks.0.k.bias"] + 1e-6}
    assert compare_traces(torch, replace(jax, gradients=wrong)).verdict == "mismatch"
