"""Run one twin and write what it computes to a trace file; the other framework is not imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from outlook_common.arrays import is_floating
from outlook_common.extras import require
from outlook_parity.compare.tensors import PERTURBATION
from outlook_parity.compare.tensors import refusal as refusal_of_inputs
from outlook_parity.core.check import Tensors
from outlook_parity.core.environment import versions
from outlook_parity.core.errors import user_code_errors
from outlook_parity.core.plan import Progress, run_counter
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.recorder import Recorder
from outlook_parity.core.request import DEVICES, Request, positions_and_size, round_to
from outlook_parity.core.runner import Runner
from outlook_parity.core.stored import Computed
from outlook_parity.models.builtin import FRAMEWORKS
from outlook_parity.trace.build import Source, TracedTwin, build, load
from outlook_parity.trace.file import Header, TraceFile, digest, write


@dataclass(frozen=True)
class TraceRequest:
    """What to run and to write.

    Attributes:
        framework: "torch" or "jax".
        dtype: the precision of the computation.
        rounded_to: the precision that inputs and weights are rounded to first.
        device: "cpu", "gpu" or "tpu".
        seed: of the cotangent.
        gradients: write gradients too.
        modules: write inputs and outputs of every module.
    """

    framework: str
    dtype: str
    rounded_to: str
    device: str
    seed: int
    gradients: bool
    modules: bool


def record(
    request: TraceRequest,
    source: Source,
    out: Path,
    on_note: Callable[[str], None],
    progress: Progress | None = None,
) -> str | None:
    """Run a twin and write its trace.

    Args:
        request: what to run.
        source: the model: of this package, or a user's.
        out: the file to write.
        on_note: called before the model runs, with the weights without counterpart, if there are some.
        progress: called before each step, and after the last.

    Returns:
        None; or why the twin cannot run here (no such device, no TF32), and then nothing is written.

    Raises:
        ValueError: a framework, dtype, device or model is unknown, the inputs cannot tell twins apart, or no weight has
            a counterpart.
        ImportError: the framework is not installed.
        OSError: a file cannot be read or written.
    """
    _check(request)
    require(*FRAMEWORKS[request.framework], needed_by="outlook trace")
    loaded = load(request.framework, source)
    if reason := refusal_of_inputs(loaded.inputs):
        raise ValueError(f"these inputs cannot tell twins apart: {reason}")
    absence, products = _SETTINGS[request.framework]()
    if reason := absence(request.device, request.dtype):
        return reason
    twin = build(request.framework, source, loaded)
    if twin.note is not None:
        on_note(twin.note)
    step = run_counter(progress, _steps(request))
    trace = _run(request, twin, loaded.inputs, products(request.dtype), step)
    step(f"writing {out.name}")
    write(out, trace)
    step("")
    return None


def _check(request: TraceRequest) -> None:
    """Raise a ValueError if a name is unknown."""
    for what, name, known in (
        ("framework", request.framework, _SETTINGS),
        ("dtype", request.dtype, PRECISIONS),
        ("dtype", request.rounded_to, PRECISIONS),
        ("device", request.device, DEVICES),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def _needs_jumps(request: TraceRequest) -> bool:
    """Whether the trace says how far rounding changes gradients.

    Of two twins in float64 PyTorch's are enough; a truth stands alone.
    """
    stands_for_both = request.framework == "torch" or request.rounded_to != TRUTH
    return request.gradients and request.dtype == TRUTH and stands_for_both


def _steps(request: TraceRequest) -> int:
    """Return how many steps a trace takes: the run, gradients of perturbed inputs, modules, writing."""
    return 2 + _needs_jumps(request) + request.modules


def _run(
    request: TraceRequest,
    twin: TracedTwin,
    inputs: dict[str, np.ndarray],
    products: str,
    step: Callable[..., None],
) -> TraceFile:
    """Run the twin, and once more to record its modules if they are asked for."""
    run, recorder = (
        Request(inputs, request.dtype, request.device, request.seed, request.rounded_to, keywords=twin.keywords),
        Recorder(),
    )
    with user_code_errors(request.framework, {name: array.shape for name, array in inputs.items()}):
        step(f"{request.framework} in {request.dtype}")
        result = twin.runner.run(run, gradients=request.gradients)
        jumps: Tensors = {}
        if _needs_jumps(request):
            step("how far rounding changes gradients")
            jumps = _jumps(twin.runner, run)
        if request.modules:
            step("module by module")
            twin.runner.watch(run, recorder)
    header = Header(
        framework=request.framework,
        dtype=request.dtype,
        rounded_to=request.rounded_to,
        device=request.device,
        seed=request.seed,
        inputs=_digests(inputs, request.rounded_to),
        weights=_digests(twin.runner.weights(), request.rounded_to),
        summed=positions_and_size(inputs),
        environment={**versions(), "device": request.device, "products": products},
        leaves=twin.leaves,
        modules=twin.modules,
        output_dtypes=dict(result.dtypes),
        constants={path or "": sorted(names) for path, names in twin.runner.truth.constants.items()},
    )
    return TraceFile(header, result.outputs, result.gradients, recorder.events, jumps)


def _jumps(runner: Runner, request: Request) -> Tensors:
    """Return how far rounding can change the gradients, as `verify` measures it."""
    up, down = (runner.run(replace(request, perturbed=units)).gradients for units in (PERTURBATION, -PERTURBATION))
    return Computed({name: partial(_difference, up, down, name) for name in up})


def _difference(up: Tensors, down: Tensors, name: str) -> np.ndarray:
    return np.asarray(up[name] - down[name])


def _digests(arrays: Mapping[str, np.ndarray], rounded_to: str) -> dict[str, str]:
    return {
        name: digest(round_to(array, rounded_to) if is_floating(array) else array) for name, array in arrays.items()
    }


# Why a device or a precision is absent, None if it is there; and how products are computed in a precision.
Settings = tuple[Callable[[str, str], str | None], Callable[[str], str]]


def _torch_settings() -> Settings:
    from outlook_parity.backends.torch.settings import torch_absence, torch_products, torch_products_absence

    return lambda device, dtype: torch_absence(device) or torch_products_absence(device, dtype), torch_products


def _jax_settings() -> Settings:
    from outlook_parity.backends.jax.settings import jax_absence, jax_products, jax_products_absence

    return lambda device, dtype: jax_absence(device) or jax_products_absence(device, dtype), jax_products


_SETTINGS: dict[str, Callable[[], Settings]] = {"torch": _torch_settings, "jax": _jax_settings}
