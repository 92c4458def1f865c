"""`verify`: do two twins compute the same thing? Float64 to rounding, lower precisions to the same rounding noise."""

import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from outlook_common.extras import require
from outlook_parity.compare import tensors as compare
from outlook_parity.compare.determinism import notes_on
from outlook_parity.compare.modules import MODEL
from outlook_parity.core.attributes import QUIET
from outlook_parity.core.check import Check
from outlook_parity.core.precision import PRECISIONS, TRUTH
from outlook_parity.core.request import inputs_of
from outlook_parity.diagnose import causes
from outlook_parity.diagnose.precision import notes_on_products
from outlook_parity.mapping.user import NameMap
from outlook_parity.report.report import Report
from outlook_parity.session import LEVELS, Progress, Session, runs_of, steps_of

DEVICES = ("cpu", "gpu", "tpu")

STEPS = 3


def verify(
    torch_model: Any,
    jax_model: Any,
    inputs: Any,
    *,
    levels: Sequence[str] | None = None,
    dtypes: Sequence[str] = (TRUTH, "float32"),
    training_dtypes: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    names: NameMap | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare two twins that hold the same weights.

    In float64, on the CPU, their weights must be equal, and outputs and gradients agree to rounding. In each lower
    precision, on `device`, each twin's error against the float64 truth must be within a small factor of the other's.
    Both run on recast copies, in eval mode but for the training steps, where masks that both share decide what is
    dropped: the models, their modes and all global settings stay as they are.

    Args:
        torch_model: a `torch.nn.Module`, or a function.
        jax_model: its twin: an `nnx.Module`, a pair of a Linen module and its variables, or a function.
        inputs: what both are called with, as JAX takes it (maps channels last): an array (NumPy, or anything it reads),
            a sequence of them, or a mapping from names, which are the report's, both in the order of the arguments.
            Floating-point numbers must vary along each of their axes; integers and booleans (ids, masks) are neither
            rounded nor differentiated. Images for a VOLO go to PyTorch with the channels first, as it takes them.
        levels: "forward" (the outputs: of tuples, lists, mappings and dataclasses each leaf by its path), "layers"
            (what every module gives, on its own input and on the other twin's), "gradients" (of the sum of outputs
            times random cotangents, with respect to inputs and every parameter), "training" (losses, and every
            parameter, buffer and state of the optimizer after the last step, of SGD with momentum and of AdamW). None
            for all that the pair allows; what was left out is among the notes.
        dtypes: the precisions, of "float64", "float32", "tf32", "bfloat16", "float16". In "tf32" numbers are float32,
            and products may round what they multiply to TF32, which some GPUs do; elsewhere it does not run.
        training_dtypes: those of `dtypes` to train in, which takes the longest; None for all.
        device: "cpu", "gpu" or "tpu", for the lower precisions; PyTorch's part of a TPU run is on the CPU.
        seed: of the cotangent and of what is trained on.
        steps: of training, with each optimizer.
        names: what corresponds to what in models that are not of this package, where Flax's usual names do not say it,
            and in which order PyTorch takes the axes of the inputs.
        progress: called before each run and once after the last, with what runs next, how many runs are done, and
            how many there are.

    Returns:
        The report. Its verdict is "not-run" if the device is absent, or has no TF32 and that was asked for, or if the
        inputs can tell nothing. NaN, Inf, missing tensors and empty comparisons never pass.

    Raises:
        ValueError: a level, dtype or device is unknown, or none is given, or a level cannot be had of plain functions;
            or there are no training steps.
        TypeError: the inputs are no numbers, or a model is none, or returns something that holds no arrays.
        ImportError: PyTorch or JAX is not installed.
    """
    _check_request(levels, dtypes, training_dtypes, device, steps)
    for module, extra in (("torch", "torch"), ("jax", "jax"), ("flax", "jax"), ("optax", "parity")):
        require(module, extra=extra, needed_by="outlook_parity.verify")
    from outlook_parity.pair import device_absence, device_names, make_pair, products_absence, products_of

    inputs = inputs_of(inputs)
    reason = compare.refusal(inputs) or device_absence(device)
    if reason:
        return Report("not-run", reason=reason, environment=versions())

    pair = make_pair(torch_model, jax_model, inputs, names or NameMap())
    notes = []
    if levels is None:
        levels = [level for level in LEVELS if level not in pair.refused]
        notes = [f"the level {level!r} was left out: {why}" for level, why in pair.refused.items()]
    if impossible := [f"{level!r} ({pair.refused[level]})" for level in levels if level in pair.refused]:
        raise ValueError(f"levels that cannot be had of this pair: {', '.join(impossible)}")

    levels = [level for level in LEVELS if level in levels]  # each once, in whatever order they are asked for
    trained = dtypes if training_dtypes is None else training_dtypes
    pairs_asked = ((level, dtype) for dtype in dtypes for level in levels if level != "training" or dtype in trained)
    asked = list(dict.fromkeys(pairs_asked))
    absent = {dtype: why for dtype in dtypes if (why := products_absence(device, dtype))}
    passes = dict.fromkeys((dtype, LEVELS[level]) for level, dtype in asked if dtype not in absent)
    step = steps_of(progress, total=sum(runs_of(which, dtype) for dtype, which in passes))
    session = Session(pair, inputs, levels, device=device, seed=seed, steps=steps, step=step)
    session.checks += compare.compare_weights(session.weights["torch"], session.weights["jax"], pair.names.expected)
    for dtype, which in passes:
        session.run(which, dtype)
    session.checks += [
        Check(level, dtype, MODEL, "not-run", bound=0.0, note=absent[dtype])
        for level, dtype in asked
        if dtype in absent
    ]
    step("")

    verdict, reason = compare.judge(
        session.checks, [*([("weights", "as given")] if pair.names.expected else []), *asked]
    )
    said = session.differences()
    found = session.explanation(said) if verdict == "mismatch" else causes.Explanation(None, None)
    return Report(
        verdict,
        checks=tuple(session.checks),
        reason=reason,
        first_divergence=found.path,
        cause=found.cause,
        differences=tuple(str(difference) for difference in said if difference.fact not in QUIET),
        notes=(*notes_on(session.self_noise), *notes_on_products(session.checks), *notes),
        self_noise=tuple(session.self_noise),
        curves=session.curves,
        environment=versions() | device_names(device) | products_of(dtypes),
    )


def _check_request(
    levels: Sequence[str] | None, dtypes: Sequence[str], training_dtypes: Sequence[str] | None, device: str, steps: int
) -> None:
    for dtype in training_dtypes or ():
        if dtype not in dtypes:
            raise ValueError(f"training_dtypes has {dtype!r}, which is not among dtypes: {', '.join(dtypes)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for what, asked, known in (
        ("level", tuple(LEVELS) if levels is None else levels, LEVELS),
        ("dtype", dtypes, PRECISIONS),
        ("device", [device], DEVICES),
    ):
        if not asked or isinstance(asked, str):
            raise ValueError(f"{what}s must be a sequence of at least one of {', '.join(known)}, got {asked!r}")
        for name in asked:
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def load_torch_weights(jax_model: Any, torch_model: Any, names: NameMap | None = None) -> Any:
    """Give a JAX model the weights of its PyTorch twin; see `outlook_parity.pair.load_torch_weights`."""
    from outlook_parity import pair

    return pair.load_torch_weights(jax_model, torch_model, names)


def versions() -> dict[str, str]:
    """Return what everything was computed with."""
    packages = {}
    for name in ("numpy", "torch", "jax", "jaxlib", "flax"):
        with suppress(PackageNotFoundError):
            # A package that is imported says of which build it is too: 2.11.0+cu130.
            packages[name] = getattr(sys.modules.get(name), "__version__", None) or version(name)
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}
