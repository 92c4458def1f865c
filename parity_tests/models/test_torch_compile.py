"""The PyTorch twin compiled, exported and traced; in a process of its own, for compilers can crash."""

import subprocess
import sys
import textwrap

import pytest

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

EXPORT = """
eager = layer(stride=2).eval()
x = torch.randn(2, 28, 28, 24)
program = torch.export.export(eager, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
for batch in (2, 5):
    x = torch.randn(batch, 28, 28, 24)
    assert_same(program.module()(x), eager(x))
"""

EXPORT_OF_ANY_SIZE = """
eager = layer().eval()
sizes = {0: Dim("batch"), 1: Dim("rows", min=2), 2: Dim("columns", min=2)}
program = torch.export.export(eager, (torch.randn(2, 8, 8, 24),), dynamic_shapes=(sizes,))
for shape in ((2, 8, 8, 24), (3, 7, 12, 24)):
    x = torch.randn(shape)
    assert_same(program.module()(x), eager(x))
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


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(FORWARD_WITHOUT_GRADIENTS, id="forward-without-gradients"),
        pytest.param(TRAINING, id="training-and-autocast-without-recompiles"),
        pytest.param(EXPORT, id="export-with-a-dynamic-batch"),
        pytest.param(EXPORT_OF_ANY_SIZE, id="export-with-maps-of-any-size"),
        pytest.param(EXPORT_OF_A_MODEL, id="export-of-a-model-with-a-dynamic-batch"),
        pytest.param(TRACE, id="torch.jit.trace-of-a-model"),
        pytest.param(TRACE_OF_A_LAYER_IN_A_FILE, id="torch.jit.trace-of-a-layer-in-a-file"),
    ],
)
def test_compiled_equals_eager(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PRELUDE + script)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
