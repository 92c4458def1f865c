"""`implementation="triton"`: its suite in a process of its own, what the kernels compile to, and refusals."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from outlook_common.op_cases import BY_NAME, Case
from outlook_torch.ops.triton import operators as implementation
from parity_tests.support.runners import Device, draw, to_torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="not run: there is no Triton for this platform")

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "parity_tests" / "support" / "triton_suite.py"
CASE = Case("refused", 3, 4, 1, 2, B=1)
REAL = ("volo_d1", "seed_512")


def run_suite(kind: str, marker: str) -> None:
    # Whether kernels are interpreted is settled when Triton is imported, which compilers do behind one's back.
    interpreter = {"TRITON_INTERPRET": "0" if kind == "gpu" else "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(SUITE), "-q", "-m", marker, "-p", "no:cacheprovider", "--device", kind],
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name} | interpreter,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def test_the_suite_passes(request: pytest.FixtureRequest, device: object) -> None:
    run_suite(request.config.getoption("--device"), "not slow")


@pytest.mark.slow  # Triton's interpreter takes up to a minute for a map of real size
def test_the_slow_suite_passes(request: pytest.FixtureRequest, device: object) -> None:
    run_suite(request.config.getoption("--device"), "slow")


# Without the shape checks of the tests, which torch.compile cannot trace.
FULL_GRAPH = """
import torch
import outlook_torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
value = torch.randn(2, 3, 4, 2, 3, device=device, requires_grad=True)
logits = torch.randn(2, 3, 2, 2, 3, 3, device=device, requires_grad=True)
cotangent = torch.randn_like(value)
graphs = []

def attend(value, logits):
    return outlook_torch.outlook_attention(
        value, logits, kernel_size=(1, 3), stride=(1, 2), padding=(0, 1), implementation="triton"
    )

def keep(graph, inputs):
    graphs.append(graph.code)
    return make_boxed_func(graph.forward)

out = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(value, logits)
expected = attend(value, logits)
assert torch.equal(out, expected) and out.abs().max() > 0
ours, theirs = (torch.autograd.grad(x, (value, logits), cotangent) for x in (out, expected))
assert all(map(torch.equal, ours, theirs)) and all(x.abs().max() > 0 for x in ours)
forward, backward = graphs
assert "outlook_attention.attend.default" in forward and "outlook_attention.attend_backward.default" in backward
"""


def test_compiled_without_a_graph_break_it_gives_the_same_by_the_same_kernels(device: Device) -> None:
    interpreter = {"TRITON_INTERPRET": "1" if device.torch.type == "cpu" else "0"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_GRAPH], env=os.environ | interpreter, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


COMPILE = """
import json
import sys
import torch
from benchmarks.triton_sass import compile_kernel, launches
from outlook_common.op_cases import BY_NAME

name, dtype, capability, mask = sys.argv[1:]
found = {}
for launch in launches(BY_NAME[name], getattr(torch, dtype), dropout=mask == "masked"):
    sass = compile_kernel(launch.kernel, launch.arguments, int(capability))
    opcodes = {opcode.split(".")[0] for opcode in sass.opcodes}
    found[launch.kernel.fn.__name__] = {"spills": sass.spills, "shared": sass.shared, "opcodes": sorted(opcodes)}
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "mask"),
    [
        ("volo_d1", "bfloat16", "90", "masked"),
        # Some ten seconds for each kernel, and no more than other numbers in the same code.
        *(
            pytest.param(*arguments, marks=pytest.mark.slow)
            for arguments in (
                *((name, "float32", "90", "whole") for name in BY_NAME),
                *((name, "bfloat16", capability, "masked") for name in REAL for capability in ("80", "90", "100")),
                *((name, "float16", "80", "whole") for name in REAL),
            )
        ),
    ],
)
def test_the_kernels_compile_for_gpus_without_spills_and_atomics(
    name: str, dtype: str, capability: str, mask: str
) -> None:
    """Without atomics every run gives the same bits; without barriers and shared memory no thread waits for another."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name, dtype, capability, mask],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    unrolled = BY_NAME[name].grid.places <= 9
    assert set(kernels) == (
        {"attend_kernel", "gradient_kernel", "transpose_kernel"}
        if unrolled
        else {"rolled_mix_kernel", "rolled_gradient_kernel"}
    )
    for kernel, found in kernels.items():
        assert found["spills"] == 0, kernel
        assert not {"ATOM", "ATOMG", "RED"} & set(found["opcodes"]), kernel
        assert "STG" in found["opcodes"], kernel
        if unrolled:
            assert found["shared"] == 0, kernel
            assert not {"BAR", "LDS", "STS"} & set(found["opcodes"]), kernel


def refusal(case: Case = CASE, *, device: str = "cpu", mask: torch.Tensor | None = None) -> str | None:
    operands = draw(case, seed=1)
    value, logits = to_torch(operands.value).to(device), to_torch(operands.logits)
    return implementation.refusal(value, logits, mask, case.grid)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "INTERPRETED", True)


def test_operands_on_the_cpu_are_refused_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "INTERPRETED", False)
    assert "value is on cpu; Triton needs a CUDA device, or TRITON_INTERPRET=1" in (refusal() or "")


@pytest.mark.usefixtures("interpreted")
def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal() is None
    assert "value on meta, logits on cpu" in (refusal(device="meta") or "")
    mask = torch.ones(CASE.logits_shape, requires_grad=True)
    assert "dropout_mask requires a gradient" in (refusal(mask=mask) or "")
    large = Case("large", 1, 1, 1, 1, kernel_size=47, padding=23, B=1)
    assert "kernel_size=(47, 47) has 2209 places; 2048 are the most" in (refusal(large) or "")
    monkeypatch.setattr(implementation, "INSTALLED", False)
    assert "Triton is not installed" in (refusal() or "")
