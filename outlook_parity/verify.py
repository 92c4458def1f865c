"""`verify`: do two twins compute the same thing? Float64 to rounding, lower precisions to the same rounding noise."""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from outlook_common.extras import require
from outlook_parity import compare
from outlook_parity.compare import DTYPES, Tensors
from outlook_parity.report import Check, Report

if TYPE_CHECKING:
    from outlook_parity.trace import Request, Twin

TRUTH = "float64"
DEVICES = ("cpu", "gpu", "tpu")

# Which pass over a model gives what each level compares.
LEVELS = {"forward": "evaluation", "gradients": "evaluation", "training": "training"}
PLANNED_LEVELS = ("layers",)
STEPS = 3

Progress = Callable[[str, int, int], None]


def verify(
    torch_model: Any,
    jax_model: Any,
    inputs: np.ndarray,
    *,
    levels: Sequence[str] = tuple(LEVELS),
    dtypes: Sequence[str] = (TRUTH, "float32"),
    training_dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Report:
    """Compare two twins that hold the same weights.

    In float64, on the CPU, their weights must be equal, and outputs and gradients agree to rounding. In each lower
    precision, on `device`, each twin's error against the float64 truth must be within a small factor of the other's.
    Both run on recast copies, in eval mode but for the training steps, where nothing is dropped: the models, their
    modes and all global settings stay as they are.

    Args:
        torch_model: a `torch.nn.Module` with a `config` that `table_for` knows.
        jax_model: its twin, an `nnx.Module`.
        inputs: what both are called with, channels last; NumPy, or anything it reads. It must vary along each of its
            axes. Images for a VOLO go to PyTorch with the channels first, as it takes them.
        levels: "forward" (the output), "gradients" (of the sum of output times a random cotangent, with respect to
            the input and every parameter), "training" (losses, and every parameter and buffer after the last step, of
            SGD with momentum and of AdamW).
        dtypes: of "float64", "float32", "bfloat16", "float16".
        training_dtypes: those of `dtypes` to train in, which takes the longest; None for all.
        device: "cpu", "gpu" or "tpu", for the lower precisions; PyTorch's part of a TPU run is on the CPU.
        seed: of the cotangent and of what is trained on.
        steps: of training, with each optimizer.
        progress: called before each run and once after the last, with what runs next, how many runs are done, and
            how many there are.

    Returns:
        The report. Its verdict is "not-run" if the device is absent or the inputs can tell nothing. NaN, Inf, missing
        tensors and empty comparisons never pass.

    Raises:
        ValueError: a level, dtype or device is unknown, or none is given; or there are no training steps.
        NotImplementedError: a level is not built yet.
        TypeError: the inputs are not floating-point numbers, a model returns something else than one array, or has
            no configuration that is known.
        ImportError: PyTorch or JAX is not installed.
    """
    _check_request(levels, dtypes, training_dtypes, device, steps)
    for module, extra in (("torch", "torch"), ("jax", "jax"), ("flax", "jax"), ("optax", "parity")):
        require(module, extra=extra, needed_by="outlook_parity.verify")
    from outlook_parity import trace

    inputs = np.asarray(inputs)
    if inputs.dtype not in DTYPES.values():
        raise TypeError(f"inputs must be floating-point numbers ({', '.join(DTYPES)}), got {inputs.dtype}")
    inputs = inputs.astype(np.float64)
    reason = compare.refusal(inputs) or trace.device_absence(device)
    if reason:
        return Report("not-run", reason=reason, environment=_versions())

    torch_twin, jax_twin = trace.twins(torch_model, jax_model)
    trained = dtypes if training_dtypes is None else training_dtypes
    asked = [(level, dtype) for dtype in dtypes for level in levels if level != "training" or dtype in trained]
    passes = dict.fromkeys((dtype, LEVELS[level]) for level, dtype in asked)
    report_step = _steps(progress, total=sum(len(_runs(dtype)) for dtype, _ in passes))

    checks = compare.compare_weights(torch_twin.weights(), jax_twin.weights(), expected=trace.weight_names(torch_model))
    for dtype, which in passes:
        here = [level for level in levels if LEVELS[level] == which]
        run = _Pass(which, here, (torch_twin, jax_twin), partial(trace.Request, inputs, seed=seed, rounded_to=dtype))
        for name, run_dtype in _runs(dtype):
            report_step(f"{which}: {name} in {run_dtype}")
            checks += run.compute(name, run_dtype, device="cpu" if run_dtype == TRUTH else device, steps=steps)
        rows = run.compare(dtype, inputs.shape)
        if any(map(compare.may_be_a_jump, rows)):
            report_step(f"{which}: what rounding can do", again=True)
            for name, moved in (("up", compare.MOVED), ("down", -compare.MOVED)):
                run.compute(name, TRUTH, device="cpu", steps=steps, moved=moved)
            rows = run.compare(dtype, inputs.shape)
        checks += rows
    report_step("")

    verdict, reason = compare.judge(checks, [("weights", "as given"), *asked])
    return Report(
        verdict,
        checks=tuple(checks),
        reason=reason,
        **_first_wrong_weight(checks),
        environment=_versions() | trace.device_names(device),
    )


def _evaluate(twin: "Twin", request: "Request") -> tuple[dict[str, Tensors], str]:
    trace = twin.run(request)
    return {"forward": {"output": trace.output}, "gradients": trace.gradients}, trace.output_dtype


def _train(twin: "Twin", request: "Request") -> tuple[dict[str, Tensors], str]:
    return {"training": twin.train(request)}, request.dtype


# What a pass gives per level, and the dtype it was computed in.
PASSES: dict[str, Callable[["Twin", "Request"], tuple[dict[str, Tensors], str]]] = {
    "evaluation": _evaluate,
    "training": _train,
}


class _Pass:
    """One pass over both twins in one dtype, and what it gave: per level and twin."""

    def __init__(
        self, which: str, levels: Sequence[str], twins: tuple["Twin", "Twin"], request: "Callable[..., Request]"
    ) -> None:
        self._which, self._twins, self._request = which, twins, request
        self.traced: dict[str, dict[str, Tensors]] = {level: {} for level in levels}

    def compute(self, name: str, dtype: str, **settings: Any) -> list[Check]:
        """Let a twin compute; "truth", "up" and "down" are PyTorch's. Return a row if the dtype is another one."""
        twin = self._twins[name == "jax"]
        results, given = PASSES[self._which](twin, self._request(dtype=dtype, **settings))
        for level, traced in self.traced.items():
            traced[name] = results[level]
        return compare.compare_dtype(name, dtype, given)

    def compare(self, dtype: str, shape: Sequence[int]) -> list[Check]:
        """Return the rows of all levels; `shape` is the input's."""
        return [
            check
            for level, traced in self.traced.items()
            for check in compare.compare_level(level, dtype, traced, shape)
        ]


def _runs(dtype: str) -> list[tuple[str, str]]:
    """Return what to run to judge one dtype, as (what, dtype); the truth is PyTorch's, at the same rounded values."""
    twins = [("torch", dtype), ("jax", dtype)]
    return twins if dtype == TRUTH else [*twins, ("truth", TRUTH)]


def _check_request(
    levels: Sequence[str], dtypes: Sequence[str], training_dtypes: Sequence[str] | None, device: str, steps: int
) -> None:
    for dtype in training_dtypes or ():
        if dtype not in dtypes:
            raise ValueError(f"training_dtypes has {dtype!r}, which is not among dtypes: {', '.join(dtypes)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for level in levels:
        if level in PLANNED_LEVELS:
            raise NotImplementedError(f"level {level!r} is not built yet; these are: {', '.join(LEVELS)}")
    for what, asked, known in (("level", levels, LEVELS), ("dtype", dtypes, DTYPES), ("device", [device], DEVICES)):
        if not asked or isinstance(asked, str):
            raise ValueError(f"{what}s must be a sequence of at least one of {', '.join(known)}, got {asked!r}")
        for name in asked:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def _steps(progress: Progress | None, *, total: int) -> Callable[..., None]:
    done = count()

    def step(what: str, *, again: bool = False) -> None:
        nonlocal total
        if again:
            total += 1
        if progress is not None:
            progress(what, next(done), total)

    return step


def _first_wrong_weight(checks: Sequence[Check]) -> dict[str, str]:
    """Return the divergence and its cause where a weight is to blame: other causes cannot be told yet."""
    for check in checks:
        if check.level == "weights" and check.verdict == "mismatch":
            how = check.note or f"differs by {check.measured:.1e} of its largest"
            return {"first_divergence": check.name.rpartition(".")[0], "cause": f"weight {check.name}: {how}"}
    return {}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("numpy", "torch", "jax", "jaxlib", "flax")}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}
