"""The PyTorch twin compiled, exported and traced; each in a process of its own, for compilers can crash."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from parity_tests.support.forks import Forks

pytestmark = pytest.mark.long(reason="PyTorch's compilers, in processes of their own")

NEEDS_ONNX = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="not run: onnx, onnxscript and onnxruntime are not installed",
)

PRELUDE = """
import torch
import outlook_torch
from torch.export import Dim

torch.manual_seed(0)

def layer(**arguments):
    return outlook_torch.OutlookAttention(24, 3, attn_drop=0.0, **arguments)

def assert_same(a, b, bound=1e-5):
    error = (a - b).abs().max() / b.abs().max()
    assert b.abs().max() > 0 and error <= bound, f"relative error {error}"
"""

FORWARD_WITHOUT_GRADIENTS = """
for arguments in ({"stride": 2}, {"kernel_size": (3, 5), "stride": (3, 1), "padding": (1, 2)}):
    eager = layer(**arguments)
    compiled = torch.compile(eager, fullgraph=True)
    # timm's own layer kills the process at 28x28, stride 2, without gradients.
    x = torch.randn(2, 28, 28, 24)
    with torch.no_grad():
        assert_same(compiled(x), eager(x))
"""

TRAINING = """
eager = layer(stride=2)
compiled = torch.compile(eager, fullgraph=True)
x = torch.randn(2, 28, 28, 24)
parameters = list(eager.parameters())
ours = torch.autograd.grad(compiled(x).square().mean(), parameters)
theirs = torch.autograd.grad(eager(x).square().mean(), parameters)
for a, b in zip(ours, theirs):
    assert_same(a, b)

before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
for _ in range(3):
    compiled(torch.randn(2, 28, 28, 24)).mean().backward()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before, "recompiled"

with torch.autocast("cpu", torch.bfloat16):
    out = compiled(x)
    assert out.dtype == torch.bfloat16
    assert_same(out.float(), eager(x).float(), 2e-2)
"""

SECOND_DERIVATIVES = """
# Of a size for which composite is chosen; PyTorch's eager backend, and Inductor's.
eager = layer(stride=2, implementation="composite")
x = torch.randn(2, 9, 8, 24, requires_grad=True)
tangent = torch.randn_like(x)

def penalty(model):
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), (x, *eager.parameters()))

expected = penalty(eager)
compiled = torch.compile(eager, backend="eager", fullgraph=True)
for ours, theirs in zip(penalty(compiled), expected):
    assert_same(ours, theirs)
try:
    found = penalty(torch.compile(eager, backend="aot_eager", fullgraph=True))
except RuntimeError as error:
    assert "double backward" in str(error), error
else:
    for ours, theirs in zip(found, expected):
        assert_same(ours, theirs)

def push(x, tangent):
    return torch.func.jvp(eager, (x,), (tangent,))[1]

expected = push(x.detach(), tangent)
try:
    found = torch.compile(push, backend="eager")(x.detach(), tangent)
except Exception as error:
    print(f"refused: {error}")
else:
    assert_same(found, expected)

def each(x, tangent):
    return torch.func.vmap(eager)(x)

# Where the implementation is chosen, forward mode takes the reference; duals from outside are refused.
chosen = layer(stride=2)
x, tangent = torch.randn(2, 28, 28, 24), torch.randn(2, 28, 28, 24)

def push_chosen(x, tangent):
    return torch.func.jvp(chosen, (x,), (tangent,))[1]

assert_same(torch.compile(push_chosen, backend="eager")(x, tangent), push_chosen(x, tangent))
with torch.autograd.forward_ad.dual_level():
    dual = torch.autograd.forward_ad.make_dual(x, tangent)
    try:
        out = torch.compile(chosen, backend="eager")(dual)
    except (NotImplementedError, RuntimeError) as error:
        print(f"refused: {error}")
    else:
        assert_same(torch.autograd.forward_ad.unpack_dual(out).tangent, push_chosen(x, tangent))

many = torch.randn(3, 2, 9, 8, 24)
assert_same(torch.compile(each, backend="eager")(many, None), each(many, None))
"""

EXPORT = """
eager = layer(stride=2).eval()
x = torch.randn(2, 28, 28, 24)
program = torch.export.export(eager, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
for batch in (2, 5):
    x = torch.randn(batch, 28, 28, 24)
    assert_same(program.module()(x), eager(x))
"""

EXPORT_OF_ANY_SIZE = """
LAYERS = (
    ({}, {}),
    ({"stride": 2}, {}),
    ({"stride": 2}, {"min": 2, "max": 64}),
    ({"stride": (3, 1), "kernel_size": (5, 3), "padding": (2, 1)}, {}),
)
for arguments, bounds in LAYERS:
    eager, least = layer(**arguments).eval(), bounds.get("min", 1)
    sizes = {0: Dim("batch"), 1: Dim("rows", **bounds), 2: Dim("columns", **bounds)}
    program = torch.export.export(eager, (torch.randn(2, 7, 9, 24),), dynamic_shapes=(sizes,)).module()
    for rows, columns in ((7, 9), (8, 8), (13, 10), (2, 3), (least, 12), (least, least)):
        for batch in (1, 3):
            x = torch.randn(batch, rows, columns, 24)
            assert_same(program(x), eager(x))

# Rows alone, which torch.export cannot prove to divide what a linear layer flattens; and masks that are drawn.
eager = layer(stride=2).eval()
program = torch.export.export(eager, (torch.randn(2, 7, 9, 24),), dynamic_shapes=({1: Dim.AUTO},)).module()
for rows in (3, 8, 11):
    x = torch.randn(2, rows, 9, 24)
    assert_same(program(x), eager(x))
sizes = {1: Dim("rows", max=16), 2: Dim("columns")}
dropped = outlook_torch.OutlookAttention(24, 3, attn_drop=0.4, proj_drop=0.0, stride=2).train()
program = torch.export.export(dropped, (torch.randn(300, 7, 9, 24),), dynamic_shapes=(sizes,)).module()
x = torch.randn(1, 11, 9, 24)
many = x.expand(300, -1, -1, -1)
assert not torch.equal(program(many), program(many))
assert_same(program(many).mean(0), dropped.eval()(x)[0], 0.2)
"""

# Of every size: ONNX divides integers towards zero, PyTorch downwards.
ONNX = """
import logging
import tempfile
import warnings
from pathlib import Path

import onnxruntime

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
for arguments in ({"stride": 2}, {"stride": (3, 1), "kernel_size": (5, 3), "padding": (2, 1)}):
    eager = layer(**arguments).eval()
    sizes = {0: Dim("batch"), 1: Dim("rows"), 2: Dim("columns")}
    program = torch.onnx.export(eager, (torch.randn(2, 7, 9, 24),), dynamo=True, dynamic_shapes=(sizes,), verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        program.save(str(Path(folder) / "layer.onnx"))
        session = onnxruntime.InferenceSession(str(Path(folder) / "layer.onnx"), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    for rows in range(1, 10):
        for columns in range(1, 10):
            x = torch.randn(1 + columns % 2, rows, columns, 24)
            (out,) = session.run(None, {name: x.numpy()})
            assert_same(torch.from_numpy(out), eager(x).detach())
"""

SMALL_VOLO = """
from outlook_common import VOLOConfig

volo = outlook_torch.VOLO(
    VOLOConfig(
        layers=(1, 1), img_size=32, patch_size=4, num_classes=7, stem_hidden_dim=6, embed_dims=(12, 24),
        num_heads=(2, 4), downsamples=(True, False), outlook_attention=(True, False),
    )
).eval()
images = torch.randn(2, 3, 32, 32)
"""

EXPORT_OF_A_MODEL = (
    SMALL_VOLO
    + """
program = torch.export.export(volo, (images,), dynamic_shapes=({0: Dim("batch")},))
for batch in (2, 5):
    images = torch.randn(batch, 3, 32, 32)
    assert_same(program.module()(images), volo(images))
"""
)

IMAGES_OF_ANY_SIZE = (
    SMALL_VOLO.replace("VOLOConfig(", "VOLOConfig(dynamic_img_size=True, ")
    + """
sizes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
program = torch.export.export(volo, (torch.randn(2, 3, 48, 40),), dynamic_shapes=(sizes,)).module()
compiled = torch.compile(volo, dynamic=True, fullgraph=True, backend="eager")
with torch.no_grad():
    for batch, rows, columns in ((2, 48, 40), (3, 64, 56), (2, 32, 32), (2, 40, 96)):
        images = torch.randn(batch, 3, rows, columns)
        assert_same(program(images), volo(images))
        assert_same(compiled(images), volo(images))
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert graphs == 1, f"{graphs} graphs"
"""
)

TRACE = (
    SMALL_VOLO
    + """
traced = torch.jit.trace(volo, images)
for batch in (2, 5):
    images = torch.randn(batch, 3, 32, 32)
    assert_same(traced(images), volo(images))
"""
)

# A map that is large enough for what is fastest in eager mode.
TRACE_OF_A_LAYER_IN_A_FILE = """
import io

eager = layer().eval()
x = torch.randn(2, 28, 28, 24)
file = io.BytesIO()
torch.jit.save(torch.jit.trace(eager, x), file)
file.seek(0)
traced = torch.jit.load(file)
for batch in (2, 5):
    x = torch.randn(batch, 28, 28, 24)
    assert_same(traced(x), eager(x))
"""


# Where sizes are symbols, PyTorch's cache of what each operation returns takes half of the time, and finds little.
NO_CACHE = "torch._dynamo.config.fake_tensor_cache_enabled = False\n"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    started = Forks()
    yield started
    started.close()


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(FORWARD_WITHOUT_GRADIENTS, id="forward-without-gradients"),
        pytest.param(TRAINING, id="training-and-autocast-without-recompiles"),
        pytest.param(SECOND_DERIVATIVES, id="second-derivatives-and-forward-mode"),
        pytest.param(EXPORT, id="export-with-a-dynamic-batch"),
        pytest.param(NO_CACHE + EXPORT_OF_ANY_SIZE, id="export-with-maps-of-any-size"),
        pytest.param(NO_CACHE + ONNX, id="ONNX-with-maps-of-any-size", marks=NEEDS_ONNX),
        pytest.param(EXPORT_OF_A_MODEL, id="export-of-a-model-with-a-dynamic-batch"),
        pytest.param(NO_CACHE + IMAGES_OF_ANY_SIZE, id="one-graph-for-images-of-any-size"),
        pytest.param(TRACE, id="torch.jit.trace-of-a-model"),
        pytest.param(TRACE_OF_A_LAYER_IN_A_FILE, id="torch.jit.trace-of-a-layer-in-a-file"),
    ],
)
def test_compiled_equals_eager(script: str, forks: Forks) -> None:
    status, printed = forks.run(PRELUDE + script)
    assert status == 0, printed[-3000:]


def test_a_crash_ends_one_script(forks: Forks) -> None:
    assert forks.run("import os; os.abort()")[0] < 0
    status, printed = forks.run("1 / 0")
    assert status == 1
    assert "ZeroDivisionError" in printed
    assert forks.run("import sys; print('torch' in sys.modules)") == (0, "True\n")
